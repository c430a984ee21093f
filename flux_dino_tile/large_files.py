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

"""Writes pictures that are too large for main memory, strip by strip, where Pillow needs all of it.

A strip is a Pillow image as wide as the picture; strips come from top to bottom. Modes are "L", "LA", "RGB", "RGBA"
and "I;16". libvips makes the file of raw pixels, which lie beside it meanwhile. The metadata are Pillow's, as in any
other picture: libvips would change the EXIF of a PNG or JPEG, and writes none to a TIFF.
"""

import logging
import os
import re
import shutil
import struct
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyvips
from PIL import Image, TiffImagePlugin, TiffTags


VIPS_OPTIONS: dict[str, dict[str, Any]] = {
    # Files as small as with the best filter for each row, in half the time.
    "PNG": {"filter": "up"},
    "JPEG": {"Q": 95, "subsample_mode": "off"},
    "TIFF": {"bigtiff": True, "tile": True, "tile_width": 256, "tile_height": 256},
}
# Mode: channels, and libvips's words for their depth and meaning.
RAW_LAYOUTS = {
    "L": (1, "uchar", "b-w"),
    "LA": (2, "uchar", "b-w"),
    "I;16": (1, "ushort", "grey16"),
    "RGB": (3, "uchar", "srgb"),
    "RGBA": (4, "uchar", "srgb"),
}
BLOCK_ROWS = 512
# How many bytes come before the metadata, the first bytes after them, and how many of these are not always the same.
METADATA_PLACES = {"PNG": (33, b"IDAT", 4), "JPEG": (2, b"\xff\xdb\0C\0", 0)}
METADATA_BYTES = 4096  # at least as many as libvips writes before the pixels
# libvips makes them up for a TIFF: the orientation, and the resolution with its unit.
VIPS_TAGS = (274, 282, 283, 296)

# Deleted files would stay open in its cache.
pyvips.cache_set_max(0)
# It would warn that a file holds more than the block that is read.
logging.getLogger("pyvips").setLevel(logging.ERROR)


def write_strips(path: Path, image_format: str, strips: Iterable[Image.Image], metadata: dict[str, Any]) -> None:
    """Writes a picture in one of the formats of `VIPS_OPTIONS`, with Pillow's `metadata`, such as `exif` as bytes."""
    with TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
        raw, plain = Path(folder, "raw"), Path(folder, f"plain.{image_format.lower()}")
        with open(raw, "wb") as file:
            for strip in strips:
                file.write(strip.tobytes())
        convert_raw(raw, plain, strip.mode, strip.width, VIPS_OPTIONS[image_format])
        raw.unlink()
        if image_format == "TIFF":
            replace_tiff_metadata(plain, **metadata)
            os.replace(plain, path)
        else:
            sample = encode(strip.crop((0, 0, 1, 1)), image_format, **metadata)
            insert_metadata(plain, path, bytes(sample), *METADATA_PLACES[image_format])


def encode(image: Image.Image, image_format: str, **options) -> memoryview:
    """The content of an image file. Where the disk gets full, Pillow might drop its end without an error."""
    encoded = BytesIO()
    image.save(encoded, format=image_format, **options)
    return encoded.getbuffer()


def convert_raw(raw: Path, path: Path, mode: str, width: int, options: dict[str, Any]) -> None:
    """Makes a picture without metadata of a file of its pixels."""
    bands, depth, interpretation = RAW_LAYOUTS[mode]
    row_bytes = width * bands * (2 if depth == "ushort" else 1)
    height, block_bytes = raw.stat().st_size // row_bytes, BLOCK_ROWS * row_bytes
    offsets = range(0, height * row_bytes, block_bytes)
    os.truncate(raw, len(offsets) * block_bytes)
    # In blocks, for libvips maps what it loads to memory.
    blocks = [
        pyvips.Image.rawload(
            str(raw), width, BLOCK_ROWS, bands, offset=offset, format=depth, interpretation=interpretation
        )
        for offset in offsets
    ]
    try:
        pyvips.Image.arrayjoin(blocks, across=1).crop(0, 0, width, height).write_to_file(
            str(path), keep="none", **options
        )
    except pyvips.Error as error:
        reason = re.search("system error: (.*)", str(error))
        raise OSError(reason[1] if reason else str(error)) from error


def insert_metadata(plain: Path, path: Path, sample: bytes, start: int, mark: bytes, before: int) -> None:
    """Copies a PNG or JPEG with the metadata of another, the `sample`, in place of its own."""
    with open(plain, "rb") as source, open(path, "wb") as target:
        beginning = source.read(METADATA_BYTES)
        target.write(beginning[:start])
        # The mark may be in the sample's metadata too, but not in the one pixel after them.
        target.write(sample[start : sample.rindex(mark) - before])
        target.write(beginning[beginning.index(mark) - before :])
        shutil.copyfileobj(source, target)


def replace_tiff_metadata(path: Path, exif: bytes, icc_profile: bytes | None) -> None:
    """Gives a BigTIFF another directory, which Pillow encodes, with the EXIF and the ICC profile."""
    stored = Image.Exif()
    stored.load(exif)
    with open(path, "rb+") as file:
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(16))
        file.seek(directory.next)
        directory.load(file)
        dict(directory)  # `tobytes` leaves out what was not looked at
        for tag in VIPS_TAGS:
            del directory[tag]
        for tag in stored:
            directory[tag] = stored.get_ifd(tag) if tag in TiffTags.TAGS_V2_GROUPS else stored[tag]
        if icc_profile:
            directory[TiffImagePlugin.ICCPROFILE] = icc_profile
            directory.tagtype[TiffImagePlugin.ICCPROFILE] = TiffTags.UNDEFINED
        place = file.seek(0, os.SEEK_END)
        file.write(directory.tobytes(place))
        file.seek(8)
        file.write(struct.pack("<Q", place))
