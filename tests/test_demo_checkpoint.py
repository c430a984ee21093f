"""The embedded checkpoint: every program finds it, and it does what the project is about."""

import json
import os
import subprocess
import sys

import app
import compare
import numpy as np
import push_to_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dino_projector.demo_training import evaluate
from dino_projector.demo_training.assemble import check_sizes
from dino_projector.demo_training.evaluate import load_checkpoint, velocity_losses
from dino_projector.metrics import gradient_energy, is_monotone, psnr
from dino_projector.pictures import to_pixels
from flux_dino_tile import upscale
from flux_dino_tile.embedded import DEMO_FOLDER, EMBEDDED
from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import ROOT


@pytest.fixture(scope="module")
def pipe():
    return load_checkpoint(DEMO_FOLDER, torch.device("cpu"))


@pytest.fixture(scope="module")
def photo():
    """The middle of the sample, `(128, 128)` px, which was not trained on."""
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").crop((16, 0, 144, 128))


@pytest.fixture(scope="module")
def small(photo):
    return photo.resize((64, 64), Image.Resampling.BICUBIC)


def enlarge(pipe, small, **options) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    return pipe(image=small, upscale_factor=2, generator=generator, **options).images[0]


# ---- What it is ----------------------------------------------------------------------------------------------------


def test_it_fits_a_repository_and_names_no_folder_of_ours():
    check_sizes(DEMO_FOLDER)
    for path in DEMO_FOLDER.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())
    others = [path for path in DEMO_FOLDER.rglob("*.*") if path.suffix not in (".json", ".safetensors", ".pyc")]
    assert others == [DEMO_FOLDER / "pipeline.py"]


def test_the_generic_loader_finds_its_pipeline():
    pipe = DiffusionPipeline.from_pretrained(str(DEMO_FOLDER), trust_remote_code=True)
    pipe.load_dino_projector(DEMO_FOLDER)
    assert type(pipe) is FluxDinoTilePipeline and pipe.default_prompt_embeds is not None


def test_it_brings_its_defaults(pipe):
    config = json.loads((DEMO_FOLDER / "model_index.json").read_text())
    steps, _, start_sigma = pipe.get_default_settings(None, None, None, None, None)
    assert (steps, start_sigma) == (4, config["default_start_sigma"])
    plan = pipe.plan_tiles(1024, 1024)
    assert plan.tile_width == plan.tile_height == config["default_tile_size"]
    assert config["default_vae_residual"]


# ---- What it does --------------------------------------------------------------------------------------------------


def test_it_is_sharper_than_bicubic_and_nearly_as_true(pipe, photo, small):
    original = to_pixels(photo)
    bicubic = to_pixels(small.resize(photo.size, Image.Resampling.BICUBIC))
    enlarged = to_pixels(enlarge(pipe, small))
    energies = [float(gradient_energy(picture) / gradient_energy(original)) for picture in (bicubic, enlarged)]
    assert energies[0] < energies[1] < 1.1
    assert float(psnr(enlarged, original)) > float(psnr(bicubic, original)) - 1


def test_what_the_vae_loses_is_true_to_the_original(pipe, photo, small):
    with_residual, without = (to_pixels(enlarge(pipe, small, vae_residual=kept)) for kept in (True, False))
    original = to_pixels(photo)
    assert float(psnr(with_residual, original)) > float(psnr(without, original))


def test_the_right_tokens_lower_the_loss_and_others_raise_it(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "LOSS_CROPS", 1)
    for index, left in enumerate((0, 112)):
        photo = Image.open(ROOT / "samples" / "photo.jpg").crop((left, 180 * index, left + 128, 180 * index + 128))
        photo.resize((256, 256), Image.Resampling.BICUBIC).save(tmp_path / f"{index}.png")
    losses = {name: float(values.mean()) for name, values in velocity_losses(pipe, tmp_path, 256, 0).items()}
    assert losses["with_tokens"] < losses["without_tokens"] < losses["other_tokens"]


def test_the_strength_of_dino_changes_the_picture_the_more_the_greater_it_is(pipe, small):
    pictures = [
        np.asarray(enlarge(pipe, small, dino_conditioning_scale=strength, start_sigma=0.35), dtype=float)
        for strength in (0.0, 0.3, 0.6, 1.0)
    ]
    effects = [float(np.abs(picture - pictures[0]).mean()) for picture in pictures]
    assert is_monotone(effects) and effects[-1] > 0.5


# ---- Who finds it --------------------------------------------------------------------------------------------------


def test_the_command_line_enlarges_with_it_offline(small, tmp_path):
    small.resize((32, 32)).save(tmp_path / "photo.png")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    command = [sys.executable, ROOT / "scripts" / "upscale.py", tmp_path / "photo.png", "--scale", "4", "--use-flux"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    image = Image.open(tmp_path / "photo_x4_flux.png")
    assert image.size == (128, 128)
    settings = json.loads(image.getexif()[305].split(" ", 2)[2])
    assert settings["model"] == EMBEDDED and settings["dino_strength"] == 1.0
    assert str(ROOT) not in image.getexif()[305]


def test_the_command_line_plans_its_tiles(tmp_path, capsys):
    Image.new("RGB", (256, 256)).save(tmp_path / "photo.png")
    assert upscale.main([str(tmp_path / "photo.png"), "--use-flux", "--plan"]) == 0
    assert "tiles: 4 (2 across, 2 down) of 544x544 px" in capsys.readouterr().out


def test_the_page_opens_with_it(small, tmp_path, monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    own, settings = app.parse(["--device", "cpu", "--steps", "1"])
    page = app.Page(*app.load_flux(settings), own.max_megapixels)
    page.pipe.set_progress_bar_config(disable=True)
    small.resize((32, 32)).save(tmp_path / "photo.png")
    *_, text, path = page.enlarge(str(tmp_path / "photo.png"), 2, 1, 0.03, 0, "", tmp_path)
    assert Image.open(path).size == (64, 64) and "similarity to the photo is" in text
    pytest.importorskip("gradio")
    assert '"DINO strength (0 is off)"' in json.dumps(app.build_app(page).get_config_file())


def test_the_comparison_compares_it(small, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(2):
        small.rotate(90 * index).save(tmp_path / "photos" / f"{index}.png")
    options = ["--out", str(tmp_path / "report"), "--scale", "2", "--device", "cpu", "--baselines", "bicubic"]
    assert compare.main([str(tmp_path / "photos"), *options, "--strengths", "1", "--steps", "1"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert EMBEDDED in page and str(DEMO_FOLDER) not in page


def test_it_can_be_published(tmp_path, capsys):
    credits_file = tmp_path / "photos.md"
    credits_file.write_text("| file | author |\n|---|---|\n| a.jpg | Añe |\n")
    options = ["--license", "apache-2.0", "--credits", str(credits_file), "--dry-run"]
    assert push_to_hub.main(["--demo", "owner/small", *options]) == 0
    output = capsys.readouterr().out
    assert "model_index.json" in output and "dino_projector/config.json" in output
    assert "### What it was trained on\n\n| file | author |\n|---|---|\n| a.jpg | Añe |\n\n## Methods" in output
    assert "the files load and run in a fresh process" in output
