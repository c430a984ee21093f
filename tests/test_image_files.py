"""Reading and writing of image files, mode by mode and format by format."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import pyvips
from PIL import ExifTags, Image, ImageCms, JpegImagePlugin

from flux_dino_tile import image_files, upscale
from flux_dino_tile.image_files import opaque_colors, read_picture, upright_size, write_picture


EXIF_IFD, GPS_IFD = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo
SUFFIXES = [".png", ".jpg", ".webp", ".tif"]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixels(mode="RGB", size=(12, 8)):
    """Smooth random pixels, so that JPEG keeps them nearly."""
    rng = np.random.default_rng(0)
    channels = len(Image.new(mode, (1, 1)).getbands())
    small = [Image.fromarray(rng.integers(0, 256, (3, 3), dtype=np.uint8)) for _ in range(channels)]
    bands = [band.resize(size, Image.Resampling.BILINEAR) for band in small]
    return bands[0] if channels == 1 else Image.merge(mode, bands)


def grey_16(size=(12, 8)):
    return Image.fromarray(np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[::-1]))


def camera_exif(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Software] = "camera firmware"
    exif[ExifTags.Base.Orientation] = orientation
    exif[EXIF_IFD] = {
        int(ExifTags.Base.DateTimeOriginal): "2020:01:02 03:04:05",
        int(ExifTags.Base.ExposureTime): 0.25,
        int(ExifTags.Base.MakerNote): b"private \x00 bytes",
        int(ExifTags.Base.ExifImageWidth): 12,
        int(ExifTags.Base.ExifImageHeight): 8,
    }
    exif[GPS_IFD] = {1: "N", 2: (52.0, 30.0, 1.5)}
    return exif


def grey_profile(gamma=1.0):
    """An ICC profile of grey with this gamma."""
    tags = [
        (b"desc", b"desc" + struct.pack(">II5s", 0, 5, b"grey\0") + bytes(79)),
        (b"cprt", b"text\0\0\0\0none\0"),
        (b"wtpt", b"XYZ \0\0\0\0" + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)),
        (b"kTRC", b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)),
    ]
    table, content = struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(content)
    header = struct.pack(">I4x4s4s4s4s12x4s", size, b"\2\x20\0\0", b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header += bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + table + content


def add_chunks(path, chunks):
    """Adds chunks to a PNG, after its header."""
    data = path.read_bytes()
    added = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )
    path.write_bytes(data[:33] + added + data[33:])
    return path


def save(image, path, **options):
    if path.suffix == ".jpg":
        options = {"quality": 98, "subsampling": 0, **options}
    image.save(path, **options)
    return path


def round_trip(source, suffix, software="test"):
    """Reads a file, writes it, and opens the result."""
    target = source.with_name(f"result{suffix}")
    write_picture(read_picture(source), target, software)
    return Image.open(target)


def png_bytes(bits, color_type, width, height, data):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_bytes(bits, planar=1, sample_format=1, size=4):
    """A black RGB TIFF with channels of `bits` bits, interleaved (`planar` 1) or in separate planes (2)."""
    strips = 3 if planar == 2 else 1
    strip = size * size * bits // 8 * 3 // strips
    tables = 8 + 2 + 12 * 11 + 4
    first = tables + 12 + 8 * strips
    offsets = [first + index * strip for index in range(strips)]
    entries = [
        *[(256, 3, 1, size), (257, 3, 1, size), (258, 3, 3, tables), (259, 3, 1, 1), (262, 3, 1, 2)],
        (273, 4, strips, tables + 12 if strips > 1 else offsets[0]),
        *[(277, 3, 1, 3), (278, 3, 1, size)],
        (279, 4, strips, tables + 12 + 4 * strips if strips > 1 else strip),
        *[(284, 3, 1, planar), (339, 3, 3, tables + 6)],
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    values = struct.pack("<6H", *[bits] * 3, *[sample_format] * 3)
    values += struct.pack(f"<{2 * strips}I", *offsets, *[strip] * strips)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + values + bytes(strip * strips)


# Pixels


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_opaque_pixels_survive(tmp_path, suffix, mode):
    image = pixels(mode, (96, 64))
    result = round_trip(save(image, tmp_path / "in.png"), suffix)
    # WebP has no grey.
    assert result.mode == ("RGB" if suffix == ".webp" else mode)
    difference = np.abs(np.asarray(result.convert(mode)).astype(int) - np.asarray(image))
    assert difference.max() <= {".png": 0, ".tif": 0, ".jpg": 8, ".webp": 16}[suffix]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_survives(tmp_path, suffix, mode):
    image = pixels(mode)
    result = round_trip(save(image, tmp_path / "in.png"), suffix)
    assert result.mode == ("RGBA" if suffix == ".webp" else mode)
    assert np.array_equal(np.asarray(result.getchannel("A")), np.asarray(image.getchannel("A")))


def test_jpeg_shows_transparent_parts_white_and_says_so(tmp_path):
    image = Image.new("RGBA", (16, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 8))
    picture = read_picture(save(image, tmp_path / "in.png"))
    notes = write_picture(picture, tmp_path / "out.jpg", "test")
    result = np.asarray(Image.open(tmp_path / "out.jpg")).astype(int)
    assert result.shape == (8, 16, 3)
    assert result[4, 2].min() > 245
    assert abs(result[4, 13] - [200, 0, 0]).max() < 8
    assert any("JPEG has no transparency" in note for note in notes)


@pytest.mark.parametrize("source_suffix", [".png", ".tif"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_16_keeps_all_bits(tmp_path, source_suffix, suffix):
    image = grey_16()
    picture = read_picture(save(image, tmp_path / f"in{source_suffix}"))
    assert picture.image.mode == "F"
    assert picture.notes == []
    result = round_trip(tmp_path / f"in{source_suffix}", suffix)
    assert result.mode == "I;16"
    assert np.array_equal(np.asarray(result), np.asarray(image))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_grey_16_becomes_8_bits_where_the_format_has_no_more(tmp_path, suffix):
    picture = read_picture(save(grey_16(), tmp_path / "in.png"))
    notes = write_picture(picture, tmp_path / f"out{suffix}", "test")
    result = np.asarray(Image.open(tmp_path / f"out{suffix}").convert("L")).astype(int)
    assert np.abs(result - np.asarray(grey_16()) / 257).max() <= 4
    assert any("16 bits become 8" in note for note in notes)


def test_grey_16_with_a_transparent_value_becomes_8_bits_with_alpha(tmp_path):
    values = np.array([[0, 257], [65535, 257 * 100]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "in.png", transparency=257)
    picture = read_picture(tmp_path / "in.png")
    assert picture.image.mode == "LA"
    assert np.asarray(picture.image).tolist() == [[[0, 255], [1, 0]], [[255, 255], [100, 255]]]
    assert len(picture.notes) == 1


def test_overshoot_of_16_bit_grey_is_clipped_not_wrapped():
    values = Image.fromarray(np.array([[-300.0, 70000.0, 1000.4, 1000.6]], dtype=np.float32))
    assert np.asarray(image_files.grey_integers(values, 65535)).tolist() == [[0, 65535, 1000, 1001]]
    assert np.asarray(image_files.grey_integers(values, 255)).tolist() == [[0, 255, 4, 4]]


@pytest.mark.parametrize(("color_type", "mode", "channels"), [(2, "RGB", 3), (4, "LA", 2), (6, "RGBA", 4)])
def test_16_bit_colour_is_read_as_8_bits_with_a_note(tmp_path, color_type, mode, channels):
    row = b"\0" + b"".join(bytes([10 * index + 10, 99]) for index in range(channels)) * 4
    (tmp_path / "in.png").write_bytes(png_bytes(16, color_type, 4, 4, row * 4))
    picture = read_picture(tmp_path / "in.png")
    assert picture.image.mode == mode
    assert picture.image.getpixel((3, 3)) == tuple(10 * index + 10 for index in range(channels))
    assert picture.notes == ["16 bits per channel are read as 8"]


def test_16_bit_rgb_tiff_is_read_as_8_bits_with_a_note(tmp_path):
    (tmp_path / "in.tif").write_bytes(tiff_bytes(16))
    assert read_picture(tmp_path / "in.tif").notes == ["16 bits per channel are read as 8"]
    (tmp_path / "in.tif").write_bytes(tiff_bytes(8))
    assert read_picture(tmp_path / "in.tif").notes == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff_bytes(16, planar=2), "separate planes"),
        (tiff_bytes(32, sample_format=3), "TIFF whose kind of pixels"),
        (b"", "is empty"),
        (b"hello, this is text", "is not an image"),
        (b"II*\0" + bytes(40), "TIFF"),
    ],
)
def test_unreadable_files_say_why(tmp_path, data, reason):
    path = tmp_path / "in.tif"
    path.write_bytes(data)
    with pytest.raises(OSError, match=reason):
        read_picture(path)
    with pytest.raises(OSError, match=reason):
        upright_size(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files_are_errors(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = save(noise, tmp_path / f"in{suffix}").read_bytes()
    (tmp_path / f"in{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"cannot be read|not an image|TIFF") as error:
        read_picture(tmp_path / f"in{suffix}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_errors(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "in.tif")
    with pytest.raises(OSError, match="32-bit pixels"):
        read_picture(tmp_path / "in.tif")


def test_palette_becomes_rgb(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    result = round_trip(save(image, tmp_path / "in.png"), ".png")
    assert result.mode == "RGB"
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_transparent_palette_entry_becomes_alpha(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / f"in{suffix}", transparency=1)
    result = round_trip(tmp_path / f"in{suffix}", ".png")
    assert result.mode == "RGBA"
    assert result.getpixel((0, 0)) == (10, 20, 30, 255)
    assert result.getpixel((1, 0))[3] == 0


@pytest.mark.parametrize(("mode", "transparent", "expected"), [("L", 7, "LA"), ("RGB", (7, 7, 7), "RGBA")])
def test_transparent_colour_becomes_alpha(tmp_path, mode, transparent, expected):
    image = Image.new(mode, (2, 1), transparent)
    image.putpixel((0, 0), 9 if mode == "L" else (9, 9, 9))
    image.save(tmp_path / "in.png", transparency=transparent)
    picture = read_picture(tmp_path / "in.png")
    assert picture.image.mode == expected
    assert list(picture.image.getchannel("A").tobytes()) == [255, 0]
    # A leftover in `info` would make the PNG writer add the transparent colour again.
    assert "transparency" not in round_trip(tmp_path / "in.png", ".png").info


def test_black_and_white_becomes_grey(tmp_path):
    image = Image.new("1", (4, 2), 1)
    image.putpixel((0, 0), 0)
    result = round_trip(save(image, tmp_path / "in.png"), ".png")
    assert result.mode == "L"
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [0, 255]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_without_profile_becomes_rgb(tmp_path, suffix):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = read_picture(save(image, tmp_path / f"in{suffix}"))
    assert picture.image.mode == "RGB"
    assert np.abs(np.asarray(picture.image).astype(int) - [255, 0, 0]).max() < 8
    assert picture.icc_profile is None


def test_colours_go_through_the_profile_to_srgb(tmp_path):
    # There is no CMYK profile to test with; Lab goes the same way.
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    image = Image.new("LAB", (4, 4), (150, 170, 90))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    expected = ImageCms.ImageCmsTransform(lab, srgb, "LAB", "RGB").apply(image)
    result, profile = image_files.to_srgb(image, lab.tobytes())
    assert result.getpixel((0, 0)) == expected.getpixel((0, 0))
    assert profile is not None
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(profile)))


@pytest.mark.parametrize("profile", [b"broken", SRGB])
def test_a_profile_that_does_not_fit_is_dropped(tmp_path, profile):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = read_picture(save(image, tmp_path / "in.jpg", icc_profile=profile))
    assert picture.icc_profile is None
    assert picture.notes == ["the ICC profile does not fit the pixels and is not kept"]
    assert np.abs(np.asarray(picture.image).astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp", ".tif"])
def test_animations_give_their_first_frame_and_a_note(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"in{suffix}", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / f"in{suffix}")
    red, green, blue = np.asarray(picture.image)[4, 4, :3]
    assert red > 240
    assert max(green, blue) < 15
    assert picture.notes == ["only the first of 3 frames is enlarged"]


# Metadata


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exif_survives_from_every_format_to_every_format(tmp_path, source_suffix, suffix):
    source = save(pixels(), tmp_path / f"in{source_suffix}", exif=camera_exif().tobytes())
    picture = read_picture(source)
    picture.image = picture.image.resize((24, 16))
    write_picture(picture, tmp_path / f"out{suffix}", 'program 1.0 {"a": 1}')

    result = Image.open(tmp_path / f"out{suffix}")
    assert result.size == (24, 16)
    exif = result.getexif()
    assert exif[ExifTags.Base.Make] == "Maker"
    assert exif[ExifTags.Base.Software] == 'program 1.0 {"a": 1}'
    assert ExifTags.Base.Orientation not in exif
    nested = exif.get_ifd(EXIF_IFD)
    assert nested[ExifTags.Base.DateTimeOriginal] == "2020:01:02 03:04:05"
    assert nested[ExifTags.Base.ExposureTime] == 0.25
    assert nested[ExifTags.Base.MakerNote] == b"private \x00 bytes"
    assert (nested[ExifTags.Base.ExifImageWidth], nested[ExifTags.Base.ExifImageHeight]) == (24, 16)
    assert exif.get_ifd(GPS_IFD)[2] == (52.0, 30.0, 1.5)
    if suffix != ".tif":
        assert not set(exif) & image_files.LAYOUT_TAGS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_software_tag_is_written_without_other_exif(tmp_path, suffix):
    result = round_trip(save(pixels(), tmp_path / "in.png"), suffix, software="program 1.0")
    assert result.getexif()[ExifTags.Base.Software] == "program 1.0"
    assert EXIF_IFD not in result.getexif()


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_dropped(tmp_path, source_suffix, orientation):
    upright = Image.new("L", (16, 8), 0)
    upright.paste(255, (0, 0, 8, 4))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the viewer's turn undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    source = save(stored, tmp_path / f"in{source_suffix}", exif=camera_exif(orientation).tobytes())
    assert upright_size(source) == (16, 8)
    result = round_trip(source, ".png")
    assert ExifTags.Base.Orientation not in result.getexif()
    assert np.abs(np.asarray(result.convert("L")).astype(int) - np.asarray(upright)).max() < 64


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_icc_profile_survives(tmp_path, source_suffix, suffix):
    source = save(pixels(), tmp_path / f"in{source_suffix}", icc_profile=SRGB)
    assert round_trip(source, suffix).info["icc_profile"] == SRGB


def test_cmyk_goes_through_its_profile(tmp_path):
    profile = bytes(pyvips.Image.profile_load("cmyk"))
    source = save(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), tmp_path / "in.jpg", icc_profile=profile)
    result = round_trip(source, ".png")
    assert result.info["icc_profile"][16:20] == b"RGB "
    # Printed cyan is darker than the (0, 255, 255) that it is without a profile.
    assert result.getpixel((4, 4))[1] < 200


@pytest.mark.parametrize("mode", ["L", "LA", "F"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_grey_profile_is_kept_or_becomes_rgb(tmp_path, suffix, mode):
    grey = grey_16() if mode == "F" else Image.new(mode, (12, 8), 55 if mode == "L" else (55, 200))
    source = save(grey, tmp_path / "in.png", icc_profile=grey_profile())
    picture = read_picture(source)
    notes = write_picture(picture, tmp_path / f"out{suffix}", "test")
    result = Image.open(tmp_path / f"out{suffix}")
    assert not any("profile" in note for note in notes)
    assert result.info["icc_profile"][16:20] == (b"RGB " if suffix == ".webp" else b"GRAY")
    if mode != "F" and suffix == ".webp":
        # 55 / 255 of the light.
        assert np.abs(np.array(result.convert("RGB").getpixel((4, 4))) - 128).max() < 4


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("mode", "profile"), [("L", SRGB), ("RGB", grey_profile()), ("P", grey_profile())])
def test_a_profile_of_other_channels_is_dropped_with_a_note(tmp_path, suffix, mode, profile):
    picture = read_picture(save(Image.new(mode, (12, 8)), tmp_path / "in.png", icc_profile=profile))
    notes = write_picture(picture, tmp_path / f"out{suffix}", "test")
    result = Image.open(tmp_path / f"out{suffix}")
    fits = suffix == ".webp" and mode == "L"
    assert result.info.get("icc_profile") == (SRGB if fits else None)
    assert notes == ([] if fits else ["the ICC profile does not fit the pixels and is not kept"])


def test_a_broken_grey_profile_does_not_get_into_webp(tmp_path):
    profile = SRGB[:16] + b"GRAY" + SRGB[20:]
    picture = read_picture(save(Image.new("L", (12, 8)), tmp_path / "in.png", icc_profile=profile))
    notes = write_picture(picture, tmp_path / "out.webp", "test")
    assert notes == ["the ICC profile does not fit the pixels and is not kept"]
    assert "icc_profile" not in Image.open(tmp_path / "out.webp").info


LINEAR = {b"gAMA": struct.pack(">I", 100000)}
WIDE = {b"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)}
HDR = {b"cICP": bytes([9, 16, 0, 1])}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("chunks", [LINEAR, WIDE, HDR, LINEAR | WIDE | HDR])
def test_what_a_png_says_of_its_colours_is_kept_or_a_note_says_so(tmp_path, suffix, chunks):
    picture = read_picture(add_chunks(save(pixels(), tmp_path / "in.png"), chunks))
    notes = write_picture(picture, tmp_path / f"out{suffix}", "test")
    data = (tmp_path / f"out{suffix}").read_bytes()
    if suffix == ".png":
        assert notes == []
        assert all(name + content in data for name, content in chunks.items())
    else:
        (note,) = notes
        assert "colours" in note
        assert all(name.decode() in note for name in chunks)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("chunks", "profile"),
    [
        ({b"sRGB": b"\0", b"gAMA": struct.pack(">I", 45455)}, None),
        ({b"gAMA": struct.pack(">I", 45455)}, None),
        ({b"cICP": bytes([1, 13, 0, 1])}, None),
        (LINEAR, SRGB),
    ],
)
def test_no_note_where_the_colours_are_those_of_srgb_or_of_the_profile(tmp_path, suffix, chunks, profile):
    picture = read_picture(add_chunks(save(pixels(), tmp_path / "in.png", icc_profile=profile), chunks))
    assert write_picture(picture, tmp_path / f"out{suffix}", "test") == []


@pytest.mark.parametrize(("codes", "is_srgb"), [((9, 16), False), ((12, 13), False), ((1, 13), True), ((2, 2), True)])
def test_the_colours_of_an_avif_go_to_a_png(tmp_path, codes, is_srgb):
    data = save(pixels(), tmp_path / "in.avif").read_bytes()
    assert data.count(b"colrnclx\0\1\0\r") == 1
    (tmp_path / "in.avif").write_bytes(data.replace(b"colrnclx\0\1\0\r", b"colrnclx" + struct.pack(">HH", *codes)))
    picture = read_picture(tmp_path / "in.avif")
    assert write_picture(picture, tmp_path / "out.png", "test") == []
    assert (b"cICP" + bytes([*codes, 0, 1]) in (tmp_path / "out.png").read_bytes()) != is_srgb
    assert bool(write_picture(picture, tmp_path / "out.jpg", "test")) != is_srgb


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_mark_of_adobe_rgb_in_the_exif_is_kept_or_a_note_says_so(tmp_path, suffix):
    exif = camera_exif()
    exif[EXIF_IFD][ExifTags.IFD.Interop] = {1: "R03", 2: b"0100"}
    picture = read_picture(save(pixels(), tmp_path / "in.jpg", exif=exif.tobytes()))
    notes = write_picture(picture, tmp_path / f"out{suffix}", "test")
    kept = Image.open(tmp_path / f"out{suffix}").getexif()
    if suffix == ".tif":
        assert len(notes) == 1 and "Adobe RGB" in notes[0]
        assert ExifTags.IFD.Interop not in kept.get_ifd(EXIF_IFD)
    else:
        assert notes == []
        assert kept.get_ifd(ExifTags.IFD.Interop)[1] == "R03"


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("orientation", "expected"), [(1, (300, 150)), (6, (150, 300))])
def test_resolution_survives(tmp_path, source_suffix, suffix, orientation, expected):
    exif = camera_exif(orientation)
    if source_suffix == ".webp":
        exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = 300.0, 150.0
        exif[ExifTags.Base.ResolutionUnit] = 2
    source = save(pixels(), tmp_path / f"in{source_suffix}", exif=exif.tobytes(), dpi=(300, 150))
    result = round_trip(source, suffix)
    stored = [result.getexif()[tag] for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution)]
    assert stored == pytest.approx(expected, abs=0.02)
    if suffix != ".webp":
        assert result.info["dpi"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source_suffix", [".jpg", ".webp"])
def test_resolution_in_the_exif_alone_survives(tmp_path, source_suffix, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution], exif[ExifTags.Base.ResolutionUnit] = 120, 60, 3
    result = round_trip(save(pixels(), tmp_path / f"in{source_suffix}", exif=exif.tobytes()), suffix)
    assert result.getexif()[ExifTags.Base.YResolution] == pytest.approx(152.4, abs=0.01)
    if suffix != ".webp":
        assert result.info["dpi"][0] == pytest.approx(304.8, abs=0.5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_resolution_is_made_up(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    result = round_trip(save(pixels(), tmp_path / "in.jpg", exif=exif.tobytes()), suffix)
    assert ExifTags.Base.XResolution not in result.getexif()


def test_a_resolution_that_no_format_holds_is_dropped(tmp_path):
    save(pixels(), tmp_path / "in.png")
    add_chunks(tmp_path / "in.png", {b"pHYs": struct.pack(">IIB", 2**31 - 1, 0, 1)})
    result = round_trip(tmp_path / "in.png", ".jpg")
    assert result.info["jfif_unit"] == 0
    assert ExifTags.Base.XResolution not in result.getexif()


# Transparency


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("place", [(0, 0, 1, 1), (5, 3, 9, 7), (0, 0, 21, 1)])
def test_what_cannot_be_seen_takes_the_colours_around_it(mode, place):
    white, clear = ((255, 255), (0, 0)) if mode == "LA" else ((255, 255, 255, 255), (0, 0, 0, 0))
    image = Image.new(mode, (21, 13), clear)
    image.paste(white, place)
    result = opaque_colors(image)
    assert (result.mode, result.size) == ("RGB", image.size)
    assert np.asarray(result).min() == 255


def test_what_can_be_seen_a_little_keeps_its_colour():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 1))
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert opaque_colors(image).getcolors() == [(16, (200, 100, 50))]
    assert opaque_colors(Image.new("RGBA", (2, 2), (1, 2, 3, 0))).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("options", [[], ["--use-flux", "--device", "cpu", "--steps", "1"]])
def test_white_on_transparent_black_gets_no_dark_edge(tmp_path, monkeypatch, options, strips):
    if strips:
        monkeypatch.setattr(image_files, "MAX_WHOLE_PIXELS", 0)
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (8, 8, 24, 24))
    image.save(tmp_path / "in.png")
    assert upscale.main([str(tmp_path / "in.png"), str(tmp_path / "out.png"), *options]) == 0
    result = Image.open(tmp_path / "out.png")
    on_white = Image.alpha_composite(Image.new("RGBA", result.size, "white"), result)
    assert np.asarray(on_white).min() > 240


def test_broken_exif_is_dropped_with_a_note_but_still_turns_the_image(tmp_path):
    # Orientation 6, and a resolution that is a text.
    entries = struct.pack("<HHIHH", 274, 3, 1, 6, 0) + struct.pack("<HHI4s", 282, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    save(pixels(), tmp_path / "in.jpg", exif=exif)
    picture = read_picture(tmp_path / "in.jpg")
    assert picture.image.size == upright_size(tmp_path / "in.jpg") == (8, 12)
    assert picture.notes == ["the EXIF is broken and is not kept"]
    write_picture(picture, tmp_path / "out.jpg", "test")
    assert dict(Image.open(tmp_path / "out.jpg").getexif()) == {ExifTags.Base.Software: "test"}


def test_exif_that_jpeg_cannot_hold_is_dropped_with_a_note(tmp_path):
    exif = camera_exif()
    exif[EXIF_IFD][ExifTags.Base.MakerNote] = bytes(66000)
    picture = read_picture(save(pixels(), tmp_path / "in.png", exif=exif.tobytes()))
    assert write_picture(picture, tmp_path / "out.png", "test") == []
    assert write_picture(picture, tmp_path / "out.jpg", "test") == ["the EXIF is too long for JPEG and is not kept"]
    assert dict(Image.open(tmp_path / "out.jpg").getexif()) == {ExifTags.Base.Software: "test"}


# Writing


def test_jpeg_is_4_4_4_of_quality_95(tmp_path):
    result = round_trip(save(pixels(), tmp_path / "in.png"), ".jpg")
    assert JpegImagePlugin.get_sampling(result) == 0
    expected = BytesIO()
    Image.new("RGB", (8, 8)).save(expected, "JPEG", quality=95)
    assert result.quantization == Image.open(expected, formats=["JPEG"]).quantization  # type: ignore[attr-defined]


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    picture = read_picture(save(pixels(), tmp_path / "in.png"))
    (tmp_path / "out.png").write_bytes(b"old")

    def fail(self, file, **options):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match=r"^cannot write .*/out\.png: No space left"):
        write_picture(picture, tmp_path / "out.png", "test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_gets_full_at_the_end_is_an_error(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    picture = read_picture(save(pixels(size=(120, 80)), tmp_path / "in.png"))
    write_picture(picture, tmp_path / f"out{suffix}", "test")
    before = (tmp_path / f"out{suffix}").read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^cannot write .*/out\{suffix}: File too large"):
            write_picture(picture, tmp_path / f"out{suffix}", "test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / f"out{suffix}").read_bytes() == before


def test_the_file_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    picture = read_picture(save(pixels(), tmp_path / "in.png"))
    real_save, seen = Image.Image.save, []

    def watch(self, file, **options):
        real_save(self, file, **options)
        seen.append((tmp_path / "out.png").exists())

    monkeypatch.setattr(Image.Image, "save", watch)
    write_picture(picture, tmp_path / "out.png", "test")
    assert seen == [False]
    assert (tmp_path / "out.png").exists()


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    round_trip(save(pixels(), tmp_path / "in.png"), ".png")
    (tmp_path / "plain").touch()
    assert (tmp_path / "result.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("a.jpg", (65500, 10), True),
        ("a.jpg", (10, 65501), False),
        ("a.webp", (16383, 10), True),
        ("a.WEBP", (16384, 10), False),
        ("a.png", (100000, 10), True),
        ("a.tif", (10, 100000), True),
    ],
)
def test_size_limits_of_formats(tmp_path, name, size, fits):
    if fits:
        image_files.check_writable(tmp_path / "new folder" / name, size)
        assert list((tmp_path / "new folder").iterdir()) == []
    else:
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} px is more than"):
            image_files.check_writable(tmp_path / name, size)


def test_a_folder_that_cannot_be_written_to_is_known_before_the_work():
    with pytest.raises(OSError, match=r"^cannot write /proc/upscale-test/out\.png: No such file"):
        image_files.check_writable(image_files.Path("/proc/upscale-test/out.png"), (10, 10))
