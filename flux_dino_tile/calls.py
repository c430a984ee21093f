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

"""What decides the result of a call, in a form that can be written down and compared."""

import inspect
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate.utils import align_module_device
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from flux_dino_tile.records import digest
from pipeline_flux_dino_tile import FluxDinoTilePipeline, Tile, TilePlan, check


# The arguments of a call that decide the canvas after each step.
DECIDING_ARGUMENTS = (
    *("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds", "max_sequence_length"),
    *("negative_prompt", "negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds"),
    *("ip_adapter_image", "ip_adapter_image_embeds"),
    *("negative_ip_adapter_image", "negative_ip_adapter_image_embeds"),
    *("image", "height", "width", "generator", "num_images_per_prompt", "latents", "first_step"),
    *("num_inference_steps", "strength", "sigmas", "start_sigma", "guidance_scale", "true_cfg_scale"),
    *("dino_conditioning_scale", "dino_guidance_start", "dino_guidance_end", "dino_embeds"),
    *("frozen_tiles", "frozen_latents", "joint_attention_kwargs"),
)
# Those that do not: `tiles`, the plan, and the size stand for the second line.
FREE_ARGUMENTS = (
    *("output_type", "return_dict", "vae_residual", "tile_batch_size"),
    *("upscale_factor", "tile_size", "tile_overlap"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
SAMPLED_WEIGHTS = 16  # values of each weight by which a model is known


def describe(value: Any) -> Any:
    """A value as JSON can hold it: tensors, arrays, images and the states of generators as a digest."""
    if isinstance(value, torch.Generator):
        return f"seed {value.initial_seed()}, state {describe(value.get_state())}"
    if isinstance(value, PIL.Image.Image):
        # Pictures of 16 or 32 bits as they are: 8 bits would make most of their tones the same.
        value = np.asarray(value if value.mode[0] in "IF" else value.convert("RGB"))
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{str(value.dtype)[6:]} {tuple(value.shape)} {digest(data)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {digest(np.ascontiguousarray(value))}"
    if isinstance(value, Mapping):
        return {str(name): describe(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [describe(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def public_entries(config: Mapping) -> dict[str, Any]:
    """A config without what diffusers notes for itself: its version, a folder, an order that no process repeats."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def describe_model(model: torch.nn.Module) -> str:
    """
    A model's class with a digest of its config, of some values of each weight that is not quantized, and of the state
    of its LoRA layers and IP-Adapters. It is the same wherever offloading keeps the weights.
    """
    own: Any = model.config
    config = own if isinstance(own, Mapping) else own.to_dict()
    parts: list[Any] = [public_entries(config)]
    for name, module in model.named_modules():
        parts.append(name)
        if hasattr(module, "lora_A"):
            parts.append([module.scaling, module.active_adapters, module.disable_adapters])
        if isinstance(module, FluxIPAdapterAttnProcessor):
            parts.append(module.scale)
        with align_module_device(module):
            weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            plain = [weight for weight in weights if type(weight) in (torch.nn.Parameter, torch.Tensor)]
            parts += [weight.detach().flatten()[:SAMPLED_WEIGHTS].float() for weight in plain]
    return f"{type(model).__name__} {digest(json.dumps(describe(parts)).encode())}"


def check_number(name: str, value: Any, low: float, high: float, meaning: str) -> None:
    """Raises a `ValueError` that names the argument unless `value` is a number from `low` to `high`."""
    is_right = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) <= high
    check(name, value, is_right, f"a number from {low:g} to {high:.3g}, {meaning}")


def complete_call(pipe: FluxDinoTilePipeline, arguments: dict[str, Any]) -> tuple[dict[str, Any], TilePlan]:
    """
    All arguments of `pipe(**arguments)` with defaults and sizes filled in and the image checked, and the tiles. Raises
    a `ValueError` if image and sizes are out of range.
    """
    bound = inspect.signature(pipe.__call__).bind(**arguments)
    bound.apply_defaults()
    call = bound.arguments
    call["image"] = pipe.check_image(call["image"])
    size = (call["height"], call["width"], call["upscale_factor"])
    call["height"], call["width"] = pipe.get_output_size(call["image"], *size)
    call["num_inference_steps"], call["guidance_scale"], call["start_sigma"] = pipe.get_default_settings(
        call["strength"], call["sigmas"], call["start_sigma"], call["num_inference_steps"], call["guidance_scale"]
    )
    return call, pipe.plan_tiles(call["height"], call["width"], call["tile_size"], call["tile_overlap"])


class TilePrompts(dict):
    """What a prompt that is a function says of each tile, by the tile's box: a prompt that can be compared."""

    def __call__(self, image: PIL.Image.Image, box: tuple[int, int, int, int]) -> str:
        return self[box]


def find_tile_prompts(pipe: FluxDinoTilePipeline, call: dict[str, Any]) -> Any:
    """What [`~FluxDinoTilePipeline.check_tile_prompts`] says of a completed call."""
    return pipe.check_tile_prompts(*(call[name] for name in ("prompt", "prompt_2", "image", "height", "width")))


@torch.no_grad()
def settle_prompt(pipe: FluxDinoTilePipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of a call with [`TilePrompts`] in place of a prompt that is a function, which is asked here, once for
    each tile. Raises a `ValueError` if image and sizes are out of range or do not fit it.
    """
    if not callable(arguments.get("prompt")):
        return arguments
    call, plan = complete_call(pipe, arguments)
    size = call["height"], call["width"]
    prompt = find_tile_prompts(pipe, call)
    said = TilePrompts()

    def ask(image: PIL.Image.Image, box: tuple[int, int, int, int]) -> str:
        said[box] = prompt(image, box)
        return said[box]

    pipe.get_tile_prompts(ask, pipe.resize_image(call["image"], *size), plan, *size)
    return {**arguments, "prompt": said}


def check_part(pipe: FluxDinoTilePipeline, call: dict[str, Any], refused: Sequence[str]) -> None:
    """
    Raises a `ValueError` unless a call, completed, makes one picture, of which a part can be painted by itself, and
    the `refused` arguments are left out.
    """
    check("image", call["image"], not pipe.is_latents(call["image"]), "pixels, not latents")
    check("image", len(call["image"]), len(call["image"]) == 1, "one picture")
    regions = find_tile_prompts(pipe, call)
    for name in ("prompt", "prompt_embeds"):
        count = len(call[name]) if isinstance(call[name], (list, torch.Tensor)) and regions is None else 1
        check(name, count, count == 1, "one for the picture")
    check("num_images_per_prompt", call["num_images_per_prompt"], call["num_images_per_prompt"] == 1, "1")
    for name in refused:
        is_default = call[name] is None or (isinstance(call[name], (int, list, tuple)) and not call[name])
        check(name, call[name], is_default, "left out where a part of a picture is painted")


def part_prompt(pipe: FluxDinoTilePipeline, call: dict[str, Any], part: Tile) -> Any:
    """The prompt of a call for a part of its picture: boxes, and those that a function gets, are moved to there."""
    prompt = find_tile_prompts(pipe, call)
    if prompt is None:
        return call["prompt"]
    left, top, size = part.left, part.top, (part.width, part.height)
    if callable(prompt):

        def ask(image: PIL.Image.Image, box: tuple[int, int, int, int]) -> str:
            right, bottom = min(box[2] + left, call["width"]), min(box[3] + top, call["height"])
            place = box[0] + left, box[1] + top, right, bottom
            return prompt(image.crop((0, 0, right - place[0], bottom - place[1])), place)

        return ask
    moved = []
    for text, box in prompt:
        first = max(0, box[0] - left), max(0, box[1] - top)
        # At least 2 px, for a box of one in the corner would be read as the fractions of all.
        last = [min(max(2, stop), length) for stop, length in zip((box[2] - left, box[3] - top), size)]
        if box[2] > left and box[3] > top and all(start < stop for start, stop in zip(first, last)):
            moved.append((text, (*first, *last)))
    return moved or ""


def part_arguments(
    pipe: FluxDinoTilePipeline, call: dict[str, Any], pixels: torch.Tensor, part: Tile, plan: TilePlan
) -> dict[str, Any]:
    """What a call gets in place of the whole picture's arguments to paint a part of it; `pixels` are prepared."""
    crop = pixels[part.slices()]
    # Bytes as a PIL image, from which a call gets the same bytes.
    image = crop / 2 + 0.5 if crop.is_floating_point() else PIL.Image.fromarray(crop[0].permute(1, 2, 0).numpy())
    size = {"height": part.height, "width": part.width, "upscale_factor": None}
    tile_size = plan.tile_height, plan.tile_width
    own = {"image": image, "prompt": part_prompt(pipe, call, part), **size, "tile_size": tile_size}
    return {**own, "output_type": "pil", "return_dict": True}


def describe_call(pipe: FluxDinoTilePipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """
    What decides the canvas after each step of `pipe(**arguments)`, as JSON can hold it: arguments, tiles, models and
    scheduler. The dtype of the VAE is left out, so that a result that it cannot decode in float16 can be decoded in
    float32.
    """
    call, plan = complete_call(pipe, arguments)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        **{name: describe(call[name]) for name in DECIDING_ARGUMENTS},
        "tiles": describe(asdict(plan)),
        **{name: describe_model(model) for name, model in models.items()},
        "dtype": {name: str(model.dtype) for name, model in models.items() if name != "vae"},
        "scheduler": [type(pipe.scheduler).__name__, describe(public_entries(pipe.scheduler.config))],
    }


def differences(settings: dict, others: dict, when: str) -> str:
    """The settings that are not the same in `others`, in words."""
    names = [name for name in {**settings, **others} if settings.get(name) != others.get(name)]
    return "; ".join(f"{name} is {settings.get(name)!r:.80}, {when} {others.get(name)!r:.80}" for name in names)


def check_scheduler(pipe: FluxDinoTilePipeline) -> None:
    """Raises a `ValueError` unless each step of the scheduler depends on the canvas alone."""
    name, is_stochastic = type(pipe.scheduler).__name__, pipe.scheduler.config.get("stochastic_sampling", False)
    is_right = type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and not is_stochastic
    expected = "a FlowMatchEulerDiscreteScheduler without `stochastic_sampling`, whose steps need the canvas alone"
    check("scheduler", f"stochastic {name}" if is_stochastic else name, is_right, expected)


def observe_steps(
    arguments: dict[str, Any], observe: Callable[[Any, int, torch.Tensor, dict], None]
) -> dict[str, Any]:
    """
    Arguments of a call which, after each step and the caller's own callback, also calls
    `observe(pipeline, step, canvas, changes)` with the packed canvas and what the callback changed.
    """
    callback = arguments.get("callback_on_step_end")
    names = arguments.get("callback_on_step_end_tensor_inputs", ["latents"])
    check("callback_on_step_end", callback, callback is None or callable(callback), "callable")
    check("callback_on_step_end_tensor_inputs", names, isinstance(names, (list, tuple)), "a list of names")

    def call_both(pipeline, step, timestep, tensors):
        asked = {name: tensors[name] for name in names}
        changes = {} if callback is None else callback(pipeline, step, timestep, asked)
        observe(pipeline, step, {**tensors, **changes}["latents"], changes)
        return changes

    all_names = [*names, *({"latents"} - set(names))]
    return {**arguments, "callback_on_step_end": call_both, "callback_on_step_end_tensor_inputs": all_names}
