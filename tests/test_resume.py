"""A checkpoint inside an image: a run that ends at any moment goes on and gives the same image, bit for bit."""

import inspect
import json
import os
import random
import resource
import subprocess
import sys
import time

import accelerate
import numpy as np
import pytest
import torch
import worker_runs
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from worker_runs import FLAT_PHOTO, NUM_STEPS, PHOTO, count_layers, generator
from wrapped_runs import (
    enlarge,
    finish_picture,
    finish_picture_killed_in_layer,
    finish_picture_killed_in_step,
    finish_picture_killed_in_write,
    say_place,
    say_size,
    write_strips,
)

from flux_dino_tile.calls import DECIDING_ARGUMENTS, FREE_ARGUMENTS, describe, describe_model
from flux_dino_tile.resume import CHECKPOINT_NAME, Checkpoint
from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import tiny_dino, tiny_ip_adapter, tiny_pipeline, tiny_transformer


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
    assert torch.equal(checkpoint_of(folder)["latents"], checkpoint_of(expected)["latents"])


@pytest.fixture(scope="module")
def expected(context, tmp_path_factory):
    """The folder of a picture that was finished at once."""
    folder = tmp_path_factory.mktemp("expected")
    assert run(context, finish_picture, folder), "the run itself fails"
    return folder


# ---- Killed --------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(context, tmp_path, expected):
    """At least eight kills, each at any moment of a run, until a picture is finished."""
    start = time.monotonic()
    assert run(context, finish_picture, tmp_path / "again")
    duration = time.monotonic() - start

    moments, kills, pictures = random.Random(0), 0, 0
    while kills < NUM_KILLS:
        folder = tmp_path / f"picture-{pictures}"
        while not run(context, finish_picture, folder, seconds=moments.uniform(0, duration)):
            kills += 1
        assert_same_picture(folder, expected)
        pictures += 1


@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_killed_in_every_step(context, tmp_path, expected, step):
    assert not run(context, finish_picture_killed_in_step, tmp_path, step)
    is_there = (tmp_path / "checkpoint" / CHECKPOINT_NAME).exists()
    assert (int(checkpoint_of(tmp_path)["step"]) if is_there else 0) == step
    assert run(context, finish_picture, tmp_path)
    assert_same_picture(tmp_path, expected)


def test_killed_within_a_model(context, tmp_path, expected):
    """By itself, in the forward pass of a random layer: before the first step, in every step, and while it decodes."""
    num_layers = count_layers(enlarge, output_type="pil")
    steps = set()
    for index, moment in enumerate(random.Random(1).sample(range(num_layers), 10)):
        folder = tmp_path / f"picture-{index}"
        assert not run(context, finish_picture_killed_in_layer, folder, moment)
        is_there = (folder / "checkpoint" / CHECKPOINT_NAME).exists()
        steps.add(int(checkpoint_of(folder)["step"]) if is_there else 0)
        assert run(context, finish_picture, folder)
        assert_same_picture(folder, expected)
    assert steps == set(range(NUM_STEPS + 1))


@pytest.mark.parametrize("write", [0, 2])
@pytest.mark.parametrize("moment", ["before", "half written", "written", "replaced"])
def test_killed_while_it_writes_the_checkpoint(context, tmp_path, expected, moment, write):
    folder = tmp_path / "killed"
    assert not run(context, finish_picture_killed_in_write, folder, write, moment)
    is_there = write > 0 or moment == "replaced"
    assert (folder / "checkpoint" / CHECKPOINT_NAME).exists() == is_there
    if is_there:
        assert int(checkpoint_of(folder)["step"]) == write + (moment == "replaced")
    assert run(context, finish_picture, folder)
    assert_same_picture(folder, expected)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == [CHECKPOINT_NAME]


def test_killed_while_strips_are_written(context, tmp_path):
    assert run(context, write_strips, tmp_path)
    expected = (tmp_path / "picture.raw").read_bytes()
    (tmp_path / "checkpoint" / CHECKPOINT_NAME).unlink()
    assert not run(context, write_strips, tmp_path, 1)
    assert int(checkpoint_of(tmp_path)["step"]) == NUM_STEPS
    assert run(context, write_strips, tmp_path)
    assert (tmp_path / "picture.raw").read_bytes() == expected


# ---- Resumed -------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(step, callback=None):
    def stop(pipeline, index, timestep, kwargs):
        if index == step:
            raise Stop
        return {} if callback is None else callback(pipeline, index, timestep, kwargs)

    return stop


def interrupt(folder, step=2, callback=None, **settings):
    """Runs until the `step`-th step; the checkpoints before it stay."""
    with pytest.raises(Stop):
        enlarge(folder, callback_on_step_end=stop_after(step, callback), **settings)


def change_latents(pipeline, index, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.9 + index}


def change_prompt(pipeline, index, timestep, kwargs):
    """Another change for each result."""
    factors = 1.5 + torch.arange(len(kwargs["prompt_embeds"])).view(-1, 1, 1)
    return {"prompt_embeds": kwargs["prompt_embeds"] * factors} if index < 2 else {}


PROMPT = {"callback": change_prompt, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
TRUE_CFG = {"negative_prompt": "blur", "true_cfg_scale": 2.0}
REGIONS = [("a photo", None), ("a dog", (0, 0, 10, 10)), ("a cat", (0.6, 0.6, 1, 1))]
CALLS = {
    "batch": {"num_images_per_prompt": 2, "generator": lambda: [generator(1), generator(2)]},
    "two images": {"image": [PHOTO, FLAT_PHOTO], "prompt": ["a", "b"]},
    "true cfg": TRUE_CFG,
    "frozen tiles": {"image": FLAT_PHOTO, "frozen_tiles": [0, 3]},
    "frozen latents": {"frozen_tiles": [1], "frozen_latents": torch.ones(1, 24, 16)},
    "strength": {"strength": 0.7, "start_sigma": None, "num_inference_steps": 5},
    "latents": {"latents": torch.linspace(-1, 1, 24 * 16).view(1, 24, 16)},
    "every second step": {"every": 2},
    "regions": {"prompt": REGIONS, **TRUE_CFG},
    "a function": {"prompt": say_place},
    "prompt callback with regions": {**PROMPT, "prompt": REGIONS},
    "latents callback": {"callback": change_latents},
    "prompt callback": PROMPT,
    "prompt callback for each of a batch": {**PROMPT, **TRUE_CFG, "num_images_per_prompt": 2},
    "no seed": {"generator": lambda: None},
}


@pytest.mark.parametrize("name", CALLS)
def test_goes_on_and_gives_the_same(tmp_path, name):
    settings = {"generator": generator, **CALLS[name]}
    make_generator, callback, every = (
        settings.pop("generator"),
        settings.pop("callback", None),
        settings.pop("every", 1),
    )
    steps = []

    def count(pipeline, index, timestep, kwargs):
        steps.append(index)
        return {} if callback is None else callback(pipeline, index, timestep, kwargs)

    torch.manual_seed(7)
    whole, resumed = make_generator(), make_generator()
    expected = enlarge(generator=whole, callback_on_step_end=callback, **settings)
    torch.manual_seed(7)
    interrupt(tmp_path, callback=callback, every=every, generator=make_generator(), **settings)
    result = enlarge(tmp_path, every, generator=resumed, callback_on_step_end=count, **settings)
    assert torch.equal(result, expected)
    assert steps == list(range(2, settings.get("num_inference_steps", NUM_STEPS) - (name == "strength")))
    if isinstance(whole, torch.Generator):
        assert torch.equal(resumed.get_state(), whole.get_state()), "what the caller draws next is not the same"


@pytest.mark.parametrize("callback", [None, change_latents, change_prompt])
@pytest.mark.parametrize("step", range(NUM_STEPS))
def test_any_step_is_a_place_to_go_on_from(tmp_path, step, callback):
    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    interrupt(tmp_path, step, callback, **names)
    result = enlarge(tmp_path, callback_on_step_end=callback, **names)
    assert torch.equal(result, enlarge(callback_on_step_end=callback, **names))


def test_crashes_one_after_the_other(tmp_path):
    """What a callback changed before the first is kept through the second."""
    for step in (1, 2):
        interrupt(tmp_path, step, change_prompt, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    result = enlarge(tmp_path, callback_on_step_end=change_prompt, **names)
    assert torch.equal(result, enlarge(callback_on_step_end=change_prompt, **names))


def test_what_does_not_decide_the_canvas_may_change(tmp_path):
    """A smaller batch after an error for want of memory, another form of the result, other words for the plan."""
    interrupt(tmp_path)
    settings = {"tile_batch_size": 3, "output_type": "np", "vae_residual": True, "tile_size": (48, 48)}
    settings |= {"upscale_factor": None, "height": 64, "width": 96}
    result = enlarge(tmp_path, **settings)
    np.testing.assert_allclose(result, enlarge(**settings), atol=1e-5)


def test_every_argument_of_a_call_is_known_to_decide_the_canvas_or_not():
    arguments = list(inspect.signature(FluxDinoTilePipeline.__call__).parameters)[1:]
    assert sorted([*DECIDING_ARGUMENTS, *FREE_ARGUMENTS]) == sorted(arguments)


def test_a_finished_canvas_is_only_decoded(pipe, tmp_path):
    expected = enlarge(tmp_path, output_type="np")
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append("transformer"))
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    assert np.array_equal(enlarge(tmp_path, output_type="np"), expected)
    assert calls == []


@pytest.mark.parametrize("every", [1, 3])
def test_an_interrupted_call_goes_on(pipe, tmp_path, every):
    """diffusers' own way to stop: the result is unfinished, the checkpoint is not lost."""

    def stop(pipeline, index, timestep, kwargs):
        pipeline._interrupt = index == 1
        return kwargs

    unfinished = enlarge(tmp_path, every, callback_on_step_end=stop)
    assert int(load_file(tmp_path / CHECKPOINT_NAME)["step"]) == 2
    result = enlarge(tmp_path)
    assert torch.equal(result, enlarge())
    assert not torch.equal(unfinished, result)


def test_latents_that_a_callback_spoils_are_not_saved(tmp_path):
    def spoil(pipeline, index, timestep, kwargs):
        return {"latents": kwargs["latents"] * torch.nan} if index == 1 else {}

    with pytest.raises(FloatingPointError, match="the latents from the callback at step 2 of 3"):
        enlarge(tmp_path, callback_on_step_end=spoil)
    assert int(load_file(tmp_path / CHECKPOINT_NAME)["step"]) == 1
    assert torch.equal(enlarge(tmp_path), enlarge())


@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_fails_leaves_the_checkpoint_of_the_one_before(pipe, tmp_path, broken):
    """What is saved is finite, and the run goes on from it."""
    expected = enlarge()
    weight = pipe.transformer.proj_out.weight
    value = weight[3, 4].item()

    def break_weight(pipeline, index, timestep, kwargs):
        if index == broken:
            weight.data[3, 4] = torch.inf
        return {}

    with pytest.raises(FloatingPointError, match=f"at step {broken + 2} of 3"):
        enlarge(tmp_path, callback_on_step_end=break_weight)
    checkpoint = load_file(tmp_path / CHECKPOINT_NAME)
    assert int(checkpoint["step"]) == broken + 1 and checkpoint["latents"].isfinite().all()
    weight.data[3, 4] = value
    assert torch.equal(enlarge(tmp_path), expected)


def test_a_decoder_that_overflows_in_float16_is_run_again_in_float32(pipe, tmp_path):
    """As the message says, and without denoising again."""
    pipe.vae.decoder.conv_in.weight.data *= 3e5
    pipe.vae.half()
    with pytest.raises(FloatingPointError, match=r"run it in float32 with `pipe.vae.to"):
        enlarge(tmp_path, output_type="np")
    pipe.vae.to(torch.float32)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    enlarge(tmp_path, output_type="np")
    assert calls == []


# ---- Refused -------------------------------------------------------------------------------------------------------

OTHER_SETTINGS = {
    "image": ({"image": PHOTO.transpose(Image.Transpose.ROTATE_180)}, r"image is \['uint8 \(32, 48, 3\) \w+'"),
    "size": ({"upscale_factor": 2.5}, "height is 80, in the checkpoint 64; width is 120, in the checkpoint 96"),
    "plan": ({"tile_size": 32}, "tiles is .*'tile_height': 32.*, in the checkpoint .*'tile_height': 48"),
    "overlap": ({"tile_overlap": 32}, "tiles is "),
    "prompt": ({"prompt": "a photo of"}, "prompt is 'a photo of', in the checkpoint 'a photo'"),
    "regions": ({"prompt": REGIONS}, r"prompt is \[\['a photo', None\], \['a dog', \[0, 0, 10, 10\]\], .*'a photo'"),
    "a function": (
        {"prompt": say_place},
        r"prompt is {'\(0, 0, 48, 48\)': '0 and 0', .*, in the checkpoint 'a photo'",
    ),
    "start sigma": ({"start_sigma": 0.5}, "start_sigma is 0.5, in the checkpoint 0.6"),
    "strength": ({"start_sigma": None, "strength": 0.75}, "strength is 0.75, in the checkpoint None; .*start_sigma"),
    "sigmas": ({"start_sigma": None, "sigmas": np.array([0.1, 0.2, 0.6])[::-1]}, r"sigmas is 'float64 \(3,\) \w+', "),
    "seed": ({"generator": generator(1)}, "generator is 'seed 1, state .*, in the checkpoint 'seed 0, state"),
    "steps": ({"num_inference_steps": 5}, "num_inference_steps is 5, in the checkpoint 3"),
    "guidance": ({"guidance_scale": 3}, "guidance_scale is 3, in the checkpoint 3.5"),
    "DINO strength": ({"dino_conditioning_scale": 0}, "dino_conditioning_scale is 0, in the checkpoint 0.5"),
    "DINO window": ({"dino_guidance_end": 0.5}, "dino_guidance_end is 0.5, in the checkpoint 1.0"),
    "frozen tiles": ({"frozen_tiles": range(1, 3)}, r"frozen_tiles is \[1, 2\], in the checkpoint \[\]"),
    "batch": ({"num_images_per_prompt": 2}, "num_images_per_prompt is 2, in the checkpoint 1"),
    "latents": ({"latents": torch.zeros(1, 24, 16)}, r"latents is 'float32 \(1, 24, 16\)"),
}


def test_another_box_and_another_word_on_a_tile_are_refused(tmp_path):
    for index, (prompt, other) in enumerate(
        ((REGIONS, [*REGIONS[:2], ("a cat", (0.5, 0.6, 1, 1))]), (say_place, say_size))
    ):
        interrupt(tmp_path / str(index), prompt=prompt)
        with pytest.raises(ValueError, match="other settings: prompt is "):
            enlarge(tmp_path / str(index), prompt=other)


def test_a_function_is_asked_once_for_each_tile(tmp_path):
    boxes = []
    enlarge(tmp_path, prompt=lambda image, box: boxes.append(box) or "a photo")
    assert len(boxes) == len(set(boxes)) == 6


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_by_name(pipe, tmp_path, name):
    interrupt(tmp_path)
    changes, message = OTHER_SETTINGS[name]
    for model in (pipe.transformer, pipe.vae.encoder, pipe.text_encoder, pipe.dino_encoder):
        model.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=f"was saved by a call of other settings: {message}"):
        enlarge(tmp_path, **changes)
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
    "scheduler": lambda pipe: pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0)),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_refused_by_name(pipe, tmp_path, name):
    interrupt(tmp_path)
    OTHER_MODELS[name](pipe)
    with pytest.raises(ValueError, match=f"other settings: .*{name} is "):
        enlarge(tmp_path)


def test_another_empty_prompt_of_the_projector_is_refused(monkeypatch, tmp_path):
    carried = {"num_prompt_tokens": 16, "pooled_dim": 16}
    monkeypatch.setattr(worker_runs, "PIPE", tiny_pipeline(dino="dinov2", projector=carried))
    interrupt(tmp_path, prompt=None)
    worker_runs.PIPE.dino_projector.prompt_embeds += 1
    with pytest.raises(ValueError, match=r"other settings: .*dino_projector is "):
        enlarge(tmp_path, prompt=None)


def test_the_vae_may_change_its_dtype(pipe, tmp_path):
    """What it cannot decode in float16 can be decoded in float32."""
    expected = enlarge()
    interrupt(tmp_path)
    pipe.vae.to(torch.float64)
    assert torch.equal(enlarge(tmp_path), expected)


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


def test_values_are_told_apart_by_all_that_they_hold():
    """Arrays that run backwards, and the tones of pictures of 16 and 32 bits, which 8 bits make the same."""
    ramp = np.arange(12, dtype=np.float32).reshape(3, 4)
    deep = (ramp * 1000 + 300).astype(np.uint16)
    images = [Image.fromarray(values) for values in (deep, deep + 1, ramp * 40, ramp * 40 + 1e-3)]
    used = generator()
    torch.randn(1, generator=used)
    values = [ramp, ramp[::-1], ramp[:, ::-1], torch.from_numpy(ramp).half(), *images, generator(), generator(1), used]
    descriptions = [describe(value) for value in values]
    assert len(set(descriptions)) == len(values)
    assert describe(ramp[::-1]) == describe(ramp[::-1].copy())
    assert describe(ramp) == describe(torch.from_numpy(ramp))


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
    assert torch.equal(enlarge(tmp_path), expected)


class OwnScheduler(FlowMatchEulerDiscreteScheduler):
    pass


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler"),
        (FlowMatchLCMScheduler(), "FlowMatchLCMScheduler"),
        (OwnScheduler(), "OwnScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_schedulers_with_a_state_are_refused(pipe, tmp_path, scheduler, name):
    pipe.scheduler = scheduler
    expected = f"`scheduler` must be a FlowMatchEulerDiscreteScheduler without `stochastic_sampling`.* but is '{name}'"
    with pytest.raises(ValueError, match=expected):
        enlarge(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": ""}, "`folder` must be the path of a folder, but is ''"),
        ({"folder": 3}, "`folder` must be the path of a folder, but is 3"),
        ({"folder": "x", "every": 0}, "`every` must be a whole number of steps of at least 1, but is 0"),
        ({"folder": "x", "every": True}, "`every` must be .*, but is True"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be callable, but is 3"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "`callback_on_step_end_tensor_inputs` must be a list"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "has to be in .* but found"),
        ({"image": None}, "`image` must be a PIL image"),
        ({"upscale_factor": 9}, "`upscale_factor` must be a number from 1 to 8"),
    ],
)
def test_wrong_arguments_of_the_call(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        enlarge(tmp_path, **kwargs)


# ---- Faults of the disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a checkpoint .* Delete it"):
        enlarge(tmp_path)
    assert path.read_bytes() == content


def test_a_file_of_other_tensors(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(ValueError, match="of other settings: prompt is 'a photo', in the checkpoint None"):
        enlarge(tmp_path)


def test_a_folder_that_cannot_be_made(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(OSError, match="file"):
        enlarge(tmp_path / "file")


DESCRIBE_CALL = """
import json, sys
from PIL import Image
from diffusers import FlowMatchEulerDiscreteScheduler
from flux_dino_tile.calls import describe_call
from tiny_models import tiny_pipeline
pipe = tiny_pipeline()
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(sys.argv[1])
print(json.dumps(describe_call(pipe, {"image": Image.new("RGB", (32, 32)), "prompt": "a"})))
"""


def test_a_call_is_the_same_in_every_process(tmp_path):
    """FLUX.1's scheduler config leaves settings to their defaults, which diffusers lists in an order of chance."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0", "shift": 1.0}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    answers = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", DESCRIBE_CALL, str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        answers.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert answers[0] == answers[1]


def test_the_strength_of_an_ip_adapter_decides_the_canvas():
    transformer = tiny_transformer()
    transformer._load_ip_adapter_weights([tiny_ip_adapter(transformer)])
    before = describe_model(transformer)
    for processor in transformer.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.2]
    assert describe_model(transformer) != before


def test_an_offloaded_projector_still_brings_the_empty_prompt(tmp_path):
    """As `enable_sequential_cpu_offload` treats the parts, which it does with an accelerator only."""
    pipe = tiny_pipeline(dino="dinov2", projector={"num_prompt_tokens": 8, "pooled_dim": 16})
    arguments = {"image": Image.new("RGB", (32, 32), "teal"), "upscale_factor": 1, "num_inference_steps": 1}
    arguments |= {"output_type": "pt", "tile_size": 32, "tile_overlap": 0}
    expected = pipe(generator=torch.Generator().manual_seed(0), **arguments).images
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in pipe._exclude_from_cpu_offload:
            accelerate.cpu_offload(part, "cpu", offload_buffers=len(part._parameters) > 0)
    result = Checkpoint(tmp_path).run(pipe, generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(result, expected)


def test_a_full_disk_costs_the_checkpoint_and_not_the_image(tmp_path, caplog):
    """A limit on the size of files stands in for the full disk: the write ends in the middle."""
    interrupt(tmp_path, step=1)
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        result = enlarge(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(result, enlarge())
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == before
    assert "cannot be written, and the picture goes on without" in caplog.text
