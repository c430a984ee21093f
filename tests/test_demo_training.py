# Copyright 2026 The flux-dino-tile authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The stages that train the embedded checkpoint's models, on tiny ones: they run, go on exactly, and fit together."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_demo
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from training_runs import save_photos
from worker_runs import exit_codes, make_context, outputs, start_ranks

from dino_projector import metrics
from dino_projector.demo_training import paint, stages
from dino_projector.demo_training.assemble import CHECKPOINT_FOLDER, assemble, check_sizes
from dino_projector.demo_training.captions import Language, describe_squares, place_codes
from dino_projector.demo_training.crops import (
    center_crop,
    cut_crops,
    degrade_crops,
    draw_crops,
    draw_pairs,
    load_photos,
    make_pyramid,
)
from dino_projector.demo_training.dino import DinoStage, balance, linear_r2
from dino_projector.demo_training.evaluate import evaluate, format_table
from dino_projector.demo_training.flux import FluxStage, draw_sigmas
from dino_projector.demo_training.paint import PaintStage
from dino_projector.demo_training.sizes import SIZES, count_weights, make_dino, make_transformer, make_vae
from dino_projector.demo_training.stages import load_shards, run_stage, update_average
from dino_projector.demo_training.vae import DecoderStage, VaeStage
from dino_projector.pictures import to_pixels
from dino_projector.training.losses import local_edge_energy, reconstruction_loss
from dino_projector.training.samples import sample_rng
from flux_dino_tile.diagnostics import seam_ratio
from flux_dino_tile.embedded import DEMO_FOLDER
from pipeline_flux_dino_tile import DinoProjector, FluxDinoTilePipeline


CPU = torch.device("cpu")
TINY = SIZES["tiny"]._replace(batch=2)
NEEDED = {"flux": ("vae",), "decoder": ("vae",), "paint": ("vae", "flux")}
STAGES = {stage.name: stage for stage in (VaeStage, DinoStage, FluxStage, PaintStage, DecoderStage)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with four photos in `train`, and two both in `validation` and in `held_out`."""
    root = tmp_path_factory.mktemp("photos")
    save_photos(root / "train", 128)
    (root / "held_out").mkdir()
    for name in ("coffee", "dogs"):
        (root / "train" / f"{name}.png").rename(root / "held_out" / f"{name}.png")
    shutil.copytree(root / "held_out", root / "validation")
    return root


@pytest.fixture(scope="module")
def loaded(photos):
    return [load_photos(photos / part, CPU) for part in ("train", "validation")]


def command(photos: Path, work: Path, stage: str, *more: object) -> list[str]:
    options = ["--photos", photos, "--work", work, "--size", "tiny", "--cpu", "--workers", 0, *more]
    return [stage, *map(str, options)]


@pytest.fixture(scope="module")
def work(photos, tmp_path_factory):
    """The folder in which every training stage has made two steps, through the command line."""
    folder = tmp_path_factory.mktemp("work")
    for stage in ("vae", "dino", "decoder", "flux", "paint", "projector", "assemble"):
        assert train_demo.main(command(photos, folder, stage, "--steps", 2)) == 0
    return folder


# ---- Stages --------------------------------------------------------------------------------------------------------


def train_to(name, steps, loaded, folder, seed=0):
    stage = STAGES[name](TINY, loaded[0], folder, seed, CPU)
    return stage, run_stage(stage, loaded[1], None, steps)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_goes_on_equals_one_that_was_not_stopped(name, loaded, work, tmp_path, monkeypatch):
    monkeypatch.setattr(VaeStage, "adversary_steps", 1)
    monkeypatch.setattr(paint, "ADVERSARY_STEPS", 1)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
        for earlier in NEEDED.get(name, ()):
            (tmp_path / folder / earlier).symlink_to(work / earlier)
    whole, _ = train_to(name, 3, loaded, tmp_path / "whole")
    train_to(name, 1, loaded, tmp_path / "parts")
    parts, numbers = train_to(name, 3, loaded, tmp_path / "parts")
    assert numbers["steps"] == 3
    expected, found = dict(whole.state_tensors()), dict(parts.state_tensors())
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, msg=key)
    saved = load_shards(tmp_path / "parts" / name / stages.STATE_FOLDER)
    assert saved.keys() == expected.keys()


def test_a_stage_ends_with_its_time(loaded, tmp_path):
    stage = DinoStage(TINY, loaded[0], tmp_path, 0, CPU)
    assert run_stage(stage, loaded[1], 0.0, None)["steps"] == 0


def test_processes_share_a_stage(photos, loaded, tmp_path, monkeypatch):
    """One step of two processes is the update by the mean of the gradients that each would have alone."""
    argv = command(photos, tmp_path, "vae", "--steps", 1)
    ranks = start_ranks(make_context(), train_demo.main, 2, tmp_path, argv)
    assert exit_codes(ranks) == [0, 0], outputs(tmp_path, 2)
    first, second = outputs(tmp_path, 2)
    assert 'vae: {"steps": 1' in first and "vae" not in second

    gradients = []

    def collect(parameters):
        gradients.append([parameter.grad.clone() for parameter in parameters])

    def average(parameters):
        for parameter, pair in zip(parameters, zip(*gradients)):
            parameter.grad = torch.stack(pair).mean(0)

    for rank, step in ((0, collect), (1, collect), (0, average)):
        monkeypatch.setattr(stages, "average_gradients", step)
        stage = VaeStage(SIZES["tiny"], loaded[0], tmp_path, 0, CPU)
        stage.processes = SimpleNamespace(num_processes=2, process_index=rank)
        stage.train_step()
    saved = load_shards(tmp_path / "vae" / stages.STATE_FOLDER)
    for key, tensor in stage.vae.state_dict().items():
        torch.testing.assert_close(saved[f"vae.{key}"], tensor)
    assert not all(torch.equal(*pair) for pair in zip(*gradients))


def test_a_stage_of_several_processes_ends_with_its_time(photos, tmp_path):
    argv = command(photos, tmp_path, "dino", "--seconds", 0.5)
    assert exit_codes(start_ranks(make_context(), train_demo.main, 2, tmp_path, argv)) == [0, 0]
    assert json.loads((tmp_path / "dino" / stages.STATE_FOLDER / "step.json").read_text())["step"] > 0


def test_other_stages_run_alone(photos, work, tmp_path):
    argv = command(photos, work, "assemble")
    assert exit_codes(start_ranks(make_context(), train_demo.main, 2, tmp_path, argv)) == [2, 2]
    assert "the stage assemble runs in one process, not in 2" in outputs(tmp_path, 2)[0]


def test_another_seed_is_refused(loaded, work):
    with pytest.raises(ValueError, match=r"--seed 1: .* was made with 0"):
        DinoStage(SIZES["tiny"], loaded[0], work, 1, CPU).resume()


@pytest.mark.parametrize("name", STAGES)
def test_a_model_that_travelled_without_its_state_goes_on(name, loaded, work, tmp_path, capsys):
    for earlier in ("vae", *NEEDED.get(name, ())):
        shutil.copytree(work / earlier, tmp_path / earlier, dirs_exist_ok=True)
    if name != "vae":
        shutil.copytree(work / name / stages.MODEL_FOLDER, tmp_path / name / stages.MODEL_FOLDER)
    else:
        shutil.rmtree(tmp_path / "vae" / stages.STATE_FOLDER)
    stage = STAGES[name](TINY, loaded[0], tmp_path, 1, CPU)
    stage.resume()
    assert "starts from" in capsys.readouterr().out
    saved = type(stage.copies[0]).from_pretrained(work / name / stages.MODEL_FOLDER).state_dict()
    for copy in stage.copies:
        assert all(torch.equal(tensor, saved[key]) for key, tensor in copy.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(loaded, tmp_path):
    stage = DinoStage(TINY, loaded[0], tmp_path, 0, CPU)
    stage.train_step = lambda: {"loss": torch.tensor(float("nan"))}
    with pytest.raises(ValueError, match="dino: the loss is not finite at step 1"):
        run_stage(stage, loaded[1], None, 1)
    assert not (tmp_path / "dino").exists()


def test_the_decoder_stage_leaves_the_latents_as_they_are(loaded, work, tmp_path):
    shutil.copytree(work / "vae", tmp_path / "vae")
    train_to("decoder", 2, loaded, tmp_path)
    before, after = (
        AutoencoderKL.from_pretrained(tmp_path / name / stages.MODEL_FOLDER) for name in ("vae", "decoder")
    )
    assert after.config.scaling_factor == before.config.scaling_factor
    assert after.config.shift_factor == before.config.shift_factor
    for part, is_equal in (("encoder", True), ("decoder", False)):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters())
        assert all(torch.equal(*pair) for pair in pairs) == is_equal


def test_the_decoder_stage_goes_on_with_the_adversary(loaded, work, tmp_path):
    shutil.copytree(work / "vae", tmp_path / "vae")
    saved = load_shards(tmp_path / "vae" / stages.STATE_FOLDER)
    for key, tensor in DecoderStage(TINY, loaded[0], tmp_path, 0, CPU).adversary.state_dict().items():
        assert torch.equal(tensor, saved[f"adversary.{key}"])


def test_flux_needs_the_vae(loaded, tmp_path):
    with pytest.raises(ValueError, match="there is no vae yet; run the stage vae first"):
        FluxStage(TINY, loaded[0], tmp_path, 0, CPU)


def test_shards_stay_below_their_size(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "MAX_SHARD_SIZE", "200KB")
    stage = DinoStage(TINY, loaded[0], tmp_path, 0, CPU)
    stage.train_step()
    stage.save()
    folder = tmp_path / "dino" / stages.STATE_FOLDER
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    assert len(files) > 4 and all(sum(t.nbytes for t in tensors.values()) <= 200_000 for tensors in files)
    for name, tensor in stage.state_tensors():
        assert torch.equal(load_shards(folder)[name], tensor)


def test_the_average_follows():
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1)
    average.weight.data.fill_(0)
    update_average(average, model, 0)
    assert average.weight.item() == pytest.approx(0.9)
    update_average(average, model, 10**9, 0.5)
    assert average.weight.item() == pytest.approx(0.95)


def test_the_demo_fits_its_size():
    sizes = SIZES["demo"]
    projector = DinoProjector(len(sizes.projector_layers) * sizes.dino_dim, sizes.text_dim, sizes.projector_dim)
    models = [make_vae(sizes), make_transformer(sizes), make_dino(sizes), projector]
    assert 2 * sum(map(count_weights, models)) < 47 * 2**20


# ---- Crops and losses ----------------------------------------------------------------------------------------------


def test_crops_depend_on_the_generator_only(loaded):
    photos = [make_pyramid(photo, 64) for photo in loaded[0]]
    crops = [draw_crops(photos, 5, 64, sample_rng(3, step)) for step in (7, 7, 8)]
    assert crops[0].shape == (5, 3, 64, 64) and crops[0].abs().max() <= 1
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_a_crop_of_a_pyramid_is_that_of_the_photo():
    ramp = torch.linspace(0, 255, 256).round().byte().expand(3, 128, 256)
    pyramid = make_pyramid(ramp, 16)
    assert [tuple(level.shape[1:]) for level in pyramid] == [(128, 256), (64, 128), (32, 64), (16, 32)]
    for step in range(8):
        from_pyramid, from_photo = (cut_crops(levels, 2, 16, sample_rng(0, step)) for levels in (pyramid, [ramp]))
        # A level is drawn from at its own pixels: the places differ by at most one of the smallest level's.
        assert (from_pyramid.diff(dim=3).mean() - from_photo.diff(dim=3).mean()).abs() < 0.004


def test_restored_crops_lie_below_their_start():
    sigmas, starts = draw_sigmas(200, 100, sample_rng(0, 0))
    assert (sigmas <= starts).all() and sigmas.min() > 0
    assert starts[:100].min() >= 0.03 and starts[:100].max() <= 0.5
    assert 30 < (sigmas[:100] == starts[:100]).sum() < 70
    assert starts[100:].isinf().all() and sigmas[100:].max() > 0.9


def test_photos_that_are_too_small_are_said(loaded, tmp_path):
    with pytest.raises(ValueError, match="no photo has 512 px on both sides"):
        draw_crops([[photo] for photo in loaded[0]], 1, 512, sample_rng(0, 0))
    with pytest.raises(ValueError, match="fetch_photos"):
        load_photos(tmp_path, CPU)


def test_the_center_crop_is_the_middle():
    photo = torch.zeros(3, 4, 8, dtype=torch.uint8)
    photo[..., 2:6] = 255
    assert torch.equal(center_crop(photo, 4), torch.ones(1, 3, 4, 4))


def test_the_vae_loss_makes_blur_dear():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    assert float(reconstruction_loss(images, images)) == 0
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    shaken = images + (blurred - images).abs().mean() * torch.randn(images.shape, generator=generator).sign()
    l1 = [float((other - images).abs().mean()) for other in (blurred, shaken)]
    assert l1[0] == pytest.approx(l1[1], rel=1e-3)
    energies = [float((local_edge_energy(x) - local_edge_energy(images)).mean()) for x in (blurred, shaken)]
    assert energies[0] < 0 < energies[1]


def test_balance_uses_every_prototype_alike():
    choices = balance(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(choices.sum(1), torch.ones(64))
    torch.testing.assert_close(choices.sum(0), torch.full((8,), 8.0), rtol=0.1, atol=0)


def test_a_linear_readout_finds_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    features, noise = torch.randn(400, 5, generator=generator), torch.randn(400, 2, generator=generator)
    targets = features @ torch.randn(5, 2, generator=generator) + 3
    assert linear_r2(features[:200], targets[:200], features[200:], targets[200:]) == pytest.approx(1, abs=1e-3)
    assert linear_r2(features[:200], noise[:200], features[200:], noise[200:]) == pytest.approx(0, abs=0.1)


def test_crops_are_degraded_as_the_pipeline_enlarges_them(loaded):
    """Most often exactly as Pillow shrinks and the pipeline enlarges; else with more harm, never in size or colour."""
    photos = [make_pyramid(photo, 64) for photo in loaded[0]]
    errors = []
    for step in range(20):
        images = draw_crops(photos, 2, 64, sample_rng(1, step))
        pixels = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        small = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
        expected = to_pixels(small.resize((64, 64), Image.Resampling.LANCZOS))
        degraded = degrade_crops(images, sample_rng(0, step))
        assert degraded.shape == images.shape and degraded.abs().max() <= 1
        torch.testing.assert_close(degraded.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.06)
        errors.append(float((degraded[:1] - expected).abs().mean()) * 127.5)
    # Pillow rounds between its two passes too.
    assert 8 <= sum(error < 0.5 for error in errors) <= 16, errors


def test_pairs_are_bytes_of_sharp_and_degraded_crops(loaded):
    photos = [make_pyramid(photo, 64) for photo in loaded[0]]
    pairs = draw_pairs(photos, 20, 64, sample_rng(0, 0))
    assert pairs.sharp.shape == pairs.degraded.shape == (20, 3, 64, 64)
    sharp, degraded = pairs.take(torch.tensor([3, 19]))
    assert torch.equal(((sharp + 1) * 127.5).round().byte(), pairs.sharp[[3, 19]])
    energies = [float(metrics.gradient_energy(images).mean()) for images in (sharp, degraded)]
    assert energies[1] < 0.8 * energies[0]


def test_a_stretch_of_steps_draws_from_the_same_crops(loaded, tmp_path):
    stage = DinoStage(TINY._replace(pool_steps=2, pool_crops=4), loaded[0], tmp_path, 0, CPU)
    crops = []
    for stage.step in range(4):
        crops.append(stage.crops_of(64).sharp)
    assert torch.equal(crops[0], crops[1]) and torch.equal(crops[2], crops[3])
    assert not torch.equal(crops[0], crops[2])


def test_the_learning_rate_falls_at_the_end_of_the_last_call(loaded, tmp_path):
    factors = []

    def step():
        factors.append(stage.rate_factor)
        return {"loss": torch.tensor(0.0)}

    for cools_down in (False, True):
        stage = DinoStage(TINY, loaded[0], tmp_path / str(cools_down), 0, CPU)
        stage.train_step = step
        run_stage(stage, loaded[1], None, 10, cools_down)
    assert factors[:10] == [1] * 10
    assert factors[10:] == pytest.approx([1] * 8 + [2 / 3, 1 / 3])


@pytest.fixture
def painting(loaded, work):
    """The paint stage with the weights that it has saved."""
    stage = PaintStage(TINY, loaded[0], work, 0, CPU)
    stage.resume()
    stage.working.load_state_dict(stage.average.state_dict())
    return stage


def test_the_paint_stage_takes_the_steps_of_a_call(painting, loaded):
    images = torch.cat([center_crop(photo, 64) for photo in loaded[1]])
    latents = painting.encode(images, torch.Generator().manual_seed(1))
    inputs = painting.step_inputs(latents, torch.tensor([0.4, 0.4]), torch.Generator(), torch.float32)
    empty = painting.language.empty_branch(torch.float32)
    expected = painting.pipe(
        image=(images + 1) / 2,
        height=64,
        width=64,
        tile_size=64,
        latents=painting.pipe.pack_canvas(0.6 * latents + 0.4 * inputs.noise),
        first_step=0,
        start_sigma=0.4,
        num_inference_steps=4,
        prompt_embeds=empty.prompt_embeds,
        pooled_prompt_embeds=empty.pooled_prompt_embeds,
        output_type="latent",
    ).images
    found = painting.take_steps(inputs, None, 4)
    torch.testing.assert_close(painting.pipe.unpack_canvas(expected, 64, 64), found, rtol=1e-4, atol=1e-4)


def test_the_pictures_of_the_paint_stage_get_back_what_the_vae_lost_of_the_input(painting, monkeypatch):
    """Latents that stay as they are then give the degraded pictures, in the same window as the sharp ones."""
    monkeypatch.setattr(PaintStage, "take_steps", lambda stage, inputs, caption, num_steps: inputs.latents)
    pairs, windows = painting.crops_of(64).pairs, set()
    for painting.step in range(4):
        images, degraded, _, decoded = painting.enlarge(3, sample_rng(0, painting.step))
        torch.testing.assert_close(decoded, degraded, rtol=0, atol=1e-4)
        window = painting.draw_window(sample_rng(1, painting.step))
        assert images.shape == (3, 3, 32, 32) and (window.height, window.width) == (32, 32)
        for image, blurred in zip(images, degraded):
            places = [
                (index, top, left)
                for index in range(len(pairs.sharp))
                for top in range(0, 33, 8)
                for left in range(0, 33, 8)
                if torch.equal(pairs.sharp[index, :, top : top + 32, left : left + 32].float() / 127.5 - 1, image)
            ]
            (index, top, left) = places[0]
            windows.add((top, left))
            expected = pairs.degraded[index, :, top : top + 32, left : left + 32].float() / 127.5 - 1
            assert torch.equal(blurred, expected)
    assert len(windows) > 1


def test_stages_draw_crops_of_their_own(loaded, work):
    pools = [cls(TINY, loaded[0], work, 0, CPU).crops_of(64).pairs.sharp for cls in (FluxStage, PaintStage)]
    assert not torch.equal(*pools)


def test_a_stage_that_has_made_its_steps_makes_no_more(loaded, tmp_path):
    for steps in (2, 1):
        _, numbers = train_to("dino", steps, loaded, tmp_path)
        assert numbers["steps"] == 2


# ---- Captions ------------------------------------------------------------------------------------------------------


def test_squares_are_described_where_they_are():
    images = torch.zeros(1, 3, 32, 32)
    images[:, 0, :16, 16:] = 1
    features = describe_squares(images, 2)
    assert features.shape == (1, 22, 2, 2)
    assert features[0, 0].tolist() == [[0, 1], [0, 0]]


def test_a_stripe_is_told_by_its_direction():
    rows = torch.arange(32) % 4 // 2 * 2.0 - 1
    pictures = [values.expand(1, 3, 32, 32).contiguous() for values in (rows, rows[:, None])]
    across, along = (describe_squares(picture, 1)[0, 6:10, 0, 0] for picture in pictures)
    assert across.argmax() == 0 and along.argmax() == 2


def test_captions_have_the_scale_of_the_empty_prompt_and_depend_on_the_picture():
    language = Language(64, CPU)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    caption = language.caption(describe_squares(images, 4), 128)
    (tokens,) = caption.tokens
    assert tokens.shape == (2, 16, 64)
    torch.testing.assert_close(tokens.square().mean(-1), torch.ones(2, 16))
    # 8 x 8 image tokens: each caption lies between two of them.
    assert caption.ids[:5].tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 0.5, 4.5], [0, 0.5, 6.5], [0, 2.5, 0.5]]
    assert not torch.allclose(tokens[0], tokens[1])
    assert float(language.empty_prompt.square().mean()) == pytest.approx(1, abs=0.2)
    assert torch.equal(Language(64, CPU).matrix, language.matrix)
    codes = place_codes(4).flatten(1)
    assert len({tuple(code.tolist()) for code in codes.T}) == 16


# ---- The checkpoint ------------------------------------------------------------------------------------------------


def test_the_checkpoint_loads_through_the_public_calls(work):
    checkpoint = work / CHECKPOINT_FOLDER
    assert (checkpoint / "pipeline.py").read_bytes() == (DEMO_FOLDER / "pipeline.py").read_bytes()
    pipe = FluxDinoTilePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.load_dino_projector(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder is None
    empty_prompt = Language(TINY.text_dim, CPU).empty_prompt.half().float()
    assert torch.equal(pipe.dino_projector.prompt_embeds, empty_prompt)
    assert pipe(image=Image.new("RGB", (16, 16), "teal")).images[0].size == (64, 64)
    for file in checkpoint.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_sizes_are_checked(work):
    checkpoint = work / CHECKPOINT_FOLDER
    assert check_sizes(checkpoint) == sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="not below 1000: lower MAX_SHARD_SIZE"):
        check_sizes(checkpoint, max_file=1000)
    with pytest.raises(ValueError, match="not below 2000: choose smaller sizes"):
        check_sizes(checkpoint, max_total=2000)


def test_the_projector_goes_on(photos, work, capsys):
    assert train_demo.main(command(photos, work, "projector", "--steps", 3)) == 0
    assert "going on from" in capsys.readouterr().out
    before = load_file(work / CHECKPOINT_FOLDER / "dino_projector" / "diffusion_pytorch_model.safetensors")
    after = load_file(assemble(work) / "dino_projector" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_projector_stops_with_its_time(photos, work, capsys):
    assert train_demo.main(command(photos, work, "projector", "--seconds", 0)) == 0
    assert "stopped at step" in capsys.readouterr().out


def test_the_evaluation_fills_its_table(photos, work):
    def judge(images, originals):
        return (images - originals).abs().mean((1, 2, 3))

    numbers, sheet = evaluate(work / CHECKPOINT_FOLDER, photos / "held_out", 32, 96, 0.3, 0, CPU, judge)
    assert sheet.size == (5 * 128, 2 * 128)
    table = format_table(numbers)
    names = ("vae psnr", "loss gap other tokens percent", "distance without minus with dino", "seam ratio in one tile")
    assert all(f"| {name} |" in table for name in names)
    assert numbers["strength_effect"][0] == 0
    assert numbers["gradient_energy_bicubic"].mean < 1
    for metric in ("haarpsi", "dss", "distance"):
        without, with_dino = (numbers[f"{metric}_{kind}"].mean for kind in ("without", "with_dino"))
        gap = numbers[f"{metric}_without_minus_with_dino"].mean
        assert without != with_dino and gap == pytest.approx(without - with_dino)
    tiles, one = numbers["seam_ratio_with_dino"].mean, numbers["seam_ratio_in_one_tile"].mean
    assert tiles != one and numbers["seam_ratio_with_dino_minus_in_one_tile"].mean == pytest.approx(tiles - one)
    json.dumps(numbers)


def test_a_checkpoint_without_a_projector_is_said(photos, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    assert train_demo.main(command(photos, tmp_path, "evaluate")) == 1
    assert "has no checkpoint with a projector yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["vae"], "the stage vae needs --seconds or --steps"),
        (["vae", "--steps", "1", "--photos", "nowhere"], "--photos nowhere: has no folder train"),
        (["draw"], "argument STAGE"),
    ],
)
def test_wrong_usage_is_one_line(photos, tmp_path, capsys, more, message):
    stage, *options = more
    assert train_demo.main([stage, "--photos", str(photos), "--work", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- Metrics -------------------------------------------------------------------------------------------------------


def test_gradient_energy_and_psnr_of_known_pictures():
    steps = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
    assert float(metrics.gradient_energy(steps)) == pytest.approx(0.5)
    assert float(metrics.psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2))) == pytest.approx(20)


def test_the_seam_ratio_of_a_ramp_is_one_and_of_a_step_its_height():
    ramp = torch.arange(64.0).expand(3, 64, 64)
    assert seam_ratio(ramp, [], [32]) == pytest.approx(1)
    step = ramp + 2 * (torch.arange(64) >= 32)
    assert seam_ratio(step, [], [32]) == pytest.approx(3)
    assert seam_ratio(step.transpose(1, 2), [32], []) == pytest.approx(3)
    # A grid of the VAE is no seam.
    blocks = ramp + torch.arange(64) // 8
    assert seam_ratio(blocks, [], [32]) == pytest.approx(1)


def test_the_grid_ratio():
    ramp = torch.arange(64.0).expand(3, 64, 64)
    diagonal = ramp + ramp.transpose(1, 2)
    assert metrics.grid_ratio(diagonal) == pytest.approx(1)
    assert metrics.grid_ratio(diagonal + diagonal[:, :, :1] // 8 + diagonal[:, :1] // 8) == pytest.approx(2)


def test_the_bootstrap_interval():
    assert metrics.bootstrap_mean([2.0, 2.0, 2.0]) == (2, 2, 2)
    interval = metrics.bootstrap_mean(list(range(100)))
    assert interval.mean == 49.5
    assert interval.low == pytest.approx(49.5 - 1.96 * 2.887, abs=0.3)
    assert interval.high == pytest.approx(49.5 + 1.96 * 2.887, abs=0.3)


def test_monotone():
    assert metrics.is_monotone([0, 0.1, 0.1, 0.4])
    assert not metrics.is_monotone([0, 0.2, 0.1])


def test_the_judge_minds_blur_more_than_a_little_brightness(loaded):
    pytest.importorskip("efficientnet_lite_pytorch")
    judge = metrics.Judge()
    original = center_crop(loaded[1][0], 128)
    blurred = torch.nn.functional.avg_pool2d(original, 5, 1, 2)
    assert float(judge(original, original)) == 0
    assert float(judge(blurred, original)) > float(judge((original + 0.02).clamp(-1, 1), original))


def test_the_table_measures_captions_and_tokens(photos, work, capsys):
    class Judge(metrics.Judge):
        def __init__(self):
            self.model = torch.nn.Identity()

        def __call__(self, images, originals):
            return (images - originals).abs().mean((1, 2, 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "Judge", Judge)
        assert train_demo.main(command(photos, work, "table", "--side", 128, "--sigmas", 0.1, 0.4)) == 0
    rows = json.loads((work / "table" / "rows.json").read_text())
    names = [f"{condition} {sigma}" for sigma in (0.1, 0.4) for condition in ("none", "caption", "right", "other")]
    assert list(rows) == ["bicubic", "lanczos", *names]
    assert len({tuple(rows[name]["distance"]) for name in rows}) == len(rows)
    table = capsys.readouterr().out
    mean = sum(rows["right 0.4"]["distance"]) / 2 - sum(rows["other 0.4"]["distance"]) / 2
    assert f"| right 0.4 less other | {mean:+.4f} (" in table
