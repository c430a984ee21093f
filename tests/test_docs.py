"""README and the pages in docs/ name what is there: files, headings, options, tests, arguments and names in code."""

import ast
import importlib
import inspect
import re

import pytest

from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = ("flux_dino_tile", "dino_projector", "scripts", "tests", "docs", "notebooks", "samples")
# What a command of a page makes, a file of a published repository, and one of a reader's.
NOT_OURS = {"samples/photo_x4_flux.jpg", "pipeline.py", "enlarge.py"}
# Options of accelerate, torchrun, pytest, tensorboard and git.
OTHER_OPTIONS = {
    "--multi_gpu",
    "--num_processes",
    "--nproc-per-node",
    "--hypothesis-show-statistics",
    "--logdir",
    "--mirror",
}
OPTION = r"(?<![\w-])--[a-zA-Z][\w-]*"
# What takes the arguments of a call and some of its own, and the module that has it.
WRAPPERS = {"upscale_with_diagnosis": "diagnostics", "preview": "preview", "redo": "redo"}
PROGRAMS = [path.stem for path in (ROOT / "scripts").glob("*.py")]


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_of(program: str) -> set[str]:
    """What the program's source adds to its parser; app.py takes options of upscale.py too."""
    files = [ROOT / "scripts" / f"{program}.py"]
    if program in ("upscale", "app"):
        files.append(ROOT / "flux_dino_tile" / "options.py")
    added = set(re.findall(r'"(--[\w-]+)"', "".join(file.read_text() for file in files)))
    return added | {option.replace("--", "--no-") for option in added} | {"--help"}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", TEXTS)
def test_files_are_there(page):
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./]*\w\w", TEXTS[page]):
        assert name in NOT_OURS or (ROOT / name).exists(), name
    known = {path.name for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py")}
    known |= {path.name for folder in FOLDERS for path in (ROOT / folder).glob("*/*.py")}
    assert set(re.findall(r"(?<![\w<>*-])\w+\.py\b", TEXTS[page])) <= known | NOT_OURS


@pytest.mark.parametrize("page", TEXTS)
def test_tests_are_there(page):
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for file, function in re.findall(r"\b(test_\w+)(?:\.py(?:::(\w+))?)?", TEXTS[page]):
        assert file in sources, file
        assert not function or f"\ndef {function}(" in sources[file], function


@pytest.mark.parametrize("page", TEXTS)
def test_options_are_there(page):
    known = OTHER_OPTIONS.union(*map(options_of, PROGRAMS))
    assert set(re.findall(OPTION, TEXTS[page])) <= known
    commands = "\n".join(blocks(TEXTS[page], "bash")).replace("\\\n", "")
    for program, arguments in re.findall(r"scripts/(\w+)\.py(.*)", commands):
        assert set(re.findall(OPTION, arguments.split("#")[0])) <= options_of(program), (program, arguments)


def python_blocks():
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page, text in TEXTS.items()
        for number, block in enumerate(blocks(text, "python", "py"))
    ]


@pytest.mark.parametrize("block", python_blocks())
def test_code_names_what_is_there(block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (*FOLDERS, "pipeline_flux_dino_tile"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pipe":
            components = inspect.signature(FluxDinoTilePipeline.__init__).parameters
            assert node.attr in components or hasattr(FluxDinoTilePipeline, node.attr), node.attr
        if isinstance(node, ast.Call):
            check_arguments(node)


def check_arguments(call: ast.Call) -> None:
    """That the keywords of a call of the pipeline, also by what wraps it, are arguments of theirs."""
    name = ast.unparse(call.func)
    given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    allowed = set(inspect.signature(FluxDinoTilePipeline.__call__).parameters)
    if name in WRAPPERS:
        wrapper = getattr(importlib.import_module(f"flux_dino_tile.{WRAPPERS[name]}"), name)
        allowed |= set(inspect.signature(wrapper).parameters)
    elif name.startswith("pipe."):
        method = getattr(FluxDinoTilePipeline, name.removeprefix("pipe."), None)
        if method is None:  # a component's
            return
        parameters = inspect.signature(method).parameters
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        allowed = set(parameters)
    elif name != "pipe" and not name.endswith(").run"):
        return
    assert given <= allowed, given - allowed
