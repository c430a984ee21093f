"""The small checkpoint that comes with the project: every program finds it where it lies, and says so if it does not.

A checkpoint of random weights stands in, of the same files.
"""

import json

import app
import push_to_hub
import pytest
import torch
from PIL import Image

from dino_projector import demo_checkpoint
from dino_projector.demo_training.flux import make_pipeline
from dino_projector.models import save_result
from flux_dino_tile import upscale
from pipeline_flux_dino_tile import PromptBranch
from tiny_models import JOINT_ATTENTION_DIM, POOLED_DIM, ROOT, tiny_pipeline, tiny_transformer, tiny_vae


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """As `assemble` in dino_projector/demo_training makes it: its index names neither projector nor DINO."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    make_pipeline(tiny_vae(), tiny_transformer()).save_pretrained(folder)
    (folder / "pipeline_flux_dino_tile.py").unlink()
    prompt = PromptBranch(torch.randn(1, 7, JOINT_ATTENTION_DIM), torch.randn(1, POOLED_DIM), None, None)
    save_result(folder, tiny_pipeline(dino="dinov2_with_registers"), prompt, {})
    (folder / "training.json").unlink()
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.open(ROOT / "samples" / "photo.jpg").resize((32, 24)).save(path)
    return path


def test_without_it_programs_say_so(photo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_checkpoint, "DEMO_FOLDER", tmp_path / "nowhere")
    monkeypatch.delenv("MODEL", raising=False)
    for main, arguments, message in (
        (upscale.main, [str(photo), "--use-flux"], "--use-flux needs --model for now: no small checkpoint comes"),
        (app.main, [], "--use-flux needs --model for now: no small checkpoint comes"),
        (push_to_hub.main, ["--demo", "owner/name"], "--demo: no small checkpoint comes"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_the_command_line_enlarges_with_it_and_its_projector(demo, photo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_checkpoint, "DEMO_FOLDER", demo)
    results = []
    for strength in ("0", "1"):
        target = tmp_path / f"{strength}.png"
        options = ["--use-flux", "--scale", "2", "--device", "cpu", "--steps", "1", "--dino-strength", strength]
        assert upscale.main([str(photo), str(target), *options]) == 0
        image = Image.open(target)
        settings = json.loads(image.getexif()[305].split(" ", 2)[2])
        assert image.size == (64, 48) and settings["dino_strength"] == float(strength)
        assert str(demo) not in image.getexif()[305]
        results.append(image.tobytes())
    assert results[0] != results[1]


def test_the_page_opens_with_it(demo, monkeypatch):
    monkeypatch.setattr(demo_checkpoint, "DEMO_FOLDER", demo)
    monkeypatch.delenv("MODEL", raising=False)
    _, args = app.parse([])
    pipe = app.load_flux(args)
    assert pipe.dino_projector is not None and pipe.text_encoder is None


def test_it_can_be_published(demo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_checkpoint, "DEMO_FOLDER", demo)
    credits_file = tmp_path / "photos.md"
    credits_file.write_text("| file | author |\n|---|---|\n| a.jpg | Añe |\n")
    options = ["--license", "apache-2.0", "--credits", str(credits_file), "--dry-run"]
    assert push_to_hub.main(["--demo", "owner/small", *options]) == 0
    output = capsys.readouterr().out
    assert "model_index.json" in output and "dino_projector/config.json" in output
    assert "### What it was trained on\n\n| file | author |\n|---|---|\n| a.jpg | Añe |\n\n## Methods" in output
    assert "the files load and run in a fresh process" in output
