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

"""Finds the tiles with nothing to redraw, such as clear sky, which an enlargement may skip."""

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput

from flux_dino_tile.calls import check_number
from flux_dino_tile.color_fix import low_frequencies
from pipeline_flux_dino_tile import DEFAULT_TILE_OVERLAP, FluxDinoTilePipeline, check


FLAT_CONTRAST = 0.01
FLAT_SQUARE = 64  # px
FLAT_SPREAD = 0.3


def square_contrasts(pixels: torch.Tensor) -> torch.Tensor:
    """
    Contrast `(batch, rows, columns)` of the squares of `FLAT_SQUARE` px in tiles `(batch, channels, height, width)` in
    [-1, 1], from 0 for a flat one to about 0.5: the root mean square of what is finer than the tiles'
    [`low_frequencies`], on a scale of 0 to 1.
    """
    power = (pixels - low_frequencies(pixels)).square().mean(1, keepdim=True) / 4
    return F.avg_pool2d(power, FLAT_SQUARE, ceil_mode=True).sqrt()[:, 0]


def tile_contrast(pixels: torch.Tensor) -> torch.Tensor:
    """Contrast `(batch,)` of tiles in their busiest square, of [`square_contrasts`]."""
    return square_contrasts(pixels).amax((1, 2))


def feature_spread(features: torch.Tensor) -> torch.Tensor:
    """
    Mean distance `(batch,)` (1 - cosine) of features `(batch, rows, columns, dim)` from their mean: 0 where all are
    the same, near 1 where they have nothing in common.
    """
    features = features.float().flatten(1, 2)
    return 1 - F.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1).mean(1)


@torch.no_grad()
def find_flat_tiles(
    pipe: FluxDinoTilePipeline,
    image: PipelineImageInput,
    height: int | None = None,
    width: int | None = None,
    upscale_factor: float | None = None,
    tile_size: int | tuple[int, int] | None = None,
    tile_overlap: int = DEFAULT_TILE_OVERLAP,
    dino_embeds: torch.Tensor | None = None,
    max_contrast: float = FLAT_CONTRAST,
) -> list[int]:
    """
    Numbers of the tiles with nothing to redraw, such as clear sky, for `frozen_tiles` of a call with the same image,
    size and tiles: they then stay as the input is, and cost no work.

    A tile is flat if in every image its [`tile_contrast`] is at most `max_contrast`, from 0 to 1, and, if DINO's
    features are given, its [`feature_spread`] is at most `FLAT_SPREAD`: DINO sees one thing in it.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The pipeline of the call.
        image, height, width, upscale_factor, tile_size, tile_overlap: As in the call. Pixels, not latents.
        dino_embeds (`torch.Tensor`, *optional*): From [`~FluxDinoTilePipeline.encode_dino`]; for the call too.
        max_contrast (`float`, defaults to 0.01): The greatest contrast of a flat tile.
    """
    check_number("max_contrast", max_contrast, 0, 1, "a contrast")
    images = pipe.check_image(image)
    check("image", image, not pipe.is_latents(images), "pixels, whose contrast can be seen, not latents")
    height, width = pipe.get_output_size(images, height, width, upscale_factor)
    plan = pipe.plan_tiles(height, width, tile_size, tile_overlap)
    if dino_embeds is not None:
        check("dino_embeds", dino_embeds, len(dino_embeds) == len(plan), f"of the {len(plan)} tiles of this image")
    pixels = pipe.resize_image(images, height, width)
    contrasts = pipe.map_tiles(lambda tile: tile_contrast(pipe.crop_pixels(pixels, tile)), plan)
    is_flat = [float(contrast.max()) <= max_contrast for contrast in contrasts]
    for index, features in enumerate(() if dino_embeds is None else dino_embeds):
        is_flat[index] &= float(feature_spread(features).max()) <= FLAT_SPREAD
    return [index for index in range(len(plan)) if is_flat[index]]
