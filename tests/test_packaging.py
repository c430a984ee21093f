"""What is built to be installed: the files of wheel and sdist, and the version."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flux_dino_tile
from tiny_models import ROOT


PACKAGES = ("pipeline_flux_dino_tile.py", "flux_dino_tile", "dino_projector")
SOURCES = (*PACKAGES, "scripts", "tests", "docs", "notebooks", "samples", "model_card.md", "CHANGELOG.md")
ALWAYS = ("README.md", "LICENSE", "pyproject.toml", ".gitignore")
VERSION = flux_dino_tile.__version__


def tracked(*paths: str) -> set[str]:
    """The project's files there, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {path for path in listing.splitlines() if (ROOT / path).is_file()}


def build(target: str, source: Path, output: Path) -> Path:
    """What `python -m build` asks the build backend for."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(output)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, as `python -m build` does it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_sdist_holds_the_sources_and_nothing_else(sdist):
    assert sdist.name == f"flux_dino_tile-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert names == tracked(*SOURCES, *ALWAYS) | {"PKG-INFO"}


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    assert wheel.name == f"flux_dino_tile-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
    info = f"flux_dino_tile-{VERSION}.dist-info"
    metadata = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == tracked(*PACKAGES) | metadata


def test_one_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"flux_dino_tile-{VERSION}.dist-info/METADATA").decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    assert re.search(rf"^## .*\b{re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    places = [path for path in tracked("*.py", "*.toml") if f'version__ = "{VERSION}"' in (ROOT / path).read_text()]
    assert places == ["flux_dino_tile/__init__.py"]
