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

"""The small FLUX's language: how the squares of a picture look and where they are, as tokens of the text stream."""

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_flux_dino_tile import DinoProjector, DinoTokens, PromptBranch

from .sizes import PIXELS_PER_TOKEN, POOLED_DIM


EMPTY_PROMPT_TOKENS = 16
NUM_DIRECTIONS = 4
NUM_SCALES = 3
NUM_LOOKS = 6 + NUM_SCALES * NUM_DIRECTIONS + 4  # values that describe a square
NUM_WAVES = 4  # of the code of a place, on each axis
# The language: all that is random about captions and the empty prompt comes from here, whatever the run's seed.
LANGUAGE_SEED = 5


def describe_squares(images: torch.Tensor, grid: int) -> torch.Tensor:
    """
    What the squares of a `grid` x `grid` raster look like.

    Args:
        images (`torch.Tensor` of shape `(batch, 3, side, side)`): Sharp crops in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(batch, 22, grid, grid)`: mean and deviation of the colours, the logarithm of the edge
        energy for each scale and direction, and how a square's quarters differ from its mean brightness.
    """
    mean = F.adaptive_avg_pool2d(images, grid)
    deviation = (F.adaptive_avg_pool2d(images.square(), grid) - mean.square()).clamp_min(0).sqrt()
    parts = [mean, 3 * deviation]
    grey = images.mean(1, keepdim=True)
    level = grey
    for _ in range(NUM_SCALES):
        corner = level[..., :-1, :-1]
        down, right = level[..., 1:, :-1] - corner, level[..., :-1, 1:] - corner
        for direction in range(NUM_DIRECTIONS):
            angle = np.pi * direction / NUM_DIRECTIONS
            slope = np.cos(angle) * right + np.sin(angle) * down
            parts.append((F.adaptive_avg_pool2d(slope.square(), grid) + 1e-4).log() / 3 + 2)
        level = F.avg_pool2d(level, 2)
    quarters = F.pixel_unshuffle(F.adaptive_avg_pool2d(grey, 2 * grid), 2)
    parts.append(3 * (quarters - quarters.mean(1, keepdim=True)))
    return torch.cat(parts, 1)


def place_codes(grid: int) -> torch.Tensor:
    """Sines and cosines of the squares' places, `(4 * NUM_WAVES, grid, grid)`."""
    centers = (torch.arange(grid) + 0.5) / grid
    waves = centers * torch.pi * 2.0 ** torch.arange(NUM_WAVES)[:, None]
    code = torch.cat([waves.sin(), waves.cos()])
    rows, columns = code[:, :, None].expand(-1, -1, grid), code[:, None, :].expand(-1, grid, -1)
    return torch.cat([rows, columns])


class Language:
    """
    Captions and the empty prompt, as embeddings of the text stream with a root mean square of one.

    Args:
        text_dim (`int`): Channels of the text stream.
        device (`torch.device`): Where they are made.
    """

    def __init__(self, text_dim: int, device: torch.device):
        generator = torch.Generator().manual_seed(LANGUAGE_SEED)
        self.matrix = torch.randn(NUM_LOOKS + 4 * NUM_WAVES, text_dim, generator=generator).to(device)
        self.empty_prompt = torch.randn(1, EMPTY_PROMPT_TOKENS, text_dim, generator=generator).to(device)

    def caption(self, looks: torch.Tensor, side: int) -> DinoTokens:
        """
        Tokens that stand where a projector's would, at the places that they describe.

        Args:
            looks (`torch.Tensor` of shape `(batch, 22, grid, grid)`): From [`describe_squares`].
            side (`int`): Of the crops, in pixels.
        """
        grid = looks.shape[-1]
        places = place_codes(grid).to(looks.device).expand(len(looks), -1, -1, -1)
        features = torch.cat([looks, places], 1).flatten(2).transpose(1, 2)
        tokens = features @ self.matrix
        tokens = tokens / tokens.square().mean(-1, keepdim=True).sqrt()
        rule = DinoProjector(1, 1, 1, token_grid=grid, position_mode="tile")
        ids = rule.position_ids((grid, grid), (side // PIXELS_PER_TOKEN,) * 2)
        return DinoTokens(tokens[None], ids.to(looks.device), None)

    def empty_branch(self, dtype: torch.dtype) -> PromptBranch:
        pooled = torch.zeros(1, POOLED_DIM, device=self.empty_prompt.device, dtype=dtype)
        return PromptBranch(self.empty_prompt.to(dtype), pooled)
