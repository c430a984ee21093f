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

One file, so that `custom_pipeline=` can load it. What wraps a call (going on after a crash, sharing the tiles among
processes, finding the tiles to mistrust, matching colours) is in the package `flux_dino_tile`.

Sizes are in pixels unless a name says cells or tokens: with FLUX.1 a cell of the latents is 8 px wide, and a token is
2x2 cells, 16 px.
"""

import itertools
import json
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
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

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import PipelineImageInput

# Two private names: no public one tells the active attention backend, or projects a block's query, key and value.
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, _get_qkv_projections
from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.schedulers import FlowMatchLCMScheduler
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

MODEL_REMEDY = "Check the weights, LoRA's too, and run the models in bfloat16 or float32 if this is float16."
VAE_REMEDY = "In float16 the VAE may overflow: run it in float32 with `pipe.vae.to(torch.float32)`."

# A planned tile has 0.8 to 1.3 MP at 16 px a token: less starves FLUX of context, above 1.5 MP it draws grids.
MIN_TILE_TOKENS, MAX_TILE_TOKENS, GRID_TILE_TOKENS = 3125, 5078, 5860
DEFAULT_TILE_TOKENS = 64  # on a side, where the plan finds no better: 1024 px, the size that FLUX was trained on
MAX_TILE_ASPECT = 2.0
TOKENS_BESIDE_IMAGE = 512  # text and DINO tokens that every planned tile carries
DEFAULT_TILE_OVERLAP = 64
DEFAULT_UPSCALE_FACTOR = 4.0

ROUNDING = 1e-3  # by which pixels may leave [0, 1]
RESIZED_ROWS = 1024  # rows of a PIL image that are enlarged at once
STRIP_ROWS = 128  # rows that become bytes at once

# Caches of diffusers that keep one state for each `cache_context`; the others would take one tile for another.
TILE_CACHES = ("FirstBlockCacheConfig", "MagCacheConfig", "TaylorSeerCacheConfig")
DINO_MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")

# Backends that add a float mask of shape (B, 1, 1, S) to the logits; the others refuse a mask.
MASK_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_math", "flex", "xformers")

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


# ---- Checks --------------------------------------------------------------------------------------------------------

# Kind of each number, its least and its greatest value, and what it is.
LIMITS = {
    "height": (numbers.Integral, 1, math.inf, "the output's size in pixels"),
    "width": (numbers.Integral, 1, math.inf, "the output's size in pixels"),
    "pixels_per_token": (numbers.Integral, 1, math.inf, "16 for FLUX.1"),
    "tile_overlap": (numbers.Integral, 0, math.inf, "the least overlap of two tiles in pixels"),
    "tile_batch_size": (numbers.Integral, 1, math.inf, "the tiles in one transformer call"),
    "num_inference_steps": (numbers.Integral, 1, math.inf, "the denoising steps"),
    "first_step": (numbers.Integral, 0, math.inf, "the steps that `latents` have behind them"),
    "num_images_per_prompt": (numbers.Integral, 1, math.inf, "the results for each prompt"),
    "max_sequence_length": (numbers.Integral, 1, 512, "the text tokens"),
    "token_grid": (numbers.Integral, 1, math.inf, "the rows and columns of tokens of a tile"),
    "upscale_factor": (numbers.Real, 1, 8, "upscale in several calls for more"),
    "strength": (numbers.Real, 0, 1, "the share of the steps that are executed"),
    "start_sigma": (numbers.Real, 0.01, 1, "the share of noise in the latents at the start"),
    "guidance_scale": (numbers.Real, 0, 1000, "about 3.5 for FLUX.1-dev"),
    "true_cfg_scale": (numbers.Real, 0, 1000, "1 is off"),
    "dino_conditioning_scale": (numbers.Real, 0, 100, "0 is off, 1 is as trained"),
    "dino_guidance_start": (numbers.Real, 0, 1, "a share of the steps"),
    "dino_guidance_end": (numbers.Real, 0, 1, "a share of the steps"),
}
CHOICES: dict[str, tuple] = {
    "vae_residual": (None, False, True),
    "output_type": ("pil", "np", "pt", "latent", "strips"),
    "position_mode": ("zero", "tile"),
}
# Of these, `None` stands for a default.
OPTIONAL = ("strength", "start_sigma", "num_inference_steps", "guidance_scale", "max_sequence_length")


def check(name: str, value: Any, is_right: bool, expected: str) -> None:
    """Raises a `ValueError` that names the argument, its value and what would be right, unless `is_right`."""
    if not is_right:
        shape = getattr(value, "shape", None)
        shown = f"{type(value).__name__} of shape {tuple(shape)}" if shape else f"{value!r:.200}"
        raise ValueError(f"`{name}` must be {expected}, but is {shown}.")


def check_values(**values: Any) -> None:
    """[`check`]s each value by its row in one of the tables above."""
    for name, value in values.items():
        if name in CHOICES:
            # By type first: an array has no truth value, and 1 equals `True`.
            is_right = type(value) in map(type, CHOICES[name]) and value in CHOICES[name]
            check(name, value, is_right, f"one of {', '.join(map(repr, CHOICES[name]))}")
        elif value is not None or name not in OPTIONAL:
            kind, low, high, meaning = LIMITS[name]
            noun = "a whole number" if kind is numbers.Integral else "a number"
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            check(name, value, is_number and low <= value <= high, f"{noun} {limits} ({meaning})")


def check_tensor(name: str, tensor: Any, shape: tuple[int | None, ...], meaning: str) -> None:
    """[`check`]s that `tensor` is a finite one of `shape`, in which `None` stands for any length."""
    lengths = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
    is_right = len(lengths) == len(shape) and all(x > 0 and y in (None, x) for x, y in zip(lengths, shape))
    wanted = ", ".join("any" if length is None else str(length) for length in shape)
    check(name, tensor, is_right, f"a tensor of shape ({wanted}), {meaning}")
    check(name, tensor, bool(torch.isfinite(tensor).all()), "free of NaN and infinite values")


def check_pixels(value: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Checks an array `(..., h, w, channels)` or tensor `(..., channels, h, w)`; returns a tensor with a batch."""
    is_array = isinstance(value, np.ndarray)
    layout = "(batch, height, width, 1 or 3)" if is_array else "(batch, 1 or 3, height, width)"
    channels = value.shape[-1 if is_array else -3] if value.ndim in (3, 4) else None
    check("image", value, channels in (1, 3) and 0 not in value.shape, f"{layout}, or unpacked latents")
    check("image", value.dtype, "float" in str(value.dtype), "floats in [0, 1]")
    # Contiguous, because torch takes no negative strides.
    pixels = torch.from_numpy(np.ascontiguousarray(value)).movedim(-1, -3) if isinstance(value, np.ndarray) else value
    low, high = float(pixels.min()), float(pixels.max())
    check("image", (low, high), low >= -ROUNDING and high <= 1 + ROUNDING, "finite and in [0, 1], not packed latents")
    return pixels.reshape(-1, *pixels.shape[-3:]).float().clamp(0, 1)


def image_size(image: Any) -> tuple[int, int]:
    """Height and width in pixels of a PIL image, an array `(..., h, w, channels)` or a tensor `(..., h, w)`."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    has_size = isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim in (3, 4) and 0 not in image.shape
    check("image", image, has_size, "a PIL image, an array or a tensor with height, width and channels")
    height, width = image.shape[-3:-1] if isinstance(image, np.ndarray) else image.shape[-2:]
    return height, width


def check_regions(regions: list, height: int, width: int) -> list[tuple[Any, Any]]:
    """[`check`]s prompts and their boxes; returns them with `(left, top, right, bottom)` in pixels of the output."""
    checked = []
    for region in regions:
        text, box = region if isinstance(region, (list, tuple)) and len(region) == 2 else (None, None)
        box = (0, 0, 1, 1) if box is None else box
        is_box = isinstance(box, (list, tuple)) and [isinstance(x, numbers.Real) for x in box] == [True] * 4
        if is_box and all(0 <= x <= 1 for x in box):
            box = [round(x * length) for x, length in zip(box, (width, height, width, height))]
        is_inside = is_box and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        place = f"(left, top, right, bottom) in the output's {width}x{height} px, in fractions of it, or None"
        check("prompt", region, isinstance(text, str) and is_inside, f"pairs of a string and a box {place}")
        checked.append((text, box))
    return checked


def check_finite(values: torch.Tensor, what: str, remedy: str, cell: int = 0, top: int = 0) -> None:
    """
    Raises a `FloatingPointError` if `values` hold NaN or infinite ones. Those of a canvas `(..., rows, columns)`, with
    cells of `cell` px, the first row `top` px below its top, are told the place.
    """
    if values.isfinite().all():
        return
    place = ""
    if cell:
        row, column = (~values.isfinite()).flatten(0, -3).any(0).nonzero()[0].tolist()
        place = f" at {row * cell + top} px from the top, {column * cell} px from the left"
    raise FloatingPointError(f"NaN or infinite values in {what}{place}. {remedy}")


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


def axis_windows(starts: Sequence[int], size: int) -> torch.Tensor:
    """
    Blending weights `(len(starts), size)` of tiles of `size` cells along one axis, which sum to one at every cell: a
    raised cosine as wide as the overlap. (The usual Gaussian hands over within a few cells whatever the overlap.)
    """
    windows = torch.ones(len(starts), size, dtype=torch.float64)
    for index, (start, next_start) in enumerate(itertools.pairwise(starts)):
        overlap = start + size - next_start
        ramp = torch.sin(torch.pi / 2 * (torch.arange(overlap, dtype=torch.float64) + 0.5) / overlap) ** 2
        windows[index, size - overlap :] *= ramp.flip(0)
        windows[index + 1, :overlap] *= ramp
    total = torch.zeros(starts[-1] + size, dtype=torch.float64)
    for start, window in zip(starts, windows):
        total[start : start + size] += window
    return torch.stack([window / total[start : start + size] for start, window in zip(starts, windows)]).float()


def choose_tile_size(rows: int, columns: int, overlap: int) -> tuple[int, int]:
    """
    The tile size that covers a canvas with the fewest tokens, text and DINO tokens included; all lengths in tokens.

    For each number of tiles down and across, the smallest tile of at least `MIN_TILE_TOKENS` that covers the canvas
    competes. If none fits, the size that FLUX was trained on.
    """

    def smallest_sides(length: int) -> set[int]:
        counts = range(1, length + 1) if length > overlap else range(1, 2)
        return {math.ceil((length + (count - 1) * overlap) / count) for count in counts}

    sizes = set()
    for tile_rows, tile_columns in itertools.product(smallest_sides(rows), smallest_sides(columns)):
        sizes.add((max(tile_rows, min(rows, math.ceil(MIN_TILE_TOKENS / tile_columns))), tile_columns))
        sizes.add((tile_rows, max(tile_columns, min(columns, math.ceil(MIN_TILE_TOKENS / tile_rows)))))

    def fits(size: tuple[int, int]) -> bool:
        # A canvas narrower than a tile forces the tile's shape.
        is_square_enough = max(size) <= MAX_TILE_ASPECT * min(size) or size[0] == rows or size[1] == columns
        is_large_enough = math.prod(size) >= MIN_TILE_TOKENS or size == (rows, columns)
        return is_square_enough and is_large_enough and math.prod(size) <= MAX_TILE_TOKENS

    def work(size: tuple[int, int]) -> int:
        count = tile_count(rows, size[0], overlap) * tile_count(columns, size[1], overlap)
        return count * (math.prod(size) + TOKENS_BESIDE_IMAGE)

    default = (min(DEFAULT_TILE_TOKENS, rows), min(DEFAULT_TILE_TOKENS, columns))
    return min(filter(fits, sorted(sizes)), key=work, default=default)


def plan_tiles(
    height: int,
    width: int,
    tile_size: int | tuple[int, int] | None = None,
    tile_overlap: int = DEFAULT_TILE_OVERLAP,
    pixels_per_token: int = 16,
) -> TilePlan:
    """
    Plans equal, evenly spread tiles whose borders lie on the token grid, for an output of `height` and `width` pixels.

    Args:
        tile_size (`int` or `tuple[int, int]`, *optional*):
            Side, or height and width, of a tile in pixels, a multiple of `pixels_per_token`. By default the size with
            the least work. A canvas smaller than that is one tile.
        tile_overlap (`int`, defaults to 64): The least overlap of neighbours in pixels, rounded up to whole tokens.
        pixels_per_token (`int`, defaults to 16): Side of a transformer token in pixels.

    Raises:
        `ValueError`: If a size is not positive, `tile_size` is off the grid, or the overlap fills a tile.
    """
    check_values(height=height, width=width, tile_overlap=tile_overlap, pixels_per_token=pixels_per_token)
    canvas = math.ceil(height / pixels_per_token), math.ceil(width / pixels_per_token)
    overlap = math.ceil(tile_overlap / pixels_per_token)
    if tile_size is None:
        tile = choose_tile_size(*canvas, overlap)
    else:
        sides = tile_size if isinstance(tile_size, (tuple, list)) else (tile_size, tile_size)
        is_whole = all(isinstance(x, numbers.Integral) and x > 0 and x % pixels_per_token == 0 for x in sides)
        grid = f"a multiple of {pixels_per_token} px, or (height, width) of such"
        check("tile_size", tile_size, len(sides) == 2 and is_whole, grid)
        tile = min(sides[0] // pixels_per_token, canvas[0]), min(sides[1] // pixels_per_token, canvas[1])
    for length, size in zip(canvas, tile):
        limit = f"below the tile's {size * pixels_per_token} px, in whole tokens of {pixels_per_token} px"
        check("tile_overlap", tile_overlap, not overlap >= size < length, limit)
    starts = [tile_starts(length, size, overlap) for length, size in zip(canvas, tile)]
    tops, lefts = (tuple(start * pixels_per_token for start in axis) for axis in starts)
    height, width, tile_height, tile_width = (length * pixels_per_token for length in (*canvas, *tile))
    return TilePlan(height, width, tile_height, tile_width, tops, lefts, pixels_per_token)


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
    """The whole canvas of [`blend_strips`]."""
    return torch.cat(list(blend_strips(tiles, plan, pixels_per_cell)), dim=2)


# ---- DINO features to tokens ---------------------------------------------------------------------------------------


class DinoProjector(ModelMixin, ConfigMixin):
    r"""
    Projects a grid of DINO patch features to tokens of the FLUX text stream, as
    [`~pipelines.flux.modeling_flux.ReduxImageEncoder`] does, with a norm before and a gain for each channel after. The
    config records all that inference has to know about the training.

    Args:
        in_dim (`int`, defaults to 768): Features of a patch: the encoder's hidden size times the number of `layers`.
        out_dim (`int`, defaults to 4096): `joint_attention_dim` of the transformer.
        hidden_dim (`int`, defaults to 4096): Width of the hidden layer.
        token_grid (`int`, defaults to 16):
            Rows and columns of tokens that a tile's patches are averaged to; a tile with fewer keeps its own grid.
        layers (`list[int]`, defaults to `[-1]`):
            Hidden states of the encoder that are concatenated, each after the encoder's final norm.
        position_mode (`str`, defaults to `"zero"`):
            Rotary position of a token: "zero" as for text, or "tile" for the row and column of the place it describes.
        dino_model (`str`, *optional*, defaults to `"facebook/dinov2-with-registers-base"`):
            Repo or folder of the encoder. `None` stands for the subfolder `dino_encoder` beside the projector.
        image_mean, image_std (`list[float]`, default to ImageNet's):
            Mean and standard deviation of red, green and blue in [0, 1] that the encoder expects.
        sigma_min, sigma_max (`float`, *optional*): The least and the greatest noise level of the training.
        num_prompt_tokens, pooled_dim (`int`, default to 0):
            If above 0, the empty prompt's embeddings are buffers, and calls without a prompt need no text encoders:
            `prompt_embeds` `(1, num_prompt_tokens, out_dim)` and `pooled_prompt_embeds` `(1, pooled_dim)`.
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
        num_prompt_tokens: int = 0,
        pooled_dim: int = 0,
    ):
        super().__init__()
        check_values(token_grid=token_grid, position_mode=position_mode)
        self.norm = torch.nn.LayerNorm(in_dim)
        self.linear_1 = torch.nn.Linear(in_dim, hidden_dim)
        self.act = torch.nn.SiLU()
        self.linear_2 = torch.nn.Linear(hidden_dim, out_dim)
        self.gain = torch.nn.Parameter(torch.ones(out_dim))
        if num_prompt_tokens > 0:
            self.register_buffer("prompt_embeds", torch.zeros(1, num_prompt_tokens, out_dim))
            self.register_buffer("pooled_prompt_embeds", torch.zeros(1, pooled_dim))

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
        Rotary positions `(rows * columns, 3)` of a tile's grid of DINO tokens: zeros, or `(0, row, column)` of the
        centre of the described place in its image tokens.
        """
        ids = torch.zeros(*grid, 3)
        if self.config.position_mode == "tile":
            centers = [(torch.arange(cells) + 0.5) * tokens / cells - 0.5 for cells, tokens in zip(grid, tile_tokens)]
            ids[..., 1] = centers[0][:, None]
            ids[..., 2] = centers[1][None, :]
        return ids.flatten(0, 1)


class DinoTokens(NamedTuple):
    """What the DINO branch adds to the text stream of every tile, and how strongly."""

    tokens: torch.Tensor  # (num_tiles, batch, num_tokens, joint_attention_dim)
    ids: torch.Tensor  # (num_tokens, 3)
    log_scale: torch.Tensor | None  # (1 or num_tiles * batch, 1 or num_tokens); None is plain attention


class PromptInputs(NamedTuple):
    """What a call says for one side of true CFG; the names of the negative side's arguments begin with "negative_"."""

    prompt: Any  # this and the next three are arguments of `encode_prompt`
    prompt_2: Any
    prompt_embeds: Any
    pooled_prompt_embeds: Any
    ip_adapter_image: Any
    ip_adapter_image_embeds: Any


class PromptBranch(NamedTuple):
    """The conditioning of one transformer call: the positive or the negative side of true CFG."""

    prompt_embeds: torch.Tensor  # (batch, num_tokens, joint_attention_dim)
    pooled_prompt_embeds: torch.Tensor  # (batch, pooled_projection_dim)
    ip_adapter_embeds: list[torch.Tensor] | None = None  # one (batch, num_images, dim) for each adapter
    tile_rows: list[int] | None = None  # the row of each tile's prompt, where the embeddings have one for each text


# ---- Attention with a strength for the DINO tokens -----------------------------------------------------------------


def cudnn_attention_with_lse(query, key, value):
    """Output and log-sum-exp `(batch, heads, tokens)` of cuDNN's attention of `(batch, heads, tokens, head_dim)`."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, compute_log_sumexp=True, dropout_p=0.0, is_causal=False, return_debug_mask=False
    )
    # torch >= 2.9 returns a trailing dimension of one.
    return out, lse.reshape(out.shape[:-1])


def flash_attention_with_lse(query, key, value):
    """The same of PyTorch's flash attention, on CUDA or the CPU."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def select_lse_attention(backend: str, device: torch.device, dtype: torch.dtype) -> Callable | None:
    """The attention with log-sum-exp for a backend, device and dtype, or `None` if there is none."""
    if device.type == "cpu":
        return flash_attention_with_lse if backend == "native" else None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return None  # these kernels begin with Ampere
    is_hopper = torch.version.hip is None and capability >= (9, 0)
    native = cudnn_attention_with_lse if is_hopper else flash_attention_with_lse
    kernels = {"native": native, "_native_cudnn": cudnn_attention_with_lse, "_native_flash": flash_attention_with_lse}
    return kernels.get(backend)


def merge_attention(out_rest, lse_rest, out_dino, lse_dino, log_scale):
    """
    Joins attention over two groups of keys as one softmax in which the logits of the second are raised by `log_scale`,
    from the groups' outputs `(batch, heads, tokens, head_dim)` and the natural logs of their softmax sums.

    `o = lerp(o_rest, o_dino, sigmoid(lse_dino + log_scale - lse_rest))`: exact, and no mask is needed. The rule is
    ring attention's (arXiv 2310.01889), with a bias that is constant over a group.
    """
    weight = torch.sigmoid(lse_dino.float() + log_scale.float() - lse_rest.float()).unsqueeze(-1)
    return torch.lerp(out_rest, out_dino, weight.to(out_rest.dtype))


class FluxDinoAttnProcessor(FluxAttnProcessor):
    r"""
    Attention of FLUX in which the DINO keys weigh `scale` times as much as their logits say. (Scaling the tokens would
    not do: LayerNorm and QK-norm remove their magnitude.)

    The strength arrives as `attention_mask`, an additive bias of shape `(batch or 1, 1, 1, tokens)` in the query's
    dtype that is `log(scale)` on the DINO keys and 0 elsewhere, so that any other processor understands it too. Where
    `lse_attention` is given, the DINO keys and the rest are attended separately, without a mask, at the speed of the
    fastest kernel, and merged by their log-sum-exp. Otherwise the bias goes to the attention backend.

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
        num = self.num_dino_tokens
        out_rest, lse_rest = self.lse_attention(query, key[:, :, num:], value[:, :, num:])
        out_dino, lse_dino = self.lse_attention(query, key[:, :, :num], value[:, :, :num])
        out = merge_attention(out_rest, lse_rest, out_dino, lse_dino, attention_mask[..., 0])
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
        query, key, value, *text = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in text)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        return (x.transpose(1, 2) for x in (query, key, value))


def attention_backend_of(processor: Any) -> str:
    """Name of the attention backend that a processor's next call uses: its own, or diffusers' active one."""
    backend = getattr(processor, "_attention_backend", None)
    return AttentionBackendName(backend or _AttentionBackendRegistry.get_active_backend()[0]).value


# ---- Pipeline ------------------------------------------------------------------------------------------------------


class FluxDinoTilePipeline(FluxImg2ImgPipeline):
    r"""
    Enlarges images with FLUX.1 in overlapping tiles, each told by DINO features what it shows.

    The image is resized, its latents are noised a little and denoised tile by tile; the tiles are blended in latent
    space and decoded. With a single tile and `strength`, and without projector, it equals [`FluxImg2ImgPipeline`],
    whose methods for saving, loading, LoRA, IP-Adapter and offloading it inherits. The text encoders are not needed
    with `prompt_embeds`, nor without a prompt if the projector carries the embeddings of the empty one.

    All that is computed for tiles goes through the attribute `map_tiles`, like `map`: replace it to share or to watch.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer, image_encoder,
        feature_extractor: The components of [`FluxImg2ImgPipeline`].
        dino_encoder (`Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel`, *optional*): DINO backbone.
        dino_projector ([`DinoProjector`], *optional*): Projects its features to the transformer's text stream.
        default_start_sigma (`float`, *optional*, defaults to 0.35):
            Where a call starts that says nothing else. A model that knows less than FLUX.1 starts with less noise.
        default_tile_size (`int`, *optional*):
            Side in pixels of a call's tiles, for a transformer that knows no larger pictures. Planned by default.
        default_vae_residual (`bool`, *optional*, defaults to `False`):
            Whether a call that says nothing else has `vae_residual`, for a VAE that loses much.
    """

    # Running a model frees the one before it. DINO may not run, so it must not stand between T5 and the transformer.
    model_cpu_offload_seq = f"dino_encoder->dino_projector->{FluxImg2ImgPipeline.model_cpu_offload_seq}"
    _optional_components = [*FluxImg2ImgPipeline._optional_components, "dino_encoder", "dino_projector"]
    _optional_components += ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    # Sequential offloading would take the embeddings that it carries away from where a call reads them.
    _exclude_from_cpu_offload = ["dino_projector"]

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
        text_parts = (text_encoder, tokenizer, text_encoder_2, tokenizer_2)
        super().__init__(scheduler, vae, *text_parts, transformer, image_encoder, feature_extractor)
        self.register_modules(dino_encoder=dino_encoder, dino_projector=dino_projector)
        self.register_to_config(default_start_sigma=default_start_sigma, default_tile_size=default_tile_size)
        self.register_to_config(default_vae_residual=default_vae_residual)
        self._joint_attention_kwargs: dict[str, Any] = {}
        self.map_tiles: Callable[[Callable[[Any], torch.Tensor], Sequence], Iterable[torch.Tensor]] = map

    # ---- Loading and saving ----------------------------------------------------------------------------------------

    def load_dino_projector(
        self,
        pretrained_model_name_or_path: str | Path,
        subfolder: str = "dino_projector",
        revision: str | None = None,
        token: str | bool | None = None,
        variant: str | None = None,
        dino_encoder: str | Path | PreTrainedModel | None = None,
    ) -> None:
        r"""
        Loads a projector and the DINO encoder that it was trained with, from safetensors only and without remote code.
        After `from_pretrained` it also restores those of a saved pipeline.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Repo or folder with `subfolder`, or a projector's folder.
            subfolder, revision, token, variant: As for [`~DiffusionPipeline.from_pretrained`].
            dino_encoder (`str`, `Path` or `PreTrainedModel`, *optional*):
                A DINO model, or its repo or folder. By default the folder `dino_encoder` beside a local projector,
                else the one that the projector's config names.

        Raises:
            `ValueError`: If the projector, the encoder and the transformer do not fit together.
            `OSError`: If files are missing or are not safetensors.
        """
        place, encoder = pretrained_model_name_or_path, dino_encoder
        check("pretrained_model_name_or_path", place, isinstance(place, str | Path), "a repo or a folder")
        check("subfolder", subfolder, isinstance(subfolder, str), "the name of a folder")
        is_right = isinstance(encoder, str | Path | PreTrainedModel | None)
        check("dino_encoder", encoder, is_right, "a DINO model, or its repo or folder")
        folder = Path(place)
        if isinstance(place, Path) and not folder.is_dir():
            raise OSError(f"There is no folder {folder}.")
        if (folder / "config.json").is_file() and not (folder / subfolder).is_dir():
            folder, subfolder = folder.parent, folder.name
        dtype, weights = self.transformer.dtype, {"use_safetensors": True, "variant": variant}
        location: dict[str, Any] = {"revision": revision, "token": token}
        config = DinoProjector.load_config(str(folder), subfolder=subfolder, **location)
        is_projector = isinstance(config, dict) and config.get("_class_name") == DinoProjector.__name__
        check("pretrained_model_name_or_path", place, is_projector, "a DinoProjector's place")
        projector, info = DinoProjector.from_pretrained(
            str(folder), subfolder=subfolder, torch_dtype=dtype, output_loading_info=True, **weights, **location
        )
        if info["missing_keys"]:
            raise OSError(f"The weights in {folder / subfolder} lack {sorted(info['missing_keys'])}.")
        if not isinstance(encoder, PreTrainedModel):
            name = projector.config.dino_model if encoder is None else str(encoder)
            if encoder is None and (name is None or (folder / "dino_encoder").is_dir()):
                name, location["subfolder"] = str(folder), "dino_encoder"
            else:
                # Another repo has revisions and variants of its own.
                location, weights["variant"] = {"token": token}, None
            # Read first, because a config makes lists and tables as long as its sizes.
            for key, value in PreTrainedConfig.get_config_dict(name, **location)[0].items():
                most = 100 if key == "num_hidden_layers" else 100_000
                is_right = not isinstance(value, int) or value <= most
                check("dino_encoder", value, is_right, f"of at most {most} `{key}`")
            encoder_config = AutoConfig.from_pretrained(name, trust_remote_code=False, **location)
            self.check_dino_components(encoder_config, projector)
            encoder = AutoModel.from_pretrained(name, trust_remote_code=False, dtype=dtype, **weights, **location)
        self.check_dino_components(encoder.config, projector)
        # Under sequential and group offload these two, small beside FLUX, stay on the execution device.
        device = self._execution_device
        self.register_modules(dino_encoder=encoder.to(device).eval(), dino_projector=projector.to(device).eval())
        # Model offload chains its hooks from component to component: chain them again with these two.
        self.maybe_free_model_hooks()

    def unload_dino_projector(self) -> None:
        r"""Removes the projector and the DINO encoder."""
        self.register_modules(dino_encoder=None, dino_projector=None)
        self.maybe_free_model_hooks()

    @classmethod
    def load_config(cls, *args, **kwargs):
        r"""Loads `model_index.json`; this class needs none of the code that lies beside a published pipeline."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    def to_json_string(self) -> str:
        r"""
        `model_index.json` without the DINO parts, which are saved beside it for [`load_dino_projector`]: diffusers
        loads no class of another library from the Hub.
        """
        config = json.loads(super().to_json_string())
        config |= {"dino_encoder": [None, None], "dino_projector": [None, None]}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def check_dino_components(self, encoder_config: PreTrainedConfig | None, dino_projector: DinoProjector) -> None:
        r"""Raises a `ValueError` unless projector, transformer and, if its config is given, encoder fit together."""
        config, dims = dino_projector.config, self.transformer.config
        sizes = config.out_dim, config.pooled_dim if config.num_prompt_tokens else dims.pooled_projection_dim
        wanted = dims.joint_attention_dim, dims.pooled_projection_dim
        check("dino_projector", sizes, sizes == wanted, f"for the transformer's widths {wanted}")
        if encoder_config is not None:
            kind, trained = encoder_config.model_type, f"which was trained with {config.dino_model}"
            check("dino_encoder", kind, kind in DINO_MODEL_TYPES, f"one of {', '.join(DINO_MODEL_TYPES)}")
            width = encoder_config.hidden_size * len(config.layers)
            fits = f"of the width {config.in_dim} that `dino_projector` takes, {trained}"
            check("dino_encoder", width, width == config.in_dim, fits)
            depth, layers = encoder_config.num_hidden_layers + 1, list(config.layers)
            in_range = all(-depth <= layer < depth for layer in layers)
            check("dino_projector", layers, in_range, f"for one of the encoder's {depth} layers each")

    # ---- Defaults --------------------------------------------------------------------------------------------------

    @property
    def pixels_per_token(self) -> int:
        r"""`int`: Side of a transformer token in pixels: a VAE cell times the 2x2 packing."""
        return self.vae_scale_factor * 2

    @property
    def default_text_tokens(self) -> int:
        r"""`int`: Text tokens that the model was trained with: 256 for the distilled FLUX.1-schnell, 512 for dev."""
        return 512 if self.transformer.config.guidance_embeds else 256

    @property
    def default_prompt_embeds(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        r"""`tuple` of the empty prompt's T5 and pooled CLIP embeddings, if the projector carries them."""
        if self.dino_projector is None or self.dino_projector.config.num_prompt_tokens == 0:
            return None
        return self.dino_projector.prompt_embeds, self.dino_projector.pooled_prompt_embeds

    def get_default_settings(
        self, strength=None, sigmas=None, start_sigma=None, num_inference_steps=None, guidance_scale=None
    ) -> tuple[int, float, float | None]:
        r"""
        Steps, guidance and start sigma where the caller leaves them out. A transformer with guidance embeddings is
        taken for FLUX.1-dev, one without for the distilled FLUX.1-schnell. From a start sigma every step is executed,
        so dev needs fewer of them than with `strength`.
        """
        if strength is None and sigmas is None and start_sigma is None:
            start_sigma = self.config.default_start_sigma
        if sigmas is not None:
            num_inference_steps = len(sigmas)
        elif num_inference_steps is None:
            num_inference_steps = (28 if start_sigma is None else 12) if self.transformer.config.guidance_embeds else 4
        return num_inference_steps, 3.5 if guidance_scale is None else guidance_scale, start_sigma

    def plan_tiles(
        self, height: int, width: int, tile_size: int | tuple[int, int] | None = None, tile_overlap: int = 64
    ) -> TilePlan:
        r"""The tiles that a call with this output size would process; see [`plan_tiles`] for the arguments."""
        tile_size = self.config.default_tile_size if tile_size is None else tile_size
        plan = plan_tiles(height, width, tile_size, tile_overlap, self.pixels_per_token)
        if plan.tokens_per_tile > GRID_TILE_TOKENS:
            size = f"{plan.tile_width}x{plan.tile_height} px are {plan.tokens_per_tile} tokens"
            logger.warning(f"Tiles of {size}. FLUX.1 draws grids above {GRID_TILE_TOKENS}: lower `tile_size`.")
        return plan

    # ---- Checks ----------------------------------------------------------------------------------------------------

    def check_image(self, image: PipelineImageInput) -> list[PIL.Image.Image] | torch.Tensor:
        r"""
        What a call takes as `image`, checked, as a list of PIL images or a tensor `(batch, channels, height, width)`
        of pixels in [0, 1] or, with the VAE's channels, of latents. Raises a `ValueError` unless the images are of one
        kind and size, with 1 or 3 channels (PIL: any mode) and finite values in [0, 1].
        """
        if self.is_latents(image):
            check_tensor("image", image, (None, self.latent_channels, None, None), "latents of the output's size")
            check("image", image, not any(cells % 2 for cells in image.shape[2:]), "latents of even height and width")
            return image
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        for index, item in enumerate(images):
            # PIL's own conversion to 8 bits cuts the tones of 16-bit and float images.
            if isinstance(item, PIL.Image.Image) and item.mode[0] in "IF":
                tones = np.asarray(item, dtype=np.float32)[..., None] / (1 if item.mode == "F" else 65535)
                grey = check_pixels(tones)[0, 0].mul(255).round().to(torch.uint8)
                images[index] = PIL.Image.fromarray(grey.numpy())
        kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
        is_one_kind = any(all(isinstance(item, kind) for item in images) for kind in kinds)
        names = sorted({type(item).__name__ for item in images})
        check("image", names, is_one_kind and names != [], "a PIL image, an array, a tensor, or a list of one of them")
        if not isinstance(images[0], PIL.Image.Image):
            images = [check_pixels(item) for item in images]
        sizes = sorted({image_size(item) for item in images})
        check("image", sizes, len(sizes) == 1 and min(sizes[0]) > 0, "of one (height, width)")
        return images if isinstance(images[0], PIL.Image.Image) else torch.cat(images)

    def is_latents(self, image: Any) -> bool:
        r"""Whether an image of a call holds latents, as the parent pipeline allows."""
        return isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == self.latent_channels != 3

    def get_output_size(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        upscale_factor: float | None = None,
    ) -> tuple[int, int]:
        r"""Height and width of the result in pixels. Raises a `ValueError` if they are out of range or said twice."""
        image_height, image_width = image_size(image[0] if isinstance(image, (list, tuple)) and image else image)
        factor = DEFAULT_UPSCALE_FACTOR if upscale_factor is None else upscale_factor
        if height is not None or width is not None:
            check("upscale_factor", upscale_factor, upscale_factor is None, f"left out beside {height}x{width} px")
            check("height", height, height is not None, f"given with `width`, {width}")
            check("width", width, width is not None, f"given with `height`, {height}")
            check_values(height=height, width=width)
        if self.is_latents(image):
            own_size = image_height * self.vae_scale_factor, image_width * self.vae_scale_factor
            is_kept = upscale_factor in (None, 1) and (height or own_size[0], width or own_size[1]) == own_size
            check("image", image, is_kept, f"pixels to be resized, not latents of {own_size[0]}x{own_size[1]} px")
            return own_size
        check_values(upscale_factor=factor)
        return height or round(image_height * factor), width or round(image_width * factor)

    def check_inputs(
        self, sides: dict[str, PromptInputs], num_images: int, num_tokens: int, do_true_cfg: bool, tensor_inputs: Any
    ) -> tuple[int, int]:
        r"""
        Checks the prompts and IP-Adapter inputs of both sides, by the prefix of their names, and by the parent's
        method what excludes each other. Raises a `ValueError`. Returns the number of prompts, once for each image, and
        that of text tokens.
        """
        is_list = isinstance(tensor_inputs, (list, tuple))
        check("callback_on_step_end_tensor_inputs", tensor_inputs, is_list, "a list of names")
        config: Any = self.transformer.config
        channels = 4 * self.latent_channels
        fits = f"a plain FLUX.1 of {channels} input channels, not Fill or Control"
        check("transformer", config.in_channels, config.in_channels == channels, fits)
        adapters: Any = getattr(self.transformer, "encoder_hid_proj", None)
        has_text_encoders = self.text_encoder is not None and self.text_encoder_2 is not None
        has_image_encoder = self.image_encoder is not None and self.feature_extractor is not None
        has_adapter_input = adapters is not None and any(x is not None for side in sides.values() for x in side[4:])
        adapter_counts: set[tuple[str, int]] = set()
        for prefix, side in sides.items():
            for name, text in ((f"{prefix}prompt", side.prompt), (f"{prefix}prompt_2", side.prompt_2)):
                entries = text if isinstance(text, list) else [""] if text is None else [text]
                is_text = len(entries) > 0 and all(isinstance(entry, str) for entry in entries)
                check(name, text, is_text, "a string or a list of strings")
                check(name, text, text is None or has_text_encoders, "None without the two text encoders")
            embeds, pooled, name = side.prompt_embeds, side.pooled_prompt_embeds, f"{prefix}prompt_embeds"
            if embeds is not None:
                both = "T5 embeddings, of as many tokens on both sides"
                check_tensor(name, embeds, (None, num_tokens if prefix else None, config.joint_attention_dim), both)
                # A negative prompt gets as many tokens, for both share the positions.
                num_tokens = embeds.shape[1]
            if pooled is not None:
                check(f"{prefix}pooled_prompt_embeds", pooled, embeds is not None, f"None without `{name}`")
                dims = (len(embeds), config.pooled_projection_dim)
                check_tensor(f"{prefix}pooled_prompt_embeds", pooled, dims, "CLIP embeddings of the same prompts")
            image, embeds, name = side.ip_adapter_image, side.ip_adapter_image_embeds, f"{prefix}ip_adapter_image"
            check(name, image, image is None or adapters is not None, "None before `load_ip_adapter`")
            check(f"{name}_embeds", embeds, embeds is None or adapters is not None, "None before `load_ip_adapter`")
            # A side without image gets a black one, which has to be encoded too.
            needs_encoder = has_adapter_input and embeds is None and (not prefix or do_true_cfg)
            check(name, image, has_image_encoder or not needs_encoder, "embeddings without `image_encoder`")
            if embeds is not None:
                embeds = embeds if isinstance(embeds, list) else [embeds]
                layers = adapters.image_projection_layers
                check(f"{name}_embeds", len(embeds), len(embeds) == len(layers), "one for each IP-Adapter")
                for layer, value in zip(layers, embeds):
                    shape = (None, None, layer.image_embeds.in_features)
                    check_tensor(f"{name}_embeds", value, shape, "image embeddings")
                adapter_counts |= {(f"{name}_embeds", len(value)) for value in embeds}
        texts = {f"{prefix}{name}": x for prefix, side in sides.items() for name, x in zip(side._fields[:4], side)}
        super().check_inputs(**texts, strength=0, height=0, width=0, callback_on_step_end_tensor_inputs=tensor_inputs)
        counts = {name: len(x) if isinstance(x, (list, torch.Tensor)) else 1 for name, x in texts.items()}
        name = "prompt" if texts["prompt_embeds"] is None else "prompt_embeds"
        num_texts = counts[name]
        check(name, num_texts, num_texts == 1 or num_texts % num_images == 0, f"one for each of {num_images} images")
        num_prompts = max(num_texts, num_images)
        for name, allowed in (
            ("prompt_2", {1, num_texts} if texts["prompt_2"] is None else {num_texts}),
            ("negative_prompt", {1, num_prompts}),
            ("negative_prompt_2", {1, counts["negative_prompt"]}),
            ("negative_prompt_embeds", {1, num_prompts}),
        ):
            check(name, counts[name], counts[name] in allowed, f"{max(allowed)} for as many prompts")
        for name, count in adapter_counts:
            check(name, count, count in (1, num_prompts), f"1, or {num_prompts} for as many prompts")
        return num_prompts, num_tokens

    def check_tile_prompts(self, prompt, prompt_2, image, height: int, width: int) -> Callable | list | None:
        r"""
        The checked `prompt` of a call if it differs from tile to tile: a function, or regions with boxes in pixels.
        `None` for any other. Raises a `ValueError`.
        """
        has_boxes = isinstance(prompt, list) and any(isinstance(entry, (list, tuple)) for entry in prompt)
        if not has_boxes and not callable(prompt):
            return None
        check("image", len(image), len(image) == 1, "one image where `prompt` differs from tile to tile")
        check("prompt_2", prompt_2, prompt_2 is None, "left out where `prompt` differs from tile to tile")
        has_pixels = has_boxes or not self.is_latents(image)
        check("image", image, has_pixels, "pixels, not latents, where `prompt` is a function that looks at them")
        return check_regions(prompt, height, width) if has_boxes else prompt

    def check_dino_inputs(self, is_latent, plan, num_images, scale, dino_embeds, kwargs) -> None:
        r"""Checks the DINO conditioning; raises a `ValueError`."""
        if self.dino_projector is None:
            check("dino_embeds", dino_embeds, dino_embeds is None, "None where no projector is loaded")
            if scale not in (0, 1):
                logger.warning(f"`dino_conditioning_scale` {scale} has no effect: there is no projector.")
            return
        if dino_embeds is not None:
            shape = (len(plan), num_images, None, None, self.dino_projector.config.in_dim)
            check_tensor("dino_embeds", dino_embeds, shape, "from `encode_dino` for the same image and tiles")
        if scale > 0:
            if dino_embeds is None and self.dino_encoder is None:
                raise ValueError("`dino_encoder` is missing. Call `load_dino_projector` or pass `dino_embeds`.")
            if dino_embeds is None and is_latent:
                raise ValueError("`image` holds latents, which DINO cannot see. Pass `dino_embeds` or pixels.")
            self.check_dino_components(self.dino_encoder.config if dino_embeds is None else None, self.dino_projector)
            check("joint_attention_kwargs", list(kwargs), "attention_mask" not in kwargs, "without `attention_mask`")
        if scale not in (0, 1):
            obstacle = self.find_obstacle_to_strength()
            check("dino_conditioning_scale", scale, obstacle is None, f"0 or 1 with {obstacle}")

    def find_obstacle_to_strength(self) -> str | None:
        r"""What keeps an attention processor from weighing the DINO keys, or `None`."""
        for processor in self.transformer.attn_processors.values():
            if getattr(processor, "_parallel_config", None) is not None:
                return "context parallelism, which splits the sequence"
            backend = attention_backend_of(processor)
            lse_attention = select_lse_attention(backend, self._execution_device, self.transformer.dtype)
            if backend not in MASK_BACKENDS and (type(processor) is not FluxAttnProcessor or lse_attention is None):
                return f"the attention backend {backend!r}, which takes no mask"
        return None

    # ---- Image and latents -----------------------------------------------------------------------------------------

    def prepare_image(self, image: PipelineImageInput, height: int, width: int) -> torch.Tensor:
        r"""
        Resizes what a call takes as `image` (PIL by Lanczos, arrays and tensors by antialiased bicubic) and pads it to
        whole tokens by repeating its last row and column: `(batch, 3, padded height, padded width)` on the CPU, bytes
        from PIL images, else float32 in [-1, 1]. [`~FluxDinoTilePipeline.crop_pixels`] reads both.
        """
        return self.resize_image(self.check_image(image), height, width)

    def resize_image(self, images: list[PIL.Image.Image] | torch.Tensor, height: int, width: int) -> torch.Tensor:
        r"""The same of images that are checked already."""
        below, right = -height % self.pixels_per_token, -width % self.pixels_per_token
        if isinstance(images, torch.Tensor):
            pixels = images.expand(-1, 3, -1, -1)
            if pixels.shape[2:] != (height, width):
                pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
            return self.image_processor.normalize(F.pad(pixels.cpu(), (0, right, 0, below), mode="replicate"))
        canvas = np.empty((len(images), height + below, width + right, 3), dtype=np.uint8)
        for rows, item in zip(canvas, images):
            wide = item.convert("RGB").resize((width, item.height), PIL.Image.Resampling.LANCZOS)
            # Band by band, so that beside the result only a band is held.
            for top in range(0, height, RESIZED_ROWS):
                bottom = min(top + RESIZED_ROWS, height)
                box = (0, top * item.height / height, width, bottom * item.height / height)
                band = wide.resize((width, bottom - top), PIL.Image.Resampling.LANCZOS, box)
                rows[top:bottom, :width] = np.asarray(band)
        canvas[:, :height, width:] = canvas[:, :height, width - 1 : width]
        canvas[:, height:] = canvas[:, height - 1 : height]
        return torch.from_numpy(canvas).permute(0, 3, 1, 2)

    def crop_pixels(self, image: torch.Tensor, tile: Tile) -> torch.Tensor:
        r"""A tile of a prepared image on the execution device, in [-1, 1] in float32."""
        pixels = image[tile.slices()].to(self._execution_device)
        return pixels if pixels.is_floating_point() else self.image_processor.normalize(pixels.float() / 255)

    def encode_tiles(self, image: torch.Tensor, plan: TilePlan) -> torch.Tensor:
        r"""
        Encodes a prepared image `(batch, 3, height, width)` tile by tile to one posterior for the whole canvas, in
        float32: mean and log-variance, stacked as channels, or latents if the VAE has no posterior.
        """

        def encode(tile: Tile) -> torch.Tensor:
            # Contiguous, because a compiled encoder is compiled for given strides.
            encoded = self.vae.encode(self.crop_pixels(image, tile).to(self.vae.dtype).contiguous())
            return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents

        posterior = blend_tiles(self.map_tiles(encode, plan), plan, self.vae_scale_factor)
        check_finite(posterior, "the image as the VAE encodes it", VAE_REMEDY, self.vae_scale_factor)
        return posterior

    def sample_latents(self, posterior: torch.Tensor, generator=None, sample_mode: str = "sample") -> torch.Tensor:
        r"""Scaled latents `(batch, channels, rows, columns)` of a posterior: a sample, or with "argmax" the mode."""
        if posterior.shape[1] != self.latent_channels:
            distribution = DiagonalGaussianDistribution(posterior)
            posterior = distribution.mode() if sample_mode == "argmax" else distribution.sample(generator)
        return (posterior - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode_tile(self, latents: torch.Tensor, tile: Tile) -> torch.Tensor:
        r"""A tile of a canvas `(batch, latent channels, rows, columns)` in pixels, about in [-1, 1], in float32."""
        crop = latents[tile.slices(self.vae_scale_factor)]
        crop = crop / self.vae.config.scaling_factor + self.vae.config.shift_factor
        # Contiguous, because a compiled decoder is compiled for given strides.
        return self.vae.decode(crop.contiguous().to(self.vae.dtype), return_dict=False)[0].float()

    def get_vae_residual(self, image: torch.Tensor, latents: torch.Tensor, tile: Tile) -> torch.Tensor:
        r"""What the VAE loses of a tile of a prepared image that has these latents, in pixels."""
        return self.crop_pixels(image, tile) - self.decode_tile(latents, tile)

    @torch.no_grad()
    def decode_strips(
        self,
        latents: torch.Tensor,
        plan: TilePlan,
        residual_of: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_prompts: int = 1,
    ) -> Iterator[torch.Tensor]:
        r"""
        Decodes `(batch, latent channels, rows, columns)` latents tile by tile and yields the padded image from top to
        bottom, in strips `(batch, 3, rows, width)`, about in [-1, 1], in float32. Only one row of tiles is held. With
        `residual_of`, a prepared image and its latents, each tile gets what the VAE loses of it, for every prompt.
        """

        def decode(tile: Tile) -> torch.Tensor:
            pixels = self.decode_tile(latents, tile)
            if residual_of is None:
                return pixels
            return pixels + repeat_images(self.get_vae_residual(*residual_of, tile), num_prompts, len(pixels))

        top = 0
        for strip in blend_strips(self.map_tiles(decode, plan), plan, 1):
            check_finite(strip, "the result as the VAE decodes it", VAE_REMEDY, 1, top)
            yield strip
            top += strip.shape[2]
        self.maybe_free_model_hooks()

    def finish_strips(self, strips, height: int, width: int, as_bytes: bool) -> Iterator[np.ndarray]:
        r"""Cuts the strips of a padded image to arrays `(batch, rows, width, 3)` of bytes, or of floats in [0, 1]."""
        top = 0
        for strip in strips:
            for rows in strip[:, :, : height - top, :width].split(STRIP_ROWS, dim=2):
                pixels = self.image_processor.postprocess(rows, output_type="pt").permute(0, 2, 3, 1)
                yield ((pixels * 255).round().to(torch.uint8) if as_bytes else pixels).contiguous().cpu().numpy()
            top += strip.shape[2]

    def pack_canvas(self, latents: torch.Tensor) -> torch.Tensor:
        r"""`(batch, channels, rows, columns)` latents to `(batch, tokens, 4 * channels)`, the parent's packing."""
        return self._pack_latents(latents.contiguous(), *latents.shape)

    def unpack_canvas(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        r"""Undoes [`~FluxDinoTilePipeline.pack_canvas`], in float32; `height` and `width` are in pixels."""
        tokens = tokens.to(self._execution_device, torch.float32)
        return self._unpack_latents(tokens, height, width, self.vae_scale_factor)

    def get_tile_timesteps(self, num_inference_steps, sigmas, strength, start_sigma, plan) -> torch.Tensor:
        r"""
        The timesteps to execute. `mu`, the resolution-dependent shift of the schedule, comes from the tile: it is the
        tile that the transformer sees. From a `start_sigma` the noise levels fall evenly, before the shift, to 0.
        """
        device, config = self._execution_device, self.scheduler.config
        name, kinds = type(self.scheduler).__name__, (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)
        check("scheduler", name, isinstance(self.scheduler, kinds), "a flow-match Euler or LCM scheduler")
        settings = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(plan.tokens_per_tile, *(config[setting] for setting in settings))
        if start_sigma is not None:
            # Read the scheduler's shift as a table, to find the unshifted sigma that it moves to `start_sigma`.
            unshifted = np.linspace(1.0, 1e-3, 1000)
            retrieve_timesteps(self.scheduler, None, device, sigmas=unshifted, mu=mu)
            shifted = self.scheduler.sigmas[: len(unshifted)].cpu().numpy()
            first = np.interp(start_sigma, shifted[::-1], unshifted[::-1])
            sigmas = np.linspace(first, first / num_inference_steps, num_inference_steps)
        elif sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        _, num_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu)
        reached = float(self.scheduler.sigmas[0])
        is_reached = start_sigma is None or abs(reached - start_sigma) < 1e-3
        check("start_sigma", start_sigma, is_reached, f"what this {name} starts at, {reached:.3f}")
        timesteps, num_steps = self.get_timesteps(num_steps, 1.0 if strength is None else strength, device)
        check("strength", strength, num_steps >= 1, f"enough for one of {num_inference_steps} steps")
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
        DINO features `(num_tiles, batch, grid rows, grid columns, features)` of every tile, to be passed as
        `dino_embeds` to calls with the same arguments. Raises a `ValueError` as a call, or if no projector is loaded.
        """
        if self.dino_encoder is None or self.dino_projector is None:
            raise ValueError("`encode_dino` needs a DINO encoder and a projector. Call `load_dino_projector` first.")
        images = self.check_image(image)
        if self.is_latents(images):
            raise ValueError("`image` holds latents, which DINO cannot see. Pass pixels.")
        height, width = self.get_output_size(images, height, width, upscale_factor)
        plan = self.plan_tiles(height, width, tile_size, tile_overlap)
        self.check_dino_components(self.dino_encoder.config, self.dino_projector)
        features = self.encode_dino_tiles(self.resize_image(images, height, width), plan)
        self.maybe_free_model_hooks()
        return features

    def encode_dino_tiles(self, image: torch.Tensor, plan: TilePlan) -> torch.Tensor:
        r"""
        The same of the tiles of a prepared image. Every tile is resized so that one DINO patch lies under each token.
        (The encoder's own image processor would crop the tile's centre.)
        """
        patch_size, config = self.dino_encoder.config.patch_size, self.dino_projector.config
        rows, columns = plan.tile_tokens
        device = self._execution_device
        mean, std = torch.tensor([config.image_mean, config.image_std], device=device).view(2, 1, 3, 1, 1)

        def encode(tile: Tile) -> torch.Tensor:
            pixels = (self.crop_pixels(image, tile) / 2 + 0.5 - mean) / std
            pixels = F.interpolate(pixels, (rows * patch_size, columns * patch_size), mode="bicubic", antialias=True)
            return self.dino_projector.pool(self.get_patch_features(pixels, rows, columns))

        return torch.stack(list(self.map_tiles(encode, plan)))

    def get_patch_features(self, pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        r"""Features `(batch, rows, columns, dim)` of every patch, without CLS and register tokens, after the norm."""
        encoder, layers = self.dino_encoder, list(self.dino_projector.config.layers)
        if layers == [-1]:
            hidden_states = encoder(pixels.to(encoder.dtype)).last_hidden_state
        else:
            norm = encoder.norm if hasattr(encoder, "norm") else encoder.layernorm
            all_states = encoder(pixels.to(encoder.dtype), output_hidden_states=True).hidden_states
            hidden_states = torch.cat([norm(all_states[layer]) for layer in layers], dim=-1)
        return hidden_states[:, -rows * columns :].unflatten(1, (rows, columns))

    def prepare_dino_tokens(self, features: torch.Tensor, plan: TilePlan, scale: float) -> DinoTokens:
        r"""Projects features of [`~FluxDinoTilePipeline.encode_dino`] to tokens with positions."""
        device, dtype = self._execution_device, self.dino_projector.dtype
        tokens = self.dino_projector(features.flatten(2, 3).to(device=device, dtype=dtype))
        check_finite(tokens, "the DINO tokens", MODEL_REMEDY)
        ids = self.dino_projector.position_ids(tuple(features.shape[2:4]), plan.tile_tokens)
        # A compiled block gets a bias at strength 1 too, so that one graph serves every strength.
        is_compiled = self.transformer.transformer_blocks[0]._compiled_call_impl is not None
        needs_bias = scale != 1 or (is_compiled and self.find_obstacle_to_strength() is None)
        log_scale = torch.full((1, 1), scale, device=device).log() if needs_bias else None
        return DinoTokens(tokens, ids.to(device), log_scale)

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
                backend, device = attention_backend_of(processor), self._execution_device
                lse_attention = select_lse_attention(backend, device, self.transformer.dtype)
                replaced[name] = FluxDinoAttnProcessor(dino.tokens.shape[2], lse_attention)
                replaced[name]._attention_backend = processor._attention_backend
        self.transformer.set_attn_processor(replaced)
        try:
            yield
        finally:
            self.transformer.set_attn_processor(stock)

    # ---- Denoising -------------------------------------------------------------------------------------------------

    def get_tile_prompts(self, prompt, image: torch.Tensor, plan: TilePlan, height: int, width: int) -> list[str]:
        r"""
        The prompt of each tile, by what [`~FluxDinoTilePipeline.check_tile_prompts`] returns: what a function says of
        its pixels in a prepared image and of its box, or the prompts of the regions that it touches.
        """
        texts = []
        for top, left, tile_height, tile_width in plan:
            right, bottom = min(left + tile_width, width), min(top + tile_height, height)
            if callable(prompt):
                pixels = self.crop_pixels(image, Tile(top, left, bottom - top, right - left))
                seen = self.image_processor.postprocess(pixels, output_type="pil")[0]
                texts.append(prompt(seen, (left, top, right, bottom)))
                check("prompt(image, box)", texts[-1], isinstance(texts[-1], str), "a string")
            else:
                touched = [
                    x for x, box in prompt if box[0] < right and box[1] < bottom and left < box[2] and top < box[3]
                ]
                texts.append(", ".join(filter(None, touched)))
        return texts

    def encode_branch(
        self, inputs: PromptInputs, num_prompts: int, batch_size: int, num_tokens: int, has_adapter: bool, texts=None
    ) -> PromptBranch:
        r"""
        Encodes one side's prompt and IP-Adapter image, or takes their embeddings, for `batch_size` results. With
        `texts`, one for each tile, it encodes each of them once.
        """
        device, ip_adapter_embeds = self._execution_device, None
        if has_adapter:
            image, image_embeds = inputs.ip_adapter_image, inputs.ip_adapter_image_embeds
            if image is None and image_embeds is None:
                black = np.zeros((224, 224, 3), dtype=np.uint8)
                image = [black] * self.transformer.encoder_hid_proj.num_ip_adapters
            entries = self.prepare_ip_adapter_image_embeds(image, image_embeds, device, 1)
            ip_adapter_embeds = [repeat_images(entry, num_prompts, batch_size) for entry in entries]
        scale = self.joint_attention_kwargs.get("scale")
        kwargs = {**dict(zip(inputs._fields[:4], inputs)), "max_sequence_length": num_tokens, "lora_scale": scale}
        distinct = [inputs.prompt] if texts is None else list(dict.fromkeys(texts))
        # One by one: in a batch, the embeddings of a text would depend on the others by rounding.
        encoded = [self.encode_prompt(**{**kwargs, "prompt": text}, device=device)[:2] for text in distinct]
        embeds = [torch.cat(values).to(device=device, dtype=self.transformer.dtype) for values in zip(*encoded)]
        for values in embeds:
            check_finite(values, "the prompt's embeddings", "T5 overflows in float16: use bfloat16 or float32.")
        if texts is not None:
            return PromptBranch(embeds[0], embeds[1], ip_adapter_embeds, [distinct.index(text) for text in texts])
        prompt_embeds, pooled_embeds = (x.repeat_interleave(batch_size // len(x), dim=0) for x in embeds)
        return PromptBranch(prompt_embeds, pooled_embeds, ip_adapter_embeds)

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
        dtype, device = branch.prompt_embeds.dtype, latents.device
        repeats = num // branch.prompt_embeds.shape[0]
        encoder_hidden_states = branch.prompt_embeds.repeat(repeats, 1, 1)
        text_ids = torch.zeros(encoder_hidden_states.shape[1], 3, device=device)
        # The transformer changes the dictionary that it gets.
        joint_attention_kwargs = dict(self.joint_attention_kwargs)
        if branch.ip_adapter_embeds is not None:
            ip_adapter_embeds = [x.repeat(num // len(x), 1, 1) for x in branch.ip_adapter_embeds]
            joint_attention_kwargs["ip_adapter_image_embeds"] = ip_adapter_embeds
        if dino is not None:
            # Before the text, so that both groups of keys are views for the attention: it knows no order of tokens.
            encoder_hidden_states = torch.cat([dino.tokens.flatten(0, 1).to(dtype), encoder_hidden_states], dim=1)
            text_ids = torch.cat([dino.ids, text_ids])
            if dino.log_scale is not None:
                num_tokens = encoder_hidden_states.shape[1] + rows * columns // 4
                bias = torch.zeros(len(dino.log_scale), 1, 1, num_tokens, device=device, dtype=dtype)
                bias[..., : len(dino.ids)] = dino.log_scale[:, None, None]
                joint_attention_kwargs["attention_mask"] = bias
        velocity = self.transformer(
            hidden_states=self.pack_canvas(latents.to(dtype)),
            timestep=timestep.expand(num).to(dtype) / 1000,
            guidance=None if guidance is None else guidance.expand(num),
            pooled_projections=branch.pooled_prompt_embeds.repeat(repeats, 1),
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text_ids,
            img_ids=self._prepare_latent_image_ids(num, rows // 2, columns // 2, device, torch.float32),
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
        )[0]
        return self.unpack_canvas(velocity, rows * self.vae_scale_factor, columns * self.vae_scale_factor)

    def predict_canvas_velocity(
        self, canvas, timestep, plan, batches, frozen, branches, guidance, true_cfg_scale, dino, progress_bar
    ) -> torch.Tensor:
        r"""
        The velocity of a noisy canvas `(batch, latent channels, rows, columns)`, blended from its tiles', which the
        transformer predicts for `batches` of tile numbers. `frozen` tiles go straight to their clean latents: on the
        line `x = (1 - sigma) * clean + sigma * noise` the velocity is `noise - clean = (x - clean) / sigma`.
        """
        cell, sigma = self.vae_scale_factor, timestep / self.scheduler.config.num_train_timesteps

        def predict(indices: list[int]) -> torch.Tensor:
            latents = torch.cat([canvas[plan[index].slices(cell)] for index in indices])
            batch_dino = None if dino is None else dino._replace(tokens=dino.tokens[indices])
            velocities = []
            for side, branch in enumerate(branches):
                if branch.tile_rows is not None:
                    rows = [branch.tile_rows[index] for index in indices for _ in canvas]
                    embeds, pooled_embeds = branch.prompt_embeds[rows], branch.pooled_prompt_embeds[rows]
                    branch = branch._replace(prompt_embeds=embeds, pooled_prompt_embeds=pooled_embeds)
                # A cache of diffusers must not take one tile, or the other side of true CFG, for the last step.
                # Nor may what it keeps of a step with DINO's tokens serve one without.
                with self.transformer.cache_context(f"tile {indices[0]}, side {side}, DINO {dino is not None}"):
                    velocities.append(self.predict_velocity(latents, timestep, branch, guidance, batch_dino))
            velocity, *negative = velocities
            return negative[0] + true_cfg_scale * (velocity - negative[0]) if negative else velocity

        def predict_all() -> Iterator[torch.Tensor]:
            for velocity in self.map_tiles(predict, batches):
                progress_bar.update()
                yield from velocity.split(len(canvas))

        predicted = predict_all()
        velocities = (
            (canvas[tile.slices(cell)] - frozen[index]) / sigma if index in frozen else next(predicted)
            for index, tile in enumerate(plan)
        )
        return blend_tiles(velocities, plan, cell)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | list[tuple[str, Sequence[float] | None]] | Callable | None = None,
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
        dino_conditioning_scale: float = 1.0,
        dino_guidance_start: float = 0.0,
        dino_guidance_end: float = 1.0,
        dino_embeds: torch.Tensor | None = None,
        vae_residual: bool | None = None,
        first_step: int = 0,
        frozen_tiles: Sequence[int] = (),
        frozen_latents: torch.Tensor | None = None,
    ) -> FluxPipelineOutput | tuple:
        r"""
        Enlarges an image. Arguments up to `max_sequence_length` are those of [`FluxImg2ImgPipeline`], in its order;
        here are the ones that mean more than there.

        Args:
            prompt (`str`, `list[str]`, `list[tuple]` or `Callable`, *optional*):
                What to draw, beside what DINO sees; by default nothing. For regions, a list of prompts and boxes
                `(left, top, right, bottom)` in pixels of the output, or in fractions of it if no number is above 1, or
                `None` for all of it: a tile gets the prompts of all boxes that it touches, in their order, joined by
                commas. Or a function that gets a tile of the enlarged input as a PIL image, and its box in pixels, and
                returns the tile's prompt. Both are for one image, and leave the negative prompt the same everywhere.
            true_cfg_scale (`float`, defaults to 1.0):
                Guidance against the negative prompt; above 1 it doubles the work. Both branches have the DINO tokens.
            image (`PipelineImageInput`):
                One image or several of one size: PIL of any mode, NumPy `(batch, height, width, channels)` or tensor
                `(batch, channels, height, width)` with 1 or 3 channels in [0, 1], or latents `(batch, latent
                channels, rows, columns)` of the size of the output. One prompt serves several images, and one image
                several prompts.
            height, width (`int`, *optional*): Size of the output in pixels, any size. Pass both.
            strength (`float`, *optional*): Share of the steps that are executed; `start_sigma` says the noise itself.
            num_inference_steps (`int`, *optional*):
                Denoising steps. By default 4 (schnell), or (dev) 12 from a `start_sigma`, which executes all, else 28.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Of the noise, drawn for all tiles.
            latents (`torch.Tensor`, *optional*):
                Noisy latents to start from instead of the noised image, packed: `(batch, tokens, 4 * latent channels)`
                for the output padded to whole tokens.
            output_type (`str`, defaults to `"pil"`):
                "pil", "np", "pt", "latent" for the packed latents of the padded output, or "strips" for an iterator of
                byte arrays `(batch, rows, width, 3)` from top to bottom, for pictures that do not fit into memory.
            callback_on_step_end (`Callable`, *optional*):
                Gets and may change `latents`, the packed float32 latents of the whole canvas, after each step.
            max_sequence_length (`int`, *optional*):
                Text tokens of T5; fewer make every step faster. Defaults to the model's 256 (schnell) or 512 (dev).
            upscale_factor (`float`, *optional*): Enlargement from 1 to 8. Defaults to 4 unless a size is given.
            start_sigma (`float`, *optional*):
                Share of noise in the latents at the start, from 0.01 to 1: how much FLUX may change. Without it,
                `strength` and `sigmas` it is the pipeline's `default_start_sigma`, 0.35.
            tile_size (`int` or `tuple[int, int]`, *optional*):
                Tile side, or height and width, in pixels, a multiple of 16 for FLUX.1. Defaults to the pipeline's
                `default_tile_size`, or the size of 0.8 to 1.3 MP, or less for a small output, with the least work.
            tile_overlap (`int`, defaults to 64): Least overlap of neighbouring tiles in pixels.
            tile_batch_size (`int`, defaults to 1): Tiles in one transformer call.
            dino_conditioning_scale (`float`, defaults to 1.0):
                Weight of the DINO tokens in attention: 0 drops them, 1 is plain attention.
            dino_guidance_start (`float`, defaults to 0.0): Share of the steps before the DINO tokens come in.
            dino_guidance_end (`float`, defaults to 1.0): Share of the steps after which they are dropped.
            dino_embeds (`torch.Tensor`, *optional*): Features from [`~FluxDinoTilePipeline.encode_dino`].
            vae_residual (`bool`, *optional*, defaults to the pipeline's `default_vae_residual`, `False`):
                Adds what the VAE loses of the input, as grain and lettering, by another decoding. Not for latents.
            first_step (`int`, defaults to 0): Step to go on with, from `latents` as a callback saw them before it.
            frozen_tiles (`Sequence[int]`, defaults to none):
                Numbers of tiles of the plan that are not denoised but end at `frozen_latents`.
            frozen_latents (`torch.Tensor`, *optional*): Packed clean latents of the canvas; by default the input's.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: The images, in a tuple with `return_dict=False`.

        Raises:
            `ValueError`: If an argument is out of range or does not fit another, before any model runs.
            `FloatingPointError`: If embeddings, latents, velocity or result have NaN or infinite values.
        """
        # 1. Check inputs, define the output and its tiles
        image = self.check_image(image)
        num_images, is_latent = len(image), self.is_latents(image)
        height, width = self.get_output_size(image, height, width, upscale_factor)
        plan, cell = self.plan_tiles(height, width, tile_size, tile_overlap), self.vae_scale_factor
        check_values(strength=strength, start_sigma=start_sigma, num_inference_steps=num_inference_steps)
        check_values(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale, output_type=output_type)
        check_values(num_images_per_prompt=num_images_per_prompt, max_sequence_length=max_sequence_length)
        check_values(tile_batch_size=tile_batch_size, first_step=first_step, vae_residual=vae_residual)
        check_values(dino_guidance_start=dino_guidance_start, dino_guidance_end=dino_guidance_end)
        check_values(dino_conditioning_scale=dino_conditioning_scale)
        num_tokens = max_sequence_length or self.default_text_tokens
        tile_prompts: Any = self.check_tile_prompts(prompt, prompt_2, image, height, width)
        if prompt is None and prompt_embeds is None:
            # The empty prompt; if the projector carries its embeddings, their length is given.
            prompt = ""
            if self.default_prompt_embeds is not None and prompt_2 is None and pooled_prompt_embeds is None:
                prompt, (prompt_embeds, pooled_prompt_embeds) = None, self.default_prompt_embeds
                is_carried = max_sequence_length in (None, prompt_embeds.shape[1])
                carried = f"the {prompt_embeds.shape[1]} of the projector's empty prompt, or with a prompt"
                check("max_sequence_length", max_sequence_length, is_carried, carried)
        # One that differs from tile to tile counts as one prompt, and its text is what an error shows.
        prompt = prompt if tile_prompts is None else str(prompt)
        prompts = (prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        positive = PromptInputs(*prompts, ip_adapter_image, ip_adapter_image_embeds)
        prompts = (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
        negative = PromptInputs(*prompts, negative_ip_adapter_image, negative_ip_adapter_image_embeds)
        do_true_cfg = true_cfg_scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None)
        sides = {"": positive, "negative_": negative}
        num_prompts, num_tokens = self.check_inputs(
            sides, num_images, num_tokens, do_true_cfg, callback_on_step_end_tensor_inputs
        )
        batch_size = num_prompts * num_images_per_prompt
        for name, value in (("strength", strength), ("sigmas", sigmas)):
            check(name, value, value is None or start_sigma is None, f"left out beside `start_sigma` {start_sigma}")
        check("sigmas", sigmas, sigmas is None or is_falling(sigmas), "numbers that fall from at most 1 to above 0")
        for name, tensor in (("latents", latents), ("frozen_latents", frozen_latents)):
            if tensor is not None:
                shape = (batch_size, plan.height * plan.width // self.pixels_per_token**2, 4 * self.latent_channels)
                check_tensor(name, tensor, shape, "packed latents of the whole padded output")
        check("first_step", first_step, first_step == 0 or latents is not None, "0 without `latents` to go on from")
        in_plan = isinstance(frozen_tiles, Sequence)
        in_plan = in_plan and all(isinstance(x, numbers.Integral) and 0 <= x < len(plan) for x in frozen_tiles)
        check("frozen_tiles", frozen_tiles, in_plan, f"a list of numbers of the plan's {len(plan)} tiles")
        is_complete = isinstance(generator, torch.Generator | None)
        if isinstance(generator, list):
            is_complete = len(generator) == batch_size and all(isinstance(x, torch.Generator) for x in generator)
        check("generator", generator, is_complete, f"a `torch.Generator`, or a list of {batch_size}")
        is_decoded = output_type != "latent" and not is_latent
        check("vae_residual", vae_residual, is_decoded or not vae_residual, "False with latents")
        if vae_residual is None:
            vae_residual = self.config.default_vae_residual and is_decoded
        # Private, because diffusers tells only whether there is a cache.
        cache = type(self.transformer._cache_config).__name__
        is_kept = not self.transformer.is_cache_enabled or cache in TILE_CACHES
        check("transformer", cache, is_kept, f"without cache, or with one of {', '.join(TILE_CACHES)}")
        is_right = callback_on_step_end is None or callable(callback_on_step_end)
        check("callback_on_step_end", callback_on_step_end, is_right, "callable")
        kwargs = {} if joint_attention_kwargs is None else joint_attention_kwargs
        check("joint_attention_kwargs", kwargs, isinstance(kwargs, dict), "a dictionary")
        self.check_dino_inputs(is_latent, plan, num_images, dino_conditioning_scale, dino_embeds, kwargs)

        # 2. Prepare the timesteps
        num_inference_steps, guidance_scale, start_sigma = self.get_default_settings(
            strength, sigmas, start_sigma, num_inference_steps, guidance_scale
        )
        timesteps = self.get_tile_timesteps(num_inference_steps, sigmas, strength, start_sigma, plan)
        num_steps, step_sigmas = len(timesteps), timesteps / self.scheduler.config.num_train_timesteps
        check("first_step", first_step, first_step <= num_steps, f"at most the {num_steps} steps of this call")
        shares = [i / num_steps for i in range(num_steps + 1)]
        dino_steps = [
            i for i in range(num_steps) if dino_guidance_start <= shares[i] and shares[i + 1] <= dino_guidance_end
        ]
        uses_dino = self.dino_projector is not None and dino_conditioning_scale > 0
        window = f"later than `dino_guidance_start` {dino_guidance_start}, by a whole one of {num_steps} steps"
        check("dino_guidance_end", dino_guidance_end, len(dino_steps) > 0 or not uses_dino, window)
        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = kwargs
        self._interrupt = False
        self._num_timesteps = num_steps
        device = self._execution_device

        # 3. Encode the prompts
        pixels = torch.empty(0) if is_latent else self.resize_image(image, height, width)
        if tile_prompts is not None:
            tile_prompts = self.get_tile_prompts(tile_prompts, pixels, plan, height, width)
        has_adapter = any(value is not None for side in sides.values() for value in side[4:])
        settings = num_prompts, batch_size, num_tokens, has_adapter
        branches = [self.encode_branch(positive, *settings, tile_prompts)]
        if do_true_cfg:
            branches.append(self.encode_branch(negative, *settings))

        # 4. Encode what DINO sees in each tile
        dino = None
        if uses_dino:
            features = self.encode_dino_tiles(pixels, plan) if dino_embeds is None else dino_embeds
            features = repeat_images(features.transpose(0, 1), num_prompts, batch_size).transpose(0, 1)
            dino = self.prepare_dino_tokens(features, plan, float(dino_conditioning_scale))
            sigma, sigma_max = float(step_sigmas[dino_steps[0]]), self.dino_projector.config.sigma_max
            if sigma_max is not None and sigma > sigma_max + 1e-3:
                known = f"at sigma {sigma:.3f}, but the projector was trained up to {sigma_max}"
                logger.warning(f"The DINO tokens come in {known}. Lower `start_sigma` or raise `dino_guidance_start`.")

        # 5. Encode the image, and add noise or go on from `latents`
        size = plan.height, plan.width
        if is_latent:
            start = image_latents = image.to(device, torch.float32)
        elif latents is None or vae_residual or (frozen_tiles and frozen_latents is None):
            posterior = self.encode_tiles(pixels, plan)
            image_latents = self.sample_latents(posterior, sample_mode="argmax")
            start = self.sample_latents(posterior, generator) if latents is None else image_latents
        if latents is None:
            start = repeat_images(start, num_prompts, batch_size)
            # In float32 whatever the models' dtype, so that a seed stands for the same noise.
            noise = randn_tensor(start.shape, generator, device, torch.float32)
            canvas = self.scheduler.scale_noise(start, timesteps[:1].repeat(batch_size), noise)
        else:
            canvas = self.unpack_canvas(latents, *size)
            self.scheduler.set_begin_index((self.scheduler.begin_index or 0) + first_step)
        frozen = {}
        if frozen_tiles:
            clean = image_latents if frozen_latents is None else self.unpack_canvas(frozen_latents, *size)
            clean = repeat_images(clean, num_prompts, batch_size)
            frozen = {index: clean[plan[index].slices(cell)] for index in frozen_tiles}

        # 6. Denoise
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32)
        batches = split_evenly([index for index in range(len(plan)) if index not in frozen], tile_batch_size)
        num_calls = (num_steps - first_step) * len(batches)
        if self.transformer.is_cache_enabled:
            # An earlier call may have ended before it reset the caches, which only a private method does.
            self.transformer._reset_stateful_cache()
        with self.dino_attention(dino), self.progress_bar(total=num_calls) as progress_bar:
            for i, t in list(enumerate(timesteps))[first_step:]:
                if self.interrupt:
                    break
                conditions = (branches, guidance, true_cfg_scale, dino if i in dino_steps else None)
                velocity = self.predict_canvas_velocity(canvas, t, plan, batches, frozen, *conditions, progress_bar)
                place = f"at step {i + 1} of {num_steps}, sigma {step_sigmas[i]:.4g},"
                check_finite(velocity, f"the velocity {place}", MODEL_REMEDY, cell)
                canvas = self.scheduler.step(velocity, t, canvas, generator=generator, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": self.pack_canvas(canvas), "prompt_embeds": branches[0].prompt_embeds}
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, shown)
                    canvas = self.unpack_canvas(tensors["latents"], *size)
                    check_finite(canvas, f"the latents from the callback {place}", "Correct it.", cell)
                    branches[0] = branches[0]._replace(prompt_embeds=tensors["prompt_embeds"])

        # 7. Decode
        images: Any
        if output_type == "latent":
            images = self.pack_canvas(canvas)
            self.maybe_free_model_hooks()
        else:
            residual_of = (pixels, image_latents) if vae_residual else None
            strips = self.decode_strips(canvas, plan, residual_of, num_prompts)
            images = self.finish_strips(strips, height, width, as_bytes=output_type in ("pil", "strips"))
            if output_type != "strips":
                images = np.concatenate(list(images), axis=1)
            if output_type == "pil":
                images = [PIL.Image.fromarray(item) for item in images]
            elif output_type == "pt":
                images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return FluxPipelineOutput(images=images) if return_dict else (images,)


# ---- Helpers of the pipeline ---------------------------------------------------------------------------------------


def is_falling(sigmas: Any) -> bool:
    """Whether `sigmas` is a list of numbers that fall from at most 1 to above 0."""
    is_list = isinstance(sigmas, (list, tuple)) or (isinstance(sigmas, np.ndarray) and sigmas.ndim == 1)
    if not is_list or len(sigmas) == 0 or not all(isinstance(sigma, numbers.Real) for sigma in sigmas):
        return False
    return sigmas[0] <= 1 and all(high > low for high, low in itertools.pairwise([*sigmas, 0]))


def split_evenly(items: list[int], size: int) -> list[list[int]]:
    """Batches of at most `size` items, equally many but for the last."""
    size = math.ceil(len(items) / max(1, math.ceil(len(items) / size)))
    return [items[start : start + size] for start in range(0, len(items), size)] if items else []


def repeat_images(values: torch.Tensor, num_prompts: int, batch_size: int) -> torch.Tensor:
    """Repeats `(num_images, ...)` values for the prompts, then each of them for its `num_images_per_prompt`."""
    if len(values) == batch_size:
        return values
    values = torch.cat([values] * (num_prompts // len(values)))
    return values.repeat_interleave(batch_size // num_prompts, dim=0)
