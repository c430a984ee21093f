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

"""
Makes the small, degraded pictures that training starts from, out of sharp ones.

"mild" and "strong" are the second-order degradation of Real-ESRGAN (arXiv 2107.10833): twice blur, resize, noise and
JPEG, then a sinc filter. "strong" has that paper's ranges, "mild" those of SeeSR (arXiv 2311.16518). Unlike there, the
sharp picture is not sharpened first, and every sample draws for itself.
"""

import math
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


Range = tuple[float, float]


class Stage(NamedTuple):
    """What one round of blur, resize, noise and JPEG is drawn from."""

    blur_probability: float
    blur_sigma: Range  # px
    resize_probabilities: tuple[float, float, float]  # of enlarging, shrinking and neither
    resize_factor: Range
    gaussian_sigma: Range  # of 255 grey levels
    poisson_scale: Range
    jpeg_quality: tuple[int, int]


RECIPES = {
    "mild": (
        Stage(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
        Stage(0.5, (0.2, 1.5), (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100)),
    ),
    "strong": (
        Stage(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
        Stage(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ),
}
DEGRADATIONS = (*RECIPES, "bicubic")

# Both papers share what follows.
BLURS = {
    "gaussian": 0.45,
    "anisotropic gaussian": 0.25,
    "generalized": 0.12,
    "anisotropic generalized": 0.03,
    "plateau": 0.12,
    "anisotropic plateau": 0.03,
}
EXPONENTS = {"generalized": (0.5, 4.0), "plateau": (1.0, 2.0)}
KERNEL_SIZES = range(7, 22, 2)
SINC_PROBABILITY = 0.1
FINAL_SINC_PROBABILITY = 0.8
GAUSSIAN_NOISE_PROBABILITY = 0.5
GREY_NOISE_PROBABILITY = 0.4
FOURIER_STEP = 64  # px; transforms of other lengths can take several times as long
RESIZE_MODES = ("area", "bilinear", "bicubic")


class Blur(NamedTuple):
    kind: str  # one of `BLURS`, or "sinc"
    size: int  # px
    sigmas: Range = (0.0, 0.0)  # px along the two axes
    angle: float = 0.0  # of the first axis, in radians
    exponent: float = 1.0
    cutoff: float = 0.0  # of "sinc", radians per px


class Noise(NamedTuple):
    kind: str  # "gaussian" or "poisson"
    strength: float
    is_grey: bool


class StageDraw(NamedTuple):
    """What was drawn for one round."""

    blur: Blur | None
    resize_factor: float
    resize_mode: str
    noise: Noise
    jpeg_quality: int


class Degradation(NamedTuple):
    """What was drawn for one picture."""

    first: StageDraw
    second: StageDraw  # its JPEG comes last or before the sinc filter
    sinc: Blur | None
    last_resize_mode: str
    is_jpeg_last: bool


# ---- Drawing -------------------------------------------------------------------------------------------------------


def draw_sinc(rng: np.random.Generator, narrowest: float) -> Blur:
    return Blur("sinc", int(rng.choice(KERNEL_SIZES)), cutoff=rng.uniform(narrowest, math.pi))


def draw_blur(stage: Stage, rng: np.random.Generator) -> Blur:
    if rng.random() < SINC_PROBABILITY:
        blur = draw_sinc(rng, math.pi / 3)
        # A large kernel can hold a lower frequency.
        return blur if blur.size < 13 else blur._replace(cutoff=rng.uniform(math.pi / 5, math.pi))
    kind = str(rng.choice(list(BLURS), p=list(BLURS.values())))
    sigmas = [rng.uniform(*stage.blur_sigma)] * 2
    angle, exponent = 0.0, 1.0
    if kind.startswith("anisotropic"):
        sigmas[1], angle = rng.uniform(*stage.blur_sigma), rng.uniform(-math.pi, math.pi)
    shape = kind.removeprefix("anisotropic ")
    if shape in EXPONENTS:
        low, high = EXPONENTS[shape]
        exponent = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return Blur(kind, int(rng.choice(KERNEL_SIZES)), (sigmas[0], sigmas[1]), angle, exponent)


def draw_noise(stage: Stage, rng: np.random.Generator) -> Noise:
    kind = "gaussian" if rng.random() < GAUSSIAN_NOISE_PROBABILITY else "poisson"
    strength = rng.uniform(*(stage.gaussian_sigma if kind == "gaussian" else stage.poisson_scale))
    return Noise(kind, strength, bool(rng.random() < GREY_NOISE_PROBABILITY))


def draw_stage(stage: Stage, rng: np.random.Generator) -> StageDraw:
    low, high = stage.resize_factor
    limits = [(1.0, high), (low, 1.0), (1.0, 1.0)][rng.choice(3, p=stage.resize_probabilities)]
    return StageDraw(
        blur=draw_blur(stage, rng) if rng.random() < stage.blur_probability else None,
        resize_factor=rng.uniform(*limits),
        resize_mode=str(rng.choice(RESIZE_MODES)),
        noise=draw_noise(stage, rng),
        jpeg_quality=int(rng.integers(*stage.jpeg_quality, endpoint=True)),
    )


def draw_degradation(kind: str, rng: np.random.Generator) -> Degradation:
    """Draws for `kind` "mild" or "strong"."""
    first, second = (draw_stage(stage, rng) for stage in RECIPES[kind])
    return Degradation(
        first,
        second,
        sinc=draw_sinc(rng, math.pi / 3) if rng.random() < FINAL_SINC_PROBABILITY else None,
        last_resize_mode=str(rng.choice(RESIZE_MODES)),
        is_jpeg_last=bool(rng.random() < 0.5),
    )


# ---- Applying ------------------------------------------------------------------------------------------------------


def blur_kernel(blur: Blur) -> torch.Tensor:
    """The `(size, size)` kernel, which sums to one."""
    axis = torch.arange(blur.size, dtype=torch.float64) - blur.size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if blur.kind == "sinc":
        # The ideal circular low-pass filter; its value at the centre is a limit.
        radius = torch.hypot(x, y)
        values = torch.special.bessel_j1(blur.cutoff * radius) / radius
        values[radius == 0] = blur.cutoff / 2
    else:
        along = (math.cos(blur.angle) * x + math.sin(blur.angle) * y) / blur.sigmas[0]
        across = (math.cos(blur.angle) * y - math.sin(blur.angle) * x) / blur.sigmas[1]
        distance = (along**2 + across**2) ** blur.exponent
        values = 1 / (1 + distance) if blur.kind.endswith("plateau") else torch.exp(-distance / 2)
    return (values / values.sum()).float()


def apply_blur(image: torch.Tensor, blur: Blur | None) -> torch.Tensor:
    if blur is None:
        return image
    padded = F.pad(image[None], [blur.size // 2] * 4, mode="replicate")[0]
    height, width = padded.shape[1:]
    # By Fourier transforms: a convolution as it is defined takes half of a sample's time.
    size = [math.ceil(length / FOURIER_STEP) * FOURIER_STEP for length in (height, width)]
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(blur_kernel(blur), s=size)
    return torch.fft.irfft2(spectrum, s=size)[:, blur.size - 1 : height, blur.size - 1 : width].clamp(0, 1)


def resize(image: torch.Tensor, height: float, width: float, mode: str) -> torch.Tensor:
    size = (max(1, round(height)), max(1, round(width)))
    return F.interpolate(image[None], size, mode=mode)[0].clamp(0, 1)


def apply_noise(image: torch.Tensor, noise: Noise, rng: np.random.Generator) -> torch.Tensor:
    base = image.mean(0, keepdim=True) if noise.is_grey else image
    if noise.kind == "gaussian":
        return (image + torch.from_numpy(rng.normal(0, noise.strength / 255, base.shape)).float()).clamp(0, 1)
    # Real-ESRGAN's choice of photons at full white: the number of grey levels in use.
    levels = 2 ** math.ceil(math.log2(len(torch.unique((base * 255).round()))))
    photons = torch.from_numpy(rng.poisson((base * levels).numpy()) / levels).float()
    return (image + (photons - base) * noise.strength).clamp(0, 1)


def apply_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    encoded = BytesIO()
    to_picture(image).save(encoded, "JPEG", quality=quality)
    return to_tensor(Image.open(encoded))


def apply_stage(image: torch.Tensor, stage: StageDraw, size: tuple[int, int], rng: np.random.Generator):
    """Blurs, resizes to `resize_factor` of `size` (height, width) and adds noise; the JPEG is the caller's."""
    image = apply_blur(image, stage.blur)
    height, width = (length * stage.resize_factor for length in size)
    return apply_noise(resize(image, height, width, stage.resize_mode), stage.noise, rng)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """An RGB picture as `(3, height, width)` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def to_picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def degrade(picture: Image.Image, size: tuple[int, int], kind: str, rng: np.random.Generator) -> Image.Image:
    """
    Makes a small, degraded version of a sharp RGB picture.

    Args:
        size (`tuple[int, int]`): Width and height of the result in pixels.
        kind (`str`): One of `DEGRADATIONS`.
        rng (`np.random.Generator`): Decides everything; the same state gives the same picture.
    """
    if kind == "bicubic":
        return picture.resize(size, Image.Resampling.BICUBIC)
    drawn = draw_degradation(kind, rng)
    sharp, small = (picture.height, picture.width), (size[1], size[0])
    image = apply_stage(to_tensor(picture), drawn.first, sharp, rng)
    image = apply_jpeg(image, drawn.first.jpeg_quality)
    image = apply_stage(image, drawn.second, small, rng)
    if not drawn.is_jpeg_last:
        image = apply_jpeg(image, drawn.second.jpeg_quality)
    image = apply_blur(resize(image, *small, drawn.last_resize_mode), drawn.sinc)
    if drawn.is_jpeg_last:
        image = apply_jpeg(image, drawn.second.jpeg_quality)
    return to_picture(image)
