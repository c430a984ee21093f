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

"""Finds and reads pictures."""

import os
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from flux_dino_tile.jobs import OTHER_SUFFIXES, describe_left_out, register_heif


Image.init()
READ_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


class Record(NamedTuple):
    """A picture that is not opened yet."""

    name: str  # that a message shows and that is the picture's own
    file: Any  # a path or bytes
    caption: str  # "" if there is none


def walk_files(root: Path) -> Iterator[Path]:
    """The files in a folder and below, also behind links, but each folder once; hidden ones are left out."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        # Links last, so that what lies here goes by its own name.
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(parent, name)), name),
        )
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def find_pictures(root: Path) -> list[Path]:
    """
    The pictures in a folder and below by path, each once, however many links lead to it. A line names those of kinds
    that are not read.
    """
    paths = list(walk_files(root))
    suffixes = READ_SUFFIXES | register_heif(paths)
    if left_out := [path for path in paths if path.suffix.lower() in OTHER_SUFFIXES - suffixes]:
        print(f"{root}: {describe_left_out(left_out)}", file=sys.stderr, flush=True)
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() in suffixes:
            found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def read_picture(record: Record) -> Image.Image:
    """The picture upright, in RGB."""
    file = BytesIO(record.file) if isinstance(record.file, bytes) else record.file
    try:
        picture = Image.open(file)
    except UnidentifiedImageError:
        raise OSError("is not a picture that Pillow can read") from None
    with picture:
        if picture.mode.startswith(("I", "F")):
            raise OSError("has 16 or 32 bits per channel")
        # Copies of whole photos would take a fifth of the loader's time.
        ImageOps.exif_transpose(picture, in_place=True)
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def report_skipped(record: Record, error: Exception) -> None:
    print(f"{record.name}: skipped, {error}", file=sys.stderr, flush=True)


def to_bytes(picture: Image.Image) -> torch.Tensor:
    """`(3, height, width)`, 0 to 255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """`(1, 3, height, width)` in [-1, 1]."""
    return to_bytes(picture)[None].float() / 127.5 - 1
