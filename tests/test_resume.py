"""A checkpoint inside an image: a run that ends at any moment goes on and gives the same image, bit for bit."""

import random
import resource
import time
from functools import partial

import accelerate
import numpy as np
import pytest
import torch
import worker_runs
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from worker_runs import (
    FLAT_PHOTO,
    NUM_STEPS,
    PHOTO,
    command_line,
    count_layers,
    enlarge,
    finish_picture,
    finish_picture_killed_in_layer,
    finish_picture_killed_in_write,
    generator,
    write_in_strips,
    write_in_strips_killed_at_the_end,
)

from pipeline_flux_dino_tile import CHECKPOINT_NAME, describe_model
from tiny_models import tiny_dino, tiny_pipeline


NUM_KILLS = 8


@pytest.fixture(scope="module")
def context():
    return worker_runs.make_context()


@pytest.fixture
def pipe(monkeypatch):
    """A pipeline of its own for `enlarge`, to be changed."""
    monkeypatch.setattr(worker_runs, "PIPE", tiny_pipeline(dino="dinov2"))
    return worker_runs.PIPE


def run(context, function, *arguments, seconds=60.0):
    """Whether a process ended by itself in time; if not, it is killed."""
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    is_over = process.exitcode is not None
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return is_over and process.exitcode == 0


def checkpoint_of(folder):
    return load_file(folder / "checkpoint" / CHECKPOINT_NAME)


def assert_same_picture(folder, expected):
    assert (folder / "picture.png").read_bytes() == (expected / "picture.png").read_bytes()
    assert torch.equal(checkpoint_of(folder)["state"], checkpoint_of(expected)["state"])


# ---- Killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"tile_fusion": "step"}, {"tile_fusion": "final"}], ids=["step", "final"])
def test_killed_at_random_moments(context, tmp_path, settings):
    """At least eight kills for each kind of fusion, each at any moment of a run, until a picture is finished."""
    expected = tmp_path / "expected"
    run(context, finish_picture, tmp_path / "warm", settings)
    start = time.monotonic()
    assert run(context, finish_picture, expected, settings)
    duration = time.monotonic() - start

    moments, kills, pictures = random.Random(0), 0, 0
    while kills < NUM_KILLS:
        folder = tmp_path / f"picture-{pictures}"
        while not run(context, finish_picture, folder, settings, seconds=moments.uniform(0, duration)):
            kills += 1
        assert_same_picture(folder, expected)
        pictures += 1


def test_killed_within_a_model(context, tmp_path):
    """By itself, in the forward pass of a random layer: before the first step, in every step, and while it decodes."""
    assert run(context, finish_picture, tmp_path / "expected", {}), "the run itself fails"
    num_layers = count_layers(enlarge, output_type="pil")
    steps = set()
    for index, moment in enumerate(random.Random(1).sample(range(num_layers), 10)):
        folder = tmp_path / f"picture-{index}"
        assert not run(context, finish_picture_killed_in_layer, folder, {}, moment)
        is_there = (folder / "checkpoint" / CHECKPOINT_NAME).exists()
        steps.add(int(checkpoint_of(folder)["step"]) if is_there else 0)
        assert run(context, finish_picture, folder, {})
        assert_same_picture(folder, tmp_path / "expected")
    assert steps == set(range(NUM_STEPS + 1))


@pytest.mark.parametrize("write", [0, 2])
@pytest.mark.parametrize("moment", ["before", "half written", "written", "replaced"])
def test_killed_while_it_writes_the_checkpoint(context, tmp_path, moment, write):
    assert run(context, finish_picture, tmp_path / "expected", {})
    folder = tmp_path / "killed"
    assert not run(context, finish_picture_killed_in_write, folder, {}, write, moment)
    is_there = write > 0 or moment == "replaced"
    assert (folder / "checkpoint" / CHECKPOINT_NAME).exists() == is_there
    if is_there:
        assert int(checkpoint_of(folder)["step"]) == write + (moment == "replaced")
    assert run(context, finish_picture, folder, {})
    assert_same_picture(folder, tmp_path / "expected")
    assert [path.name for path in (folder / "checkpoint").iterdir()] == [CHECKPOINT_NAME]


@pytest.mark.parametrize("moment", ["first tile", "first strip written", "all written"])
def test_killed_while_strips_are_written(context, tmp_path, moment):
    PHOTO.save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--scale", "2", "--resume", "--device", "cpu"]
    arguments += ["--use-flux", "--model", "tiny/model", "--tile-size", "48", "--tile-overlap", "16", "--steps", "3"]
    assert run(context, command_line, arguments, {0: write_in_strips})
    expected = (tmp_path / "out.png").read_bytes()
    (tmp_path / "out.png").unlink()

    faults = {"first tile": partial(write_in_strips, 0), "first strip written": partial(write_in_strips, 5)}
    fault = faults.get(moment, write_in_strips_killed_at_the_end)
    assert not run(context, command_line, arguments, {0: fault})
    assert not (tmp_path / "out.png").exists()
    assert int(load_file(tmp_path / ".out.png.checkpoint" / CHECKPOINT_NAME)["step"]) == NUM_STEPS
    (left_over,) = tmp_path.glob(".upscale-*.tmp")
    assert (left_over.read_bytes() == expected) == (moment == "all written")

    assert run(context, command_line, arguments, {0: write_in_strips})
    assert (tmp_path / "out.png").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [left_over.name, "in.png", "out.png"]


# ---- Resumed -------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(step, callback=None):
    def stop(pipeline, index, timestep, kwargs):
        if index == step:
            raise Stop
        return kwargs if callback is None else callback(pipeline, index, timestep, kwargs)

    return stop


def interrupt(folder, step=2, callback=None, **settings):
    """Runs until the `step`-th step; the checkpoints before it stay."""
    with pytest.raises(Stop):
        enlarge(checkpoint_dir=folder, callback_on_step_end=stop_after(step, callback), **settings)


def change_latents(pipeline, index, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.9 + index}


def change_prompt(pipeline, index, timestep, kwargs):
    return {"prompt_embeds": kwargs["prompt_embeds"] * 1.5}


CALLS = {
    "batch": {"num_images_per_prompt": 2, "generator": lambda: [generator(1), generator(2)]},
    "two images": {"image": [PHOTO, FLAT_PHOTO], "prompt": ["a", "b"]},
    "true cfg": {"negative_prompt": "blur", "true_cfg_scale": 2.0},
    "flat tiles": {"image": FLAT_PHOTO, "skip_flat_tiles": 0.05},
    "strength": {"strength": 0.7, "start_sigma": None, "num_inference_steps": 5},
    "every second step": {"checkpoint_steps": 2},
    "latents callback": {"callback": change_latents},
    "prompt callback": {"callback": change_prompt, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    "no seed": {"generator": lambda: None},
}


@pytest.mark.parametrize(
    ("name", "fusion"), [*((name, "step") for name in CALLS), ("batch", "final"), ("latents callback", "final")]
)
def test_goes_on_and_gives_the_same(tmp_path, name, fusion):
    settings = {"generator": generator, "tile_fusion": fusion, **CALLS[name]}
    make_generator, callback = settings.pop("generator"), settings.pop("callback", None)
    steps = []

    def count(pipeline, index, timestep, kwargs):
        steps.append(index)
        return kwargs if callback is None else callback(pipeline, index, timestep, kwargs)

    torch.manual_seed(7)
    whole, resumed = make_generator(), make_generator()
    expected = enlarge(generator=whole, callback_on_step_end=callback, **settings)
    torch.manual_seed(7)
    interrupt(tmp_path, callback=callback, generator=make_generator(), **settings)
    result = enlarge(checkpoint_dir=tmp_path, generator=resumed, callback_on_step_end=count, **settings)
    assert torch.equal(result, expected)
    assert steps == list(range(2, settings.get("num_inference_steps", NUM_STEPS) - (name == "strength")))
    if isinstance(whole, torch.Generator):
        assert torch.equal(resumed.get_state(), whole.get_state()), "what the caller draws next is not the same"


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_any_step_is_a_place_to_go_on_from(tmp_path, step):
    interrupt(tmp_path, step)
    assert torch.equal(enlarge(checkpoint_dir=tmp_path), enlarge())


def test_what_does_not_decide_the_canvas_may_change(tmp_path):
    """A smaller batch after an error for want of memory, another form of the result, another folder of the model."""
    interrupt(tmp_path)
    settings = {"tile_batch_size": 3, "output_type": "np", "color_fix": "adain", "vae_residual": True}
    result = enlarge(checkpoint_dir=tmp_path, **settings)
    np.testing.assert_allclose(result, enlarge(**settings), atol=1e-5)


def test_a_finished_canvas_is_only_decoded(pipe, tmp_path):
    expected = enlarge(checkpoint_dir=tmp_path, output_type="np")
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append("transformer"))
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    assert np.array_equal(enlarge(checkpoint_dir=tmp_path, output_type="np"), expected)
    assert calls == []


def test_an_interrupted_call_goes_on(pipe, tmp_path):
    """diffusers' own way to stop: the result is unfinished, the checkpoint is not lost."""

    def stop(pipeline, index, timestep, kwargs):
        pipeline._interrupt = index == 1
        return kwargs

    unfinished = enlarge(checkpoint_dir=tmp_path, callback_on_step_end=stop)
    result = enlarge(checkpoint_dir=tmp_path)
    assert torch.equal(result, enlarge())
    assert not torch.equal(unfinished, result)


# ---- Refused -------------------------------------------------------------------------------------------------------

OTHER_SETTINGS = {
    "image": ({"image": PHOTO.transpose(Image.Transpose.ROTATE_180)}, r"image is 'uint8 \(32, 48, 3\) \w+'"),
    "size": ({"upscale_factor": 2.5}, "height is 80, in the checkpoint 64; width is 120, in the checkpoint 96"),
    "plan": ({"tile_size": 32}, "tiles is .*'tile_height': 32.*, in the checkpoint .*'tile_height': 48"),
    "overlap": ({"tile_overlap": 32}, "tiles is "),
    "prompt": ({"prompt": "a photo of"}, "prompt is 'a photo of', in the checkpoint 'a photo'"),
    "start sigma": ({"start_sigma": 0.5}, "sigmas is .*; start_sigma is 0.5, in the checkpoint 0.6"),
    "strength": ({"start_sigma": None, "strength": 0.75}, "strength is 0.75, in the checkpoint None; .*start_sigma"),
    "seed": ({"generator": generator(1)}, "generator is 'seed 1, state .*, in the checkpoint 'seed 0, state"),
    "steps": ({"num_inference_steps": 5}, "num_inference_steps is 5, in the checkpoint 3"),
    "fusion": ({"tile_fusion": "final"}, "tile_fusion is 'final', in the checkpoint 'step'"),
    "DINO strength": ({"dino_conditioning_scale": 0}, "dino_conditioning_scale is 0, in the checkpoint 0.5"),
    "DINO window": ({"dino_guidance_end": 0.5}, "dino_guidance_end is 0.5, in the checkpoint 1.0"),
    "flat tiles": ({"skip_flat_tiles": True}, "skip_flat_tiles is True, in the checkpoint False"),
    "batch": ({"num_images_per_prompt": 2}, "num_images_per_prompt is 2, in the checkpoint 1"),
    "latents": ({"latents": torch.zeros(1, 24, 16)}, r"latents is 'float32 \(1, 24, 16\)"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_by_name(pipe, tmp_path, name):
    interrupt(tmp_path)
    changes, message = OTHER_SETTINGS[name]
    for model in (pipe.transformer, pipe.vae.encoder, pipe.text_encoder, pipe.dino_encoder):
        model.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=f"holds a checkpoint of other settings: {message}"):
        enlarge(checkpoint_dir=tmp_path, **changes)
    assert int(load_file(tmp_path / CHECKPOINT_NAME)["step"]) == 2


def change_one_weight(pipe):
    pipe.transformer.single_transformer_blocks[1].attn.to_q.weight.data[0, 3] += 1e-3


OTHER_MODELS = {
    "transformer": change_one_weight,
    "vae": lambda pipe: pipe.vae.decoder.conv_out.bias.data.add_(1),
    "dino_encoder": lambda pipe: pipe.register_modules(dino_encoder=tiny_dino("dinov2_with_registers")),
    "dino_projector": lambda pipe: pipe.dino_projector.gain.data.mul_(2),
    "text_encoder_2": lambda pipe: pipe.text_encoder_2.shared.weight.data.mul_(2),
    "dtype": lambda pipe: pipe.transformer.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_refused_by_name(pipe, tmp_path, name):
    interrupt(tmp_path)
    OTHER_MODELS[name](pipe)
    with pytest.raises(ValueError, match=f"other settings: .*{name} is "):
        enlarge(checkpoint_dir=tmp_path)


def test_lora_and_its_scale_are_part_of_the_model(pipe):
    from peft import LoraConfig

    descriptions = [describe_model(pipe.transformer)]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "a")
    descriptions.append(describe_model(pipe.transformer))
    pipe.set_adapters("a", 0.5)
    descriptions.append(describe_model(pipe.transformer))
    pipe.disable_lora()
    descriptions.append(describe_model(pipe.transformer))
    assert len(set(descriptions)) == 4


OFFLOADS = {
    "sequential": lambda pipe: accelerate.cpu_offload(pipe.transformer, torch.device("cpu")),
    "group": lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_may_change(pipe, tmp_path, offload):
    expected = enlarge()
    interrupt(tmp_path)
    OFFLOADS[offload](pipe)
    assert torch.equal(enlarge(checkpoint_dir=tmp_path), expected)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchHeunDiscreteScheduler(), "a FlowMatchHeunDiscreteScheduler"),
        (FlowMatchLCMScheduler(), "a FlowMatchLCMScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "a stochastic FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_schedulers_with_a_state_are_refused(pipe, tmp_path, scheduler, message):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`checkpoint_dir` needs steps that .* `scheduler` is {message}"):
        enlarge(checkpoint_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_dir": ""}, "`checkpoint_dir` must be the path of a folder but is ''"),
        ({"checkpoint_dir": 3}, "`checkpoint_dir` must be the path of a folder but is 3"),
        ({"checkpoint_steps": 0}, "`checkpoint_steps` must be a whole number of at least 1 but is 0"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        enlarge(**settings)


# ---- Faults of the disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a checkpoint .* Delete it"):
        enlarge(checkpoint_dir=tmp_path)
    assert path.read_bytes() == content


def test_a_file_of_other_tensors(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(ValueError, match="checkpoint of other settings: prompt is 'a photo', in the checkpoint None"):
        enlarge(checkpoint_dir=tmp_path)


def test_a_folder_that_cannot_be_made(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(OSError, match="file"):
        enlarge(checkpoint_dir=tmp_path / "file")


def test_a_full_disk_costs_the_checkpoint_and_not_the_image(tmp_path, caplog):
    """A limit on the size of files stands in for the full disk: the write ends in the middle."""
    interrupt(tmp_path, step=1)
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        result = enlarge(checkpoint_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(result, enlarge())
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == before
