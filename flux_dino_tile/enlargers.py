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

"""Enlarging without FLUX, and what enlarging with it shares. Needs no torch."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from .image_files import resize_strips


class BicubicEnlarger:
    """Enlarges images to a size (width, height) in pixels, as a whole or in strips from top to bottom."""

    process_group = None
    writes = True
    # For the file of the result.
    description: dict[str, Any] = {"method": "bicubic"}

    def whole(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size, Image.Resampling.BICUBIC)

    def strips(self, image: Image.Image, size: tuple[int, int]) -> Iterator[Image.Image]:
        return resize_strips(image, size)


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "RGBA")


def as_source(result: Image.Image, source: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """An RGB result in the mode of its source: grey where that is grey, and with the transparency `alpha`."""
    if source.mode in ("L", "LA"):
        result = result.convert("L")
    if alpha is not None:
        result.putalpha(alpha)
    return result
