"""The pipeline's file as diffusers' repository would take it: its lint settings, its dependencies, its entry."""

import ast
import inspect
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement

import pipeline_flux_dino_tile
from tiny_models import ROOT


FILE = ROOT / "pipeline_flux_dino_tile.py"
GUIDE = ROOT / "docs" / "community_pipeline.md"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_diffusers_lint(command):
    config = ["--no-cache", "--config", str(ROOT / "tests" / "diffusers_ruff.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *config, str(FILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def imported_packages(code: str) -> set[str]:
    """The top-level packages of all imports, also of those within functions."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.level == 0 else ".")
    return {name.split(".")[0] for name in names}


def test_imports_only_what_diffusers_brings():
    """Its core dependencies, torch's extra, and transformers, without which no FLUX pipeline loads."""
    allowed = {"diffusers", "transformers"}
    for line in requires("diffusers"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "torch"}):
            allowed.add(requirement.name.lower().replace("_", "-"))
    distributions = packages_distributions()
    for package in imported_packages(FILE.read_text()) - set(sys.stdlib_module_names):
        owners = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
        assert owners & allowed, f"{package} of {owners} is not a dependency of diffusers"


def test_the_loader_finds_one_pipeline():
    """As `custom_pipeline` demands: exactly one subclass of `DiffusionPipeline` is defined in the file."""
    classes = [
        name
        for name, value in vars(pipeline_flux_dino_tile).items()
        if isinstance(value, type)
        and issubclass(value, pipeline_flux_dino_tile.FluxImg2ImgPipeline)
        and value.__module__ == "pipeline_flux_dino_tile"
    ]
    assert classes == ["FluxDinoTilePipeline"]


def test_nothing_is_put_into_other_libraries():
    """In a fresh process: no module of diffusers or transformers gets a name of this file."""
    code = """
import sys
import diffusers, transformers, pipeline_flux_dino_tile
own = pipeline_flux_dino_tile.__name__
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("diffusers", "transformers", "torch"):
        for key, value in list(vars(module).items()):
            if getattr(value, "__module__", None) == own or value is pipeline_flux_dino_tile:
                print(name, key)
from diffusers import FluxImg2ImgPipeline
assert pipeline_flux_dino_tile.FluxDinoTilePipeline.__mro__[1] is FluxImg2ImgPipeline
print("looked at", sum(name.startswith("diffusers") for name in sys.modules) > 20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("looked at True\n", 0), done.stderr


def test_the_entry_is_a_row_of_the_table_with_its_section():
    guide = GUIDE.read_text()
    (row,) = re.findall(r"^\| FLUX.*$", guide, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 5
    title, anchor = re.fullmatch(r"\[(.+)\]\(#(.+)\)", cells[2]).groups()
    assert re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") == anchor
    assert f"### {title}\n" in guide


def test_the_entry_s_code_names_arguments_that_exist():
    """Every keyword of the example's calls."""
    code = re.search(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    parameters = inspect.signature(pipeline_flux_dino_tile.FluxDinoTilePipeline.__call__).parameters
    (call,) = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
    ]
    assert {keyword.arg for keyword in call.keywords} <= parameters.keys()
