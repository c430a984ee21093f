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

"""Reads image files of every usual kind into five modes, and writes them with their EXIF, colours and resolution.

The modes are "L", "LA", "RGB" and "RGBA" with 8 bits per channel, and "F" for 16-bit grey as floats from 0 to 65535
(Pillow's own 16-bit resize clips between its two passes).
"""

import math
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, TiffImageFile

from .large_files import VIPS_OPTIONS, encode, write_strips
from .messages import first_line


WRITE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
READ_SUFFIXES = {*WRITE_FORMATS, ".avif", ".bmp", ".gif"}
# JPEG itself could hold 65535, but libjpeg, which Pillow and libvips use, no more than this.
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
# Larger pictures, 8192 x 8192 px for example, are made and written in strips where the format allows it.
MAX_WHOLE_PIXELS = 2**26 - 1
STRIP_ROWS = 512
# What Pillow resizes pictures with transparency in.
PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}
MAX_JPEG_EXIF = 65533
MAX_DPI = 65535  # JPEG's limit
DPI_TAGS = (ExifTags.Base.XResolution, ExifTags.Base.YResolution)
# The chunks of a PNG that say how its colours are meant, beside the ICC profile, and what two of them hold for sRGB.
COLOR_CHUNKS = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
SRGB_CHUNKS = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
}
# Primaries and transfer function in a cICP (ITU-T H.273) that are shown as sRGB: its own, of video, or not known.
SRGB_CODES = (b"\1\x0d", b"\1\1", b"\1\6", b"\2\2")
MAX_AVIF_HEADER = 2**16  # bytes
UNFIT_PROFILE = "the ICC profile does not fit the pixels and is not kept"
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "exact": True},
    # Pillow writes the nested EXIF directories only to uncompressed TIFFs.
    "TIFF": {"compression": "raw"},
}

# Tags of a TIFF's first directory that lay out its pixels or belong to other metadata; they are false in another file.
LAYOUT_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 284, 288, 289, 290),
    *(291, 292, 293, 297, 301, 317, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340),
    *(341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 700, 33723, 34377, 34675),
}
# Pillow's `exif_transpose` would fail on EXIF that cannot be written again.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NESTED_TAGS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


@dataclass
class Picture:
    """
    An upright image with what belongs to it.

    Args:
        notes (`list[str]`): What was lost in reading it, in words.
        dpi (`tuple[float, float]`, *optional*): Pixels per inch across and down.
        color_chunks (`dict[bytes, bytes]`): By name the chunks of a PNG that say how the colours are meant.
    """

    image: Image.Image
    exif: Image.Exif
    icc_profile: bytes | None
    notes: list[str] = field(default_factory=list)
    dpi: tuple[float, float] | None = None
    color_chunks: dict[bytes, bytes] = field(default_factory=dict)


@contextmanager
def open_image(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Opens the file without decoding it; an `OSError` says why it cannot be used."""
    if path.exists() and not path.is_file():
        raise OSError("is no regular file")  # a pipe would be waited for
    # Given the path, Pillow would map uncompressed TIFFs to memory, and rotated ones then come out scrambled.
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            raise OSError(unreadable_reason(file)) from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
            raise OSError(
                f"has more than {limit:.0f} megapixels, as a small file that fills the memory would"
                " (--allow-large-input reads it)"
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise anything on broken bytes
            raise OSError(f"cannot be read: {first_line(error)}") from error
        if isinstance(image, TiffImageFile) and has_deep_planes(image):
            raise OSError("has 16-bit colour in separate planes, which Pillow cannot read: save it with 8 bits")
        yield image


def has_deep_planes(image: TiffImageFile) -> bool:
    """Whether each channel is stored apart with more than 8 bits, which Pillow takes for 8 bits without a word."""
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,))
    return image.tag_v2.get(PLANAR_CONFIGURATION) == 2 and len(bits) > 1 and max(bits) > 8


def unreadable_reason(file: BinaryIO) -> str:
    file.seek(0)
    start = file.read(12)
    if not start:
        return "is empty"
    if start[4:11] == b"ftyphei":
        return "is a HEIC, which is read where pillow-heif is installed (pip install pillow-heif)"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "is a TIFF whose kind of pixels Pillow cannot read, or broken: save it with 8 bits per channel"
    return "is not an image that Pillow can read"


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of the image as it is seen, from the file's header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(path) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):
                # The size of a TIFF is upright already, in newer versions of Pillow.
                width, height = (image.tag_v2[tag] for tag in (256, 257))
            is_png = isinstance(image, PngImageFile)
            exif = read_png_exif(path, image) if is_png else read_exif(image)
            is_turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if is_turned else (width, height)


def read_software(path: Path) -> str | None:
    """The text of the EXIF tag Software, from the file's header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(path) as image:
            exif = read_png_exif(path, image) if isinstance(image, PngImageFile) else read_exif(image)
            software = exif.get(ExifTags.Base.Software)
    return software if isinstance(software, str) else None


@contextmanager
def limiting_pixels(allow_large_input: bool) -> Iterator[None]:
    """Refuses pictures of more pixels than Pillow's limit while the context lasts, unless large ones are allowed."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if allow_large_input else limit
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_for_flux(path: Path) -> Picture:
    """The picture with 8 bits per channel, as FLUX takes and gives it."""
    picture = read_picture(path)
    if picture.image.mode == "F":
        picture.image = grey_integers(picture.image, 255)
        picture.notes.append("16 bits become 8 with FLUX")
    return picture


def read_picture(path: Path) -> Picture:
    """Reads the first frame, turned upright. Raises `OSError` if the file is no readable image."""
    with warnings.catch_warnings():
        # What Pillow warns of is either an error here or a note.
        warnings.simplefilter("ignore")
        with open_image(path) as image:
            try:
                picture = convert_picture(image)
                if image.format in ("PNG", "AVIF"):
                    picture.color_chunks = read_color_chunks(path, image.format)
                return picture
            except MemoryError:
                raise
            except Exception as error:  # as in `open_image`
                raise OSError(f"cannot be read: {first_line(error)}") from error


def convert_picture(file: ImageFile.ImageFile) -> Picture:
    notes = []
    if (num_frames := getattr(file, "n_frames", 1)) > 1:
        notes.append(f"only the first of {num_frames} frames is enlarged")
    storage = str(file.tile)
    icc_profile = file.info.get("icc_profile")
    transparent = file.info.get("transparency")
    orientation = file.tag_v2.get(ExifTags.Base.Orientation) if isinstance(file, TiffImageFile) else None
    # Loading turns a TIFF upright and takes the tag away.
    file.load()
    stored_exif = read_exif(file)
    turn = TURNS.get(stored_exif.get(ExifTags.Base.Orientation, 1))
    image = file.copy() if turn is None else file.transpose(turn)
    orientation = orientation or stored_exif.get(ExifTags.Base.Orientation)
    try:
        exif = portable_exif(stored_exif)
    except Exception:  # as in `open_image`
        exif = Image.Exif()
        notes.append("the EXIF is broken and is not kept")
    dpi = read_dpi(file, exif)
    if dpi and orientation in (5, 6, 7, 8):
        dpi = dpi[::-1]

    # Pillow before 11 reads a 16-bit grey PNG as "I".
    is_grey_16 = image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG")
    if image.mode in ("I", "F") and not is_grey_16:
        raise ValueError("32-bit pixels are not supported: save it with 8 or 16 bits")
    if ";16" in storage and not is_grey_16:
        notes.append("16 bits per channel are read as 8")

    if is_grey_16:
        image = image.convert("F")
        if transparent is not None:
            alpha = np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)
            image = grey_integers(image, 255)
            image.putalpha(Image.fromarray(alpha))
            notes.append("16 bits are read as 8 beside the transparency")
    elif image.mode in ("CMYK", "LAB", "YCbCr"):
        image, icc_profile = to_srgb(image, icc_profile)
        if file.info.get("icc_profile") and not icc_profile:
            notes.append(UNFIT_PROFILE)
    elif image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La") or "'LA;16B'" in storage
        image = image.convert("RGBA").convert("LA") if is_grey else image.convert("RGBA")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.info = {}
    return Picture(image, exif, icc_profile, notes, dpi)


def read_dpi(file: ImageFile.ImageFile, exif: Image.Exif) -> tuple[float, float] | None:
    """Pixels per inch across and down as the file stores them, or else as its EXIF does."""
    dpi = file.info.get("dpi")
    # Of a JPEG that does not say it, Pillow reads half of the EXIF's, or says 72.
    if dpi is None or (isinstance(file, JpegImageFile) and not file.info.get("jfif_unit")):
        per_inch = 2.54 if exif.get(ExifTags.Base.ResolutionUnit) == 3 else 1
        try:
            dpi = tuple(float(exif[tag]) * per_inch for tag in DPI_TAGS)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
    across, down = (round(float(value), 2) for value in dpi)
    return (across, down) if 1 <= across <= MAX_DPI and 1 <= down <= MAX_DPI else None


def read_color_chunks(path: Path, image_format: str) -> dict[bytes, bytes]:
    """By name the chunks of a PNG that say how its colours are meant; those of an AVIF as a PNG would say it."""
    with open(path, "rb") as file:
        if image_format == "AVIF":
            start = file.read(MAX_AVIF_HEADER)
            place = start.find(b"colrnclx")
            codes = start[place + 9 : place + 12 : 2]
            return {} if place < 0 or codes in SRGB_CODES else {b"cICP": codes + b"\0\1"}
        chunks = {}
        for name, length in png_chunks(file):
            if name == b"IDAT":
                break
            if name in COLOR_CHUNKS:
                chunks[name] = file.read(length)
        return chunks


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Names and lengths of a PNG's chunks, the file being at the data of each."""
    file.seek(8)  # behind the signature
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        data = file.tell()
        yield name, length
        file.seek(data + length + 4)  # its checksum too


def means_srgb(chunks: dict[bytes, bytes]) -> bool:
    """Whether colours that a PNG describes by these chunks are shown as if it had none."""
    if b"cICP" in chunks:
        return chunks[b"cICP"][:2] in SRGB_CODES
    return b"sRGB" in chunks or all(chunks.get(name, srgb) == srgb for name, srgb in SRGB_CHUNKS.items())


def opaque_colors(image: Image.Image) -> Image.Image:
    """
    An RGB version of the image without its transparency, for a model that knows none.

    What cannot be seen, often black, gets the colours around it, or else they would darken the edges beside it.
    """
    if image.mode not in PREMULTIPLIED:
        return image.convert("RGB")
    colors, mask = image.convert("RGB"), image.getchannel("A").point(lambda alpha: 255 * (alpha > 0))
    if mask.getextrema() != (0, 255):
        return colors
    seen = colors.copy()
    seen.putalpha(mask)
    # Pillow reduces premultiplied, so that only what can be seen counts.
    around = opaque_colors(seen.reduce(2)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(colors, around, mask)


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, bytes | None]:
    """
    An RGB version of the image, which may be grey with transparency; through its ICC profile, then with an sRGB
    profile, if it has one that fits.
    """
    if image.mode == "LA":
        colors, icc_profile = to_srgb(image.convert("L"), icc_profile)
        colors.putalpha(image.getchannel("A"))
        return colors, icc_profile
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(icc_profile or b""))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return ImageCms.ImageCmsTransform(source, target, image.mode, "RGB").apply(image), target.tobytes()
    except (OSError, ValueError, ImageCms.PyCMSError):
        return image.convert("RGB"), None


def read_exif(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception:  # as in `open_image`
        return Image.Exif()


def read_png_exif(path: Path, image: Image.Image) -> Image.Exif:
    """The EXIF of a PNG without decoding it, as Pillow would to see what stands behind the pixels."""
    exif = Image.Exif()
    with suppress(Exception), open(path, "rb") as file:  # as in `open_image`
        if "exif" in image.info or "Raw profile type exif" in image.info:
            return Image.Image.getexif(image)
        for name, length in png_chunks(file):
            if name == b"eXIf":
                exif.load(b"Exif\0\0" + file.read(length))
                break
    return exif


def portable_exif(exif: Image.Exif) -> Image.Exif:
    """A copy without orientation, thumbnail and what describes only the pixels of the file that it came from."""
    copy = Image.Exif()
    for tag, value in exif.items():
        if tag not in LAYOUT_TAGS and tag not in NESTED_TAGS:
            copy[tag] = value
    for tag in NESTED_TAGS:
        if nested := dict(exif.get_ifd(tag)):
            if nested.pop(ExifTags.IFD.Interop, None) is not None:
                nested[ExifTags.IFD.Interop] = dict(exif.get_ifd(ExifTags.IFD.Interop))
            copy[tag] = nested
    copy.tobytes()  # raises on values that cannot be written
    return copy


def grey_integers(image: Image.Image, maximum: int) -> Image.Image:
    """Mode "F" as grey of 8 bits (`maximum` 255) or 16 bits (65535)."""
    values = np.clip(np.rint(np.asarray(image) * (maximum / 65535)), 0, maximum)
    return Image.fromarray(values.astype(np.uint8 if maximum == 255 else np.uint16))


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Puts the output's name into errors, which would otherwise read as if they were about the input."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {first_line(error)}") from error


def check_writable(path: Path, size: tuple[int, int]) -> None:
    """Raises before the work what would make `write_picture` fail after it; creates the folder."""
    image_format = WRITE_FORMATS[path.suffix.lower()]
    if max(size) > MAX_SIDE.get(image_format, max(size)):
        raise ValueError(
            f"{size[0]}x{size[1]} px is more than the {MAX_SIDE[image_format]} px that {image_format} can hold: "
            "give an output that ends in .png or .tif"
        )
    check_place(path)


def check_place(path: Path) -> None:
    """Raises if no file of this name can be made; creates the folder."""
    with naming_output(path):
        for parent in path.parents:
            if os.path.exists(parent) and not os.path.isdir(parent):
                raise NotADirectoryError(f"{parent} is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary_path(path), "wb"):
            pass
        temporary_path(path).unlink()


def temporary_path(path: Path) -> Path:
    return path.with_name(f".upscale-{os.getpid()}.tmp")


def can_be_written_in_strips(path: Path, size: tuple[int, int]) -> bool:
    """Whether a picture of this size is large, and the format of the path's suffix can be written from strips."""
    return math.prod(size) > MAX_WHOLE_PIXELS and WRITE_FORMATS[path.suffix.lower()] in VIPS_OPTIONS


def resize_strips(image: Image.Image, size: tuple[int, int]) -> Iterator[Image.Image]:
    """The image enlarged to `size`, bicubic, in strips from top to bottom."""
    width, height = size
    # Pillow resizes across first too; with a box it would change the order, and so the rounding.
    wide = image.convert(PREMULTIPLIED.get(image.mode, image.mode))
    wide = wide.resize((width, image.height), Image.Resampling.BICUBIC)
    for top in range(0, height, STRIP_ROWS):
        yield resize_rows(wide, height, top, min(top + STRIP_ROWS, height)).convert(image.mode)


def resize_rows(image: Image.Image, height: int, top: int, bottom: int) -> Image.Image:
    """The rows from `top` to `bottom` of the image enlarged downwards to `height`, bicubic."""
    box = (0, top * image.height / height, image.width, bottom * image.height / height)
    return image.resize((image.width, bottom - top), Image.Resampling.BICUBIC, box)


def write_picture(
    picture: Picture,
    path: Path,
    software: str,
    strips: Iterable[Image.Image] | None = None,
    size: tuple[int, int] = (0, 0),
) -> list[str]:
    """
    Writes the picture in the format of the path's suffix, wholly or not at all.

    Args:
        software (`str`): Text for the EXIF tag Software.
        strips (`Iterable[Image.Image]`, *optional*):
            The picture's pixels from top to bottom, in place of `picture.image`, for what is too large for memory.
        size (`tuple[int, int]`): Width and height in pixels that the strips make up.

    Returns:
        `list[str]`: What the format could not hold, in words.
    """
    image_format = WRITE_FORMATS[path.suffix.lower()]
    image, losses = picture.image, list[str]()
    if strips is None:
        image, losses = storable_image(image, image_format)
        size = image.size
    profile = picture.icc_profile
    if image_format == "WEBP" and image.mode in ("L", "LA") and profile and profile[16:20] == b"GRAY":
        image, profile = to_srgb(image, profile)
    metadata, notes = storable_metadata(picture, image_format, profile, "RGB" in image.mode, software, size)
    with replacing(path) as temporary:
        if strips is None:
            temporary.write_bytes(encode(image, image_format, **SAVE_OPTIONS[image_format], **metadata))
        else:
            storable = (keep_losses(storable_image(strip, image_format), losses) for strip in strips)
            write_strips(temporary, image_format, storable, metadata)
    return losses + notes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a temporary file, which becomes the file `path` if the context ends without an error."""
    temporary = temporary_path(path)
    with naming_output(path):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                # Or else a loss of power could leave the name and not the content.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file wholly or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def keep_losses(stored: tuple[Image.Image, list[str]], losses: list[str]) -> Image.Image:
    """The image of a pair from [`storable_image`]; replaces `losses` by what it lost, the same for every strip."""
    image, losses[:] = stored
    return image


def storable_metadata(
    picture: Picture, image_format: str, profile: bytes | None, has_rgb: bool, software: str, size: tuple[int, int]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments for Pillow's `save` as far as the format can hold them, and what was lost."""
    exif, notes = storable_exif(picture, image_format, software, size)
    # Grey is shown right as RGB, and WebP has nothing else.
    if profile and profile[16:20] != (b"RGB " if has_rgb or image_format == "WEBP" else b"GRAY"):
        profile = None
    if picture.icc_profile and not profile:
        notes.append(UNFIT_PROFILE)
    metadata: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": profile}
    if picture.dpi and image_format in ("PNG", "JPEG"):
        metadata["dpi"] = picture.dpi
    if image_format == "PNG":
        metadata["pnginfo"] = PngInfo()
        for name, content in picture.color_chunks.items():
            metadata["pnginfo"].add(name, content)
    elif not means_srgb(picture.color_chunks) and (b"cICP" in picture.color_chunks or not profile):
        names = " and ".join(name.decode() for name in COLOR_CHUNKS if name in picture.color_chunks)
        notes.append(f"{image_format} cannot hold how the colours are meant ({names}): they may look different")
    return metadata, notes


def storable_exif(
    picture: Picture, image_format: str, software: str, size: tuple[int, int]
) -> tuple[Image.Exif, list[str]]:
    """The EXIF with Software, size and resolution, as far as the format can hold it, and what was lost."""
    exif, notes = picture.exif, []
    exif[ExifTags.Base.Software] = software
    if picture.dpi:
        exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = picture.dpi
        exif[ExifTags.Base.ResolutionUnit] = 2
    if nested := exif.get(ExifTags.IFD.Exif):
        nested[ExifTags.Base.ExifImageWidth], nested[ExifTags.Base.ExifImageHeight] = size
        # Pillow writes it to no TIFF.
        rules = nested.pop(ExifTags.IFD.Interop, {}) if image_format == "TIFF" else {}
        if rules.get(ExifTags.Interop.InteropIndex) == "R03" and not picture.icc_profile:
            notes.append("TIFF cannot hold the EXIF's mark of Adobe RGB: the colours may look different")
    if image_format == "JPEG" and len(exif.tobytes()) > MAX_JPEG_EXIF:
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = software
        notes.append("the EXIF is too long for JPEG and is not kept")
    return exif, notes


def storable_image(image: Image.Image, image_format: str) -> tuple[Image.Image, list[str]]:
    """The image in a mode that the format can hold, and what was lost."""
    if image.mode == "F":
        if image_format in ("PNG", "TIFF"):
            return grey_integers(image, 65535), []
        return grey_integers(image, 255), [f"16 bits become 8 in {image_format}"]
    if image_format == "JPEG" and image.mode in ("LA", "RGBA"):
        color, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
        return Image.composite(color, Image.new(color.mode, color.size, "white"), alpha), [
            "the transparent parts become white: JPEG has no transparency"
        ]
    return image, []
