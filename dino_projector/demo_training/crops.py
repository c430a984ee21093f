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

"""Random crops of a few photographs that stay on the device, drawn and augmented there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..pictures import Record, find_pictures, read_picture, to_bytes


GAMMA_SPREAD = 0.3  # of the logarithm
GAIN_SPREAD = 0.06
FACTORS = (2.0, 8.0)  # how much smaller a degraded picture was
NOISE_STD = 0.05  # at most, of a value in [-1, 1]


def load_photos(folder: Path, device: torch.device) -> list[torch.Tensor]:
    """Bytes `(3, height, width)` of the pictures in a folder, by name."""
    paths = find_pictures(folder)
    if not paths:
        raise ValueError(f"{folder}: no pictures in this folder; scripts/fetch_photos.py fetches them")
    return [to_bytes(read_picture(Record(path.name, path, ""))).to(device) for path in paths]


def make_pyramid(photo: torch.Tensor, min_side: int) -> list[torch.Tensor]:
    """A photo's bytes `(3, height, width)`, and its halves as long as both sides have `min_side` px."""
    levels = [photo]
    while min(levels[-1].shape[1:]) // 2 >= min_side:
        size = [length // 2 for length in levels[-1].shape[1:]]
        half = F.interpolate(levels[-1][None].float(), size, mode="bicubic", antialias=True)
        levels.append(half[0].round().clamp(0, 255).byte())
    return levels


def draw_crops(
    photos: Sequence[Sequence[torch.Tensor]], count: int, side: int, rng: np.random.Generator
) -> torch.Tensor:
    """
    Crops `(count, 3, side, side)` in [-1, 1] at any scale from a photo's full size to its shorter side.

    A photo comes as often as the square root of its area says: the large ones hold more, but not only they.

    Args:
        photos (`Sequence[Sequence[torch.Tensor]]`):
            From [`make_pyramid`]; those with a side below `side` are left out.
    """
    large = [photo for photo in photos if min(photo[0].shape[1:]) >= side]
    if not large:
        raise ValueError(f"no photo has {side} px on both sides: fetch larger ones (--max-side)")
    weights = np.sqrt([photo[0].shape[1] * photo[0].shape[2] for photo in large])
    chosen = rng.choice(len(large), count, p=weights / weights.sum())
    return tint(torch.cat([turn(cut_crop(large[index], side, rng), rng) for index in chosen]), rng)


def cut_crop(photo: Sequence[torch.Tensor], side: int, rng: np.random.Generator) -> torch.Tensor:
    """A crop `(1, 3, side, side)` in [0, 1], from the smallest level that has its pixels."""
    factor = float(np.exp(rng.uniform(0, np.log(min(photo[0].shape[1:]) / side))))
    level = min(int(np.log2(factor)), len(photo) - 1)
    height, width = photo[level].shape[1:]
    region = min(int(side * factor / 2**level), height, width)
    top, left = int(rng.integers(height - region + 1)), int(rng.integers(width - region + 1))
    crop = photo[level][None, :, top : top + region, left : left + region].float() / 255
    return F.interpolate(crop, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def turn(crop: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turns a square crop `(1, 3, side, side)` by right angles, and mirrors half of them."""
    crop = torch.rot90(crop, int(rng.integers(4)), (2, 3))
    return crop.flip(3) if rng.random() < 0.5 else crop


def tint(crops: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Changes gamma and colour balance of crops in [0, 1], each by its own; the result is in [-1, 1]."""
    gammas = np.exp(rng.uniform(-GAMMA_SPREAD, GAMMA_SPREAD, (len(crops), 1, 1, 1)))
    gains = rng.normal(1, GAIN_SPREAD, (len(crops), 3, 1, 1))
    exponent, factor = (torch.from_numpy(values).float().to(crops.device) for values in (gammas, gains))
    return (crops**exponent * factor).clamp(0, 1) * 2 - 1


def center_crop(photo: torch.Tensor, side: int) -> torch.Tensor:
    """The middle `(1, 3, side, side)` of a photo's bytes, shrunk to `side` px on its shorter side, in [-1, 1]."""
    height, width = photo.shape[1:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    crop = photo[None, :, top : top + square, left : left + square].float() / 127.5 - 1
    return F.interpolate(crop, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def device_generator(rng: np.random.Generator, device: torch.device) -> torch.Generator:
    """For noise that is drawn where it is needed; the CPU would take longer to draw it than the GPU for the step."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**63)))


def degrade_crops(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shrinks `(batch, 3, side, side)` crops, adds noise, and enlarges them again, on the device."""
    side = images.shape[-1]
    small_side = max(1, round(side / np.exp(rng.uniform(*np.log(FACTORS)))))
    small = F.interpolate(images, (small_side, small_side), mode="bicubic", antialias=True)
    generator = device_generator(rng, images.device)
    noise = torch.randn(small.shape, generator=generator, device=images.device)
    small = small + rng.uniform(0, NOISE_STD) * noise
    return F.interpolate(small, (side, side), mode="bicubic").clamp(-1, 1)
