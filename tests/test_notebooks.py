"""The notebook: its two forms are one, and all its cells run on a CPU, with the embedded checkpoint."""

import pytest

from tiny_models import ROOT


jupytext = pytest.importorskip("jupytext")
TEXT = ROOT / "notebooks" / "enlarge_photos.py"


def test_both_forms_are_one():
    """`jupytext --sync notebooks/enlarge_photos.py` makes them so; results are not kept."""
    text, notebook = jupytext.read(TEXT), jupytext.read(TEXT.with_suffix(".ipynb"))
    cells, others = ([(cell.cell_type, cell.source) for cell in form.cells] for form in (text, notebook))
    assert cells == others
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.fixture(scope="module")
def executed():
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = jupytext.read(TEXT)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(TEXT.parent)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        client.execute()
    return {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def outputs_of(executed, text: str) -> list:
    (outputs,) = (outputs for source, outputs in executed.items() if text in source)
    return outputs


def test_the_small_model_enlarges(executed):
    printed = "".join(output.text for output in outputs_of(executed, "plan_tiles") if output.get("name") == "stdout")
    assert "tiles of" in printed
    (slider,) = outputs_of(executed, "def compare(")
    assert slider.data["text/html"].count("data:image/jpeg;base64,") == 2


def test_strengths_are_shown(executed):
    assert [output for output in outputs_of(executed, "sweep =") if "image/png" in output.get("data", {})]


def test_flux_is_left_out_without_a_gpu(executed):
    printed = "".join(output.get("text", "") for output in outputs_of(executed, "choose_recipe("))
    assert "the cells for FLUX.1 do nothing" in printed


@pytest.mark.parametrize(
    ("card", "gpu_gib", "main_gib", "recipe"),
    [("A100", 39.6, 83, "gpu"), ("L4", 22.2, 53, "group"), ("T4", 14.6, 12.7, "nf4"), ("T4", 14.6, 51, "group")],
)
def test_recipe(card, gpu_gib, main_gib, recipe):
    """Of the cards and machines that Colab lends."""
    (cell,) = (cell.source for cell in jupytext.read(TEXT).cells if "def choose_recipe" in cell.source)
    names: dict = {}
    exec(cell.split("main_gib =")[0], names)
    assert names["choose_recipe"](gpu_gib, main_gib) == recipe
