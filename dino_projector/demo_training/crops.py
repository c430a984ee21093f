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
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pictures import Record, find_pictures, read_picture, to_bytes


GAMMA_SPREAD = 0.3  # of the logarithm
GAIN_SPREAD = 0.06
EXACT_SHARE = 0.6  # of the groups of crops: an enlargement by EXACT_FACTOR of a picture without noise
EXACT_FACTOR = 4.0
FACTORS = (2.0, 8.0)  # how much smaller the others were
NOISE_STD = 0.02  # at most, of a value in [-1, 1]
JPEG_SHARE = 0.5  # of the others
JPEG_QUALITIES = (60, 95)
GROUP = 16  # crops of one photo that are scaled and degraded alike


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
    Crops `(count, 3, side, side)` in [-1, 1] of one photo, at one scale between its full size and its shorter side.

    A photo comes as often as the square root of its area says: the large ones hold more, but not only they.

    Args:
        photos (`Sequence[Sequence[torch.Tensor]]`):
            From [`make_pyramid`]; those with a side below `side` are left out.
    """
    large = [photo for photo in photos if min(photo[0].shape[1:]) >= side]
    if not large:
        raise ValueError(f"no photo has {side} px on both sides: fetch larger ones (--max-megapixels)")
    weights = np.sqrt([photo[0].shape[1] * photo[0].shape[2] for photo in large])
    photo = large[rng.choice(len(large), p=weights / weights.sum())]
    return tint(turn(cut_crops(photo, count, side, rng), rng), rng)


def cut_crops(photo: Sequence[torch.Tensor], count: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """Crops `(count, 3, side, side)` in [0, 1], from the smallest level that has their pixels."""
    factor = float(np.exp(rng.uniform(0, np.log(min(photo[0].shape[1:]) / side))))
    level = min(int(np.log2(factor)), len(photo) - 1)
    height, width = photo[level].shape[1:]
    region = min(int(side * factor / 2**level), height, width)
    tops, lefts = rng.integers(height - region + 1, size=count), rng.integers(width - region + 1, size=count)
    regions = [photo[level][:, top : top + region, left : left + region] for top, left in zip(tops, lefts)]
    crops = torch.stack(regions).float() / 255
    return F.interpolate(crops, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def turn(crops: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turns square crops `(count, 3, side, side)` by right angles, and mirrors half of the times."""
    crops = torch.rot90(crops, int(rng.integers(4)), (2, 3))
    return crops.flip(3) if rng.random() < 0.5 else crops


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


@lru_cache(maxsize=64)
def resize_matrix(length: int, new_length: int, resample: Image.Resampling) -> torch.Tensor:
    """Pillow's weights `(new_length, length)` for resizing a line: what it makes of the identity's rows."""
    identity = Image.fromarray(np.eye(length, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((length, new_length), resample)))


def resize_squares(images: torch.Tensor, side: int, resample: Image.Resampling) -> torch.Tensor:
    """Resizes `(batch, 3, side, side)` values of 0 to 255 to whole ones, as Pillow and so the pipeline do."""
    matrix = resize_matrix(images.shape[-1], side, resample).to(images.device)
    return (matrix @ images @ matrix.T).round().clamp(0, 255)


def compress_jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """`(batch, 3, height, width)` values of 0 to 255 as they come out of a JPEG."""
    decoded = []
    for pixels in images.byte().permute(0, 2, 3, 1).cpu().numpy():
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        decoded.append(to_bytes(Image.open(file)))
    return torch.stack(decoded).to(images)


def degrade_crops(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """
    What the pipeline would start from: crops `(batch, 3, side, side)` in [-1, 1] shrunk, most often to a fourth and
    without further harm, and enlarged again by Lanczos.
    """
    side = images.shape[-1]
    factor, noise_std, quality = EXACT_FACTOR, 0.0, None
    if rng.random() >= EXACT_SHARE:
        factor = float(np.exp(rng.uniform(*np.log(FACTORS))))
        noise_std = 127.5 * rng.uniform(0, NOISE_STD)
        quality = int(rng.integers(*JPEG_QUALITIES, endpoint=True)) if rng.random() < JPEG_SHARE else None
    generator = device_generator(rng, images.device)
    small = resize_squares((images + 1) * 127.5, max(1, round(side / factor)), Image.Resampling.BICUBIC)
    noise = torch.randn(small.shape, generator=generator, device=images.device)
    small = (small + noise_std * noise).round().clamp(0, 255)
    if quality is not None:
        small = compress_jpeg(small, quality)
    return resize_squares(small, side, Image.Resampling.LANCZOS) / 127.5 - 1


class CropPairs(NamedTuple):
    """Sharp crops and what [`degrade_crops`] made of them, as bytes `(count, 3, side, side)`."""

    sharp: torch.Tensor
    degraded: torch.Tensor

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sharp and degraded crops in [-1, 1]."""
        return crops_from_bytes(self.sharp[indices]), crops_from_bytes(self.degraded[indices])


def draw_pairs(photos: Sequence[Sequence[torch.Tensor]], count: int, side: int, rng: np.random.Generator) -> CropPairs:
    """Cuts and degrades crops once, for many steps that draw from them: cutting takes longer than a step."""
    sharp, degraded = [], []
    for start in range(0, count, GROUP):
        crops = draw_crops(photos, min(GROUP, count - start), side, rng)
        sharp.append(crops_to_bytes(crops))
        degraded.append(crops_to_bytes(degrade_crops(crops, rng)))
    return CropPairs(torch.cat(sharp), torch.cat(degraded))


def draw_indices(count: int, total: int, rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rng.integers(total, size=count)).to(device)


def crops_from_bytes(crops: torch.Tensor) -> torch.Tensor:
    """In [-1, 1]."""
    return crops.float() / 127.5 - 1


def crops_to_bytes(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().byte()
