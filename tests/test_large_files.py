"""Pictures that are written strip by strip: the same file as from memory, and nothing where it fails."""

import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, TiffImagePlugin
from test_image_files import EXIF_IFD, GPS_IFD, SRGB, camera_exif, grey_16, grey_profile, pixels

from flux_dino_tile import image_files, upscale
from flux_dino_tile.image_files import Picture, resize_strips, write_picture


SUFFIXES = [".png", ".tif", ".jpg"]
MODES = ["L", "LA", "RGB", "RGBA"]
# More than a row and a column of TIFF tiles, and than a strip.
SIZE = (300, 530)


def picture(mode="RGB", size=SIZE):
    image = Image.fromarray(np.asarray(grey_16(size), dtype=np.float32)) if mode == "F" else pixels(mode, size)
    profile = SRGB if "RGB" in mode else grey_profile()
    return Picture(image, camera_exif(), profile, dpi=(300, 150), color_chunks={b"gAMA": struct.pack(">I", 100000)})


def cut(image, rows=97):
    return (image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("mode", [*MODES, "F"])
def test_strips_give_the_file_that_the_whole_gives(tmp_path, capfd, mode, suffix):
    strips, whole = tmp_path / f"strips{suffix}", tmp_path / f"whole{suffix}"
    image = picture(mode).image
    notes = write_picture(picture(mode), strips, "test 1", cut(image), image.size)
    assert notes == write_picture(picture(mode), whole, "test 1")
    with Image.open(strips) as result, Image.open(whole) as expected:
        assert (result.mode, result.size, result.format) == (expected.mode, expected.size, expected.format)
        assert np.array_equal(np.asarray(result), np.asarray(expected))
        assert result.info["icc_profile"] == expected.info["icc_profile"] == picture(mode).icc_profile
        assert result.info["dpi"] == expected.info["dpi"] == pytest.approx((300, 150), abs=0.02)
        assert result.info.get("gamma") == expected.info.get("gamma") == (1.0 if suffix == ".png" else None)
        for tag in (ExifTags.Base.Make, ExifTags.Base.Software, ExifTags.Base.YResolution):
            assert result.getexif()[tag] == expected.getexif()[tag]
        for group in (EXIF_IFD, GPS_IFD):
            assert dict(result.getexif().get_ifd(group)) == dict(expected.getexif().get_ifd(group)) != {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [strips.name, whole.name]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("size", [(1, 700), (700, 1), (256, 256), (257, 512)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strips_of_unusual_sizes(tmp_path, suffix, size):
    image = pixels("RGB", size)
    write_picture(Picture(image, Image.Exif(), None), tmp_path / f"a{suffix}", "test", cut(image, 13), size)
    write_picture(Picture(image, Image.Exif(), None), tmp_path / f"b{suffix}", "test")
    results = [np.asarray(Image.open(tmp_path / f"{name}{suffix}")) for name in "ab"]
    assert np.array_equal(*results)


def test_tiff_is_a_tiled_bigtiff(tmp_path):
    image = picture("RGB").image
    write_picture(picture("RGB"), tmp_path / "a.tif", "test", cut(image), image.size)
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    with Image.open(tmp_path / "a.tif") as result:
        assert result.tag_v2[TiffImagePlugin.TILEWIDTH] == 256
        assert len(result.tag_v2[TiffImagePlugin.TILEOFFSETS]) == 2 * 3


@pytest.mark.parametrize("mode", [*MODES, "F"])
@pytest.mark.parametrize("size", [(40, 1200), (93, 1033)])
def test_bicubic_in_strips_is_bicubic(mode, size):
    image = picture(mode, (31, 257)).image
    result = np.vstack([np.asarray(strip) for strip in resize_strips(image, size)])
    expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    # Pillow holds the place of a strip in the source as a 32-bit float.
    assert np.abs(result.astype(float) - expected).max() <= 1
    assert result.shape == expected.shape


def run_both(source, folder, monkeypatch, *options):
    """Enlarges the source in strips and as a whole; returns both images."""
    images = []
    for name, limit in (("strips", 1000), ("whole", 10**9)):
        monkeypatch.setattr(image_files, "MAX_WHOLE_PIXELS", limit)
        target = folder / f"{name}.tif"
        assert upscale.main([str(source), str(target), *options]) == 0
        images.append(Image.open(target))
        # The whole one is no BigTIFF, so that this shows which way was taken.
        assert (target.read_bytes()[2] == 43) == (name == "strips")
    return images


@pytest.mark.parametrize("mode", MODES)
def test_the_command_line_takes_strips_for_large_pictures(tmp_path, monkeypatch, mode):
    pixels(mode, (40, 30)).save(tmp_path / "in.png")
    strips, whole = run_both(tmp_path / "in.png", tmp_path, monkeypatch, "--scale", "3")
    assert strips.mode == whole.mode
    assert np.array_equal(np.asarray(strips), np.asarray(whole))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tiny_models import save_tiny_pipeline

    save_tiny_pipeline(folder := tmp_path_factory.mktemp("large") / "model")
    return folder


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA"])
def test_flux_in_strips_is_flux(tmp_path, monkeypatch, tiny_model, mode):
    pixels(mode, (40, 30)).save(tmp_path / "in.png")
    options = ["--use-flux", "--model", str(tiny_model), "--device", "cpu", "--steps", "1", "--scale", "3"]
    options += ["--tile-size", "64", "--tile-overlap", "16"]
    options += ["--vae-residual"] if mode == "RGBA" else []
    strips, whole = run_both(tmp_path / "in.png", tmp_path, monkeypatch, *options)
    assert strips.mode == whole.mode == mode
    assert np.array_equal(np.asarray(strips), np.asarray(whole))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strips_that_fail_leave_the_old_file_and_nothing_else(tmp_path, suffix):
    image = picture().image
    (tmp_path / f"out{suffix}").write_bytes(b"old")

    def fail():
        yield from list(cut(image))[:2]
        raise RuntimeError("the models failed")

    with pytest.raises(RuntimeError, match="the models failed"):
        write_picture(picture(), tmp_path / f"out{suffix}", "test", fail(), image.size)
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]
    assert (tmp_path / f"out{suffix}").read_bytes() == b"old"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_gets_full_while_strips_are_written(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8))
    noise = Picture(image, Image.Exif(), None)
    target = tmp_path / f"out{suffix}"
    target.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1000, 300_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"^cannot write .*/out\{suffix}: File too large"):
                write_picture(noise, target, "test", cut(image), image.size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
        assert target.read_bytes() == b"old"


def test_the_pipeline_resizes_in_bands_as_in_one(monkeypatch):
    import pipeline_flux_dino_tile
    from tiny_models import tiny_pipeline

    pipe = tiny_pipeline()
    image = pixels("RGB", (37, 61))
    whole = pipe.prepare_image(image, 150, 90)
    monkeypatch.setattr(pipeline_flux_dino_tile, "RESIZED_ROWS", 16)
    banded = pipe.prepare_image(image, 150, 90)
    assert whole.shape == banded.shape == (1, 3, 160, 96)
    assert (whole.int() - banded.int()).abs().max() <= 1
    expected = np.asarray(image.resize((90, 150), Image.Resampling.LANCZOS))
    assert np.array_equal(whole[0, :, :150, :90].permute(1, 2, 0).numpy(), expected)
