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

"""A preview: one tile or a few, painted with several settings side by side, before the whole picture is enlarged."""

import itertools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import ImageDraw, ImageFont

from flux_dino_tile.calls import check_part, check_scheduler, complete_call, part_arguments
from flux_dino_tile.flat_tiles import square_contrasts
from pipeline_flux_dino_tile import LIMITS, FluxDinoTilePipeline, Tile, TilePlan, check, check_values


DINO_SCALES = (0.0, 0.5, 1.0)
SIGMA_FACTORS = (0.5, 1.0, 2.0)  # of the pipeline's `default_start_sigma`
# What a preview sets itself, or what means other tiles.
REFUSED_ARGUMENTS = ("strength", "sigmas", "latents", "first_step", "frozen_tiles", "frozen_latents", "dino_embeds")
GAP = 8  # px, around the pictures of a sheet
FONT_SIZES = (12, 28)  # px, of the captions: the least, and the greatest
FONT_SHARE = 32  # of a picture's width


class Preview(NamedTuple):
    """What [`preview`] returns; places are in pixels of the output."""

    sheet: PIL.Image.Image  # all pictures with captions, and the image enlarged by bicubic
    images: list[list[list[PIL.Image.Image]]]  # for each tile, start sigma and DINO scale
    tiles: list[Tile]  # without what pads the output to whole tokens
    start_sigmas: list[float]
    dino_conditioning_scales: list[float]


@torch.no_grad()
def preview(
    pipe: FluxDinoTilePipeline,
    image: PipelineImageInput,
    at: Sequence[Any] | None = None,
    dino_conditioning_scale: float | Sequence[float] | None = None,
    start_sigma: float | Sequence[float] | None = None,
    **arguments,
) -> Preview:
    """
    Paints single tiles of the call `pipe(image=image, **arguments)` with every pair of a start sigma and a DINO scale,
    from the noise that the call would have there, at the same positions. No other tile is computed.

    A tile that no other overlaps comes out as in the call. Tiles that overlap look at each other in every step; then
    the preview differs a little.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The pipeline of the call.
        image (`PipelineImageInput`): One image, pixels.
        at (`tuple` or a list of them, *optional*):
            Places `(x, y)` in pixels of `image`. Each stands for the tile whose centre is nearest. By default the tile
            with the most detail.
        dino_conditioning_scale (`float` or `Sequence`, *optional*): Defaults to 0, 0.5 and 1, or 0 without projector.
        start_sigma (`float` or `Sequence`, *optional*): Defaults to half, once and twice `default_start_sigma`.
        **arguments: Of the call, for one prompt. A `generator` keeps its state.

    Raises:
        `ValueError`: If an argument is out of range or does not fit another.
    """
    scales = as_list(dino_conditioning_scale, DINO_SCALES if pipe.dino_projector is not None else DINO_SCALES[:1])
    default_sigmas = [min(max(0.01, factor * pipe.config.default_start_sigma), 1.0) for factor in SIGMA_FACTORS]
    sigmas = as_list(start_sigma, default_sigmas)
    call, plan = complete_call(pipe, {**arguments, "image": image})
    check_preview(pipe, call, plan, scales, sigmas)
    photo = call["image"][0] if isinstance(call["image"], list) else to_pil(call["image"])
    places = None if at is None else check_places(at, photo)
    height, width = call["height"], call["width"]
    pixels = pipe.resize_image(call["image"], height, width)
    if places is None:
        chosen = [find_most_detailed(pipe, pixels, plan)]
    else:
        scaled = [(x * width / photo.width, y * height / photo.height) for x, y in places]
        chosen = list(dict.fromkeys(find_nearest(plan, *place) for place in scaled))

    shown = [
        tile._replace(height=min(tile.height, height - tile.top), width=min(tile.width, width - tile.left))
        for tile in chosen
    ]
    images = [
        [[result.crop((0, 0, tile.width, tile.height)) for result in row] for row in rows]
        for tile, rows in zip(shown, (paint_tile(pipe, call, plan, tile, pixels, sigmas, scales) for tile in chosen))
    ]
    dino = ", DINO {:.3g}" if pipe.dino_projector is not None else ""
    captions = [[f"start sigma {sigma:.3g}" + dino.format(scale) for scale in scales] for sigma in sigmas]
    sheet_rows = []
    for tile, rows in zip(shown, images):
        place = f"bicubic of {tile.left},{tile.top},{tile.width},{tile.height}"
        bicubic = (place, enlarge_part(photo, tile, width, height))
        sheet_rows += [[bicubic, *zip(*labelled)] for labelled in zip(captions, rows)]
    return Preview(draw_sheet(sheet_rows), images, shown, sigmas, scales)


# ---- Checks --------------------------------------------------------------------------------------------------------


def as_list(value: Any, default: Sequence[float]) -> list:
    """A value, or several of them, as a list."""
    return list(default) if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def check_preview(
    pipe: FluxDinoTilePipeline, call: dict[str, Any], plan: TilePlan, scales: list, sigmas: list
) -> None:
    """Raises a `ValueError` unless the tiles of a call can be previewed."""
    check_scheduler(pipe)
    check_part(pipe, call, REFUSED_ARGUMENTS)
    is_right = isinstance(call["generator"], torch.Generator | None)
    check("generator", call["generator"], is_right, "a `torch.Generator`")
    for name, values in (("dino_conditioning_scale", scales), ("start_sigma", sigmas)):
        check(name, values, len(values) > 0, "a number or several")
        for value in values:
            check_values(**{name: value})
    # What the calls check too, but after a tile was encoded; the size is checked.
    check_values(**{name: call[name] for name in LIMITS if name in call and name != "upscale_factor"})
    kwargs = call["joint_attention_kwargs"] or {}
    for scale in scales:
        pipe.check_dino_inputs(False, plan, 1, scale, None, kwargs)
    for sigma in sigmas:
        pipe.get_tile_timesteps(call["num_inference_steps"], None, None, sigma, plan)


def check_places(at: Any, photo: PIL.Image.Image) -> list[tuple[float, float]]:
    """The places as a list; raises a `ValueError` unless they lie in the photo."""
    places = [at] if isinstance(at, (list, tuple)) and all(isinstance(x, numbers.Real) for x in at) else at
    inside = f"(x, y) in the photo's {photo.width}x{photo.height} px, or a list of such"
    check("at", at, isinstance(places, (list, tuple)) and len(places) > 0, inside)
    for place in places:
        is_pair = isinstance(place, (list, tuple)) and len(place) == 2
        is_pair = is_pair and all(isinstance(x, numbers.Real) and 0 <= float(x) < y for x, y in zip(place, photo.size))
        check("at", place, is_pair, inside)
    return list(places)


# ---- Tiles ---------------------------------------------------------------------------------------------------------


def find_most_detailed(pipe: FluxDinoTilePipeline, pixels: torch.Tensor, plan: TilePlan) -> Tile:
    """The tile of a prepared image with the highest mean of [`square_contrasts`]."""
    details = [float(square_contrasts(pipe.crop_pixels(pixels, tile)).mean()) for tile in plan]
    return plan[details.index(max(details))]


def find_nearest(plan: TilePlan, x: float, y: float) -> Tile:
    """The tile whose centre is nearest, which holds the place, for all tiles have one size."""
    return min(plan, key=lambda t: (t.left + t.width / 2 - x) ** 2 + (t.top + t.height / 2 - y) ** 2)


def paint_tile(
    pipe: FluxDinoTilePipeline,
    call: dict[str, Any],
    plan: TilePlan,
    tile: Tile,
    pixels: torch.Tensor,
    sigmas: list[float],
    scales: list[float],
) -> list[list[PIL.Image.Image]]:
    """The tile for each start sigma and DINO scale, by calls in which it is a picture of its own."""
    start, noise = draw_start(pipe, pixels, tile, plan, call["generator"])
    call = {**call, **part_arguments(pipe, call, pixels, tile, plan)}
    rows = []
    for sigma in sigmas:
        first = pipe.get_tile_timesteps(call["num_inference_steps"], None, None, sigma, plan)[:1]
        latents = pipe.pack_canvas(pipe.scheduler.scale_noise(start, first, noise))
        call |= {"start_sigma": sigma, "latents": latents}
        rows.append([pipe(**{**call, "dino_conditioning_scale": scale}).images[0] for scale in scales])
    return rows


def draw_start(
    pipe: FluxDinoTilePipeline, pixels: torch.Tensor, tile: Tile, plan: TilePlan, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Latents of a tile of a prepared image, and their noise, as a call draws them for the whole canvas. The generator
    keeps its state.
    """
    generator = generator and generator.clone_state()
    alone = pipe.plan_tiles(tile.height, tile.width, (tile.height, tile.width))
    posterior = pipe.encode_tiles(pixels[tile.slices()], alone)
    rows, columns = (length // pipe.vae_scale_factor for length in (plan.height, plan.width))
    canvas = posterior.new_zeros(*posterior.shape[:2], rows, columns)
    place = tile.slices(pipe.vae_scale_factor)
    canvas[place] = posterior
    start = pipe.sample_latents(canvas, generator)
    noise = randn_tensor(start.shape, generator, start.device, torch.float32)
    pipe.maybe_free_model_hooks()
    return start[place], noise[place]


# ---- The sheet -----------------------------------------------------------------------------------------------------


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    """The first of `(batch, channels, height, width)` pixels in [0, 1]."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))[0]


def enlarge_part(photo: PIL.Image.Image, tile: Tile, width: int, height: int) -> PIL.Image.Image:
    """The part of a photo under a tile, enlarged by bicubic as the whole would be to `width` and `height`."""
    across, down = photo.width / width, photo.height / height
    right, bottom = tile.left + tile.width, tile.top + tile.height
    box = (tile.left * across, tile.top * down, right * across, bottom * down)
    return photo.convert("RGB").resize((tile.width, tile.height), PIL.Image.Resampling.BICUBIC, box)


def draw_sheet(rows: list[list[tuple[str, PIL.Image.Image]]]) -> PIL.Image.Image:
    """Pictures with captions, row by row."""
    widest, tallest = (max(sides) for sides in zip(*(picture.size for row in rows for _, picture in row)))
    size = min(max(widest // FONT_SHARE, FONT_SIZES[0]), FONT_SIZES[1])
    font, caption_height = ImageFont.load_default(size), 3 * size // 2
    step_across, step_down = widest + GAP, tallest + caption_height + GAP
    sheet = PIL.Image.new("RGB", (len(rows[0]) * step_across + GAP, len(rows) * step_down + GAP), "white")
    for top, row in zip(itertools.count(GAP, step_down), rows):
        for left, (caption, picture) in zip(itertools.count(GAP, step_across), row):
            # On a strip of its own, at whose end a caption that is too long stops.
            strip = PIL.Image.new("RGB", (picture.width, caption_height), "white")
            ImageDraw.Draw(strip).text((0, 0), caption, "black", font)
            sheet.paste(strip, (left, top))
            sheet.paste(picture, (left, top + caption_height))
    return sheet
