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

"""One region of a finished picture again, from its photo, with other settings."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from diffusers.image_processor import PipelineImageInput

from flux_dino_tile.calls import check_part, complete_call, part_arguments
from flux_dino_tile.color_fix import METHODS, match_color
from flux_dino_tile.enlargers import as_source, has_alpha
from pipeline_flux_dino_tile import FluxDinoTilePipeline, Tile, axis_windows, check


MODES = ("L", "LA", "RGB", "RGBA")
REFUSED_ARGUMENTS = ("latents", "first_step", "frozen_tiles", "frozen_latents", "dino_embeds")


def redo(
    pipe: FluxDinoTilePipeline,
    result: PIL.Image.Image,
    region: Sequence[int],
    image: PipelineImageInput,
    color_fix: str | None = None,
    **arguments,
) -> PIL.Image.Image:
    """
    Paints a region of `pipe(image=image, **arguments)` again, and fades it into the `result` of an earlier call: by
    the ramp of the tiles' windows, in a border as wide as `tile_overlap` around the region. All other pixels stay as
    they are, and so does transparency.

    What is painted is a tile with the region in its middle, or several if the region is larger, from the photo and
    with noise of its own. The result is not looked at.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The pipeline.
        result (`PIL.Image.Image`): The picture, of mode L, LA, RGB or RGBA.
        region (`Sequence[int]`): `(x, y, width, height)` in pixels of `result`.
        image (`PipelineImageInput`): The photo from which the picture was made, pixels.
        color_fix (`str`, *optional*): "wavelet" or "adain", of what is painted: see [`match_color`].
        **arguments: Of the call, for one prompt. Their size and tiles are the picture's.

    Raises:
        `ValueError`: If an argument is out of range or does not fit another, before any model runs.
    """
    call, plan = complete_call(pipe, {**arguments, "image": image})
    check_part(pipe, call, REFUSED_ARGUMENTS)
    size = call["width"], call["height"]
    is_picture = isinstance(result, PIL.Image.Image) and result.mode in MODES
    check("result", result, is_picture, f"a PIL image of mode {', '.join(MODES)}")
    check("result", result.size, result.size == size, f"of the {size[0]}x{size[1]} px that this call makes")
    check_region(region, result.size)
    check("color_fix", color_fix, color_fix is None or color_fix in METHODS, f"None or one of {', '.join(METHODS)}")

    x, y, width, height = region
    overlap = call["tile_overlap"]
    top, part_height = choose_span(y, height, overlap, plan.tile_height, plan.height, plan.pixels_per_token)
    left, part_width = choose_span(x, width, overlap, plan.tile_width, plan.width, plan.pixels_per_token)
    part = Tile(top, left, part_height, part_width)
    own = part_arguments(pipe, call, pipe.resize_image(call["image"], size[1], size[0]), part, plan)
    painted = pipe(**{**call, **own}).images
    if color_fix is not None:
        painted = match_color(pipe, painted, own["image"], color_fix)
    rows, columns = (
        fade_weights(y - top, height, part_height, overlap),
        fade_weights(x - left, width, part_width, overlap),
    )
    return fade_in(result, painted[0], rows[:, None, None] * columns[:, None], part)


def check_region(region: Any, size: tuple[int, int]) -> None:
    """Raises a `ValueError` unless the region lies in a picture of this size."""
    inside = f"(x, y, width, height) in whole pixels inside the picture's {size[0]}x{size[1]} px"
    is_box = isinstance(region, (list, tuple)) and len(region) == 4
    is_box = is_box and all(isinstance(x, numbers.Integral) and int(x) >= 0 for x in region) and min(region[2:]) > 0
    is_inside = is_box and all(start + length <= side for start, length, side in zip(region, region[2:], size))
    check("region", region, is_inside, inside)


def choose_span(first: int, length: int, overlap: int, tile: int, canvas: int, token: int) -> tuple[int, int]:
    """
    Start and length, in whole tokens along one axis of the canvas, of a tile with `length` pixels from `first` and the
    overlap around them in its middle; longer than a tile if they are.
    """
    start = max(0, first - overlap) // token * token
    stop = min(canvas, -(-(first + length + overlap) // token) * token)
    span = max(tile, stop - start)
    start -= (span - (stop - start)) // (2 * token) * token
    return min(max(start, 0), canvas - span), span


def fade_weights(first: int, length: int, span: int, overlap: int) -> np.ndarray:
    """Weights along one axis: 1 for `length` pixels from `first`, falling to 0 as a tile's window does."""
    ramp = axis_windows([0, overlap], 2 * overlap)[0, overlap:].numpy() if overlap else np.empty(0)
    weights = np.concatenate([ramp[::-1], np.ones(length), ramp])
    start = first - overlap
    inside = weights[max(0, -start) : span - start]
    return np.pad(inside, (max(0, start), span - max(0, start) - len(inside)))


def fade_in(result: PIL.Image.Image, painted: PIL.Image.Image, weights: np.ndarray, part: Tile) -> PIL.Image.Image:
    """The result with a painted part mixed in by weights `(rows, columns, 1)`; it keeps its transparency."""
    right, bottom = min(part.left + part.width, result.width), min(part.top + part.height, result.height)
    kept = result.crop((part.left, part.top, right, bottom))
    old, new = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (kept, painted))
    new, weights = new[: kept.height, : kept.width], weights[: kept.height, : kept.width]
    mixed = PIL.Image.fromarray(np.rint(old + weights * (new - old)).astype(np.uint8))
    again = result.copy()
    again.paste(as_source(mixed, kept, kept.getchannel("A") if has_alpha(kept) else None), (part.left, part.top))
    return again
