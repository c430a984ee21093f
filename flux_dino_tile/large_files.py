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
and "I;16". PNG and TIFF are written as the strips come; JPEG is made by libvips from a PNG beside it.
"""

import importlib.util
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, TiffTags


# PNG's and TIFF's numbers for the kinds of pixels.
PNG_COLOR_TYPES = {"L": 0, "I;16": 0, "RGB": 2, "LA": 4, "RGBA": 6}
TIFF_BLACK_IS_ZERO, TIFF_RGB = 1, 2
TIFF_UNASSOCIATED_ALPHA = 2
TIFF_LONG8 = 16
TIFF_TILE_SIDE = 256
JPEG_ICC_PART = 65519
BIGTIFF_HEADER = b"II+\0\x08\0\0\0" + bytes(8)  # the last 8 bytes are for the place of the directory


def can_write_strips(image_format: str) -> bool:
    """Whether the format can be written from strips here; JPEG takes the package pyvips."""
    return image_format in ("PNG", "TIFF") or (
        image_format == "JPEG" and importlib.util.find_spec("pyvips") is not None
    )


def write_strips(
    path: Path,
    image_format: str,
    size: tuple[int, int],
    strips: Iterable[Image.Image],
    exif: Image.Exif,
    icc_profile: bytes | None,
) -> None:
    """Writes a picture of `size` (width, height) in pixels in one of the formats of [`can_write_strips`]."""
    if image_format == "JPEG":
        write_jpeg(path, size, strips, exif, icc_profile)
        return
    with open(path, "wb") as file:
        (write_png if image_format == "PNG" else write_tiff)(file, size, strips, exif, icc_profile)


def write_png(
    file: BinaryIO,
    size: tuple[int, int],
    strips: Iterable[Image.Image],
    exif: Image.Exif | None,
    icc_profile: bytes | None,
    level: int = 6,
) -> None:
    """Writes a PNG of the compression `level` of zlib, 0 to 9 (https://www.w3.org/TR/png-3/)."""

    def write_chunk(name: bytes, content: bytes) -> None:
        file.write(struct.pack(">I", len(content)) + name + content)
        file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(name))))

    compressor = zlib.compressobj(level)
    above: np.ndarray | None = None
    for strip in strips:
        rows = np.asarray(strip).reshape(strip.height, -1)
        if above is None:
            bits = 8 * rows.itemsize
            file.write(b"\x89PNG\r\n\x1a\n")
            write_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, PNG_COLOR_TYPES[strip.mode], 0, 0, 0))
            if icc_profile:
                write_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
            if exif is not None:
                write_chunk(b"eXIf", exif.tobytes()[6:])
            above = np.zeros(rows.shape[1] * rows.itemsize, dtype=np.uint8)
        filtered, above = filter_png_rows(rows, above, len(strip.getbands()) * rows.itemsize)
        if compressed := compressor.compress(filtered):
            write_chunk(b"IDAT", compressed)
    write_chunk(b"IDAT", compressor.flush())
    write_chunk(b"IEND", b"")


def filter_png_rows(rows: np.ndarray, above: np.ndarray, pixel_bytes: int) -> tuple[bytes, np.ndarray]:
    """
    Rows `(height, samples)` as PNG stores them, each after the number of its filter, and the last row's bytes.

    Each row takes the filter "Sub" or "Up", whichever leaves the smaller differences, the usual rule of thumb.
    """
    raw = rows.astype(rows.dtype.newbyteorder(">")).view(np.uint8)
    left = np.zeros_like(raw)
    left[:, pixel_bytes:] = raw[:, :-pixel_bytes]
    candidates = (raw - left, raw - np.vstack([above, raw[:-1]]))
    costs = [np.abs(candidate.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64) for candidate in candidates]
    is_up = costs[1] < costs[0]
    filtered = np.empty((len(raw), raw.shape[1] + 1), dtype=np.uint8)
    filtered[:, 0] = np.where(is_up, 2, 1)
    filtered[:, 1:] = np.where(is_up[:, None], candidates[1], candidates[0])
    return filtered.tobytes(), raw[-1]


def write_tiff(
    file: BinaryIO,
    size: tuple[int, int],
    strips: Iterable[Image.Image],
    exif: Image.Exif,
    icc_profile: bytes | None,
) -> None:
    """Writes an uncompressed BigTIFF of square tiles, then its directory, which Pillow encodes."""
    width, height = size
    file.write(BIGTIFF_HEADER)
    offsets = []
    pixels = np.empty((0, 0, 0))
    for pixels in tile_rows(strips, width):
        for left in range(0, width, TIFF_TILE_SIDE):
            offsets.append(file.tell())
            file.write(pixels[:, left : left + TIFF_TILE_SIDE].tobytes())
    channels, tile_bytes = pixels.shape[2], TIFF_TILE_SIDE**2 * pixels.shape[2] * pixels.itemsize

    directory = TiffImagePlugin.ImageFileDirectory_v2(BIGTIFF_HEADER)
    stored = Image.Exif()
    stored.load(exif.tobytes())
    for tag in stored:
        directory[tag] = stored.get_ifd(tag) if tag in TiffTags.TAGS_V2_GROUPS else stored[tag]
    directory[TiffImagePlugin.IMAGEWIDTH] = width
    directory[TiffImagePlugin.IMAGELENGTH] = height
    directory[TiffImagePlugin.BITSPERSAMPLE] = (8 * pixels.itemsize,) * channels
    directory[TiffImagePlugin.COMPRESSION] = 1
    directory[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = TIFF_RGB if channels > 2 else TIFF_BLACK_IS_ZERO
    directory[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    directory[TiffImagePlugin.PLANAR_CONFIGURATION] = 1
    if channels in (2, 4):
        directory[TiffImagePlugin.EXTRASAMPLES] = TIFF_UNASSOCIATED_ALPHA
    if icc_profile:
        directory[TiffImagePlugin.ICCPROFILE] = icc_profile
        directory.tagtype[TiffImagePlugin.ICCPROFILE] = TiffTags.UNDEFINED
    directory[TiffImagePlugin.TILEWIDTH] = directory[TiffImagePlugin.TILELENGTH] = TIFF_TILE_SIDE
    for tag, values in (
        (TiffImagePlugin.TILEOFFSETS, offsets),
        (TiffImagePlugin.TILEBYTECOUNTS, [tile_bytes] * len(offsets)),
    ):
        directory.tagtype[tag] = TIFF_LONG8
        directory[tag] = tuple(values)
    place = file.tell()
    file.write(directory.tobytes(place))
    file.seek(8)
    file.write(struct.pack("<Q", place))


def tile_rows(strips: Iterable[Image.Image], width: int) -> Iterator[np.ndarray]:
    """Regroups strips to rows of TIFF tiles, `(tile side, width padded to whole tiles, channels)`, padded by zeros."""
    padded_width = -(-width // TIFF_TILE_SIDE) * TIFF_TILE_SIDE
    row, filled = np.empty(0), 0
    for strip in strips:
        pixels = np.asarray(strip).reshape(strip.height, width, -1)
        while len(pixels):
            if filled == 0:
                row = np.zeros((TIFF_TILE_SIDE, padded_width, pixels.shape[2]), dtype=pixels.dtype)
            part = pixels[: TIFF_TILE_SIDE - filled]
            row[filled : filled + len(part), :width] = part
            filled = (filled + len(part)) % TIFF_TILE_SIDE
            pixels = pixels[len(part) :]
            if filled == 0:
                yield row
    if filled:
        yield row


def write_jpeg(
    path: Path,
    size: tuple[int, int],
    strips: Iterable[Image.Image],
    exif: Image.Exif,
    icc_profile: bytes | None,
) -> None:
    """Writes a JPEG as Pillow does with the quality 95 and no subsampling, by way of a PNG that is removed again."""
    import pyvips

    middle = path.with_name(f"{path.name}.png")
    try:
        with open(middle, "wb") as file:
            write_png(file, size, strips, None, None, level=1)
        markers = jpeg_metadata(exif, icc_profile or b"")
        with open(path, "wb") as file:
            target = pyvips.TargetCustom()
            failures: list[OSError] = []

            def write(data) -> int:
                # The metadata go in here, after the first marker: libvips would write an EXIF of its own.
                start = file.tell()
                try:
                    file.write(data if start else data[:2] + markers)
                    file.write(b"" if start else data[2:])
                except OSError as error:  # libvips would say only that it failed
                    failures.append(error)
                    return -1
                return len(data)

            target.on_write(write)
            image = pyvips.Image.new_from_file(str(middle), access="sequential")
            try:
                image.write_to_target(target, ".jpg", Q=95, subsample_mode="off", keep="none")
            except pyvips.Error as error:
                raise failures[0] if failures else OSError(str(error)) from error
    finally:
        middle.unlink(missing_ok=True)


def jpeg_metadata(exif: Image.Exif, icc_profile: bytes) -> bytes:
    """The markers of a JPEG that hold EXIF and ICC profile, the latter in as many parts as it needs."""
    parts = [icc_profile[start : start + JPEG_ICC_PART] for start in range(0, len(icc_profile), JPEG_ICC_PART)]
    contents = [(b"\xff\xe1", exif.tobytes())]
    contents += [
        (b"\xff\xe2", b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part) for number, part in enumerate(parts, 1)
    ]
    return b"".join(marker + struct.pack(">H", len(content) + 2) + content for marker, content in contents)
