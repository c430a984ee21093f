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

"""Tiled FLUX.1 upscaling in which DINO patch features tell the transformer what each tile shows.

All that inference needs is in this file, so that `custom_pipeline=` can load it: the tile plan and its windows, the
projector, the attention processor and the pipeline. Sizes are in pixels unless a name says latents or tokens: with
FLUX.1 a latent cell is 8 px and a token is 2x2 cells, 16 px.
"""

import hashlib
import itertools
import json
import math
import numbers
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_NAME as TRANSFORMERS_WEIGHTS_NAME
from transformers.utils import cached_file

import diffusers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.image_processor import PipelineImageInput
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, _get_qkv_projections
from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift, retrieve_latents, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, logging, replace_example_docstring
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

MODULE_NAME = "pipeline_flux_dino_tile"

MODEL_REMEDY = "Check the weights, LoRA's too, and run the models in bfloat16 or float32 if this is float16."
VAE_REMEDY = "In float16 the VAE may overflow: run it in float32 with `pipe.vae.to(torch.float32)`."

# A planned tile has 0.8 to 1.3 MP at 16 px a token: less starves FLUX of context, above 1.5 MP it draws grids.
MIN_TILE_TOKENS = 3125
MAX_TILE_TOKENS = 5078
GRID_TILE_TOKENS = 5860
DEFAULT_TILE_TOKENS = 64  # on a side: 1024 px, the size that FLUX was trained on
MAX_TILE_ASPECT = 2.0
DEFAULT_TILE_OVERLAP = 64
DEFAULT_UPSCALE_FACTOR = 4.0

# Rows of pixels that are enlarged at once, and that become bytes at once.
RESIZED_ROWS = 1024
FINISHED_ROWS = 128

# The largest DINO, DINOv3's ViT-7B, has 40.
MAX_DINO_LAYERS = 100
MAX_DINO_NUMBER = 100_000
DINO_MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
PROMPT_EMBEDS_NAME = "prompt_embeds.safetensors"
PROMPT_EMBEDS_KEYS = ("prompt_embeds", "pooled_prompt_embeds")
CHECKPOINT_NAME = "checkpoint.safetensors"
# What a resumed call may change: it does not decide the canvas, or `tiles` and the size do in its place.
FREE_ARGUMENTS = (
    *("self", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "color_fix"),
    *("vae_residual", "upscale_factor", "tile_size", "tile_overlap", "tile_batch_size"),
    *("checkpoint_dir", "checkpoint_steps", "process_group"),
    *("return_diagnostics", "suspect_threshold"),
)
SAMPLED_WEIGHTS = 16  # values of each weight by which a checkpoint knows its models

# What the planner weighs: the steps of FLUX.1-schnell, and the time of the VAE for an image token, as the operations
# that the compiled transformer does in that time (measured on an H100).
PLANNED_STEPS = 4
VAE_FLOPS_PER_TOKEN = 9e9

# A flat tile, which `skip_flat_tiles` leaves as it is: root mean square of the detail, on a scale of 0 to 1, in the
# busiest square of this many pixels, and the mean distance (1 - cosine) of its DINO features from their mean.
FLAT_TILE_CONTRAST = 0.01
FLAT_TILE_SQUARE = 64
FLAT_TILE_DINO_SPREAD = 0.3

SEAM_OFFSETS = (-32, -16, 16, 32)  # px, of the lines that a tile's border is compared with
LEAST_STEP = 1e-6
SUSPECT_SIMILARITY = 0.5  # a guess: DINO's similarity of input and result below which a tile may show something else

# Backends that add a float mask of shape (B, 1, 1, S) to the logits; the others refuse a mask.
MASK_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName.FLEX,
    AttentionBackendName.XFORMERS,
)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import load_image

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "black-forest-labs/FLUX.1-schnell",
        ...     custom_pipeline="<user>/flux-dino-tile",
        ...     trust_remote_code=True,
        ...     dtype=torch.bfloat16,
        ... ).to("cuda")
        >>> pipe.load_dino_projector("<user>/flux-dino-tile")
        >>> small = load_image("photo.jpg")
        >>> image = pipe(image=small, upscale_factor=4, dino_conditioning_scale=0.6).images[0]
        >>> image.save("photo_x4.png")
        ```
"""


# ---- Argument checks -----------------------------------------------------------------------------------------------


def check_number(name: str, value: Any, low: float, high: float, remedy: str) -> None:
    """Raises a `ValueError` that names the argument unless `value` is a real number with `low <= value <= high`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"`{name}` must be a number from {low:g} to {high:g} but is {value!r}. {remedy}")


def check_integer(name: str, value: Any, low: int, remedy: str) -> None:
    """Raises a `ValueError` that names the argument unless `value` is a whole number of at least `low`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low:
        raise ValueError(f"`{name}` must be a whole number of at least {low} but is {value!r}. {remedy}")


def check_choice(name: str, value: Any, choices: Sequence) -> None:
    """Raises a `ValueError` that names the argument unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))} but is {value!r}.")


def check_embeds(name: str, embeds: Any, shape: Sequence[int | None], meaning: str) -> None:
    """Raises a `ValueError` unless `embeds` is a finite tensor of `shape`, in which `None` stands for any length."""
    is_tensor = isinstance(embeds, torch.Tensor)
    fits = is_tensor and embeds.ndim == len(shape) and 0 not in embeds.shape
    if not fits or any(wanted not in (None, given) for wanted, given in zip(shape, embeds.shape)):
        wanted = "(" + ", ".join("any" if length is None else str(length) for length in shape) + ")"
        found = f"has shape {tuple(embeds.shape)}" if is_tensor else f"is a {type(embeds).__name__}"
        raise ValueError(f"`{name}` must be a tensor of shape {wanted}, {meaning}, but {found}.")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"`{name}` holds NaN or infinite values. Compute it again, in float32 if it overflowed.")


# ---- Tiles ---------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A tile's place on the padded canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def slices(self, pixels_per_cell: int = 1) -> tuple:
        """Index of the tile in a `(..., height, width)` tensor with one cell for `pixels_per_cell` pixels."""
        top, left, height, width = (length // pixels_per_cell for length in self)
        return (..., slice(top, top + height), slice(left, left + width))


@dataclass(frozen=True)
class TilePlan(Sequence):
    """A grid of equal tiles that covers a canvas, in pixels; as a sequence, its tiles row by row."""

    height: int  # of the canvas, padded to whole tokens
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]  # first pixel row of each row of tiles
    lefts: tuple[int, ...]  # first pixel column of each column of tiles
    pixels_per_token: int  # side of a transformer token, 16 for FLUX.1

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __getitem__(self, index):
        return self.tiles[index]

    @cached_property
    def tiles(self) -> list[Tile]:
        return [Tile(top, left, self.tile_height, self.tile_width) for top in self.tops for left in self.lefts]

    @property
    def tile_tokens(self) -> tuple[int, int]:
        """Rows and columns of image tokens of a tile."""
        return self.tile_height // self.pixels_per_token, self.tile_width // self.pixels_per_token

    @property
    def tokens_per_tile(self) -> int:
        return math.prod(self.tile_tokens)

    @property
    def borders(self) -> tuple[list[int], list[int]]:
        """The first pixel rows and columns beyond the tiles' borders inside the canvas."""
        rows = {*self.tops[1:], *(top + self.tile_height for top in self.tops[:-1])}
        columns = {*self.lefts[1:], *(left + self.tile_width for left in self.lefts[:-1])}
        return sorted(rows), sorted(columns)

    def windows(self, pixels_per_cell: int = 1) -> Iterator[torch.Tensor]:
        """Yields each tile's blending weights `(rows, columns)`; at every cell of the canvas they sum to one."""
        rows = axis_windows([top // pixels_per_cell for top in self.tops], self.tile_height // pixels_per_cell)
        columns = axis_windows([left // pixels_per_cell for left in self.lefts], self.tile_width // pixels_per_cell)
        return (row[:, None] * column[None, :] for row in rows for column in columns)


def tile_count(length: int, size: int, overlap: int) -> int:
    """The fewest tiles of `size` that cover `[0, length)` with neighbours sharing at least `overlap`."""
    return 1 if size >= length else math.ceil((length - overlap) / (size - overlap))


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Starts of the fewest tiles that cover `[0, length)`, evenly spread, neighbours sharing at least `overlap`."""
    count = tile_count(length, size, overlap)
    if count == 1:
        return [0]
    span = length - size
    return [(2 * index * span + count - 1) // (2 * (count - 1)) for index in range(count)]


def handover(overlap: int) -> torch.Tensor:
    """
    Weights `(overlap,)` of a tile in its overlap with the one before it: a raised cosine as wide as the overlap.

    The usual Gaussian hands over within a few cells however wide the overlap is.
    """
    return torch.sin(torch.pi / 2 * (torch.arange(overlap, dtype=torch.float64) + 0.5) / overlap) ** 2


def axis_windows(starts: Sequence[int], size: int) -> torch.Tensor:
    """
    Blending weights along one axis, from [`handover`]; where more than two tiles meet, they are normalised.

    Args:
        starts (`Sequence[int]`): First cell of each tile, ascending, without gaps.
        size (`int`): Cells of a tile.

    Returns:
        `torch.Tensor` of shape `(len(starts), size)`: positive weights that sum to one at every covered cell.
    """
    windows = torch.ones(len(starts), size, dtype=torch.float64)
    for index, (start, next_start) in enumerate(itertools.pairwise(starts)):
        overlap = start + size - next_start
        ramp = handover(overlap)
        windows[index, size - overlap :] *= ramp.flip(0)
        windows[index + 1, :overlap] *= ramp
    total = torch.zeros(starts[-1] + size, dtype=torch.float64)
    for start, window in zip(starts, windows):
        total[start : start + size] += window
    return torch.stack([window / total[start : start + size] for start, window in zip(starts, windows)]).float()


def transformer_flops(num_tokens: int, inner_dim: int = 3072, num_layers: int = 57) -> float:
    """
    Floating-point operations of one FLUX forward pass for one tile.

    A block's linear layers hold `12 * inner_dim**2` weights for a token, in double and single blocks alike, and
    attention does `4 * num_tokens * inner_dim` operations for a token; a multiply-add counts as two.

    Args:
        num_tokens (`int`): Image, text and DINO tokens together.
        inner_dim (`int`, defaults to 3072): Heads times head dimension.
        num_layers (`int`, defaults to 57): Double plus single blocks.
    """
    return 4.0 * inner_dim * num_layers * num_tokens * (6 * inner_dim + num_tokens)


def tile_cost(image_tokens: int, extra_tokens: int, inner_dim: int = 3072) -> float:
    """
    Work for one tile of an image, as floating-point operations of the transformer: its steps and the VAE.

    Args:
        image_tokens (`int`): Tokens of the tile.
        extra_tokens (`int`): Text and DINO tokens that every tile carries.
        inner_dim (`int`, defaults to 3072): Heads times head dimension.
    """
    steps = PLANNED_STEPS * transformer_flops(image_tokens + extra_tokens, inner_dim)
    return steps + VAE_FLOPS_PER_TOKEN * image_tokens


def choose_tile_size(
    height: int, width: int, overlap: int, extra_tokens: int, inner_dim: int
) -> tuple[int, int] | None:
    """
    The tile size that covers the canvas with the least work, all lengths in tokens; `None` if the overlap fills every
    one.

    Tiles of `MIN_TILE_TOKENS` to `MAX_TILE_TOKENS` and the fixed size of 64 x 64 compete. A canvas too narrow for
    them gets the largest tiles that it can hold.
    """

    longest = int(math.sqrt(MAX_TILE_TOKENS * MAX_TILE_ASPECT))
    shortest = int(math.sqrt(MIN_TILE_TOKENS / MAX_TILE_ASPECT))
    sides = [range(min(length, shortest), min(length, longest) + 1) for length in (height, width)]

    def is_square_enough(rows: int, columns: int) -> bool:
        # A canvas narrower than a tile forces the tile's shape.
        return max(rows, columns) <= MAX_TILE_ASPECT * min(rows, columns) or rows == height or columns == width

    def work(size: tuple[int, int]) -> float:
        count = tile_count(height, size[0], overlap) * tile_count(width, size[1], overlap)
        return count * tile_cost(size[0] * size[1], extra_tokens, inner_dim)

    sizes = [
        (rows, columns)
        for rows, columns in itertools.product(*sides)
        if rows * columns <= MAX_TILE_TOKENS and is_square_enough(rows, columns)
    ]
    enough = min(MIN_TILE_TOKENS, max(rows * columns for rows, columns in sizes))
    sizes = [(rows, columns) for rows, columns in sizes if rows * columns >= enough]
    sizes.append((min(DEFAULT_TILE_TOKENS, height), min(DEFAULT_TILE_TOKENS, width)))
    sizes = [
        (rows, columns)
        for rows, columns in sizes
        if (rows == height or rows > overlap) and (columns == width or columns > overlap)
    ]
    return min(sizes, key=work, default=None)


def plan_tiles(
    height: int,
    width: int,
    tile_size: int | tuple[int, int] | None = None,
    tile_overlap: int = DEFAULT_TILE_OVERLAP,
    pixels_per_token: int = 16,
    extra_tokens: int = 768,
    inner_dim: int = 3072,
) -> TilePlan:
    """
    Plans equal, evenly spread tiles whose borders lie on the token grid.

    Args:
        height (`int`): Height of the output in pixels.
        width (`int`): Width of the output in pixels.
        tile_size (`int` or `tuple[int, int]`, *optional*):
            Side, or height and width, of a tile in pixels, a multiple of `pixels_per_token`. A canvas smaller than
            that is one tile. When `None`, the size that costs the least work for this output, see [`tile_cost`].
        tile_overlap (`int`, defaults to 64): The least overlap of neighbours in pixels, rounded up to whole tokens.
        pixels_per_token (`int`, defaults to 16): Side of a transformer token in pixels.
        extra_tokens (`int`, defaults to 768): Text and DINO tokens that every tile carries, for the cost.
        inner_dim (`int`, defaults to 3072): Heads times head dimension of the transformer, for the cost.

    Returns:
        [`TilePlan`]: The tiles, on a canvas padded to whole tokens.

    Raises:
        `ValueError`: If a size is not positive, `tile_size` is off the grid, or the overlap fills a tile.
    """
    for name, length in (("height", height), ("width", width)):
        check_integer(name, length, 1, "Pass the size of the output in pixels.")
    check_integer("pixels_per_token", pixels_per_token, 1, "It is 16 for FLUX.1.")
    check_integer("extra_tokens", extra_tokens, 0, "It is the number of text and DINO tokens.")
    check_integer("inner_dim", inner_dim, 1, "It is heads times head dimension.")
    check_integer("tile_overlap", tile_overlap, 0, "Pass the least overlap of two tiles in pixels.")
    rows, columns = math.ceil(height / pixels_per_token), math.ceil(width / pixels_per_token)
    overlap = math.ceil(tile_overlap / pixels_per_token)

    if tile_size is None:
        planned = choose_tile_size(rows, columns, overlap, extra_tokens, inner_dim)
        if planned is None:
            raise ValueError(f"`tile_overlap` {tile_overlap} leaves no tile size. Lower it or pass `tile_size`.")
        tile_rows, tile_columns = planned
    else:
        sides = tile_size if isinstance(tile_size, (tuple, list)) else (tile_size, tile_size)
        if len(sides) != 2:
            raise ValueError(f"`tile_size` must be an integer or (height, width) in pixels but is {tile_size!r}.")
        for side in sides:
            check_integer("tile_size", side, pixels_per_token, f"Pass pixels, a multiple of {pixels_per_token}.")
            if side % pixels_per_token:
                nearest = round(side / pixels_per_token) * pixels_per_token
                raise ValueError(
                    f"`tile_size` must be a multiple of {pixels_per_token} px but is {side}. Pass {nearest}."
                )
        tile_rows, tile_columns = (
            min(side // pixels_per_token, length) for side, length in zip(sides, (rows, columns))
        )
    for length, size in ((rows, tile_rows), (columns, tile_columns)):
        if overlap >= size < length:
            raise ValueError(
                f"`tile_overlap` must be smaller than the tile of {size * pixels_per_token} px but is {tile_overlap},"
                f" {overlap * pixels_per_token} px in whole tokens. Lower it or pass a larger `tile_size`."
            )

    tops = tile_starts(rows, tile_rows, overlap)
    lefts = tile_starts(columns, tile_columns, overlap)
    return TilePlan(
        height=rows * pixels_per_token,
        width=columns * pixels_per_token,
        tile_height=tile_rows * pixels_per_token,
        tile_width=tile_columns * pixels_per_token,
        tops=tuple(top * pixels_per_token for top in tops),
        lefts=tuple(left * pixels_per_token for left in lefts),
        pixels_per_token=pixels_per_token,
    )


def crop_tiles(canvas: torch.Tensor, plan: TilePlan, pixels_per_cell: int) -> torch.Tensor:
    """Cuts a `(batch, channels, rows, columns)` canvas into `(num_tiles, batch, channels, rows, columns)`."""
    return torch.stack([canvas[tile.slices(pixels_per_cell)] for tile in plan])


def blend_strips(tiles: Iterable[torch.Tensor], plan: TilePlan, pixels_per_cell: int) -> Iterator[torch.Tensor]:
    """
    Adds up windowed `(batch, channels, rows, columns)` tiles in float32, one by one, and yields the canvas from top to
    bottom: after each row of tiles, the rows that no later tile touches.
    """
    size, width = plan.tile_height // pixels_per_cell, plan.width // pixels_per_cell
    columns = [Tile(0, left, plan.tile_height, plan.tile_width).slices(pixels_per_cell) for left in plan.lefts]
    steps = [(bottom - top) // pixels_per_cell for top, bottom in itertools.pairwise([*plan.tops, plan.height])]
    tiles = iter(tiles)
    first = next(tiles)
    values_and_windows = zip(itertools.chain([first], tiles), plan.windows(pixels_per_cell))
    strip = torch.zeros(*first.shape[:2], size, width, device=first.device, dtype=torch.float32)
    for step in steps:
        for column, (values, window) in zip(columns, itertools.islice(values_and_windows, len(columns))):
            strip[column] += values.float() * window.to(values.device)
        yield strip[:, :, :step].clone()
        strip = F.pad(strip[:, :, step:], (0, 0, 0, step))


def blend_tiles(tiles: Iterable[torch.Tensor], plan: TilePlan, pixels_per_cell: int) -> torch.Tensor:
    """The whole canvas of [`blend_strips`]; undoes [`crop_tiles`]."""
    canvas, top = None, 0
    for strip in blend_strips(tiles, plan, pixels_per_cell):
        if canvas is None:
            # At once, because joining strips at the end would take the canvas twice.
            canvas = strip.new_empty(*strip.shape[:2], plan.height // pixels_per_cell, strip.shape[3])
        canvas[:, :, top : top + strip.shape[2]] = strip
        top += strip.shape[2]
    assert canvas is not None
    return canvas


# ---- Colour --------------------------------------------------------------------------------------------------------


def low_frequencies(image: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """
    The part of a `(batch, channels, height, width)` image that an a-trous wavelet transform leaves after `levels`.

    Each level blurs with (1, 2, 1)/4 along both axes at twice the spacing of the last, as in StableSR's
    `wavelet_reconstruction`.
    """
    for level in range(levels):
        spacing = 2**level
        for dim, pad in ((3, (spacing, spacing, 0, 0)), (2, (0, 0, spacing, spacing))):
            padded, length = F.pad(image, pad, mode="replicate"), image.shape[dim]
            image = (padded.narrow(dim, 0, length) + 2 * image + padded.narrow(dim, 2 * spacing, length)) / 4
    return image


def match_color(image: torch.Tensor, reference: torch.Tensor, method: str) -> torch.Tensor:
    """
    Gives `image` the colours of `reference`, both `(batch, channels, height, width)`.

    "wavelet" takes the low frequencies from `reference` and keeps the detail of `image`; "adain" matches each
    channel's mean and standard deviation (adaptive instance normalisation, arXiv 1703.06868).
    """
    if method == "wavelet":
        return image + low_frequencies(reference - image)
    mean, std = image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True)
    reference_mean, reference_std = reference.mean((2, 3), keepdim=True), reference.std((2, 3), keepdim=True)
    return (image - mean) / (std + 1e-5) * reference_std + reference_mean


# ---- Flat tiles ----------------------------------------------------------------------------------------------------


def tile_contrast(pixels: torch.Tensor) -> torch.Tensor:
    """
    Contrast of each `(batch, channels, height, width)` tile in [-1, 1]: the root mean square of what is finer than its
    [`low_frequencies`], on a scale of 0 to 1, in the busiest square of `FLAT_TILE_SQUARE` px. Shape `(batch,)`.
    """
    power = (pixels - low_frequencies(pixels)).square().mean(1, keepdim=True) / 4
    return F.avg_pool2d(power, FLAT_TILE_SQUARE, ceil_mode=True).amax((1, 2, 3)).sqrt()


def feature_spread(features: torch.Tensor) -> torch.Tensor:
    """Mean distance (1 - cosine) of `(batch, rows, columns, dim)` features from their mean. Shape `(batch,)`."""
    features = features.float().flatten(1, 2)
    return 1 - F.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1).mean(1)


# ---- Finite numbers, processes and checkpoints ---------------------------------------------------------------------


def watch_tiles(tiles: Iterable[torch.Tensor], is_finite: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the tiles and notes for each, without waiting for the device, whether it is finite."""
    for tile in tiles:
        is_finite.append(tile.isfinite().all())
        yield tile


def check_finite(is_finite: Sequence[torch.Tensor], what: str, remedy: str, plan: Sequence[Tile] = ()) -> None:
    """Raises a `FloatingPointError` unless all flags, one for each tile if there is a plan, are true."""
    flags = torch.stack(list(is_finite))
    if flags.all():
        return
    bad = [tile for tile, is_good in zip(plan, flags.tolist()) if not is_good]
    place = (
        f" in {len(bad)} of {len(plan)} tiles, first in that at top {bad[0].top}, left {bad[0].left} px" if bad else ""
    )
    raise FloatingPointError(f"NaN or infinite values in {what}{place}. {remedy}")


def share_work(compute: Callable[[Any], torch.Tensor], items: Sequence, process_group: Any) -> Iterator[torch.Tensor]:
    """
    Yields `compute(item)`, of one shape, for all items in order.

    The processes of a `torch.distributed` group take an item each, round by round, and send each other the results as
    they are: every process yields all of them, bit for bit what one process yields, to add them up in the same order.
    """
    if process_group is None:
        yield from map(compute, items)
        return
    rank, size = torch.distributed.get_rank(process_group), torch.distributed.get_world_size(process_group)
    for start in range(0, len(items), size):
        # In the last round, processes without an item repeat the last one: all have to take part.
        value = compute(items[min(start + rank, len(items) - 1)]).contiguous()
        results = [torch.empty_like(value) for _ in range(size)]
        torch.distributed.all_gather(results, value, group=process_group)
        yield from results[: len(items) - start]


def is_first_process(process_group: Any) -> bool:
    """Whether this process, of those that share an image, is the one that writes."""
    return process_group is None or torch.distributed.get_rank(process_group) == 0


def describe(value: Any) -> Any:
    """An argument as JSON can hold it: tensors, arrays, images and the states of generators as a digest."""
    if isinstance(value, torch.Generator):
        return f"seed {value.initial_seed()}, state {describe(value.get_state())}"
    if isinstance(value, PIL.Image.Image):
        value = np.array(value.convert("RGB"))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{str(value.dtype)[6:]} {tuple(value.shape)} {hashlib.sha256(data.data).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(name): describe(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def describe_model(model: torch.nn.Module) -> str:
    """
    A model's class with a digest of its config, of some values of each weight that is not quantized, and of the state
    of its LoRA layers. It is the same wherever offloading keeps the weights.
    """
    config = model.config if isinstance(model.config, Mapping) else {}
    parts: list[Any] = [{name: value for name, value in config.items() if not name.startswith("_")}]
    for name, module in model.named_modules():
        parts.append(
            [name, *(getattr(module, key, None) for key in ("scaling", "_active_adapter", "_disable_adapters"))]
        )
        with align_module_device(module):
            weights = [weight for weight in module.parameters(recurse=False) if type(weight) is torch.nn.Parameter]
            parts += [weight.detach().flatten()[:SAMPLED_WEIGHTS].float() for weight in weights]
    return f"{type(model).__name__} {hashlib.sha256(json.dumps(describe(parts)).encode()).hexdigest()[:16]}"


def differing_settings(settings: dict, others: dict, when: str) -> str:
    """The settings that are not the same in `others`, in words."""
    names = [name for name in {**settings, **others} if settings.get(name) != others.get(name)]
    return "; ".join(f"{name} is {settings.get(name)!r:.80}, {when} {others.get(name)!r:.80}" for name in names)


def read_checkpoint(folder: str | Path | None, settings: dict, process_group: Any) -> dict[str, torch.Tensor]:
    """
    The tensors of the checkpoint in `folder`, which is made if it is missing; empty if it has none.

    Raises:
        `ValueError`: If it was made with other settings, or the processes of the group do not agree.
        `OSError`: If `folder` cannot be written.
    """
    saved_settings, tensors = None, {}
    if folder is not None:
        path = Path(folder) / CHECKPOINT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").touch()
        path.with_suffix(".tmp").unlink(missing_ok=True)
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    saved_settings = json.loads((file.metadata() or {}).get("settings", "{}"))
                    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            except SafetensorError as error:
                raise ValueError(f"{path} is not a checkpoint ({error}). Delete it.") from error
    if process_group is not None:
        step = int(tensors.get("step", torch.tensor(0)))
        calls: list[Any] = [None] * torch.distributed.get_world_size(process_group)
        call = {**settings, "step of the checkpoint": step, "settings of the checkpoint": saved_settings}
        torch.distributed.all_gather_object(calls, call, group=process_group)
        for rank, other in enumerate(calls):
            if other != calls[0]:
                differences = differing_settings(calls[0], other, f"in process {rank}")
                raise ValueError(f"The processes of `process_group` must make the same call: {differences}.")
    if saved_settings is not None and saved_settings != settings:
        differences = differing_settings(settings, saved_settings, "in the checkpoint")
        raise ValueError(
            f"`checkpoint_dir` {folder} holds a checkpoint of other settings: {differences}. Repeat the call with its"
            " settings, or delete the folder."
        )
    return tensors


def save_checkpoint(folder: str | Path, settings: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces the checkpoint in `folder` at once; if it cannot be written, warns and leaves the old one."""
    path = Path(folder) / CHECKPOINT_NAME
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, temporary, metadata={"settings": json.dumps(settings)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning(f"The checkpoint {path} cannot be written, and the image goes on without: {error}")


# ---- Diagnostics ---------------------------------------------------------------------------------------------------


@dataclass
class FluxDinoTilePipelineOutput(FluxPipelineOutput):
    """Images and, if they were asked for, numbers about their tiles, tensors of shape `(num_tiles, batch)`."""

    tile_plan: TilePlan | None = None
    dino_similarity: Any = None  # of result to input; NaN without a DINO encoder
    seam_score: Any = None  # see `tile_seam_scores`
    suspects: list[list[Tile]] | None = None  # for each image the tiles of too little similarity


def dino_similarity(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean cosine of features `(..., rows, columns, dim)` at the same place, from -1 to 1 for equal ones."""
    return F.cosine_similarity(features.float(), others.float().to(features.device), dim=-1).mean((-2, -1)).cpu()


def line_steps(image: torch.Tensor, axis: int) -> np.ndarray:
    """Mean step of a `(3, height, width)` picture across each line between two rows (axis 0) or columns (axis 1)."""
    return image.diff(dim=axis + 1).abs().mean((0, 2 - axis)).cpu().numpy()


def seam_ratio(image: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> float:
    """
    How much larger the steps across the tiles' borders are than those one and two tokens away: 1 without seams, and
    where all lines are borders.

    Lines on the token grid are compared with each other, for a grid of the VAE's own is not a seam.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): The picture.
        rows, columns (`Sequence[int]`): The first pixel row or column beyond each border inside the picture.
    """
    across, beside = [], []
    for axis, lines in enumerate((rows, columns)):
        steps = line_steps(image, axis)
        for line in lines:
            others = {line + offset for offset in SEAM_OFFSETS if 0 < line + offset <= len(steps)} - set(lines)
            if others:
                across.append(steps[line - 1])
                beside.append(np.mean([steps[other - 1] for other in others]))
    if not across:
        return 1.0
    # The least step keeps a picture without any from dividing by 0.
    return float((np.mean(across) + LEAST_STEP) / (np.mean(beside) + LEAST_STEP))


def tile_seam_scores(image: torch.Tensor, plan: TilePlan) -> list[float]:
    """
    For each tile of a padded `(3, height, width)` picture the [`seam_ratio`] of its and its neighbours' borders in it
    and on its edge; 1 for a single tile.
    """
    margin = max(SEAM_OFFSETS)
    scores = []
    for top, left, height, width in plan:
        starts = (max(0, top - margin), max(0, left - margin))
        region = image[:, starts[0] : top + height + margin, starts[1] : left + width + margin]
        lines = [
            [border - start for border in borders if first <= border <= first + length]
            for borders, first, length, start in zip(plan.borders, (top, left), (height, width), starts)
        ]
        scores.append(seam_ratio(region, *lines))
    return scores


# ---- DINO features to tokens ---------------------------------------------------------------------------------------


class DinoProjector(ModelMixin, ConfigMixin):
    r"""
    Projects a grid of DINO patch features to tokens of the FLUX text stream.

    LayerNorm, Linear, SiLU, Linear, and a gain for each output channel. It is the form of
    [`~pipelines.flux.modeling_flux.ReduxImageEncoder`] with a norm before and a gain after.

    The config records all that inference has to know about how the projector was trained.

    Args:
        in_dim (`int`, defaults to 768):
            Features of a patch: the encoder's hidden size times the number of `layers`.
        out_dim (`int`, defaults to 4096):
            `joint_attention_dim` of the transformer.
        hidden_dim (`int`, defaults to 4096):
            Width of the hidden layer.
        token_grid (`int`, defaults to 16):
            Rows and columns of tokens that the patches of a tile are averaged to; 16 gives 256 tokens a tile. A tile
            with fewer patches keeps its own grid.
        layers (`list[int]`, defaults to `[-1]`):
            Hidden states of the encoder that are concatenated, each after the encoder's final norm.
        position_mode (`str`, defaults to `"zero"`):
            Rotary position of the tokens: "zero" as text tokens, or "tile" for the row and column of the place in the
            tile that a token describes.
        dino_model (`str`, *optional*, defaults to `"facebook/dinov2-with-registers-base"`):
            Repo or folder of the encoder. `None` stands for the subfolder `dino_encoder` beside the projector.
        image_mean (`list[float]`, defaults to ImageNet's):
            Mean of the red, green and blue values in [0, 1] that the encoder expects.
        image_std (`list[float]`, defaults to ImageNet's):
            Their standard deviation.
        sigma_min (`float`, *optional*):
            The least noise level of the training.
        sigma_max (`float`, *optional*):
            The greatest noise level of the training.
    """

    @register_to_config
    def __init__(
        self,
        in_dim: int = 768,
        out_dim: int = 4096,
        hidden_dim: int = 4096,
        token_grid: int = 16,
        layers: list[int] = [-1],
        position_mode: str = "zero",
        dino_model: str | None = "facebook/dinov2-with-registers-base",
        image_mean: list[float] = [0.485, 0.456, 0.406],
        image_std: list[float] = [0.229, 0.224, 0.225],
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ):
        super().__init__()
        for name, value in {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim}.items():
            check_integer(name, value, 1, "It is a number of channels.")
        check_integer("token_grid", token_grid, 1, "It is the number of token rows and columns of a tile.")
        check_choice("position_mode", position_mode, ("zero", "tile"))
        if not isinstance(layers, (list, tuple)) or not 1 <= len(layers) <= MAX_DINO_LAYERS:
            raise ValueError(f"`layers` must be a list of 1 to {MAX_DINO_LAYERS} whole numbers but is {layers!r:.80}.")
        for layer in layers:
            check_integer("layers", layer, -MAX_DINO_LAYERS, "It is the number of a hidden state.")
        for name, values, low in (("image_mean", image_mean, -1000.0), ("image_std", image_std, 1e-6)):
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(f"`{name}` must be a list of 3 numbers but is {values!r:.80}.")
            for number in values:
                check_number(name, number, low, 1000, "It is for values in [0, 1].")
        if not isinstance(dino_model, (str, type(None))):
            raise ValueError(f"`dino_model` must be the name of a repo or folder, or None, but is {dino_model!r:.80}.")
        self.norm = torch.nn.LayerNorm(in_dim)
        self.linear_1 = torch.nn.Linear(in_dim, hidden_dim)
        self.act = torch.nn.SiLU()
        self.linear_2 = torch.nn.Linear(hidden_dim, out_dim)
        self.gain = torch.nn.Parameter(torch.ones(out_dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        r"""Features `(..., in_dim)` from [`~DinoProjector.pool`] to tokens `(..., out_dim)` of the text stream."""
        return self.linear_2(self.act(self.linear_1(self.norm(features)))) * self.gain

    def pool(self, patches: torch.Tensor) -> torch.Tensor:
        r"""Averages patch features `(batch, rows, columns, in_dim)` of a tile to the token grid, of the same form."""
        return F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), self.grid(patches.shape[1:3])).permute(0, 2, 3, 1)

    def grid(self, tile_tokens: Sequence[int]) -> tuple[int, int]:
        r"""Rows and columns of DINO tokens of a tile with these rows and columns of image tokens."""
        rows, columns = (min(self.config.token_grid, length) for length in tile_tokens)
        return rows, columns

    def position_ids(self, grid: tuple[int, int], tile_tokens: tuple[int, int]) -> torch.Tensor:
        r"""
        Rotary positions `(rows * columns, 3)` of the tokens, in float32, to go before the text's in `txt_ids`.

        They are zeros, or `(0, row, column)` of the centre of the described place, in image tokens. `grid` and
        `tile_tokens` are the rows and columns of DINO tokens and of image tokens of a tile.
        """
        ids = torch.zeros(*grid, 3)
        if self.config.position_mode == "tile":
            centers = [(torch.arange(cells) + 0.5) * tokens / cells - 0.5 for cells, tokens in zip(grid, tile_tokens)]
            ids[..., 1] = centers[0][:, None]
            ids[..., 2] = centers[1][None, :]
        return ids.flatten(0, 1)


# `model_index.json` names a component's library. On the Hub diffusers accepts no other than itself and transformers,
# unless the component's folder holds code, and then a saved pipeline needs `trust_remote_code` even when installed.
diffusers.DinoProjector = DinoProjector
DinoProjector.__module__ = "diffusers"


class DinoTokens(NamedTuple):
    """What the DINO branch adds to the text stream of every tile, and how strongly."""

    tokens: torch.Tensor  # (num_tiles, batch, num_tokens, joint_attention_dim)
    ids: torch.Tensor  # (num_tokens, 3)
    log_scale: torch.Tensor | None  # (1 or num_tiles * batch, 1 or num_tokens); None is plain attention


class PromptBranch(NamedTuple):
    """The conditioning of one transformer call: the positive or the negative side of true CFG."""

    prompt_embeds: torch.Tensor  # (batch, num_tokens, joint_attention_dim)
    pooled_prompt_embeds: torch.Tensor  # (batch, pooled_projection_dim)
    text_ids: torch.Tensor  # (num_tokens, 3)
    ip_adapter_embeds: list[torch.Tensor] | None  # one (batch, num_images, dim) for each adapter


# ---- Attention with a strength for the DINO tokens -----------------------------------------------------------------


def cudnn_attention_with_lse(query, key, value):
    """Output and log-sum-exp `(batch, heads, tokens)` of cuDNN's attention of `(batch, heads, tokens, head_dim)`."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, compute_log_sumexp=True, dropout_p=0.0, is_causal=False, return_debug_mask=False
    )
    # torch >= 2.9 returns a trailing dimension of one.
    return out, lse.reshape(out.shape[:-1])


def flash_attention_with_lse(query, key, value):
    """Flash attention on CUDA: output and log-sum-exp, shapes as in [`cudnn_attention_with_lse`]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out, lse


def cpu_attention_with_lse(query, key, value):
    """PyTorch's flash attention on the CPU: output and log-sum-exp, shapes as in [`cudnn_attention_with_lse`]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def select_lse_attention(backend: AttentionBackendName, device: torch.device, dtype: torch.dtype) -> Callable | None:
    """The attention with log-sum-exp for a backend, device and dtype, or `None` if there is none."""
    if device.type == "cpu" and backend == AttentionBackendName.NATIVE:
        return cpu_attention_with_lse
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if backend == AttentionBackendName._NATIVE_CUDNN:
        return cudnn_attention_with_lse
    if backend == AttentionBackendName._NATIVE_FLASH:
        return flash_attention_with_lse
    if backend == AttentionBackendName.NATIVE:
        is_hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
        return cudnn_attention_with_lse if is_hopper else flash_attention_with_lse
    return None


def merge_attention(out_rest, lse_rest, out_dino, lse_dino, log_scale):
    """
    Joins attention over two groups of keys as one softmax in which the logits of the second are raised by `log_scale`.

    `o = lerp(o_rest, o_dino, sigmoid(lse_dino + log_scale - lse_rest))`: exact, and no mask is needed. The rule is
    ring attention's (arXiv 2310.01889), with a bias that is constant over a group.

    Args:
        out_rest, out_dino (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): The groups' outputs.
        lse_rest, lse_dino (`torch.Tensor` of shape `(batch, heads, tokens)`): Natural log of their softmax sums.
        log_scale (`torch.Tensor`): Bias that broadcasts to `lse_dino`.
    """
    weight = torch.sigmoid(lse_dino.float() + log_scale.float() - lse_rest.float()).unsqueeze(-1)
    return torch.lerp(out_rest, out_dino, weight.to(out_rest.dtype))


class FluxDinoAttnProcessor(FluxAttnProcessor):
    r"""
    Attention of FLUX in which the DINO keys weigh `scale` times as much as their logits say.

    The strength arrives as `attention_mask`, an additive bias of shape `(batch or 1, 1, 1, tokens)` in the query's
    dtype that is `log(scale)` on the DINO keys and 0 elsewhere, so that any other processor understands it too. Where
    `lse_attention` is given, the DINO keys and the rest are attended separately, without a mask, at the speed of the
    fastest kernel, and merged by their log-sum-exp. Otherwise the bias goes to the attention backend.

    Scaling the tokens instead would not do: LayerNorm and QK-norm remove their magnitude.

    Args:
        num_dino_tokens (`int`, defaults to 0): Length of the first part of the sequence `[DINO | text | image]`.
        lse_attention (`Callable`, *optional*): From [`select_lse_attention`]; it has no gradient for the bias.
    """

    def __init__(self, num_dino_tokens: int = 0, lse_attention: Any = None):
        super().__init__()
        self.num_dino_tokens = num_dino_tokens
        self.lse_attention = lse_attention

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # The kernels' log-sum-exp carries no gradient, so training takes the bias.
        if attention_mask is None or self.lse_attention is None or torch.is_grad_enabled():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        query, key, value = self.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = self.attend(query, key, value, attention_mask[..., 0])
        hidden_states = out.transpose(1, 2).flatten(2, 3)
        # A single block projects outside.
        if encoder_hidden_states is None:
            return hidden_states
        num_text_tokens = encoder_hidden_states.shape[1]
        text_states = attn.to_add_out(hidden_states[:, :num_text_tokens])
        image_states = attn.to_out[0](hidden_states[:, num_text_tokens:])
        return attn.to_out[1](image_states), text_states

    def project(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb):
        """Normed and rotated query, key and value of shape `(batch, heads, tokens, head_dim)`, text stream first."""
        query, key, value, *encoder_projections = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in encoder_projections)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        return (x.transpose(1, 2) for x in (query, key, value))

    def attend(self, query, key, value, log_scale):
        """Attention of `(batch, heads, tokens, head_dim)` tensors with `log_scale` added to the DINO logits."""
        num = self.num_dino_tokens
        out_rest, lse_rest = self.lse_attention(query, key[:, :, num:], value[:, :, num:])
        out_dino, lse_dino = self.lse_attention(query, key[:, :, :num], value[:, :, :num])
        return merge_attention(out_rest, lse_rest, out_dino, lse_dino, log_scale)


# ---- Pipeline ------------------------------------------------------------------------------------------------------


class FluxDinoTilePipeline(FluxImg2ImgPipeline):
    r"""
    Enlarges images with FLUX.1 in overlapping tiles, each told by DINO features what it shows.

    The image is resized, its latents are noised a little and denoised tile by tile; the tiles are blended in latent
    space and decoded. Without a projector it is a plain tiled image-to-image pipeline, and with a single tile and
    `strength` it equals [`FluxImg2ImgPipeline`], whose methods for saving, loading, LoRA, IP-Adapter and offloading it
    inherits.

    Args:
        scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            A scheduler to be used in combination with `transformer` to denoise the latents.
        vae ([`AutoencoderKL`]):
            Variational auto-encoder to encode the image and decode the result.
        text_encoder ([`CLIPTextModel`], *optional*):
            CLIP text encoder; not needed with `prompt_embeds`, nor without a prompt if the projector's repo brings
            the embeddings of the empty prompt.
        tokenizer ([`CLIPTokenizer`], *optional*):
            Tokenizer of `text_encoder`.
        text_encoder_2 ([`T5EncoderModel`], *optional*):
            T5 text encoder.
        tokenizer_2 ([`T5TokenizerFast`], *optional*):
            Tokenizer of `text_encoder_2`.
        transformer ([`FluxTransformer2DModel`]):
            Conditional transformer (FLUX.1-schnell, FLUX.1-dev or a model of their architecture).
        image_encoder ([`CLIPVisionModelWithProjection`], *optional*):
            Image encoder of an IP-Adapter.
        feature_extractor ([`CLIPImageProcessor`], *optional*):
            Image processor of an IP-Adapter.
        dino_encoder ([`PreTrainedModel`], *optional*):
            DINO backbone: `Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel`.
        dino_projector ([`DinoProjector`], *optional*):
            Projector from the features of `dino_encoder` to the text stream of `transformer`.
        default_start_sigma (`float`, *optional*, defaults to 0.35):
            Where a call starts that says nothing else. A model that knows less than FLUX.1 starts with less noise.
        default_tile_size (`int`, *optional*):
            Side in pixels of the tiles of a call that says nothing else, for a transformer that was trained on no
            larger pictures. Planned by default.
        default_vae_residual (`bool`, *optional*, defaults to `False`):
            Whether a call that says nothing else adds what the VAE loses of the input, for a VAE that loses much.
    """

    # Running a model frees the one before it. DINO may not run, so it must not stand between T5 and the transformer.
    model_cpu_offload_seq = (
        "dino_encoder->dino_projector->text_encoder->text_encoder_2->image_encoder->transformer->vae"
    )
    _optional_components = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
        "dino_encoder",
        "dino_projector",
    ]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: T5EncoderModel | None,
        tokenizer_2: T5TokenizerFast | None,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        dino_encoder: PreTrainedModel | None = None,
        dino_projector: DinoProjector | None = None,
        default_start_sigma: float = 0.35,
        default_tile_size: int | None = None,
        default_vae_residual: bool = False,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_modules(dino_encoder=dino_encoder, dino_projector=dino_projector)
        self.register_to_config(
            default_start_sigma=default_start_sigma,
            default_tile_size=default_tile_size,
            default_vae_residual=default_vae_residual,
        )
        self.default_prompt_embeds: tuple[torch.Tensor, torch.Tensor] | None = None
        self._kept_tile_size: tuple[int, int] | None = None

    # ---- Loading and saving ----------------------------------------------------------------------------------------

    def load_dino_projector(
        self,
        pretrained_model_name_or_path: str | Path,
        subfolder: str = "dino_projector",
        revision: str | None = None,
        token: str | bool | None = None,
        dino_encoder: str | Path | PreTrainedModel | None = None,
    ) -> None:
        r"""
        Loads a projector and the DINO encoder that it was trained with, from safetensors only and without remote code.

        If the repo holds `prompt_embeds.safetensors` (tensors `prompt_embeds` of shape `(1, tokens, dim)` and
        `pooled_prompt_embeds` of shape `(1, dim)`), calls without a prompt use it and need no text encoder.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Hub repo or local folder that holds `subfolder`, or a local folder of a projector itself.
            subfolder (`str`, *optional*, defaults to `"dino_projector"`):
                Folder of the projector in the repo.
            revision (`str`, *optional*):
                Branch, tag or commit of the repo.
            token (`str` or `bool`, *optional*):
                Hub token for a private repo.
            dino_encoder (`str`, `Path` or `PreTrainedModel`, *optional*):
                A DINO model, or its repo or folder, in place of the one that the projector's config names.

        Raises:
            `ValueError`: If the projector, the encoder and the transformer do not fit together.
            `OSError`: If files are missing or are not safetensors.
        """
        for name, value, kinds in (
            ("pretrained_model_name_or_path", pretrained_model_name_or_path, (str, Path)),
            ("subfolder", subfolder, (str,)),
            ("dino_encoder", dino_encoder, (str, Path, PreTrainedModel, type(None))),
        ):
            if not isinstance(value, kinds):
                names = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"`{name}` must be one of {names} but is {value!r}.")
        source = str(pretrained_model_name_or_path)
        if isinstance(pretrained_model_name_or_path, Path) and not Path(source).is_dir():
            raise OSError(f"There is no folder {source}.")
        is_projector_folder = (Path(source) / "config.json").is_file() and not (Path(source) / subfolder).is_dir()
        repo = str(Path(source).parent) if is_projector_folder else source
        folder = Path(source) if is_projector_folder else Path(source) / subfolder
        if not Path(source).is_dir():
            # `ModelMixin.from_pretrained` would print warnings about itself, and its errors do not name the subfolder.
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                file = hf_hub_download(source, name, subfolder=subfolder, revision=revision, token=token)
            folder = Path(file).parent
        config = DinoProjector.load_config(folder)
        class_name = config.get("_class_name") if isinstance(config, dict) else None
        if class_name != DinoProjector.__name__:
            raise ValueError(
                f"`pretrained_model_name_or_path` {source} holds a {class_name or 'model of another library'}, not a"
                " DinoProjector. Pass the repo or folder of a trained projector."
            )
        check_projector_file(config, folder / SAFETENSORS_WEIGHTS_NAME)
        device, dtype = self._execution_device, self.transformer.dtype
        # `ModelMixin.to(dtype)` warns about modules to keep in float32, also where there are none.
        projector = DinoProjector.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype)
        encoder = dino_encoder
        if isinstance(encoder, PreTrainedModel):
            self.check_dino_components(encoder.config, projector)
        else:
            name = projector.config.dino_model if encoder is None else str(encoder)
            location = {}
            if name is None:
                name, location = repo, {"revision": revision, "subfolder": "dino_encoder"}
            options = {"token": token, "trust_remote_code": False, **location}
            # Before the weights: other kinds and absurd sizes are refused without allocating anything.
            check_dino_numbers(PreTrainedConfig.get_config_dict(name, **options)[0])
            encoder_config = AutoConfig.from_pretrained(name, **options)
            self.check_dino_components(encoder_config, projector)
            check_encoder_file(encoder_config, name, options)
            try:
                encoder = AutoModel.from_pretrained(name, use_safetensors=True, **options)
            except RuntimeError as error:
                raise ValueError(
                    f"`dino_encoder` {name} has weights that do not fit its config. Pass the encoder that the"
                    " projector was trained with."
                ) from error
        default_prompt_embeds = load_prompt_embeds(repo, revision, token)
        if default_prompt_embeds is not None:
            dims = self.transformer.config.joint_attention_dim, self.transformer.config.pooled_projection_dim
            for name, embeds, shape in zip(
                PROMPT_EMBEDS_KEYS, default_prompt_embeds, ((1, None, dims[0]), (1, dims[1]))
            ):
                check_embeds(f"{name} of {PROMPT_EMBEDS_NAME}", embeds, shape, "the empty prompt's")

        # Under sequential and group offload these two, small beside FLUX, stay on the execution device.
        encoder, projector = encoder.to(device=device, dtype=dtype).eval(), projector.to(device).eval()
        self.register_modules(dino_encoder=encoder, dino_projector=projector)
        self.default_prompt_embeds = default_prompt_embeds
        # Model offload chains its hooks from component to component: chain them again with these two.
        self.maybe_free_model_hooks()

    def unload_dino_projector(self) -> None:
        r"""Removes the projector, the DINO encoder and the prompt embeddings that came with them."""
        self.register_modules(dino_encoder=None, dino_projector=None)
        self.default_prompt_embeds = None
        # As after loading.
        self.maybe_free_model_hooks()

    def check_dino_components(self, encoder_config: PreTrainedConfig | None, dino_projector: DinoProjector) -> None:
        r"""Raises a `ValueError` unless projector, transformer and, if its config is given, encoder fit together."""
        joint_dim = self.transformer.config.joint_attention_dim
        if dino_projector.config.out_dim != joint_dim:
            raise ValueError(
                f"`dino_projector` gives tokens of {dino_projector.config.out_dim} channels but the transformer takes"
                f" {joint_dim}. Use a projector trained for this transformer."
            )
        if encoder_config is None:
            return
        model_type = encoder_config.model_type
        if model_type not in DINO_MODEL_TYPES:
            raise ValueError(f"`dino_encoder` must be one of {', '.join(DINO_MODEL_TYPES)} but is a {model_type!r}.")
        num_features = encoder_config.hidden_size * len(dino_projector.config.layers)
        if num_features != dino_projector.config.in_dim:
            raise ValueError(
                f"`dino_encoder` gives {num_features} features a patch but `dino_projector` takes"
                f" {dino_projector.config.in_dim}. Pass the encoder that the projector was trained with"
                f" ({dino_projector.config.dino_model})."
            )
        num_states = encoder_config.num_hidden_layers + 1
        if not all(-num_states <= layer < num_states for layer in dino_projector.config.layers):
            raise ValueError(
                f"`dino_projector` takes the layers {list(dino_projector.config.layers)}, but `dino_encoder` has"
                f" {num_states} hidden states. Pass the encoder that the projector was trained with."
            )

    def compile_for_upscaling(self, **kwargs) -> None:
        r"""
        Compiles the transformer's blocks and the VAE's encoder and decoder, as graphs without breaks.

        The transformer takes three graphs (its double blocks, the first single block and the others), and encoder and
        decoder one each. They fit one tile size, so that from then on the planner keeps to the tile size of the first
        call that has none given, and the last batch of tiles is filled up. With a projector they serve every DINO
        strength: where DINO is off, its tokens stay in the sequence without weight.

        Args:
            kwargs: Passed to `torch.compile`, for example `mode`.

        Raises:
            `ValueError`: If group or sequential offloading is on, whose hooks `torch.compile` cannot trace.
        """
        is_sequential = any(hasattr(module, "_hf_hook") for module in self.transformer.transformer_blocks.modules())
        if is_sequential or _is_group_offload_enabled(self.transformer):
            raise ValueError(
                "`compile_for_upscaling` does not work with group or sequential offloading. Call it on a pipeline with"
                " `enable_model_cpu_offload`, or without offloading."
            )
        self.transformer.compile_repeated_blocks(fullgraph=True, **kwargs)
        for coder in (self.vae.encoder, self.vae.decoder):
            coder.compile(fullgraph=True, **kwargs)

    @property
    def is_compiled(self) -> bool:
        r"""`bool`: Whether transformer or VAE have compiled modules, whose graphs fit one shape."""
        return any(
            is_compiled_module(model) or any(module._compiled_call_impl is not None for module in model.modules())
            for model in (self.transformer, self.vae)
        )

    @classmethod
    def load_config(cls, *args, **kwargs):
        r"""Loads `model_index.json`; this class itself needs none of the code that lies beside a saved pipeline."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and config.get("_class_name") == [MODULE_NAME, cls.__name__]:
            config["_class_name"] = cls.__name__
        return config

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        # With the module's name, `DiffusionPipeline.from_pretrained` finds the file that `save_config` puts there.
        config["_class_name"] = [MODULE_NAME, type(self).__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        r"""Saves `model_index.json`, and this file beside it, so that the folder loads where nothing is installed."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        target = Path(save_directory) / f"{MODULE_NAME}.py"
        if not (target.exists() and target.samefile(__file__)):
            shutil.copyfile(__file__, target)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    # ---- Checks and defaults ---------------------------------------------------------------------------------------

    @property
    def pixels_per_token(self) -> int:
        r"""`int`: Side of a transformer token in pixels: a VAE cell times the 2x2 packing."""
        return self.vae_scale_factor * 2

    def is_latent_image(self, image: PipelineImageInput) -> bool:
        r"""Whether `image` holds latents, as the parent pipeline allows: a 4-D tensor with the VAE's channels."""
        return isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == self.latent_channels != 3

    def check_image(self, image: PipelineImageInput) -> list:
        r"""
        Returns the images as a list; raises a `ValueError` unless they are of one kind and size, with 1 or 3 channels
        (PIL images may have any mode) and finite values in [0, 1].
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
        if not images or not any(all(isinstance(item, kind) for item in images) for kind in kinds):
            names = sorted({type(item).__name__ for item in images}) or "an empty list"
            raise ValueError(
                f"`image` must be a PIL image, a NumPy array, a tensor, or a list of one of these, but is {names}."
                " Open files with `diffusers.utils.load_image`."
            )
        if not isinstance(images[0], PIL.Image.Image):
            images = [item for value in images for item in split_image_batch(value)]
        sizes = {image_size(item) for item in images}
        if len(sizes) != 1 or min(min(sizes)) < 1:
            raise ValueError(
                f"`image` must hold images of one size of at least 1 px but has (height, width) {sorted(sizes)}."
                " Call once for each size."
            )
        return images

    def get_output_size(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        upscale_factor: float | None = None,
    ) -> tuple[int, int]:
        r"""
        The height and width of the result in pixels.

        Raises:
            `ValueError`: If `image`, `upscale_factor`, `height` or `width` is out of range, or if both an
                `upscale_factor` and a size are given.
        """
        if upscale_factor is not None and (height is not None or width is not None):
            raise ValueError(
                f"Both `upscale_factor` ({upscale_factor}) and `height` ({height}) or `width` ({width}) are given."
                " Pass one of the two."
            )
        if (height is None) ^ (width is None):
            raise ValueError(
                f"`height` ({height}) and `width` ({width}) go together. Pass both in pixels, or `upscale_factor`."
            )
        if self.is_latent_image(image):
            return self._get_latent_image_size(image, height, width, upscale_factor)
        if height is not None and width is not None:
            for name, length in (("height", height), ("width", width)):
                check_integer(name, length, 1, "Pass the size of the output in pixels.")
            self.check_image(image)
            return height, width
        factor = DEFAULT_UPSCALE_FACTOR if upscale_factor is None else upscale_factor
        check_number("upscale_factor", factor, 1, 8, "Upscale in several calls for more.")
        image_height, image_width = image_size(self.check_image(image)[0])
        return round(image_height * factor), round(image_width * factor)

    def _get_latent_image_size(self, latents, height, width, upscale_factor):
        check_embeds("image", latents, (None, self.latent_channels, None, None), "latents of the size of the output")
        size = tuple(cells * self.vae_scale_factor for cells in latents.shape[2:])
        if any(length % self.pixels_per_token for length in size) or 0 in size:
            raise ValueError(f"`image` latents must have even height and width but have {tuple(latents.shape[2:])}.")
        if upscale_factor not in (None, 1) or (height is not None and (height, width) != size):
            raise ValueError(
                f"`image` holds latents of {size[0]}x{size[1]} px, which cannot be resized. Pass pixels to upscale, or"
                " leave out `upscale_factor`, `height` and `width`."
            )
        return size

    def check_schedule_inputs(self, strength, start_sigma, sigmas, num_inference_steps):
        r"""Checks what sets the noise levels; raises a `ValueError`."""
        for name, value in {"strength": strength, "sigmas": sigmas}.items():
            if value is not None and start_sigma is not None:
                raise ValueError(
                    f"Both `{name}` ({value}) and `start_sigma` ({start_sigma}) set the noise level. Pass one of them."
                )
        if strength is not None:
            check_number("strength", strength, 0, 1, "It is the share of the steps that are executed.")
        if start_sigma is not None:
            check_number("start_sigma", start_sigma, 0.01, 1, "It is the share of noise in the latents at the start.")
        if sigmas is not None and not is_falling(sigmas):
            raise ValueError(
                f"`sigmas` must be a list of numbers that fall from at most 1 to above 0 but is {sigmas!r}."
            )
        if num_inference_steps is not None:
            check_integer("num_inference_steps", num_inference_steps, 1, "Pass the number of denoising steps.")

    def check_flat_tile_inputs(self, skip_flat_tiles, image, latents) -> float:
        r"""Checks what skipping flat tiles needs; returns the greatest contrast of a flat tile, 0 for none."""
        if isinstance(skip_flat_tiles, bool):
            skip_flat_tiles = FLAT_TILE_CONTRAST if skip_flat_tiles else 0.0
        check_number("skip_flat_tiles", skip_flat_tiles, 0, 1, "It is a contrast; pass True for 0.01.")
        if skip_flat_tiles and (latents is not None or self.is_latent_image(image)):
            raise ValueError(
                f"`skip_flat_tiles` ({skip_flat_tiles:g}) needs the pixels of `image`, but latents are given. Pass"
                " False, or pixels and no `latents`."
            )
        return skip_flat_tiles

    def check_result_inputs(
        self, image, color_fix, vae_residual, output_type, callback_on_step_end, tensor_inputs
    ) -> bool:
        r"""
        Checks what the result and the callback need; raises a `ValueError`. Returns `vae_residual`, or the model's
        default where the call decodes an image.
        """
        check_choice("color_fix", color_fix, (None, "wavelet", "adain"))
        check_choice("vae_residual", vae_residual, (None, False, True))
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        has_latents = self.is_latent_image(image) or output_type == "latent"
        if color_fix is not None and has_latents:
            raise ValueError(f"`color_fix` {color_fix!r} needs an image and a decoded result, not latents. Pass None.")
        if vae_residual and has_latents:
            raise ValueError("`vae_residual` needs an image and a decoded result, not latents. Pass False.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable but is {callback_on_step_end!r}.")
        if not isinstance(tensor_inputs, (list, tuple)) and (callback_on_step_end or tensor_inputs is not None):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a list but is {tensor_inputs!r}.")
        return (self.config.default_vae_residual and not has_latents) if vae_residual is None else vae_residual

    def check_diagnosis_inputs(self, image, output_type, latents, suspect_threshold, redo_start_sigma, start_sigma):
        r"""Checks what a diagnosis of the tiles, and doing some again, need; raises a `ValueError`."""
        check_number("suspect_threshold", suspect_threshold, -1, 1, "It is a mean cosine of DINO features.")
        if output_type == "latent" or self.is_latent_image(image):
            raise ValueError(
                "`return_diagnostics` and `redo_start_sigma` compare pixels, but `image` or `output_type`"
                f" ({output_type!r}) is latents. Pass pixels, and another `output_type`."
            )
        if redo_start_sigma is not None:
            remedy = f"It must be less noise than the tiles start from at first, {start_sigma:.3g}."
            check_number("redo_start_sigma", redo_start_sigma, 0.01, np.nextafter(start_sigma, 0), remedy)
            if latents is not None or self.dino_encoder is None or self.dino_projector is None:
                raise ValueError(
                    f"`redo_start_sigma` ({redo_start_sigma:g}) needs a DINO projector to find the tiles, and no"
                    " `latents`. Call `load_dino_projector`, or pass None."
                )

    def check_prompt_inputs(self, texts: dict, embeds: dict, max_sequence_length, joint_attention_kwargs):
        r"""
        Checks the texts, or their embeddings, by the argument's name; raises a `ValueError`. The parent's
        `check_inputs` checks what excludes each other.
        """
        check_integer("max_sequence_length", max_sequence_length, 1, "FLUX.1 takes up to 512 text tokens.")
        for name, text in texts.items():
            entries = text if isinstance(text, list) else [""] if text is None else [text]
            if not entries or not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"`{name}` must be a string or a list of strings but is {text!r}.")
        config = self.transformer.config
        shape: tuple[int | None, ...]
        for prefix in ("", "negative_"):
            tokens, pooled = embeds[f"{prefix}prompt_embeds"], embeds[f"{prefix}pooled_prompt_embeds"]
            if tokens is not None:
                shape = (None, None, config.joint_attention_dim)
                check_embeds(f"{prefix}prompt_embeds", tokens, shape, "T5 embeddings")
            if tokens is None and pooled is not None:
                raise ValueError(
                    f"`{prefix}pooled_prompt_embeds` is given without `{prefix}prompt_embeds`. Pass both, or a prompt."
                )
            if tokens is not None and pooled is not None:
                shape = (len(tokens), config.pooled_projection_dim)
                check_embeds(f"{prefix}pooled_prompt_embeds", pooled, shape, "CLIP embeddings of the same prompts")
        positive, negative = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
        num_text_tokens = max_sequence_length if positive is None else positive.shape[1]
        if negative is not None and negative.shape[1] != num_text_tokens:
            raise ValueError(
                f"`negative_prompt_embeds` has {negative.shape[1]} tokens but the prompt has {num_text_tokens}. Encode"
                " both with the same `max_sequence_length`."
            )
        has_text_encoders = self.text_encoder is not None and self.text_encoder_2 is not None
        prompt, negative_prompt = texts["prompt"], texts["negative_prompt"]
        if not has_text_encoders and (prompt is not None or negative_prompt is not None):
            raise ValueError(
                f"`prompt` ({prompt!r}) or `negative_prompt` ({negative_prompt!r}) needs the components `text_encoder`"
                " and `text_encoder_2`, which this pipeline was loaded without. Load them, or pass `prompt_embeds` and"
                " `pooled_prompt_embeds`."
            )
        if joint_attention_kwargs is not None and not isinstance(joint_attention_kwargs, dict):
            raise ValueError(f"`joint_attention_kwargs` must be a dictionary but is {joint_attention_kwargs!r}.")

    def check_ip_adapter_inputs(self, ip_adapter_inputs: dict, num_prompts: int, prefixes: tuple[str, ...]):
        r"""Checks images and embeddings for an IP-Adapter, by the argument's name; raises a `ValueError`."""
        given = {name: value for name, value in ip_adapter_inputs.items() if value is not None}
        adapters = getattr(self.transformer, "encoder_hid_proj", None)
        has_image_encoder = self.image_encoder is not None and self.feature_extractor is not None
        for name, value in given.items():
            if adapters is None:
                raise ValueError(f"`{name}` is given but no IP-Adapter is loaded. Call `load_ip_adapter` first.")
            values = value if isinstance(value, list) else [value]
            if len(values) != adapters.num_ip_adapters:
                raise ValueError(f"`{name}` has {len(values)} entries for {adapters.num_ip_adapters} IP-Adapters.")
            if name.endswith("_embeds"):
                for layer, embeds in zip(adapters.image_projection_layers, values):
                    check_embeds(name, embeds, (None, None, layer.image_embeds.in_features), "image embeddings")
                    if len(embeds) not in (1, num_prompts):
                        raise ValueError(f"`{name}` has {len(embeds)} entries for {num_prompts} prompts.")
            elif not has_image_encoder:
                raise ValueError(
                    f"`{name}` needs the components `image_encoder` and `feature_extractor`. Load them, or pass"
                    f" `{name}_embeds`."
                )
        for prefix in prefixes:
            name = f"{prefix}ip_adapter_image"
            if given and not {name, f"{name}_embeds"} & given.keys() and not has_image_encoder:
                raise ValueError(
                    f"`{name}_embeds` is missing, and a black image in its place needs the components `image_encoder`"
                    " and `feature_extractor`. Pass it, or load them."
                )

    def check_batch_inputs(self, num_prompts, num_images_per_prompt, texts, embeds, generator, latents, plan):
        r"""Checks what has to agree with the number of prompts; raises a `ValueError`."""
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, "Pass the number of results for each prompt.")
        num_texts, num_negative_texts = (
            len(texts[name]) if isinstance(texts[name], list) else 1 for name in ("prompt", "negative_prompt")
        )
        for name, value, lengths in (
            ("prompt_2", texts["prompt_2"], (num_texts,)),
            ("negative_prompt", texts["negative_prompt"], (1, num_prompts)),
            ("negative_prompt_2", texts["negative_prompt_2"], (num_negative_texts,)),
            ("negative_prompt_embeds", embeds["negative_prompt_embeds"], (1, num_prompts)),
        ):
            if isinstance(value, (list, torch.Tensor)) and len(value) not in lengths:
                raise ValueError(f"`{name}` has {len(value)} entries for {num_prompts} prompts.")
        batch_size = num_prompts * num_images_per_prompt
        generators = generator if isinstance(generator, list) else [generator]
        if not all(item is None or isinstance(item, torch.Generator) for item in generators):
            raise ValueError(f"`generator` must be a `torch.Generator` or a list of them but is {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` has {len(generator)} entries for a batch of {batch_size}. Pass as many.")
        if latents is not None:
            num_tokens = plan.height * plan.width // self.pixels_per_token**2
            shape = (batch_size, num_tokens, self.latent_channels * 4)
            check_embeds("latents", latents, shape, "packed latents of the whole padded output")

    def check_dino_inputs(self, image, plan, num_images, scale, dino_embeds, joint_attention_kwargs):
        r"""Checks the DINO conditioning; raises a `ValueError`."""
        if dino_embeds is not None:
            if self.dino_projector is None:
                raise ValueError("`dino_embeds` is given but there is no projector. Call `load_dino_projector` first.")
            shape = (len(plan), num_images, None, None, self.dino_projector.config.in_dim)
            meaning = "features from `encode_dino` for the same image, size and tiles"
            check_embeds("dino_embeds", dino_embeds, shape, meaning)
        if self.dino_projector is None and scale not in (0, 1):
            logger.warning(f"`dino_conditioning_scale` {scale} has no effect: there is no projector.")
        if scale == 0 or self.dino_projector is None:
            return
        if dino_embeds is None and self.dino_encoder is None:
            raise ValueError("`dino_encoder` is missing. Call `load_dino_projector` or pass `dino_embeds`.")
        if dino_embeds is None and self.is_latent_image(image):
            raise ValueError("`image` holds latents, which DINO cannot see. Pass `dino_embeds` or pixels.")
        self.check_dino_components(self.dino_encoder.config if dino_embeds is None else None, self.dino_projector)
        if scale != 1:
            self.check_attention_backends(scale, joint_attention_kwargs or {})

    def check_attention_backends(self, scale: float, joint_attention_kwargs: dict) -> None:
        r"""Raises a `ValueError` where an attention processor could not apply a DINO strength other than 0 and 1."""
        if "attention_mask" in joint_attention_kwargs:
            raise ValueError(
                "`joint_attention_kwargs` has an `attention_mask`, which carries the DINO strength. Leave it out, or"
                " pass `dino_conditioning_scale` 0 or 1."
            )
        obstacle = self.find_obstacle_to_strength()
        if obstacle is not None:
            raise ValueError(f"`dino_conditioning_scale` {scale} does not work with {obstacle}")

    def find_obstacle_to_strength(self) -> str | None:
        r"""What keeps an attention processor from weighing the DINO keys, with a remedy, or `None`."""
        for processor in self.transformer.attn_processors.values():
            backend = attention_backend_of(processor)
            lse_attention = select_lse_attention(backend, self._execution_device, self.transformer.dtype)
            has_lse = type(processor) is FluxAttnProcessor and lse_attention is not None
            if backend not in MASK_BACKENDS and not has_lse:
                return (
                    f"the attention backend {backend.value!r} of {type(processor).__name__}, which takes no mask. Pass"
                    ' 0 or 1, or choose a backend with `pipe.transformer.set_attention_backend("native")`.'
                )
            if getattr(processor, "_parallel_config", None) is not None:
                return "context parallelism, which splits the sequence. Pass 0 or 1."
        return None

    def check_checkpoint_inputs(self, checkpoint_dir, checkpoint_steps, process_group, generator, redo_start_sigma):
        r"""Checks what checkpoints, and processes that share the image, need; raises a `ValueError`."""
        check_integer("checkpoint_steps", checkpoint_steps, 1, "It is the number of steps between checkpoints.")
        if checkpoint_dir is not None and (not isinstance(checkpoint_dir, (str, Path)) or checkpoint_dir == ""):
            raise ValueError(f"`checkpoint_dir` must be the path of a folder but is {checkpoint_dir!r}.")
        if checkpoint_dir is None and process_group is None:
            return
        name = "process_group" if checkpoint_dir is None else "checkpoint_dir"
        scheduler = self.scheduler
        is_stateless = type(scheduler) is FlowMatchEulerDiscreteScheduler
        if not is_stateless or scheduler.config.get("stochastic_sampling", False):
            kind = f"a stochastic {type(scheduler).__name__}" if is_stateless else f"a {type(scheduler).__name__}"
            raise ValueError(
                f"`{name}` needs steps that depend on the canvas alone, but `scheduler` is {kind}. Use a"
                " FlowMatchEulerDiscreteScheduler without `stochastic_sampling`."
            )
        if redo_start_sigma is not None:
            raise ValueError(
                f"`redo_start_sigma` ({redo_start_sigma:g}) starts from the input's latents, which a call with"
                f" `{name}` need not have. Pass one of them."
            )
        if process_group is not None and generator is None:
            raise ValueError("`process_group` needs a `generator`, with the same seed in every process.")

    def describe_call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        r"""
        What decides the canvas after each step, as JSON can hold it: the arguments and the models. The dtype of the
        VAE is left out, so that a result that it cannot decode in float16 can be decoded in float32.
        """
        models = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
        dtypes = {name: str(model.dtype) for name, model in models.items() if name != "vae"}
        return {
            **describe(arguments),
            **{name: describe_model(part) for name, part in models.items()},
            "dtype": dtypes,
        }

    def get_num_prompts(self, prompt, prompt_embeds, num_images: int) -> int:
        r"""The number of prompts once a single prompt is repeated for several images."""
        num_prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        name = "prompt" if prompt_embeds is None else "prompt_embeds"
        if num_prompts == 1 or num_prompts % num_images == 0:
            return max(num_prompts, num_images)
        raise ValueError(
            f"`{name}` has {num_prompts} entries for {num_images} images. Pass one prompt, or one for each image."
        )

    def get_default_settings(self, strength, sigmas, start_sigma, num_inference_steps, guidance_scale) -> tuple:
        r"""
        Steps, guidance and start sigma where the caller leaves them out.

        A transformer with guidance embeddings is taken for FLUX.1-dev, one without for the distilled FLUX.1-schnell.
        From a start sigma every step is executed, so dev needs fewer of them than with `strength`.
        """
        is_dev = self.transformer.config.guidance_embeds
        if strength is None and sigmas is None and start_sigma is None:
            start_sigma = self.config.default_start_sigma
        if sigmas is not None:
            num_inference_steps = len(sigmas)
        elif num_inference_steps is None:
            num_inference_steps = (12 if start_sigma is not None else 28) if is_dev else 4
        return num_inference_steps, 3.5 if guidance_scale is None else guidance_scale, start_sigma

    # ---- Tiles, image and latents ----------------------------------------------------------------------------------

    def plan_tiles(
        self,
        height: int,
        width: int,
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: int = DEFAULT_TILE_OVERLAP,
    ) -> TilePlan:
        r"""
        The tiles that a call with this output size would process; see [`plan_tiles`] for the arguments, in pixels.

        With FLUX.1, `len(pipe.plan_tiles(4096, 4096))` is 16.
        """
        tile_size = self.config.default_tile_size if tile_size is None else tile_size
        # The plan must not depend on the projector, so that results with and without it can be compared.
        plan_with = partial(
            plan_tiles, height, width, pixels_per_token=self.pixels_per_token, inner_dim=self.transformer.inner_dim
        )
        if tile_size is not None or self._kept_tile_size is None:
            plan = plan_with(tile_size=tile_size, tile_overlap=tile_overlap)
        else:
            # A kept tile size fits by chance: a few pixels of overlap must not cost another row of tiles.
            overlaps = (tile_overlap, tile_overlap * 3 // 4)
            plans = [plan_with(tile_size=self._kept_tile_size, tile_overlap=overlap) for overlap in overlaps]
            plan = min(plans, key=len)
        if plan.tokens_per_tile > GRID_TILE_TOKENS:
            logger.warning(
                f"Tiles of {plan.tile_width}x{plan.tile_height} px are {plan.tokens_per_tile} tokens. FLUX.1 tends to"
                f" draw grids above {GRID_TILE_TOKENS} tokens (1.5 MP): lower `tile_size`."
            )
        return plan

    def prepare_image(self, image: PipelineImageInput, height: int, width: int) -> torch.Tensor:
        r"""
        Resizes an image (PIL by Lanczos, arrays and tensors by antialiased bicubic) and pads it to whole tokens by
        repeating its last row and column.

        Returns:
            `torch.Tensor` of shape `(batch, 3, padded height, padded width)` on the CPU: bytes from PIL images, which
            take a quarter of the memory, else float32 in [-1, 1]. [`~FluxDinoTilePipeline.crop_pixels`] reads both.
        """
        images = self.check_image(image)
        below, right = -height % self.pixels_per_token, -width % self.pixels_per_token
        if isinstance(images[0], PIL.Image.Image):
            padded = np.empty((len(images), height + below, width + right, 3), dtype=np.uint8)
            for canvas, item in zip(padded, images):
                wide = item.convert("RGB").resize((width, item.height), PIL.Image.Resampling.LANCZOS)
                # Band by band, so that beside the result only a band is held.
                for top in range(0, height, RESIZED_ROWS):
                    bottom = min(top + RESIZED_ROWS, height)
                    box = (0, top * item.height / height, width, bottom * item.height / height)
                    canvas[top:bottom, :width] = wide.resize((width, bottom - top), PIL.Image.Resampling.LANCZOS, box)
            padded[:, :height, width:] = padded[:, :height, width - 1 : width]
            padded[:, height:] = padded[:, height - 1 : height]
            return torch.from_numpy(padded).permute(0, 3, 1, 2)
        if isinstance(images[0], np.ndarray):
            pixels = self.image_processor.numpy_to_pt(np.stack(images))
        else:
            pixels = torch.stack(images)
        pixels = pixels.float().expand(-1, 3, -1, -1)
        if pixels.shape[2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        return self.image_processor.normalize(F.pad(pixels.cpu(), (0, right, 0, below), mode="replicate"))

    def crop_pixels(self, image: torch.Tensor, tile: Tile | None = None) -> torch.Tensor:
        r"""
        A tile of a prepared image, or all of it, in [-1, 1] in float32: the tile on the execution device, where bytes
        become floats, the whole image on the CPU.
        """
        pixels = image if tile is None else image[tile.slices()].to(self._execution_device)
        return pixels if pixels.is_floating_point() else self.image_processor.normalize(pixels.float() / 255)

    def encode_tiles(
        self, image: torch.Tensor, plan: TilePlan, generator, process_group=None, sample_mode: str = "sample"
    ) -> torch.Tensor:
        r"""
        Encodes a prepared image `(batch, 3, height, width)` tile by tile to scaled latents in float32 of shape
        `(batch, latent channels, rows, columns)`.

        The tiles' posteriors are blended before one sample is drawn for the whole image, so that the result does not
        depend on the order of the tiles. With the `sample_mode` "argmax" it is their mode, without `generator`.
        """
        is_finite: list[torch.Tensor] = []
        tiles = share_work(lambda tile: self.encode_tile(self.crop_pixels(image, tile)), plan, process_group)
        blended = blend_tiles(watch_tiles(tiles, is_finite), plan, self.vae_scale_factor)
        check_finite(is_finite, "the image as the VAE encodes it", VAE_REMEDY, plan)
        if blended.shape[1] == self.latent_channels:  # an `AutoencoderTiny` has no posterior
            latents = blended
        else:
            generators = generator if isinstance(generator, list) else [generator]
            parts = blended.split(1) if len(generators) > 1 else [blended]
            latents = torch.cat(
                [
                    retrieve_latents(AutoencoderKLOutput(DiagonalGaussianDistribution(part)), generator, sample_mode)
                    for part, generator in zip(parts, generators)
                ]
            )
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def encode_tile(self, pixels: torch.Tensor) -> torch.Tensor:
        r"""Mean and log-variance, stacked as channels, of a tile's posterior, or its latents if the VAE has none."""
        # Contiguous, because a compiled encoder is compiled for given strides.
        encoded = self.vae.encode(pixels.to(self._execution_device).to(self.vae.dtype).contiguous())
        return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents

    def decode_strips(self, latents: torch.Tensor, plan: TilePlan, process_group=None) -> Iterator[torch.Tensor]:
        r"""
        Decodes `(batch, latent channels, rows, columns)` latents tile by tile and yields the padded image from top to
        bottom, in strips `(batch, 3, rows, width)`, about in [-1, 1], in float32. Only one row of tiles is held.
        """
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        # Contiguous, because a compiled decoder is compiled for given strides.
        tiles = [latents[tile.slices(self.vae_scale_factor)] for tile in plan]
        is_finite: list[torch.Tensor] = []
        decoded = share_work(
            lambda tile: self.vae.decode(tile.contiguous().to(self.vae.dtype), return_dict=False)[0],
            tiles,
            process_group,
        )
        for strip in blend_strips(watch_tiles(decoded, is_finite), plan, 1):
            check_finite(is_finite, "the result as the VAE decodes it", VAE_REMEDY, plan)
            yield strip

    def decode_strips_with_residual(
        self, latents: torch.Tensor, plan: TilePlan, image: torch.Tensor, num_prompts: int, process_group=None
    ) -> Iterator[torch.Tensor]:
        r"""
        The strips of [`~FluxDinoTilePipeline.decode_strips`] with what the VAE loses of a prepared image: the image
        less what it decodes to, without a step of the transformer.
        """
        modes = self.encode_tiles(image, plan, None, process_group, sample_mode="argmax")
        kept, top = self.decode_strips(modes, plan, process_group), 0
        for strip, kept_strip in zip(self.decode_strips(latents, plan, process_group), kept):
            bottom = top + strip.shape[2]
            residual = self.crop_pixels(image[:, :, top:bottom]).to(strip.device) - kept_strip
            yield strip + self.expand_images(residual, num_prompts, len(strip))
            top = bottom

    def decode_image(
        self,
        latents: torch.Tensor,
        plan: TilePlan,
        height: int,
        width: int,
        output_type: str,
        decode: Callable[..., Iterator[torch.Tensor]],
        fix_color: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        r"""
        Decodes latents to the output of `height` and `width` in pixels, put together in main memory: "pil" from bytes,
        "np" and "pt" from floats in [0, 1]. `decode` makes strips of `latents` and `plan`. `fix_color` gets and
        returns the whole padded image, on the CPU.
        """
        strips: Iterable[torch.Tensor] = decode(latents, plan)
        if fix_color is not None:
            strips = [fix_color(torch.cat([strip.cpu() for strip in strips], dim=2))]
        parts = [self.finish_strip(strip[..., :width], output_type) for strip in strips]
        pixels = torch.cat(parts, dim=1)[:, :height]
        if output_type == "pt":
            return pixels.permute(0, 3, 1, 2).contiguous()
        return [PIL.Image.fromarray(image) for image in pixels.numpy()] if output_type == "pil" else pixels.numpy()

    def choose_decoder(
        self, residual_image: torch.Tensor | None, num_prompts: int, process_group=None
    ) -> Callable[..., Iterator[torch.Tensor]]:
        r"""What makes strips of latents and a plan: with what the VAE loses of `residual_image`, if that is given."""
        if residual_image is None:
            return partial(self.decode_strips, process_group=process_group)
        known = {"image": residual_image, "num_prompts": num_prompts, "process_group": process_group}
        return partial(self.decode_strips_with_residual, **known)

    def finish_strip(self, strip: torch.Tensor, output_type: str) -> torch.Tensor:
        r"""
        A strip of [`~FluxDinoTilePipeline.decode_strips`] as `(batch, rows, width, 3)` on the CPU: bytes for "pil",
        else floats in [0, 1].
        """
        strip = self.image_processor.postprocess(strip, output_type="pt").permute(0, 2, 3, 1)
        if output_type == "pil":
            strip = (strip * 255).round().to(torch.uint8)
        return strip.contiguous().cpu()

    @torch.no_grad()
    def decode_pixels(
        self,
        latents: torch.Tensor,
        plan: TilePlan,
        height: int,
        width: int,
        process_group=None,
        residual_image: torch.Tensor | None = None,
    ) -> Iterator[np.ndarray]:
        r"""
        Decodes a result of `output_type="latent"` without holding the picture: yields its pixels from top to bottom as
        bytes of shape `(batch, rows, width, 3)`. A row of tiles is held.

        Args:
            latents (`torch.Tensor`): Packed latents of the whole padded output.
            plan ([`TilePlan`]): The tiles of the call, from [`~FluxDinoTilePipeline.plan_tiles`].
            height (`int`): Height of the output in pixels.
            width (`int`): Width of the output in pixels.
            process_group (`torch.distributed.ProcessGroup`, *optional*):
                The processes that share the decoding. Every one of them has to take all the pixels.
            residual_image (`torch.Tensor` of shape `(num_images, 3, padded height, padded width)`, *optional*):
                For a result with `vae_residual`: the call's images from [`~FluxDinoTilePipeline.prepare_image`], with
                one prompt each. Then two rows of tiles are held.

        Raises:
            `FloatingPointError`: If the decoded pixels have NaN or infinite values.
        """
        canvas, top = self.unpack_canvas(latents, plan.height, plan.width), 0
        num_prompts = 1 if residual_image is None else len(residual_image)
        decode = self.choose_decoder(residual_image, num_prompts, process_group)
        for strip in decode(canvas, plan):
            for rows in strip[:, :, : height - top, :width].split(FINISHED_ROWS, dim=2):
                yield self.finish_strip(rows, "pil").numpy()
            top += strip.shape[2]
        self.maybe_free_model_hooks()

    def add_noise(self, image_latents: torch.Tensor, timestep: torch.Tensor, generator) -> torch.Tensor:
        r"""Image latents `(batch, latent channels, rows, columns)` noised to a timestep, from one noise canvas."""
        # In float32 whatever the models' dtype, so that a seed stands for the same noise.
        noise = randn_tensor(image_latents.shape, generator, image_latents.device, torch.float32)
        return self.scheduler.scale_noise(image_latents, timestep.repeat(len(image_latents)), noise)

    def pack_canvas(self, latents: torch.Tensor) -> torch.Tensor:
        r"""`(batch, channels, rows, columns)` latents to `(batch, tokens, 4 * channels)`, the parent's packing."""
        return self._pack_latents(latents.contiguous(), *latents.shape)

    def unpack_canvas(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        r"""Undoes [`~FluxDinoTilePipeline.pack_canvas`]; `height` and `width` are in pixels."""
        return self._unpack_latents(tokens, height, width, self.vae_scale_factor)

    def get_tile_timesteps(self, num_inference_steps, sigmas, strength, start_sigma, plan):
        r"""
        The timesteps to execute.

        `mu`, the resolution-dependent shift of the schedule, comes from the tile: it is the tile that the transformer
        sees. With a `start_sigma` the noise levels fall evenly, before the shift, from there to 0.
        """
        device = self._execution_device
        config = self.scheduler.config
        mu = calculate_shift(
            plan.tokens_per_tile,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        if start_sigma is not None:
            # Read the scheduler's shift as a table, to find the unshifted sigma that it moves to `start_sigma`.
            unshifted = np.linspace(1.0, 1e-3, 1000)
            retrieve_timesteps(self.scheduler, None, device, sigmas=unshifted, mu=mu)
            shifted = self.scheduler.sigmas[: len(unshifted)].cpu().numpy()
            first = np.interp(start_sigma, shifted[::-1], unshifted[::-1])
            sigmas = np.linspace(first, first / num_inference_steps, num_inference_steps)
        elif sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu
        )
        if start_sigma is not None and abs(float(self.scheduler.sigmas[0]) - start_sigma) > 1e-3:
            raise ValueError(
                f"`start_sigma` {start_sigma} is out of reach of this {type(self.scheduler).__name__}, which starts at"
                f" {float(self.scheduler.sigmas[0]):.3f}. Pass `strength`, or a scheduler without sigma conversion."
            )
        timesteps, num_inference_steps = self.get_timesteps(
            num_inference_steps, 1.0 if strength is None else strength, device
        )
        if num_inference_steps < 1:
            raise ValueError(
                f"`strength` {strength} leaves no step to execute. Raise it or `num_inference_steps`, or pass"
                " `start_sigma`."
            )
        return timesteps

    # ---- DINO ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_dino(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        upscale_factor: float | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: int = DEFAULT_TILE_OVERLAP,
    ) -> torch.Tensor:
        r"""
        DINO features of every tile, to be passed as `dino_embeds` to calls with the same image, size and tiles, for
        example to try several strengths.

        Args:
            image (`PipelineImageInput`): As for a call, but no latents.
            height, width (`int`, *optional*): Size of the output in pixels.
            upscale_factor (`float`, *optional*, defaults to 4): Enlargement, unless `height` and `width` are given.
            tile_size (`int` or `tuple[int, int]`, *optional*): Tile size in pixels; planned by default.
            tile_overlap (`int`, defaults to 64): Least overlap of tiles in pixels.

        Returns:
            `torch.Tensor` of shape `(num_tiles, batch, grid rows, grid columns, features)`.

        Raises:
            `ValueError`: If no projector is loaded, or an argument is out of range.
        """
        if self.dino_encoder is None or self.dino_projector is None:
            raise ValueError("`encode_dino` needs a DINO encoder and a projector. Call `load_dino_projector` first.")
        if self.is_latent_image(image):
            raise ValueError("`image` holds latents, which DINO cannot see. Pass pixels.")
        height, width = self.get_output_size(image, height, width, upscale_factor)
        plan = self.plan_tiles(height, width, tile_size, tile_overlap)
        self.check_dino_components(self.dino_encoder.config, self.dino_projector)
        features = self.encode_dino_tiles(self.prepare_image(image, height, width), plan)
        self.maybe_free_model_hooks()
        return features

    def encode_dino_tiles(self, image: torch.Tensor, plan: TilePlan, process_group=None) -> torch.Tensor:
        r"""
        DINO features `(num_tiles, batch, grid rows, grid columns, features)` of the tiles of a prepared image
        `(batch, 3, height, width)`.

        Every tile is resized so that one DINO patch lies under each transformer token. (The encoder's own image
        processor would crop the tile's centre.)
        """
        patch_size = self.dino_encoder.config.patch_size
        rows, columns = plan.tile_tokens
        device, config = self._execution_device, self.dino_projector.config
        mean, std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (config.image_mean, config.image_std)
        )

        def encode(tile: Tile) -> torch.Tensor:
            pixels = (self.crop_pixels(image, tile) / 2 + 0.5 - mean) / std
            pixels = F.interpolate(pixels, (rows * patch_size, columns * patch_size), mode="bicubic", antialias=True)
            return self.dino_projector.pool(self.get_patch_features(pixels, rows, columns))

        return torch.stack(list(share_work(encode, plan, process_group)))

    def get_patch_features(self, pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        r"""Features `(batch, rows, columns, dim)` of every patch, without CLS and register tokens, after the norm."""
        pixels = pixels.to(device=self._execution_device, dtype=self.dino_encoder.dtype)
        layers = list(self.dino_projector.config.layers)
        if layers == [-1]:
            hidden_states = self.dino_encoder(pixels).last_hidden_state
        else:
            norm = self.dino_encoder.norm if hasattr(self.dino_encoder, "norm") else self.dino_encoder.layernorm
            all_states = self.dino_encoder(pixels, output_hidden_states=True).hidden_states
            hidden_states = torch.cat([norm(all_states[layer]) for layer in layers], dim=-1)
        return hidden_states[:, -rows * columns :].unflatten(1, (rows, columns))

    def prepare_dino_tokens(self, features: torch.Tensor, plan: TilePlan, scale: float) -> DinoTokens:
        r"""Projects features of [`~FluxDinoTilePipeline.encode_dino`] to tokens with positions."""
        device, dtype = self._execution_device, self.dino_projector.dtype
        tokens = self.dino_projector(features.flatten(2, 3).to(device=device, dtype=dtype))
        ids = self.dino_projector.position_ids(tuple(features.shape[2:4]), plan.tile_tokens)
        log_scale = None if scale == 1 else torch.full((1, 1), scale, device=device).log()
        return DinoTokens(tokens, ids.to(device), log_scale)

    def keep_dino_tokens(
        self, dino: DinoTokens | None, plan: TilePlan, batch_size: int
    ) -> tuple[DinoTokens, DinoTokens]:
        r"""
        The DINO tokens, and the same without weight in attention, for a compiled transformer: with a bias at every
        strength, also 1 and 0, so that all take the same graph. Without tokens (strength 0) both are a placeholder.
        """
        if dino is None:
            grid = self.dino_projector.grid(plan.tile_tokens)
            features = torch.zeros(len(plan), batch_size, *grid, self.dino_projector.config.in_dim)
            dino = self.prepare_dino_tokens(features, plan, 0.0)
        silence = torch.full((1, 1), -torch.inf, device=dino.tokens.device)
        if dino.log_scale is None:
            dino = dino._replace(log_scale=torch.zeros_like(silence))
        return dino, dino._replace(log_scale=silence)

    def warn_outside_training(self, sigma: float) -> None:
        r"""Warns if the projector was not trained for the noise level of the first step that it takes part in."""
        sigma_max = self.dino_projector.config.sigma_max
        if sigma_max is not None and sigma > sigma_max:
            logger.warning(
                f"The DINO tokens come in at sigma {sigma:.3f}, but the projector was trained up to {sigma_max}. Lower"
                " `start_sigma` or `strength`, or raise `dino_guidance_start`."
            )

    @torch.no_grad()
    def diagnose_tiles(self, images, plan, features, suspect_threshold=SUSPECT_SIMILARITY):
        r"""
        Compares the tiles of results with the `features` of the input, from [`~FluxDinoTilePipeline.encode_dino`].
        DINO steers the result too, so that its similarity is no independent judgement.
        """
        pixels = self.prepare_image(images, *self.get_output_size(images, upscale_factor=1))
        scores = torch.tensor([tile_seam_scores(self.crop_pixels(image[None])[0], plan) for image in pixels]).T
        similarity = torch.full_like(scores, torch.nan)
        if features is not None and self.dino_encoder is not None:
            similarity = dino_similarity(self.encode_dino_tiles(pixels, plan), features)
        suspects = [[tile for tile, value in zip(plan, c) if value < suspect_threshold] for c in similarity.T]
        return FluxDinoTilePipelineOutput(images, plan, similarity, scores, suspects)

    @staticmethod
    def expand_images(values: torch.Tensor, num_prompts: int, batch_size: int) -> torch.Tensor:
        r"""Repeats `(num_images, ...)` values for the prompts, then each of them for its `num_images_per_prompt`."""
        if values.shape[0] == batch_size:
            return values
        values = torch.cat([values] * (num_prompts // values.shape[0]))
        return values.repeat_interleave(batch_size // num_prompts, dim=0)

    @contextmanager
    def dino_attention(self, dino: DinoTokens | None) -> Iterator[None]:
        r"""Lets stock attention processors weigh the DINO keys while the context lasts, then puts them back."""
        if dino is None or dino.log_scale is None:
            yield
            return
        stock = self.transformer.attn_processors
        replaced = dict(stock)
        for name, processor in stock.items():
            # Others, such as an IP-Adapter's, take the bias as a mask.
            if type(processor) is FluxAttnProcessor:
                lse_attention = select_lse_attention(
                    attention_backend_of(processor), self._execution_device, self.transformer.dtype
                )
                replaced[name] = FluxDinoAttnProcessor(dino.tokens.shape[2], lse_attention)
                replaced[name]._attention_backend = processor._attention_backend
        self.transformer.set_attn_processor(replaced)
        try:
            yield
        finally:
            self.transformer.set_attn_processor(stock)

    # ---- Denoising -------------------------------------------------------------------------------------------------

    def encode_branch(self, prefix, texts, embeds, ip_adapter_embeds, batch_size, max_sequence_length) -> PromptBranch:
        r"""Encodes the texts whose names begin with `prefix`, or takes their embeddings, for `batch_size` results."""
        device = self._execution_device
        prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(
            prompt=texts[f"{prefix}prompt"],
            prompt_2=texts[f"{prefix}prompt_2"],
            prompt_embeds=embeds[f"{prefix}prompt_embeds"],
            pooled_prompt_embeds=embeds[f"{prefix}pooled_prompt_embeds"],
            device=device,
            max_sequence_length=max_sequence_length,
            lora_scale=self.joint_attention_kwargs.get("scale"),
        )
        prompt_embeds, pooled_prompt_embeds = (
            embeds.to(device=device, dtype=self.transformer.dtype).repeat_interleave(
                batch_size // embeds.shape[0], dim=0
            )
            for embeds in (prompt_embeds, pooled_prompt_embeds)
        )
        remedy = "T5 overflows in float16: use bfloat16 or float32."
        flags = [prompt_embeds.isfinite().all(), pooled_prompt_embeds.isfinite().all()]
        check_finite(flags, f"the embeddings of `{prefix}prompt`", remedy)
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=device)
        return PromptBranch(prompt_embeds, pooled_prompt_embeds, text_ids, ip_adapter_embeds)

    def encode_ip_adapter_branch(self, prefix, inputs, num_prompts, batch_size) -> list[torch.Tensor] | None:
        r"""Embeddings of the IP-Adapter images whose names begin with `prefix`; black if only others are given."""
        if all(value is None for value in inputs.values()):
            return None
        image, embeds = inputs[f"{prefix}ip_adapter_image"], inputs[f"{prefix}ip_adapter_image_embeds"]
        if image is None and embeds is None:
            image = [np.zeros((224, 224, 3), dtype=np.uint8)] * self.transformer.encoder_hid_proj.num_ip_adapters
        embeds = self.prepare_ip_adapter_image_embeds(image, embeds, self._execution_device, 1)
        return [self.expand_images(entry, num_prompts, batch_size) for entry in embeds]

    def get_tile_batches(self, indices: list[int], tile_batch_size: int) -> list[list[int]]:
        r"""
        Tile indices of each transformer call, equally many but for the last. For a compiled transformer every batch
        is filled up to `tile_batch_size` with the last tile, since another shape would compile it again.
        """
        size, is_compiled = tile_batch_size, self.is_compiled
        if indices and not is_compiled:
            size = math.ceil(len(indices) / math.ceil(len(indices) / tile_batch_size))
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        if indices and is_compiled:
            batches[-1] += indices[-1:] * (size - len(batches[-1]))
        return batches

    def predict_velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        branch: PromptBranch,
        guidance: torch.Tensor | None,
        dino: DinoTokens | None = None,
    ) -> torch.Tensor:
        r"""
        One transformer call: noisy latents `(tiles * batch, latent channels, rows, columns)` to velocities in float32.

        `timestep` is the scheduler's, a scalar, or one for each entry, as is `guidance` of shape `(1,)`. `branch` has
        `batch` entries, which are repeated for the tiles, and `dino` has the tokens of these tiles in order.
        """
        num, _, rows, columns = latents.shape
        dtype = branch.prompt_embeds.dtype
        repeats = num // branch.prompt_embeds.shape[0]
        encoder_hidden_states = branch.prompt_embeds.repeat(repeats, 1, 1)
        text_ids = branch.text_ids
        # The transformer changes the dictionary that it gets.
        joint_attention_kwargs = dict(self.joint_attention_kwargs)
        if branch.ip_adapter_embeds is not None:
            joint_attention_kwargs["ip_adapter_image_embeds"] = [
                embeds.repeat(repeats, *[1] * (embeds.ndim - 1)) for embeds in branch.ip_adapter_embeds
            ]
        if dino is not None:
            # Before the text, so that both groups of keys are views for the attention: it knows no order of tokens.
            encoder_hidden_states = torch.cat([dino.tokens.flatten(0, 1).to(dtype), encoder_hidden_states], dim=1)
            text_ids = torch.cat([dino.ids, text_ids])
            if dino.log_scale is not None:
                num_tokens = encoder_hidden_states.shape[1] + rows * columns // 4
                bias = torch.zeros(len(dino.log_scale), 1, 1, num_tokens, device=latents.device, dtype=dtype)
                bias[..., : len(dino.ids)] = dino.log_scale[:, None, None]
                joint_attention_kwargs["attention_mask"] = bias
        velocity = self.transformer(
            hidden_states=self.pack_canvas(latents.to(dtype)),
            timestep=timestep.expand(num).to(dtype) / 1000,
            guidance=None if guidance is None else guidance.expand(num),
            pooled_projections=branch.pooled_prompt_embeds.repeat(repeats, 1),
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=self._prepare_latent_image_ids(num, rows // 2, columns // 2, latents.device, torch.float32),
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
        )[0]
        return self.unpack_canvas(velocity.float(), rows * self.vae_scale_factor, columns * self.vae_scale_factor)

    def predict_tile_velocities(
        self, tiles, timestep, branches, guidance, dino, tile_batches, true_cfg_scale, progress_bar, process_group=None
    ) -> Iterator[torch.Tensor]:
        r"""Yields the velocity of each tile of `tile_batches`, of the shape `(batch, ...)` that `tiles` have."""

        def predict(indices: list[int]) -> torch.Tensor:
            latents = torch.cat([tiles[index] for index in indices])
            batch_dino = None if dino is None else dino._replace(tokens=dino.tokens[indices])
            velocity = self.predict_velocity(latents, timestep, branches[0], guidance, batch_dino)
            if len(branches) > 1:
                negative = self.predict_velocity(latents, timestep, branches[1], guidance, batch_dino)
                velocity = negative + true_cfg_scale * (velocity - negative)
            # Processes exchange tensors of one shape, and the last batch may be smaller than the others.
            return F.pad(velocity, [0] * 7 + [len(tiles[0]) * (len(tile_batches[0]) - len(indices))])

        for velocity in share_work(predict, tile_batches, process_group):
            progress_bar.update()
            yield from velocity.split(len(tiles[0]))

    def predict_state_velocity(
        self, state, timestep, plan, flat_latents, *arguments
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        r"""
        The velocity of the state: a canvas `(batch, latent channels, rows, columns)`, or the stack of its tiles; and
        for each tile whether it is finite.

        A tile in `flat_latents`, which maps its index to its clean latents, moves straight to them: on the line
        `x = (1 - sigma) * clean + sigma * noise` the velocity is `noise - clean = (x - clean) / sigma`. The other
        tiles' velocities come from [`~FluxDinoTilePipeline.predict_tile_velocities`], which gets the `arguments`.
        """
        is_canvas = state.ndim == 4
        tiles = [state[tile.slices(self.vae_scale_factor)] for tile in plan] if is_canvas else state.unbind()
        predicted = self.predict_tile_velocities(tiles, timestep, *arguments)
        sigma = timestep / self.scheduler.config.num_train_timesteps
        is_finite: list[torch.Tensor] = []
        velocities = watch_tiles(
            (
                (tile - flat_latents[index]) / sigma if index in flat_latents else next(predicted)
                for index, tile in enumerate(tiles)
            ),
            is_finite,
        )
        velocity = blend_tiles(velocities, plan, self.vae_scale_factor) if is_canvas else torch.stack(list(velocities))
        return velocity, is_finite

    def find_flat_tiles(
        self, image: torch.Tensor, plan: TilePlan, features: torch.Tensor | None, max_contrast: float
    ) -> list[int]:
        r"""
        Indices of the tiles with nothing to redraw: [`tile_contrast`] of at most `max_contrast` in every image of the
        prepared batch and, if DINO looked, [`feature_spread`] of at most `FLAT_TILE_DINO_SPREAD`.
        """
        flat = [float(tile_contrast(self.crop_pixels(image, tile)).max()) <= max_contrast for tile in plan]
        if features is not None:
            spreads = [float(feature_spread(tile_features).max()) for tile_features in features]
            flat = [is_flat and spread <= FLAT_TILE_DINO_SPREAD for is_flat, spread in zip(flat, spreads)]
        return [index for index, is_flat in enumerate(flat) if is_flat]

    def redo_tiles(self, canvas, noisy, suspects, timesteps, plan, tile_batches, dino, conditions, true_cfg_scale):
        r"""
        Denoises tiles of a finished canvas, those in `suspects` `(num_tiles, batch)`, again from a `noisy` one, each
        alone and with DINO in every step, and blends them in.
        """
        cell = self.vae_scale_factor
        finished = crop_tiles(canvas, plan, cell)
        kept = {index: finished[index] for index in range(len(plan)) if not suspects[index].any()}
        state = crop_tiles(noisy, plan, cell)
        with self.dino_attention(dino), self.progress_bar(total=len(timesteps) * len(tile_batches)) as bar:
            for t in timesteps:
                arguments = (*conditions, dino, tile_batches, true_cfg_scale, bar, None)
                velocity, is_finite = self.predict_state_velocity(state, t, plan, kept, *arguments)
                check_finite(is_finite, "the velocity of tiles that are denoised again", MODEL_REMEDY, plan)
                state = self.scheduler.step(velocity, t, state, return_dict=False)[0]
        suspects = suspects[:, :, None, None, None].to(state.device)
        return canvas + blend_tiles(torch.where(suspects, state - finished, 0.0), plan, cell)

    def run_callback(self, callback, index, timestep, tensor_inputs, canvas, branch, plan):
        r"""Calls `callback_on_step_end` with the packed canvas; returns the canvas and the branch that it leaves."""
        packed = self.pack_canvas(canvas)
        tensors = {"latents": packed.clone(), "prompt_embeds": branch.prompt_embeds}
        outputs = callback(self, index, timestep, {name: tensors[name] for name in tensor_inputs})
        latents = outputs.pop("latents", tensors["latents"])
        if not torch.equal(latents, packed):
            canvas = self.unpack_canvas(latents.to(packed), plan.height, plan.width)
        return canvas, branch._replace(prompt_embeds=outputs.pop("prompt_embeds", branch.prompt_embeds))

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        image: PipelineImageInput = None,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_ip_adapter_image: PipelineImageInput | None = None,
        negative_ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
        upscale_factor: float | None = None,
        start_sigma: float | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: int = DEFAULT_TILE_OVERLAP,
        tile_batch_size: int = 1,
        tile_fusion: str = "step",
        dino_conditioning_scale: float = 1.0,
        dino_guidance_start: float = 0.0,
        dino_guidance_end: float = 1.0,
        dino_embeds: torch.Tensor | None = None,
        color_fix: str | None = None,
        vae_residual: bool | None = None,
        skip_flat_tiles: bool | float = False,
        checkpoint_dir: str | Path | None = None,
        checkpoint_steps: int = 1,
        process_group: Any = None,
        return_diagnostics: bool = False,
        suspect_threshold: float = SUSPECT_SIMILARITY,
        redo_start_sigma: float | None = None,
    ) -> FluxDinoTilePipelineOutput | tuple:
        r"""
        Enlarges an image. Arguments up to `max_sequence_length` are the parent's, in its order.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw, beside what DINO sees. The empty prompt when left out.
            prompt_2 (`str` or `list[str]`, *optional*):
                Prompt for the T5 encoder; `prompt` when left out.
            negative_prompt (`str` or `list[str]`, *optional*):
                What not to draw, with `true_cfg_scale` above 1.
            negative_prompt_2 (`str` or `list[str]`, *optional*):
                Negative prompt for the T5 encoder; `negative_prompt` when left out.
            true_cfg_scale (`float`, defaults to 1.0):
                Classifier-free guidance against the negative prompt; above 1 it doubles the work. The DINO tokens are
                in both branches.
            image (`PipelineImageInput`):
                One image or several of one size: PIL of any mode, NumPy `(batch, height, width, channels)` or tensor
                `(batch, channels, height, width)` with 1 or 3 channels in [0, 1], or latents `(batch, latent
                channels, rows, columns)` of the size of the output. One prompt serves several images, and one image
                several prompts.
            height (`int`, *optional*):
                Height of the output in pixels, together with `width`; any size, also not of whole tokens.
            width (`int`, *optional*):
                Width of the output in pixels.
            strength (`float`, *optional*):
                Share of the steps that are executed, in [0, 1], as in the parent. The noise level that it leads to
                depends on the schedule; see `start_sigma`.
            num_inference_steps (`int`, *optional*):
                Denoising steps. Defaults to 4 without guidance embeddings (schnell), else to 12 with `start_sigma` and
                28 with `strength` (dev). From a `start_sigma` all of them are executed.
            sigmas (`list[float]`, *optional*):
                Falling noise levels in (0, 1] for the scheduler, which may shift them; all are executed unless
                `strength` cuts them.
            guidance_scale (`float`, *optional*, defaults to 3.5):
                Guidance embedded in FLUX.1-dev; ignored by schnell.
            num_images_per_prompt (`int`, defaults to 1):
                Results for each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, drawn once for the whole image: but for rounding, the result does not depend on
                `tile_batch_size`.
            latents (`torch.Tensor`, *optional*):
                Noisy latents to start from instead of the noised image, packed: `(batch, tokens, 4 * latent channels)`
                for the output padded to whole tokens.
            prompt_embeds (`torch.Tensor`, *optional*):
                T5 embeddings `(batch, tokens, dim)` in place of `prompt`.
            pooled_prompt_embeds (`torch.Tensor`, *optional*):
                CLIP embeddings `(batch, dim)` that go with `prompt_embeds`.
            ip_adapter_image (`PipelineImageInput`, *optional*):
                Image for a loaded IP-Adapter; all tiles get it.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                Its embeddings, one `(1 or number of prompts, num_images, dim)` for each adapter.
            negative_ip_adapter_image (`PipelineImageInput`, *optional*):
                Image for the negative branch.
            negative_ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*):
                Its embeddings.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                T5 embeddings in place of `negative_prompt`.
            negative_pooled_prompt_embeds (`torch.Tensor`, *optional*):
                CLIP embeddings that go with `negative_prompt_embeds`.
            output_type (`str`, defaults to `"pil"`):
                "pil", "np", "pt", or "latent" for the packed latents of the padded output.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`~pipelines.flux.FluxPipelineOutput`] instead of a tuple.
            joint_attention_kwargs (`dict`, *optional*):
                Passed to the attention processors; `scale` is the LoRA scale.
            callback_on_step_end (`Callable`, *optional*):
                Called once after each step with `(pipeline, step, timestep, callback_kwargs)`; `callback_kwargs` holds
                `latents`, the packed latents of the whole canvas, and may return changed ones.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors for the callback: `latents`, `prompt_embeds`.
            max_sequence_length (`int`, *optional*):
                Text tokens of the T5 encoder, up to 512; a prompt is padded to as many. Defaults to what the model was
                trained with: 256 without guidance embeddings (schnell), else 512 (dev). Fewer make every step faster.
            upscale_factor (`float`, *optional*):
                Enlargement from 1 to 8. Defaults to 4 unless `height` and `width` are given.
            start_sigma (`float`, *optional*):
                Share of noise in the latents at the start, from 0.01 to 1: how much FLUX may change. Excludes
                `strength`. Without `strength` and `sigmas` it defaults to the pipeline's `default_start_sigma`, 0.35.
            tile_size (`int` or `tuple[int, int]`, *optional*):
                Tile side, or height and width, in pixels, a multiple of 16 for FLUX.1. Defaults to the pipeline's
                `default_tile_size`, or the size of 0.8 to 1.3 MP, or less for a small output, that costs least.
            tile_overlap (`int`, defaults to 64):
                Least overlap of neighbouring tiles in pixels.
            tile_batch_size (`int`, defaults to 1):
                Tiles in one transformer call.
            tile_fusion (`str`, defaults to `"step"`):
                "step" blends the tiles' velocities at every step; "final" denoises every tile alone and blends the
                finished latents.
            dino_conditioning_scale (`float`, defaults to 1.0):
                Weight of the DINO tokens in attention: 0 drops them, 1 is plain attention.
            dino_guidance_start (`float`, defaults to 0.0):
                Share of the steps before the DINO tokens come in.
            dino_guidance_end (`float`, defaults to 1.0):
                Share of the steps after which they are dropped.
            dino_embeds (`torch.Tensor`, *optional*):
                Features from [`~FluxDinoTilePipeline.encode_dino`].
            color_fix (`str`, *optional*):
                "wavelet" takes the low frequencies from the input, "adain" the mean and deviation of each channel.
            vae_residual (`bool`, *optional*, defaults to the pipeline's `default_vae_residual`, `False`):
                Adds what the VAE loses of the input, such as grain and lettering: the input less what it decodes to,
                without a step of the transformer. It costs another encoding and another decoding. Not for latents.
            skip_flat_tiles (`bool` or `float`, defaults to `False`):
                Leaves flat tiles, such as clear sky, at the input's latents instead of denoising them. A tile is flat
                if its [`tile_contrast`] is at most this number in (0, 1], 0.01 for `True`, and DINO, where it is on,
                sees one thing in it. Neighbours blend into it by the same windows.
            checkpoint_dir (`str` or `Path`, *optional*):
                Folder for this image's checkpoint, made if missing: the canvas after a step, the generator and the
                settings. The same call goes on from it and gives the same image; a call with other settings is
                refused, but `output_type`, `color_fix`, `vae_residual` and `tile_batch_size` may change. What a
                callback keeps is not saved. Delete the folder once the image is saved.
            checkpoint_steps (`int`, defaults to 1):
                Steps from one checkpoint to the next; the last step always makes one.
            process_group (`torch.distributed.ProcessGroup`, *optional*):
                Processes that share the tiles of this image, for example `torch.distributed.group.WORLD`. All must
                make the same call, with generators of one seed, and all get the image, the same as from one process.
            return_diagnostics (`bool`, defaults to `False`):
                Whether the output carries the tile plan, each tile's `dino_similarity` to the input and `seam_score`,
                and the suspects.
            suspect_threshold (`float`, defaults to 0.5):
                Similarity, from -1 to 1, below which a tile is suspect: it may show what the input does not.
            redo_start_sigma (`float`, *optional*):
                Denoises the suspect tiles once more, from the input with this lower share of noise, and blends them
                in; the diagnostics are those of the new picture. Not with `checkpoint_dir` or `process_group`.

        Examples:

        Returns:
            [`FluxDinoTilePipelineOutput`] or `tuple`: The images and what `return_diagnostics` adds, in a tuple with
            `return_dict=False`.

        Raises:
            `ValueError`: If an argument is out of range or does not fit another, or the checkpoint is of other
                settings, before any model runs.
            `FloatingPointError`: If embeddings, latents, velocity or result have NaN or infinite values.
        """
        arguments = {name: value for name, value in locals().items() if name not in FREE_ARGUMENTS}

        # 1. Define the output and its tiles, and check inputs
        height, width = self.get_output_size(image, height, width, upscale_factor)
        plan = self.plan_tiles(height, width, tile_size, tile_overlap)
        is_latent_image = self.is_latent_image(image)
        num_images = image.shape[0] if is_latent_image else len(self.check_image(image))
        if prompt is None and prompt_embeds is None:
            prompt = ""
            if self.default_prompt_embeds is not None and prompt_2 is None and pooled_prompt_embeds is None:
                prompt, (prompt_embeds, pooled_prompt_embeds) = None, self.default_prompt_embeds
        texts = {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
        }
        embeds = {
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        ip_adapter_inputs = {
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "negative_ip_adapter_image": negative_ip_adapter_image,
            "negative_ip_adapter_image_embeds": negative_ip_adapter_image_embeds,
        }
        if max_sequence_length is None:
            max_sequence_length = default_text_tokens(self.transformer.config)
        self.check_schedule_inputs(strength, start_sigma, sigmas, num_inference_steps)
        if guidance_scale is not None:
            check_number("guidance_scale", guidance_scale, 0, 1000, "FLUX.1-dev takes about 3.5.")
        check_number("true_cfg_scale", true_cfg_scale, 0, 1000, "1 switches true CFG off.")
        check_integer("tile_batch_size", tile_batch_size, 1, "It is the number of tiles in one transformer call.")
        check_choice("tile_fusion", tile_fusion, ("step", "final"))
        max_contrast = self.check_flat_tile_inputs(skip_flat_tiles, image, latents)
        vae_residual = self.check_result_inputs(
            image, color_fix, vae_residual, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        self.check_prompt_inputs(texts, embeds, max_sequence_length, joint_attention_kwargs)
        self.check_inputs(
            strength=1.0 if strength is None else strength,
            height=plan.height,
            width=plan.width,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            **texts,
            **embeds,
        )
        num_prompts = self.get_num_prompts(prompt, prompt_embeds, num_images)
        do_true_cfg = true_cfg_scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None)
        prefixes = ("", "negative_") if do_true_cfg else ("",)
        self.check_batch_inputs(num_prompts, num_images_per_prompt, texts, embeds, generator, latents, plan)
        self.check_ip_adapter_inputs(ip_adapter_inputs, num_prompts, prefixes)
        check_number("dino_conditioning_scale", dino_conditioning_scale, 0, 100, "0 is off, 1 is as trained.")
        check_number("dino_guidance_start", dino_guidance_start, 0, 1, "It is a share of the steps.")
        check_number("dino_guidance_end", dino_guidance_end, dino_guidance_start, 1, "It is a share of the steps.")
        self.check_dino_inputs(image, plan, num_images, dino_conditioning_scale, dino_embeds, joint_attention_kwargs)
        self.check_checkpoint_inputs(checkpoint_dir, checkpoint_steps, process_group, generator, redo_start_sigma)

        # 2. Define call parameters and timesteps
        num_inference_steps, guidance_scale, start_sigma = self.get_default_settings(
            strength, sigmas, start_sigma, num_inference_steps, guidance_scale
        )
        timesteps = self.get_tile_timesteps(num_inference_steps, sigmas, strength, start_sigma, plan)
        is_diagnosed = return_diagnostics or redo_start_sigma is not None
        if is_diagnosed:
            first_sigma = float(timesteps[0]) / self.scheduler.config.num_train_timesteps
            self.check_diagnosis_inputs(image, output_type, latents, suspect_threshold, redo_start_sigma, first_sigma)
        batch_size = num_prompts * num_images_per_prompt
        device = self._execution_device
        if self.is_compiled and tile_size is None:
            self._kept_tile_size = (plan.tile_height, plan.tile_width)
        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = joint_attention_kwargs or {}
        self._interrupt = False
        self._num_timesteps = len(timesteps)

        # 3. Preprocess the image and encode the prompts
        canvas_image = image if is_latent_image else self.prepare_image(image, height, width)
        settings: dict[str, Any] = {}
        checkpoint: dict[str, torch.Tensor] = {}
        if checkpoint_dir is not None or process_group is not None:
            arguments |= {"height": height, "width": width, "tiles": asdict(plan)}
            arguments |= {"num_inference_steps": num_inference_steps, "sigmas": self.scheduler.sigmas}
            settings = self.describe_call(arguments)
            checkpoint = read_checkpoint(checkpoint_dir, settings, process_group)
        if prompt_embeds is not None:
            # A negative prompt gets as many tokens, for both share the positions.
            max_sequence_length = prompt_embeds.shape[1]
        ip_branches = [
            self.encode_ip_adapter_branch(prefix, ip_adapter_inputs, num_prompts, batch_size) for prefix in prefixes
        ]
        branches = [
            self.encode_branch(prefix, texts, embeds, ip_embeds, batch_size, max_sequence_length)
            for prefix, ip_embeds in zip(prefixes, ip_branches)
        ]

        # 4. Encode what DINO sees in each tile
        num_steps = len(timesteps)
        step_sigmas = (timesteps / self.scheduler.config.num_train_timesteps).tolist()
        dino_steps = [
            i
            for i in range(num_steps)
            if dino_guidance_start <= i / num_steps and (i + 1) / num_steps <= dino_guidance_end
        ]
        dino = dino_off = features = None
        if self.dino_projector is not None and dino_conditioning_scale > 0 and dino_steps:
            features = dino_embeds
            if features is None:
                features = self.encode_dino_tiles(canvas_image, plan, process_group)
            features = self.expand_images(features.transpose(0, 1), num_prompts, batch_size).transpose(0, 1)
            self.warn_outside_training(float(timesteps[dino_steps[0]]) / self.scheduler.config.num_train_timesteps)
            dino = self.prepare_dino_tokens(features, plan, float(dino_conditioning_scale))
            check_finite([tokens.isfinite().all() for tokens in dino.tokens], "the DINO tokens", MODEL_REMEDY, plan)
        if self.is_compiled and self.dino_projector is not None and self.find_obstacle_to_strength() is None:
            dino, dino_off = self.keep_dino_tokens(dino, plan, batch_size)

        # 5. Encode the image and add noise, or go on from the checkpoint
        cell = self.vae_scale_factor
        is_fused = tile_fusion == "step"
        flat_latents: dict[int, torch.Tensor] = {}
        generators = [item for item in (generator if isinstance(generator, list) else [generator]) if item is not None]
        first_step = 0
        if checkpoint:
            first_step, state = int(checkpoint["step"]), checkpoint["state"].to(device)
            self.scheduler.set_begin_index((self.scheduler.begin_index or 0) + first_step)
            flat_latents = dict(zip(checkpoint["flat_tiles"].tolist(), checkpoint["flat_latents"].to(device)))
            branches[0] = branches[0]._replace(prompt_embeds=checkpoint["prompt_embeds"].to(device))
            for index, item in enumerate(generators):
                item.set_state(checkpoint[f"generator_{index}"])
        elif latents is None:
            image_latents = canvas_image
            if not is_latent_image:
                image_latents = self.encode_tiles(canvas_image, plan, generator, process_group)
            image_latents = self.expand_images(image_latents, num_prompts, batch_size)
            image_latents = image_latents.to(device=device, dtype=torch.float32)
            if max_contrast > 0:
                flat_tiles = self.find_flat_tiles(canvas_image, plan, features, max_contrast)
                flat_latents = {index: image_latents[plan[index].slices(cell)] for index in flat_tiles}
            canvas = self.add_noise(image_latents, timesteps[:1], generator)
        else:
            canvas = self.unpack_canvas(latents.to(device=device, dtype=torch.float32), plan.height, plan.width)

        # 6. Denoise: with "step" the state is the canvas, with "final" it is the stack of tiles
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32)
        if not checkpoint:
            state = canvas if is_fused else crop_tiles(canvas, plan, cell)
        moving_tiles = [index for index in range(len(plan)) if index not in flat_latents]
        tile_batches = self.get_tile_batches(moving_tiles, tile_batch_size)
        with (
            self.dino_attention(dino),
            self.progress_bar(total=(num_steps - first_step) * len(tile_batches)) as progress_bar,
        ):
            for i, t in itertools.islice(enumerate(timesteps), first_step, None):
                if self.interrupt:
                    break
                step_name = f"step {i + 1} of {num_steps}, sigma {step_sigmas[i]:.4g},"
                conditions = (branches, guidance, dino if i in dino_steps else dino_off)
                calls = (tile_batches, true_cfg_scale, progress_bar, process_group)
                velocity, is_finite = self.predict_state_velocity(state, t, plan, flat_latents, *conditions, *calls)
                check_finite(is_finite, f"the velocity at {step_name}", MODEL_REMEDY, plan)
                state = self.scheduler.step(velocity, t, state, return_dict=False)[0]

                if callback_on_step_end is not None:
                    canvas = state if is_fused else blend_tiles(state, plan, cell)
                    changed, branches[0] = self.run_callback(
                        callback_on_step_end, i, t, callback_on_step_end_tensor_inputs, canvas, branches[0], plan
                    )
                    if changed is not canvas:
                        tiles = crop_tiles(changed, plan, cell)
                        flags = [tile.isfinite().all() for tile in tiles]
                        check_finite(flags, f"the latents from the callback at {step_name}", "Correct it.", plan)
                        state = changed if is_fused else tiles

                is_due = (i + 1) % checkpoint_steps == 0 or i + 1 == num_steps
                if checkpoint_dir is not None and is_due and is_first_process(process_group):
                    flat = list(flat_latents.values())
                    tensors = {
                        "step": torch.tensor(i + 1),
                        "state": state,
                        "prompt_embeds": branches[0].prompt_embeds,
                        "flat_tiles": torch.tensor(list(flat_latents)),
                        "flat_latents": torch.stack(flat) if flat else torch.empty(0),
                        **{f"generator_{index}": item.get_state() for index, item in enumerate(generators)},
                    }
                    save_checkpoint(checkpoint_dir, settings, tensors)
        canvas = state if is_fused else blend_tiles(state, plan, cell)

        # 7. Decode
        images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
        if output_type == "latent":
            images = self.pack_canvas(canvas)
        else:
            fix_color = None
            if color_fix is not None:
                reference = self.expand_images(self.crop_pixels(canvas_image), num_prompts, batch_size)
                fix_color = partial(match_color, reference=reference, method=color_fix)
            decode = self.choose_decoder(canvas_image if vae_residual else None, num_prompts, process_group)
            images = self.decode_image(canvas, plan, height, width, output_type, decode, fix_color)

        # 8. Compare the tiles with the input's, and redo those that show something else
        output = FluxDinoTilePipelineOutput(images)
        if is_diagnosed:
            if features is None and self.dino_encoder is not None and self.dino_projector is not None:
                features = self.encode_dino_tiles(canvas_image, plan).transpose(0, 1)
                features = self.expand_images(features, num_prompts, batch_size).transpose(0, 1)
            output = self.diagnose_tiles(images, plan, features, suspect_threshold)
            suspects = output.dino_similarity < suspect_threshold
            if redo_start_sigma is not None and suspects.any():
                indices = suspects.any(1).nonzero().flatten().tolist()
                timesteps = self.get_tile_timesteps(num_inference_steps, None, None, redo_start_sigma, plan)
                noisy = self.add_noise(image_latents, timesteps[:1], generator)
                redone = (self.get_tile_batches(indices, tile_batch_size), dino, (branches, guidance))
                canvas = self.redo_tiles(canvas, noisy, suspects, timesteps, plan, *redone, true_cfg_scale)
                images = self.decode_image(canvas, plan, height, width, output_type, decode, fix_color)
                output = self.diagnose_tiles(images, plan, features, suspect_threshold)

        # Offload all models
        self.maybe_free_model_hooks()

        return output if return_dict else output.to_tuple()


# ---- Helpers of the pipeline ---------------------------------------------------------------------------------------


def image_size(image: PIL.Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    """Height and width in pixels of a PIL image, an array `(h, w, channels)` or a tensor `(channels, h, w)`."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.shape[1:]
    return height, width


def split_image_batch(value: np.ndarray | torch.Tensor) -> list:
    """Checks an array `(batch, h, w, channels)` or a tensor `(batch, channels, h, w)` and returns its images."""
    is_array = isinstance(value, np.ndarray)
    layout = "(batch, height, width, channels)" if is_array else "(batch, channels, height, width)"
    channels = value.shape[-1 if is_array else -3] if value.ndim in (3, 4) else None
    if channels not in (1, 3) or 0 in value.shape:
        raise ValueError(
            f"`image` must have shape {layout}, with or without batch, and 1 or 3 channels but has"
            f" {tuple(value.shape)}. Drop an alpha channel."
        )
    is_float = value.is_floating_point() if isinstance(value, torch.Tensor) else value.dtype.kind == "f"
    if not is_float:
        raise ValueError(f"`image` must hold floats in [0, 1] but holds {value.dtype}. Divide bytes by 255.")
    low, high = float(value.min()), float(value.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`image` must be finite and in [0, 1] but ranges from {low:g} to {high:g}.")
    return list(value) if value.ndim == 4 else [value]


def is_falling(sigmas: Any) -> bool:
    """Whether `sigmas` is a list of numbers that fall from at most 1 to above 0."""
    is_list = isinstance(sigmas, (list, tuple)) or (isinstance(sigmas, np.ndarray) and sigmas.ndim == 1)
    if not is_list or len(sigmas) == 0 or not all(isinstance(sigma, numbers.Real) for sigma in sigmas):
        return False
    return sigmas[0] <= 1 and all(high > low for high, low in itertools.pairwise([*sigmas, 0]))


def default_text_tokens(transformer_config: Mapping) -> int:
    """Text tokens that the model was trained with: 256 for the distilled FLUX.1-schnell, 512 for FLUX.1-dev."""
    return 512 if transformer_config["guidance_embeds"] else 256


def attention_backend_of(processor: Any) -> AttentionBackendName:
    """The attention backend that a processor's next call uses: its own, or diffusers' active one."""
    backend = getattr(processor, "_attention_backend", None)
    return AttentionBackendName(backend or _AttentionBackendRegistry.get_active_backend()[0])


def load_prompt_embeds(
    source: str, revision: str | None, token: str | bool | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """T5 and pooled CLIP embeddings from `prompt_embeds.safetensors` of a repo or folder, `None` if it has none."""
    path = str(Path(source) / PROMPT_EMBEDS_NAME)
    if not Path(source).is_dir():
        try:
            path = hf_hub_download(source, PROMPT_EMBEDS_NAME, revision=revision, token=token)
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    if not Path(path).is_file():
        return None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} is broken: {error}") from error
    if not tensors.keys() >= set(PROMPT_EMBEDS_KEYS):
        raise ValueError(f"{path} must hold {' and '.join(PROMPT_EMBEDS_KEYS)} but holds {sorted(tensors)!r:.200}.")
    return tensors[PROMPT_EMBEDS_KEYS[0]], tensors[PROMPT_EMBEDS_KEYS[1]]


def check_dino_numbers(config: dict) -> None:
    """Raises a `ValueError` if an encoder's `config.json` has absurd numbers: transformers makes lists as long."""
    for name, value in config.items():
        limit = MAX_DINO_LAYERS if name == "num_hidden_layers" else MAX_DINO_NUMBER
        if isinstance(value, int) and value > limit:
            raise ValueError(f"`dino_encoder` has the {name} {value}, more than the {limit} that are allowed.")


def check_encoder_file(config: PreTrainedConfig, name: str, options: dict) -> None:
    """
    Raises a `ValueError` if an encoder in one file would have more weights than the file has bytes: transformers makes
    up what the file lacks. `options` are those of `AutoConfig.from_pretrained`.
    """
    path = cached_file(
        name,
        TRANSFORMERS_WEIGHTS_NAME,
        _raise_exceptions_for_missing_entries=False,
        **{key: value for key, value in options.items() if key != "trust_remote_code"},
    )
    if path is None:
        return  # in shards, or missing, which `from_pretrained` says
    with torch.device("meta"):
        num_weights = sum(weights.numel() for weights in AutoModel.from_config(config).parameters())
    if num_weights > Path(path).stat().st_size:
        raise ValueError(
            f"`dino_encoder` {name} has {num_weights:.3g} weights by its config, more than its file holds."
        )


def check_projector_file(config: dict, path: Path) -> None:
    """
    Raises a `ValueError` unless a projector's weights have the names and shapes that its config tells. Reads only the
    header of the file and allocates nothing, so that a config with absurd sizes does no harm.
    """
    if not path.is_file():
        return  # `from_pretrained` names what is missing
    with torch.device("meta"):
        expected = {name: list(value.shape) for name, value in DinoProjector.from_config(config).state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise OSError(f"{path} is broken: {error}") from error
    if found != expected:
        raise ValueError(f"{path} has weights of the shapes {found!r:.500}, but its config tells {expected!r:.500}.")
