"""Bad input: a `ValueError` that names the argument and shows its value, raised before any model runs."""

import math
import re
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

import pipeline_flux_dino_tile
from pipeline_flux_dino_tile import DinoProjector, FluxDinoTilePipeline
from tiny_models import (
    DINO_DIM,
    JOINT_ATTENTION_DIM,
    POOLED_DIM,
    tiny_components,
    tiny_dino,
    tiny_ip_adapter,
    tiny_projector,
    tiny_transformer,
)


NAN, INF = math.nan, math.inf
PHOTO = Image.new("RGB", (32, 24), "orange")  # 96 x 128 px, 6 x 8 tokens, at the default factor of 4
ARRAY = np.full((24, 32, 3), 0.5, dtype=np.float32)
PIXELS = torch.full((1, 3, 24, 32), 0.5)
LATENTS = torch.zeros(1, 4, 12, 16)
EMBEDS = torch.zeros(1, 8, JOINT_ATTENTION_DIM)
POOLED = torch.zeros(1, POOLED_DIM)
PACKED = torch.zeros(1, 48, 16)
FEATURES = torch.zeros(1, 1, 4, 4, DINO_DIM)
IP_EMBEDS = torch.zeros(1, 1, 8)
GENERATOR = torch.Generator()

NUMBERS = ["1", None, NAN, INF, -1, True, [1]]
COUNTS = [0, -1, 1.5, "2", NAN, True, [1]]


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = NAN
    return tensor


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


DEEP_NEGATIVE = Image.fromarray(np.linspace(-700, 65535, 768).astype(np.int32).reshape(24, 32))


# ---- Pipelines whose models must not run ---------------------------------------------------------------------------


def refuse_to_run(*args, **kwargs):
    raise AssertionError("a model ran")


@cache
def components() -> dict:
    """The parts that all pipelines share."""
    return {**tiny_components(), "dino_encoder": tiny_dino(), "dino_projector": tiny_projector()}


def tiny_vit(hidden_size=DINO_DIM):
    return ViTModel(ViTConfig(hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, image_size=32))


def tiny_clip():
    config = CLIPVisionConfig(hidden_size=DINO_DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return CLIPVisionModel(config)


def large_dino():
    encoder = tiny_dino()
    encoder.config.hidden_size = 2 * DINO_DIM
    return encoder


def ip_transformer():
    transformer = tiny_transformer()
    transformer._load_ip_adapter_weights([tiny_ip_adapter(transformer)])
    return transformer


def transformer_with(**attributes):
    transformer = tiny_transformer()
    for processor in transformer.attn_processors.values():
        for name, value in attributes.items():
            setattr(processor, name, value)
    return transformer


PIPELINES = {
    "full": dict,
    "no text": lambda: dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]),
    "no projector": lambda: {"dino_encoder": None, "dino_projector": None},
    "no encoder": lambda: {"dino_encoder": None},
    "ViT": lambda: {"dino_encoder": tiny_vit()},
    "CLIP": lambda: {"dino_encoder": tiny_clip()},
    "large encoder": lambda: {"dino_encoder": large_dino()},
    "wide projector": lambda: {"dino_projector": tiny_projector(out_dim=48)},
    "layer 7": lambda: {"dino_projector": tiny_projector(layers=[7])},
    "IP-Adapter": lambda: {"transformer": ip_transformer()},
    "flash": lambda: {"transformer": transformer_with(_attention_backend=AttentionBackendName.FLASH)},
    "native flash": lambda: {"transformer": transformer_with(_attention_backend=AttentionBackendName._NATIVE_FLASH)},
    "parallel": lambda: {"transformer": transformer_with(_parallel_config=object())},
    "karras": lambda: {"scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)},
    "LCM": lambda: {"scheduler": FlowMatchLCMScheduler()},
    "Heun": lambda: {"scheduler": FlowMatchHeunDiscreteScheduler()},
    "UniPC": lambda: {"scheduler": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")},
    "Euler of another kind": lambda: {"scheduler": EulerDiscreteScheduler()},
    "DDIM": lambda: {"scheduler": DDIMScheduler()},
    "Fill": lambda: {"transformer": tiny_transformer(in_channels=40)},
    "carried prompt": lambda: {"dino_projector": tiny_projector(num_prompt_tokens=8, pooled_dim=POOLED_DIM)},
    "other pooled width": lambda: {"dino_projector": tiny_projector(num_prompt_tokens=8, pooled_dim=POOLED_DIM + 1)},
}


@cache
def pipeline(name: str) -> FluxDinoTilePipeline:
    """A pipeline whose models raise an `AssertionError` when they run."""
    pipe = FluxDinoTilePipeline(**{**components(), **PIPELINES[name]()})
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.forward = refuse_to_run
    pipe.vae.encode = pipe.vae.decode = refuse_to_run
    return pipe


def describe(value) -> str:
    """What a message shows of `value`, after "but is": type and shape of a tensor, else the start of its `repr`."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return re.escape(f", but is {type(value).__name__} of shape {tuple(value.shape)}.")
    return re.escape(f", but is {value!r:.200}.")


def describe_image(value) -> str:
    """The same of what is no image at all, of which a message shows the type."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return describe(value)
    return re.escape(f", but is ['{type(value).__name__}'].")


# Said by diffusers, or of what is missing: what would be right stands in a sentence of its own.
REMEDIES = re.compile(r"[Mm]ake sure to|has to be in|Call `load_dino_projector`|Pass `dino_embeds`|Pass pixels")


def assert_refused(function, kwargs: dict, argument: str, shown: str) -> None:
    """The message names the argument, says what would be right and what is; `shown` is a regular expression."""
    with pytest.raises(ValueError, match=f"`{argument}`") as error:
        function(**kwargs)
    message = str(error.value)
    assert type(error.value) is ValueError
    assert re.search(shown, message), f"{shown!r} is not in {message!r}"
    assert re.match(rf"`{argument}` must be .+, but is .+\.$", message, re.DOTALL) or REMEDIES.search(message), message


def test_the_guard_sees_a_model_run():
    """So that the tables below cannot pass for the wrong reason: the call that they spoil is a good one."""
    for name, kwargs in {
        "full": {"prompt": "a"},
        "no text": {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED},
        "no projector": {},
        "no encoder": {"dino_embeds": FEATURES},
        "wide projector": {"dino_conditioning_scale": 0},
        "flash": {"dino_conditioning_scale": 1},
        "native flash": {"dino_conditioning_scale": 1},
        "parallel": {"dino_conditioning_scale": 1},
        "karras": {"strength": 0.5},
        "LCM": {},
        "carried prompt": {"max_sequence_length": 8},
        "IP-Adapter": {"ip_adapter_image_embeds": IP_EMBEDS, "negative_ip_adapter_image_embeds": IP_EMBEDS},
    }.items():
        with pytest.raises(AssertionError, match="a model ran"):
            pipeline(name)(image=PHOTO, **kwargs)
    with pytest.raises(AssertionError, match="a model ran"):
        pipeline("full").encode_dino(PHOTO)


# ---- One wrong value -----------------------------------------------------------------------------------------------

BAD_IMAGES = [None, "photo.jpg", b"photo", 3, True, {"image": PHOTO}]
BAD_IMAGE_SHAPES = [
    ARRAY[..., 0],
    ARRAY[None, None],
    ARRAY[:0],
    np.dstack([ARRAY, ARRAY[..., :1]]),
    PIXELS[0, 0],
    PIXELS[..., :0],
    PIXELS[0].permute(1, 2, 0),
    LATENTS[0],
]
BAD_SIZES = [0, -16, 64.0, "64", NAN, INF, True, [64]]
BAD_FACTORS = ["4", NAN, INF, 0, 0.5, -2, 8.5, True, [2]]
BAD_TILE_SIZES = [0, -64, 8, 40, 64.0, NAN, "64", True, (64,), (64, 64, 64), (64, 40), [64, "64"], {64}]
BAD_OVERLAPS = [-1, 1.5, "64", None, NAN, INF, True, (64, 64)]

BAD_CALL_VALUES = {
    "prompt": [3, True, ("a", "b"), [], [3], ["a", None], {"a": 1}],
    "prompt_2": [3, True, ["a", 3]],
    "true_cfg_scale": NUMBERS,
    "image": BAD_IMAGES + BAD_IMAGE_SHAPES,
    "strength": ["1", NAN, INF, -0.1, 1.1, True, [1], 0, 0.0],
    "num_inference_steps": COUNTS,
    "sigmas": [[], (), [NAN], [1.0, NAN], [0.5, 0.75], [0.5, 0.5], [1.5, 0.5], [0.5, 0.0], [0.5, -0.1], [INF, 0.5]]
    + [["1"], [None], "1", 0.5, True],
    "guidance_scale": ["1", NAN, INF, -1, True, [1]],
    "num_images_per_prompt": [*COUNTS, None],
    "generator": [3, "seed", True, [3], (GENERATOR,)],
    "latents": [3, "noise", PACKED.tolist(), PACKED.numpy(), PACKED[0], PACKED[:, 1:], PACKED[..., 1:], LATENTS]
    + [PACKED.repeat(2, 1, 1)],
    "output_type": ["jpeg", None, 3, True, ["pil"], "PIL", np.array(["pil", "np"])],
    "joint_attention_kwargs": [3, "scale", [("scale", 1)], True],
    "callback_on_step_end": [3, "print", [print], True],
    "callback_on_step_end_tensor_inputs": [3, True, "latents"],
    "max_sequence_length": [*COUNTS, 513],
    "upscale_factor": BAD_FACTORS,
    "start_sigma": ["1", NAN, INF, 0, 0.001, -1, 1.1, True, [1]],
    "tile_size": BAD_TILE_SIZES,
    "tile_overlap": BAD_OVERLAPS,
    "tile_batch_size": [*COUNTS, None],
    "dino_conditioning_scale": [*NUMBERS, 101],
    "dino_guidance_start": [*NUMBERS, 1.1],
    "dino_guidance_end": [*NUMBERS, 1.1],
    "dino_embeds": [3, "cat", FEATURES.tolist(), FEATURES.numpy(), FEATURES[0], FEATURES[..., 1:]]
    + [FEATURES.repeat(2, 1, 1, 1, 1), FEATURES.repeat(1, 2, 1, 1, 1), FEATURES[:, :, :0]],
    "vae_residual": ["yes", 3, 0, 1, 1.0, [True], np.array([True, False]), torch.ones(2), np.True_],
    "first_step": [-1, 1.5, "1", None, NAN, True, [1]],
    "frozen_tiles": [[-1], [1], [0.0], ["0"], [True], (0, 7)],
    "frozen_latents": [
        3,
        "clean",
        PACKED.tolist(),
        PACKED.numpy(),
        PACKED[0],
        PACKED[:, 1:],
        PACKED[..., 1:],
        LATENTS,
    ],
}


def one_by_one(table: dict) -> list:
    return [
        pytest.param(argument, value, id=f"{argument}-{index}")
        for argument, values in table.items()
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(("argument", "value"), one_by_one(BAD_CALL_VALUES))
def test_call_refuses_a_wrong_value(argument, value):
    shown = (describe_image if argument == "image" else describe)(value)
    assert_refused(pipeline("full"), {"image": PHOTO, argument: value}, argument, shown)


@pytest.mark.parametrize(("argument", "value"), one_by_one({"height": BAD_SIZES, "width": BAD_SIZES}))
def test_every_method_refuses_a_wrong_size(argument, value):
    """The other side is a good one."""
    pipe, size = pipeline("full"), {"height": 96, "width": 128, argument: value}
    for function in (pipe, pipe.encode_dino, pipe.get_output_size):
        assert_refused(function, {"image": PHOTO, **size}, argument, describe(value))
    for function in (pipe.plan_tiles, pipeline_flux_dino_tile.plan_tiles):
        assert_refused(function, size, argument, describe(value))


@pytest.mark.parametrize(
    ("argument", "value"),
    one_by_one(
        {
            "image": BAD_IMAGES + BAD_IMAGE_SHAPES,
            "upscale_factor": BAD_FACTORS,
            "tile_size": BAD_TILE_SIZES,
            "tile_overlap": BAD_OVERLAPS,
        }
    ),
)
def test_methods_refuse_a_wrong_value(argument, value):
    pipe, shown = pipeline("full"), (describe_image if argument == "image" else describe)(value)
    if argument.startswith("tile"):
        assert_refused(pipe.plan_tiles, {"height": 96, "width": 128, argument: value}, argument, shown)
    elif argument != "image":
        assert_refused(pipe.get_output_size, {"image": PHOTO, argument: value}, argument, shown)
    assert_refused(pipe.encode_dino, {"image": PHOTO, argument: value}, argument, shown)


@pytest.mark.parametrize("value", [*BAD_IMAGES, [], ARRAY[..., 0], ARRAY[None, None], ARRAY[:0], PIXELS[..., :0]])
def test_output_size_of_what_has_no_size(value):
    """The pixels are checked by the call."""
    assert_refused(pipeline("full").get_output_size, {"image": value}, "image", describe(value))


@pytest.mark.parametrize(
    ("argument", "value"),
    one_by_one({"pixels_per_token": [0, -16, "16", 1.5, None, True]}),
)
def test_plan_function_refuses_a_wrong_value(argument, value):
    plan = pipeline_flux_dino_tile.plan_tiles
    assert_refused(plan, {"height": 96, "width": 128, argument: value}, argument, describe(value))


# ---- Values that do not fit each other, or the pipeline ------------------------------------------------------------


class Case(NamedTuple):
    """Arguments of a call beside the image; the message names `argument` and holds the regular expression `shown`."""

    argument: str
    shown: str
    kwargs: dict
    pipeline: str = "full"


EMBEDDED = {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED}
NEGATIVE = {
    "negative_prompt_embeds": EMBEDS,
    "negative_pooled_prompt_embeds": POOLED,
    "true_cfg_scale": 2,
    "max_sequence_length": EMBEDS.shape[1],
}
NEGATIVE_IP = {"negative_ip_adapter_image_embeds": [IP_EMBEDS]}
HALF = {"dino_conditioning_scale": 0.5}

NO_DINO = {"dino_conditioning_scale": 0}
ON = ("a dog", (0, 0, 64, 64))
BAD_REGIONS = {
    "a string alone": "a dog",
    "nothing": (),
    "a box alone": ((0, 0, 64, 64),),
    "three parts": ("a dog", (0, 0, 64, 64), 1),
    "the box first": ((0, 0, 64, 64), "a dog"),
    "no string": (3, (0, 0, 64, 64)),
    "None as prompt": (None, None),
    "a box of text": ("a dog", "left"),
    "three numbers": ("a dog", (0, 0, 64)),
    "five numbers": ("a dog", (0, 0, 64, 64, 64)),
    "a number as text": ("a dog", (0, 0, "64", 64)),
    "an array": ("a dog", np.array([0, 0, 64, 64])),
    "no width": ("a dog", (64, 0, 64, 64)),
    "right before left": ("a dog", (64, 0, 32, 64)),
    "bottom above top": ("a dog", (0, 64, 64, 32)),
    "beyond the right": ("a dog", (0, 0, 129, 64)),
    "beyond the bottom": ("a dog", (0, 0, 64, 97)),
    "below 0": ("a dog", (-1, 0, 64, 64)),
    "a fraction above 1": ("a dog", (0, 0, 1.5, 200)),
    "a negative fraction": ("a dog", (-0.1, 0, 0.5, 0.5)),
    "a fraction of no pixel": ("a dog", (0, 0, 0.001, 1)),
    "NaN": ("a dog", (0, 0, NAN, 64)),
    "NaN in fractions": ("a dog", (0, 0, 1, NAN)),
    "infinite": ("a dog", (0, 0, INF, 64)),
}

BAD_COMBINATIONS = {
    # Images
    "no image": Case("image", "list", {"image": []}),
    "image and nothing": Case("image", "NoneType", {"image": [PHOTO, None]}),
    "mixed kinds": Case("image", "ndarray", {"image": [PHOTO, ARRAY]}),
    "image sizes differ": Case("image", r"\(32, 24\)", {"image": [PHOTO, PHOTO.rotate(90, expand=True)]}),
    "array sizes differ": Case("image", r"\(12, 32\)", {"image": [ARRAY, ARRAY[:12]]}),
    "PIL image without pixels": Case("image", r"\(4, 0\)", {"image": Image.new("RGB", (0, 4))}),
    "list of latents": Case("image", r"\(1, 4, 12, 16\)", {"image": [LATENTS]}),
    "bytes": Case("image", "uint8", {"image": (ARRAY * 255).astype(np.uint8)}),
    "tensor of bytes": Case("image", "uint8", {"image": PIXELS.to(torch.uint8)}),
    "whole numbers": Case("image", "int64", {"image": ARRAY.astype(np.int64)}),
    "truth values": Case("image", "bool", {"image": PIXELS > 0}),
    "complex numbers": Case("image", "complex64", {"image": ARRAY.astype(np.complex64)}),
    "objects": Case("image", r"dtype\('O'\)", {"image": ARRAY.astype(object)}),
    "above 1": Case("image", "1.5", {"image": 3 * ARRAY}),
    "below 0": Case("image", "-0.5", {"image": -PIXELS}),
    "infinite": Case("image", "inf", {"image": INF * PIXELS}),
    "NaN in an array": Case("image", "nan", {"image": np.where(np.arange(3) == 1, NAN, ARRAY)}),
    "NaN in a tensor": Case("image", "nan", {"image": with_nan(PIXELS)}),
    "NaN in the second": Case("image", "nan", {"image": [PIXELS, with_nan(PIXELS)]}),
    "far above 1 in one place": Case("image", r"but is \(0.25, 1.25\)", {"image": with_value(PIXELS / 2, 1.25)}),
    "too far above 1 for rounding": Case(
        "image", r"but is \(0.5, 1.00[12]\d*\)", {"image": with_value(PIXELS, 1.002)}
    ),
    "too far below 0 for rounding": Case("image", r"but is \(-0.002\d*, 0.5\)", {"image": with_value(PIXELS, -0.002)}),
    "packed latents": Case("image", "not packed latents", {"image": 3 * torch.ones_like(PACKED)}),
    "two packed latents": Case("image", "unpacked latents", {"image": PACKED.repeat(2, 1, 1)}),
    "a tone below black in 16 bits": Case("image", r"but is \(-0.01\d*, 1.0\)", {"image": DEEP_NEGATIVE}),
    "NaN in latents": Case("image", "NaN", {"image": with_nan(LATENTS), "dino_embeds": FEATURES}),
    "latents for DINO": Case("image", "latents", {"image": LATENTS}),
    "latents of half a token": Case(
        "image", r"\(1, 4, 11, 16\)", {"image": LATENTS[:, :, :11], "dino_embeds": FEATURES}
    ),
    "latents without pixels": Case("image", r"12, 0\)", {"image": LATENTS[..., :0], "dino_embeds": FEATURES}),
    "latents to enlarge": Case("image", "96x128", {"image": LATENTS, "upscale_factor": 2}),
    "latents of another size": Case("image", "96x128", {"image": LATENTS, "height": 96, "width": 96}),
    "latents to go on with are missing": Case("first_step", "`latents` to go on from, but is 1", {"first_step": 1}),
    "beyond the last step": Case(
        "first_step",
        "the 2 steps of this call, but is 3",
        {"first_step": 3, "latents": PACKED, "num_inference_steps": 2},
    ),
    "frozen latents of another size": Case(
        "frozen_latents", r"\(1, 48, 16\)", {"upscale_factor": 3, "frozen_latents": PACKED, "frozen_tiles": [0]}
    ),
    "NaN in frozen latents": Case("frozen_latents", "NaN", {"frozen_latents": with_nan(PACKED), "frozen_tiles": [0]}),
    "a frozen tile that is not there": Case(
        "frozen_tiles", r"the plan's 4 tiles, but is \[4\]", {"frozen_tiles": [4], "tile_size": 80, "tile_overlap": 16}
    ),
    "frozen tiles as one number": Case("frozen_tiles", "is 3", {"frozen_tiles": 3}),
    "frozen tiles as a tensor": Case(
        "frozen_tiles", r"Tensor of shape \(1,\)", {"frozen_tiles": torch.zeros(1, dtype=int)}
    ),
    # Sizes and tiles
    "height alone": Case("width", "with `height`, 96, but is None", {"height": 96}),
    "width alone": Case("height", "with `width`, 128, but is None", {"width": 128}),
    "factor and size": Case("upscale_factor", "3", {"upscale_factor": 3, "height": 96, "width": 128}),
    "factor and height": Case("upscale_factor", "3", {"upscale_factor": 3, "height": 96}),
    "overlap fills the tile": Case("tile_overlap", "64", {"tile_size": 64, "tile_overlap": 64}),
    "default overlap fills the tile": Case("tile_overlap", "64", {"tile_size": 32}),
    "overlap fills one side": Case("tile_overlap", "33", {"tile_size": (96, 48), "tile_overlap": 33}),
    "overlap leaves no tile": Case("tile_overlap", "2048", {"height": 2304, "width": 2304, "tile_overlap": 2048}),
    # The schedule
    "strength and start_sigma": Case("strength", r"0\.5", {"strength": 0.5, "start_sigma": 0.4}),
    "sigmas and start_sigma": Case("sigmas", r"\[0\.5\]", {"sigmas": [0.5], "start_sigma": 0.4}),
    "sigmas as one number": Case("sigmas", r"0\.5", {"sigmas": np.array(0.5)}),
    "table of sigmas": Case("sigmas", r"\(2, 2\)", {"sigmas": np.array([[1, 1], [0.5, 0.5]])}),
    "start_sigma out of reach": Case("start_sigma", r"0\.4", {"start_sigma": 0.4}, "karras"),
    "Heun": Case("scheduler", "'FlowMatchHeunDiscreteScheduler'", {}, "Heun"),
    "UniPC": Case("scheduler", "'UniPCMultistepScheduler'", {}, "UniPC"),
    "Euler that matches no flow": Case(
        "scheduler", "'EulerDiscreteScheduler'", {"strength": 0.5}, "Euler of another kind"
    ),
    "DDIM": Case("scheduler", "'DDIMScheduler'", {"sigmas": [0.5]}, "DDIM"),
    "transformer with more input channels": Case("transformer", "16 input channels, .* but is 40", {}, "Fill"),
    # Prompts and batches
    "negative prompt of another type": Case("negative_prompt", "3", {"negative_prompt": 3, "true_cfg_scale": 2}),
    "negative prompt of numbers": Case("negative_prompt", "3", {"negative_prompt": [3], "true_cfg_scale": 2}),
    "no negative prompt": Case("negative_prompt", r"\[\]", {"negative_prompt": [], "true_cfg_scale": 2}),
    "two negative prompts": Case("negative_prompt", "2", {"negative_prompt": ["a", "b"], "true_cfg_scale": 2}),
    "second negative prompt of another type": Case(
        "negative_prompt_2", "3", {"negative_prompt": "a", "negative_prompt_2": 3, "true_cfg_scale": 2}
    ),
    "two second negative prompts": Case(
        "negative_prompt_2", "2", {"negative_prompt": "a", "negative_prompt_2": ["a", "b"], "true_cfg_scale": 2}
    ),
    "two second prompts": Case("prompt_2", "2", {"prompt": "a", "prompt_2": ["a", "b"]}),
    "three prompts for two images": Case("prompt", "3", {"prompt": ["a", "b", "c"], "image": [PHOTO, PHOTO]}),
    "three embeddings for two images": Case(
        "prompt_embeds",
        "3",
        {
            "image": [PHOTO, PHOTO],
            "prompt_embeds": EMBEDS.repeat(3, 1, 1),
            "pooled_prompt_embeds": POOLED.repeat(3, 1),
        },
    ),
    "one generator for two images": Case(
        "generator", r"2, but is \[<", {"image": [PHOTO, PHOTO], "generator": [GENERATOR]}
    ),
    "two generators for one result": Case("generator", r"1, but is \[<", {"generator": [GENERATOR] * 2}),
    "no generator": Case("generator", r"1, but is \[\]", {"generator": []}),
    "a list of nothing": Case("generator", r"1, but is \[None\]", {"generator": [None]}),
    "one generator for two results": Case(
        "generator", r"2, but is \[<", {"num_images_per_prompt": 2, "generator": [GENERATOR]}
    ),
    "latents for one of two": Case("latents", r"\(1, 48, 16\)", {"num_images_per_prompt": 2, "latents": PACKED}),
    "latents of another size of output": Case("latents", r"\(1, 48, 16\)", {"upscale_factor": 3, "latents": PACKED}),
    "NaN in the noise": Case("latents", "NaN", {"latents": with_nan(PACKED)}),
    # Prompts that differ from tile to tile
    **{
        f"a region: {name}": Case(
            "prompt",
            rf"pairs of a string and a box .* 128x96 px, .* but is {re.escape(repr(region))}\.",
            {"prompt": [ON, region]},
        )
        for name, region in BAD_REGIONS.items()
    },
    "regions of two images": Case("image", "one image .* but is 2", {"image": [PHOTO, PHOTO], "prompt": [ON]}),
    "a function for two images": Case("image", "one image .* but is 2", {"image": [PHOTO, PHOTO], "prompt": print}),
    "regions and a second prompt": Case("prompt_2", "left out .* but is 'a'", {"prompt": [ON], "prompt_2": "a"}),
    "a function and a second prompt": Case("prompt_2", "left out .* but is 'a'", {"prompt": print, "prompt_2": "a"}),
    "a function for latents": Case("image", "pixels, not latents", {"image": LATENTS, "prompt": print, **NO_DINO}),
    "regions and embeddings": Case("prompt_embeds", "a dog", {**EMBEDDED, "prompt": [ON]}),
    "a function and embeddings": Case("prompt_embeds", "function print", {**EMBEDDED, "prompt": print}),
    "regions and too many negative prompts": Case(
        "negative_prompt", "but is 2", {"prompt": [ON, ON], "negative_prompt": ["a", "b"], "true_cfg_scale": 2}
    ),
    "regions as negative prompt": Case("negative_prompt", r"a dog", {"negative_prompt": [ON], "true_cfg_scale": 2}),
    "regions without text encoders": Case("prompt", "None without .*a dog", {"prompt": [ON]}, "no text"),
    "a function without text encoders": Case("prompt", "None without .*function print", {"prompt": print}, "no text"),
    # Embeddings
    "prompt and embeddings": Case("prompt_embeds", "cat", {**EMBEDDED, "prompt": "cat"}),
    "second prompt and embeddings": Case("prompt_2", "cat", {**EMBEDDED, "prompt_2": "cat"}),
    "embeddings alone": Case("pooled_prompt_embeds", "have to be passed", {"prompt_embeds": EMBEDS}),
    "pooled embeddings alone": Case("pooled_prompt_embeds", "prompt_embeds", {"pooled_prompt_embeds": POOLED}),
    "embeddings of another dimension": Case(
        "prompt_embeds", r"\(1, 8, 31\)", {**EMBEDDED, "prompt_embeds": EMBEDS[..., 1:]}
    ),
    "embeddings without batch": Case("prompt_embeds", r"\(8, 32\)", {**EMBEDDED, "prompt_embeds": EMBEDS[0]}),
    "embeddings of nobody": Case(
        "prompt_embeds", r"\(0, 8, 32\)", {"prompt_embeds": EMBEDS[:0], "pooled_prompt_embeds": POOLED[:0]}
    ),
    "embeddings as a list": Case("prompt_embeds", r"is \[\[\[0", {**EMBEDDED, "prompt_embeds": EMBEDS.tolist()}),
    "NaN in embeddings": Case("prompt_embeds", "NaN", {**EMBEDDED, "prompt_embeds": with_nan(EMBEDS)}),
    "pooled embeddings of two": Case(
        "pooled_prompt_embeds", r"\(2, 16\)", {**EMBEDDED, "pooled_prompt_embeds": POOLED.repeat(2, 1)}
    ),
    "pooled embeddings of another dimension": Case(
        "pooled_prompt_embeds", r"\(1, 15\)", {**EMBEDDED, "pooled_prompt_embeds": POOLED[:, 1:]}
    ),
    "NaN in pooled embeddings": Case(
        "pooled_prompt_embeds", "NaN", {**EMBEDDED, "pooled_prompt_embeds": with_nan(POOLED)}
    ),
    "negative prompt and embeddings": Case("negative_prompt_embeds", "cat", {**NEGATIVE, "negative_prompt": "cat"}),
    "negative embeddings alone": Case(
        "negative_pooled_prompt_embeds", "have to be passed", {**NEGATIVE, "negative_pooled_prompt_embeds": None}
    ),
    "negative embeddings of another length": Case(
        "negative_prompt_embeds", "7", {**EMBEDDED, **NEGATIVE, "negative_prompt_embeds": EMBEDS[:, 1:]}
    ),
    "negative embeddings of three": Case(
        "negative_prompt_embeds",
        "3",
        {
            **NEGATIVE,
            "negative_prompt_embeds": EMBEDS.repeat(3, 1, 1),
            "negative_pooled_prompt_embeds": POOLED.repeat(3, 1),
        },
    ),
    "NaN in negative embeddings": Case(
        "negative_prompt_embeds", "NaN", {**NEGATIVE, "negative_prompt_embeds": with_nan(EMBEDS)}
    ),
    "NaN in negative pooled embeddings": Case(
        "negative_pooled_prompt_embeds", "NaN", {**NEGATIVE, "negative_pooled_prompt_embeds": with_nan(POOLED)}
    ),
    "more tokens than the projector carries": Case(
        "max_sequence_length", "8 of the .* but is 16", {"max_sequence_length": 16}, "carried prompt"
    ),
    "fewer tokens than the projector carries": Case(
        "max_sequence_length", "8 of the .* but is 7", {"max_sequence_length": 7}, "carried prompt"
    ),
    "carried prompt of another width": Case(
        "dino_projector", r"\(32, 16\), but is \(32, 17\)", {"prompt": "a"}, "other pooled width"
    ),
    "prompt without text encoders": Case("prompt", "cat", {"prompt": "cat"}, "no text"),
    "no prompt and no text encoders": Case("prompt", "None", {}, "no text"),
    "negative prompt without text encoders": Case(
        "negative_prompt", "cat", {**EMBEDDED, "negative_prompt": "cat", "true_cfg_scale": 2}, "no text"
    ),
    # IP-Adapter
    "image without adapter": Case("ip_adapter_image", "load_ip_adapter", {"ip_adapter_image": PHOTO}),
    "embeddings without adapter": Case(
        "ip_adapter_image_embeds", "load_ip_adapter", {"ip_adapter_image_embeds": [IP_EMBEDS]}
    ),
    "negative image without adapter": Case(
        "negative_ip_adapter_image", "load_ip_adapter", {"negative_ip_adapter_image": PHOTO}
    ),
    "image without image encoder": Case(
        "ip_adapter_image", "image_encoder", {"ip_adapter_image": PHOTO}, "IP-Adapter"
    ),
    "adapter embeddings of three for two prompts": Case(
        "ip_adapter_image_embeds",
        "1, or 2 .*but is 3",
        {**NEGATIVE_IP, "prompt": ["a", "b"], "ip_adapter_image_embeds": [IP_EMBEDS.repeat(3, 1, 1)]},
        "IP-Adapter",
    ),
    "two embeddings for one adapter": Case(
        "ip_adapter_image_embeds", "2", {"ip_adapter_image_embeds": [IP_EMBEDS, IP_EMBEDS]}, "IP-Adapter"
    ),
    "adapter embeddings without batch": Case(
        "ip_adapter_image_embeds",
        r"\(1, 8\)",
        {**NEGATIVE_IP, "ip_adapter_image_embeds": [IP_EMBEDS[0]]},
        "IP-Adapter",
    ),
    "adapter embeddings of another dimension": Case(
        "ip_adapter_image_embeds",
        r"\(1, 1, 7\)",
        {**NEGATIVE_IP, "ip_adapter_image_embeds": [IP_EMBEDS[..., 1:]]},
        "IP-Adapter",
    ),
    "negative adapter embeddings of another dimension": Case(
        "negative_ip_adapter_image_embeds",
        r"\(1, 1, 7\)",
        {"ip_adapter_image_embeds": [IP_EMBEDS], "negative_ip_adapter_image_embeds": [IP_EMBEDS[..., 1:]]},
        "IP-Adapter",
    ),
    "NaN in adapter embeddings": Case(
        "ip_adapter_image_embeds",
        "NaN",
        {**NEGATIVE_IP, "ip_adapter_image_embeds": [with_nan(IP_EMBEDS)]},
        "IP-Adapter",
    ),
    # The callback
    "another callback input": Case(
        "callback_on_step_end_tensor_inputs",
        r"in \['latents', 'prompt_embeds'\], but found \['noise'\]",
        {"callback_on_step_end_tensor_inputs": ["noise"]},
    ),
    "one callback input more": Case(
        "callback_on_step_end_tensor_inputs",
        r"found \['image'\]",
        {"callback_on_step_end_tensor_inputs": ["latents", "image"]},
    ),
    "no callback inputs": Case(
        "callback_on_step_end_tensor_inputs",
        "None",
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": None},
    ),
    "the residual of latents": Case(
        "vae_residual", "with latents", {"image": LATENTS, "vae_residual": True, "dino_conditioning_scale": 0}
    ),
    "a residual at the end": Case("vae_residual", "with latents", {"output_type": "latent", "vae_residual": True}),
    # DINO
    "start after end": Case("dino_guidance_end", r"0\.2", {"dino_guidance_start": 0.8, "dino_guidance_end": 0.2}),
    "no whole step in the window": Case(
        "dino_guidance_end",
        r"0\.3, by a whole one of 2 steps, but is 0\.4",
        {"dino_guidance_start": 0.3, "dino_guidance_end": 0.4, "num_inference_steps": 2},
    ),
    "window that ends at once": Case(
        "dino_guidance_end", "of 2 steps, but is 0", {"dino_guidance_end": 0, "num_inference_steps": 2}
    ),
    "window that starts at the end": Case(
        "dino_guidance_end", "1, by .* but is 1.0", {"dino_guidance_start": 1, "dino_embeds": FEATURES}
    ),
    "features without projector": Case("dino_embeds", "no projector", {"dino_embeds": FEATURES}, "no projector"),
    "features of other tiles": Case(
        "dino_embeds", r"\(1, 1, 4, 4, 24\)", {"dino_embeds": FEATURES, "tile_size": 80, "tile_overlap": 16}
    ),
    "features of one of two": Case(
        "dino_embeds", r"\(1, 1, 4, 4, 24\)", {"dino_embeds": FEATURES, "image": [PHOTO] * 2}
    ),
    "NaN in features": Case("dino_embeds", "NaN", {"dino_embeds": with_nan(FEATURES)}),
    "projector without encoder": Case("dino_encoder", "is missing", {}, "no encoder"),
    "encoder is a ViT": Case("dino_encoder", "'vit'", {}, "ViT"),
    "encoder is a CLIP": Case("dino_encoder", "clip", {}, "CLIP"),
    "encoder of another size": Case("dino_encoder", "24 .* 48", {}, "large encoder"),
    "projector of another transformer": Case("dino_projector", r"\(32, 16\), but is \(48, 16\)", {}, "wide projector"),
    "projector of another transformer with features": Case(
        "dino_projector", r"\(32, 16\), but is \(48, 16\)", {"dino_embeds": FEATURES}, "wide projector"
    ),
    "a layer that the encoder lacks": Case("dino_projector", "7", {}, "layer 7"),
    # Backends that cannot weigh the DINO keys
    "mask of the caller": Case(
        "joint_attention_kwargs", "attention_mask", {**HALF, "joint_attention_kwargs": {"attention_mask": PIXELS}}
    ),
    "backend without mask": Case("dino_conditioning_scale", "'flash', .* but is 0.5", HALF, "flash"),
    "native flash in float32": Case("dino_conditioning_scale", "'_native_flash', .* but is 0.5", HALF, "native flash"),
    "context parallelism": Case("dino_conditioning_scale", r"0\.5", HALF, "parallel"),
}


@pytest.mark.parametrize("case", BAD_COMBINATIONS.values(), ids=list(BAD_COMBINATIONS))
def test_call_refuses_what_does_not_fit(case):
    assert_refused(pipeline(case.pipeline), {"image": PHOTO, **case.kwargs}, case.argument, case.shown)


def test_a_function_that_returns_no_string_is_refused():
    message = r"`prompt\(image, box\)` must be a string, but is 3\."
    with pytest.raises(ValueError, match=message):
        pipeline("full")(image=PHOTO, prompt=lambda image, box: 3)


BAD_COMBINATIONS_FOR_METHODS = {
    name: case
    for name, case in BAD_COMBINATIONS.items()
    if not name.startswith("latents")
    and case.kwargs.keys() <= {"image", "height", "width", "upscale_factor", "tile_size", "tile_overlap"}
    and case.pipeline in ("full", "ViT", "CLIP", "large encoder", "wide projector", "layer 7")
}


@pytest.mark.parametrize("case", BAD_COMBINATIONS_FOR_METHODS.values(), ids=list(BAD_COMBINATIONS_FOR_METHODS))
def test_encode_dino_refuses_what_does_not_fit(case):
    assert_refused(pipeline(case.pipeline).encode_dino, {"image": PHOTO, **case.kwargs}, case.argument, case.shown)


@pytest.mark.parametrize("name", ["no projector", "no encoder"])
def test_encode_dino_needs_encoder_and_projector(name):
    assert_refused(pipeline(name).encode_dino, {"image": PHOTO}, "encode_dino", "load_dino_projector")


# ---- Loading a projector -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    one_by_one(
        {
            "pretrained_model_name_or_path": [None, 3, True, ["folder"], tiny_projector],
            "subfolder": [3, ["dino_projector"]],
            "dino_encoder": [3, True, torch.nn.Linear(2, 2), tiny_dino],
        }
    ),
)
def test_load_dino_projector_refuses_a_wrong_type(argument, value, tmp_path, monkeypatch):
    """Before anything is asked of the Hub."""
    folder = tmp_path / "dino_projector"
    tiny_projector().save_pretrained(folder)
    monkeypatch.setattr("pipeline_flux_dino_tile.AutoModel.from_pretrained", refuse_to_run)
    if argument == "pretrained_model_name_or_path":
        monkeypatch.setattr(DinoProjector, "from_pretrained", refuse_to_run)
    kwargs = {"pretrained_model_name_or_path": tmp_path, argument: value}
    assert_refused(pipeline("no projector").load_dino_projector, kwargs, argument, describe(value))


@pytest.mark.parametrize(
    ("projector", "encoder", "argument", "shown"),
    [
        ({}, tiny_vit, "dino_encoder", "'vit'"),
        ({}, tiny_clip, "dino_encoder", "clip"),
        ({}, large_dino, "dino_encoder", "24 .* 48"),
        ({"in_dim": 2 * DINO_DIM}, tiny_dino, "dino_encoder", "48 .* 24"),
        ({"out_dim": 48}, tiny_dino, "dino_projector", r"\(32, 16\), but is \(48, 16\)"),
        ({"layers": [7]}, tiny_dino, "dino_projector", "7"),
    ],
)
def test_load_dino_projector_refuses_parts_that_do_not_fit(projector, encoder, argument, shown, tmp_path):
    """And leaves the pipeline as it was."""
    tiny_projector(**projector).save_pretrained(tmp_path)
    pipe = pipeline("no projector")
    kwargs = {"pretrained_model_name_or_path": tmp_path, "dino_encoder": encoder()}
    assert_refused(pipe.load_dino_projector, kwargs, argument, shown)
    assert pipe.dino_encoder is None and pipe.dino_projector is None


@pytest.mark.parametrize(
    ("argument", "value"),
    one_by_one({"token_grid": COUNTS, "position_mode": ["sin", None, 3, True, np.array(["zero", "tile"])]}),
)
def test_projector_config_is_checked(argument, value):
    assert_refused(tiny_projector, {argument: value}, argument, describe(value))
