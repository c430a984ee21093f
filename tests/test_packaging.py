"""What is built to be installed: the files of wheel and sdist, the version, and the installed command."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import flux_dino_tile
from tiny_models import ROOT, save_tiny_pipeline


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
    metadata = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == tracked(*PACKAGES) | metadata


def test_one_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"flux_dino_tile-{VERSION}.dist-info/METADATA").decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    assert re.search(rf"^## .*\b{re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    places = [path for path in tracked("*.py", "*.toml") if f'version__ = "{VERSION}"' in (ROOT / path).read_text()]
    assert places == ["flux_dino_tile/__init__.py"]


def test_the_installed_command_enlarges(wheel, tmp_path):
    """In an environment that has the dependencies and this project's wheel, but not its folder."""
    environment = tmp_path / "venv"
    venv.create(environment)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    # The paths alone: an editable install of this project's folder in there does not come along.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    save_tiny_pipeline(tmp_path / "tiny")
    photo = tmp_path / "photo.png"
    Image.open(ROOT / "samples" / "photo.jpg").resize((32, 24)).save(photo)

    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *arguments: str) -> str:
        command = [str(environment / "bin" / program), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout

    assert "64x48 px" in run("flux-dino-tile", "photo.png", "small.png", "--scale", "2")
    assert f"flux-dino-tile {VERSION} " in Image.open(tmp_path / "small.png").getexif()[305]
    run("flux-dino-tile", "photo.png", "flux.png", "--scale", "2", "--use-flux", "--model", "tiny", "--steps", "1")
    assert Image.open(tmp_path / "flux.png").size == (64, 48)
    code = "import pipeline_flux_dino_tile, flux_dino_tile.upscale as module; print(module.__file__)"
    assert run("python", "-c", code).startswith(str(site))
