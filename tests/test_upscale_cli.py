"""The command line `scripts/upscale.py`: bicubic on real files, FLUX on the tiny model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from flux_dino_tile import __version__, upscale
from flux_dino_tile.enlargers import BicubicEnlarger
from flux_dino_tile.image_files import WRITE_FORMATS
from flux_dino_tile.options import CARDS_GIB, FLUX_OPTIONS, PLAN_OPTIONS, Options, parse_arguments
from flux_dino_tile.plans import transformer_flops


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "upscale.py"
BICUBIC = Image.Resampling.BICUBIC


def photo(mode="RGB", size=(20, 12)):
    rng = np.random.default_rng(1)
    channels = len(Image.new(mode, (1, 1)).getbands())
    bands = [Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)) for _ in range(channels)]
    return bands[0] if channels == 1 else Image.merge(mode, bands)


def run(*arguments):
    return upscale.main([str(argument) for argument in arguments])


def usage_error(capsys, *arguments):
    """Runs a command that must fail with exit code 2 and one line on stderr, which it returns."""
    assert run(*arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("upscale.py: error: ")
    return errors


def settings_of(path):
    name, version, settings = Image.open(path).getexif()[ExifTags.Base.Software].split(" ", 2)
    assert (name, version) == ("flux-dino-tile", __version__)
    return json.loads(settings)


@pytest.fixture
def folder(tmp_path):
    """`tmp_path` as the working folder, with `photo.png` in it."""
    photo().save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tiny_models import save_tiny_pipeline

    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_pipeline(directory, with_dino=True)
    return directory


# Bicubic


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize(("scale", "size"), [("4", (80, 48)), ("1", (20, 12)), ("2.33", (47, 28))])
def test_bicubic_is_pillows_bicubic(tmp_path, mode, scale, size):
    photo(mode).save(tmp_path / "in.png")
    assert run(tmp_path / "in.png", tmp_path / "out.png", "--scale", scale) == 0
    result = Image.open(tmp_path / "out.png")
    assert result.mode == mode
    assert np.array_equal(np.asarray(result), np.asarray(photo(mode).resize(size, BICUBIC)))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_bicubic_keeps_16_bit_grey(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 65536, (12, 20)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"in{suffix}")
    assert run(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}") == 0
    result = Image.open(tmp_path / f"out{suffix}")
    expected = np.asarray(Image.fromarray(values.astype(np.float32)).resize((80, 48), BICUBIC))
    assert result.mode == "I;16"
    assert np.array_equal(np.asarray(result), np.clip(np.rint(expected), 0, 65535))


def test_rotated_photo_comes_out_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo(size=(20, 12)).save(tmp_path / "in.png", exif=exif)
    assert run(tmp_path / "in.png", tmp_path / "out.png", "--scale", "2") == 0
    result = Image.open(tmp_path / "out.png")
    turned = photo(size=(20, 12)).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(result), np.asarray(turned.resize((24, 40), BICUBIC)))
    assert ExifTags.Base.Orientation not in result.getexif()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_settings_are_in_the_software_tag(folder, suffix):
    assert run(folder / "photo.png", folder / f"out{suffix}", "--scale", "2") == 0
    assert settings_of(folder / f"out{suffix}") == {"method": "bicubic", "scale": 2.0}


@pytest.mark.parametrize("arguments", [["--help"], ["photo.png"], [".", "-o", "out"]])
def test_bicubic_and_help_never_import_torch(folder, arguments):
    command = [sys.executable, "-X", "importtime", SCRIPT, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.returncode == 0 and "flux_dino_tile.options" in imported
    assert not {"torch", "diffusers", "transformers", "pipeline_flux_dino_tile"} & imported
    assert arguments == ["--help"] or list(folder.rglob("photo*.png")) != [folder / "photo.png"]


# Where the output goes


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("a.png", [], "a_x4.png"),
        ("a.JPG", [], "a_x4.JPG"),
        ("a.jpeg", ["--scale", "2"], "a_x2.jpeg"),
        ("a.webp", ["--scale", "1.5"], "a_x1.5.webp"),
        ("a.tiff", [], "a_x4.tiff"),
        ("a.bmp", [], "a_x4.png"),
        ("a.gif", [], "a_x4.png"),
    ],
)
def test_default_output_is_beside_the_input(tmp_path, name, options, expected):
    photo().save(tmp_path / name)
    assert run(tmp_path / name, *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, expected])
    assert Image.open(tmp_path / expected).format == WRITE_FORMATS[Path(expected).suffix.lower()]


def test_output_may_be_an_option_or_a_folder_or_in_a_new_folder(folder):
    assert run(folder / "photo.png", "-o", folder / "new" / "b.webp") == 0
    assert run(folder / "photo.png", folder / "new") == 0
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["b.webp", "photo_x4.png"]


def test_output_that_ends_in_a_slash_is_made_as_a_folder(folder):
    assert run(folder / "photo.png", f"{folder}/new/") == 0
    assert run(folder / "photo.png", "-o", f"{folder}/new.png/") == 0
    assert [path.name for path in (folder / "new").iterdir()] == ["photo_x4.png"]
    assert [path.name for path in (folder / "new.png").iterdir()] == ["photo_x4.png"]


def test_folder_keeps_its_structure(tmp_path, capsys, monkeypatch):
    source = tmp_path / "photos"
    (source / "deep" / "er").mkdir(parents=True)
    (source / ".hidden").mkdir()
    for name in ("a.png", "b.JPG", "deep/c.webp", "deep/er/d.gif", "._a.png", ".hidden/e.png"):
        photo().save(source / name, format="GIF" if name.endswith("gif") else "PNG")
    (source / "notes.txt").write_text("no image")
    monkeypatch.chdir(source)
    assert run(".", "--scale", "2") == 0
    results = sorted(str(path.relative_to(tmp_path / "photos_x2")) for path in (tmp_path / "photos_x2").rglob("*.*"))
    assert results == ["a.png", "b.JPG", "deep/c.webp", "deep/er/d.gif.png"]
    assert Image.open(tmp_path / "photos_x2" / "deep" / "c.webp").size == (40, 24)
    assert capsys.readouterr().out.splitlines()[-1] == "4 done, 0 skipped, 0 failed"


def test_results_inside_the_input_folder_are_not_enlarged_again(folder, capsys):
    for _ in range(2):
        assert run(folder, folder / "large") == 0
    assert sorted(path.name for path in folder.rglob("*.png")) == ["photo.png", "photo.png"]
    assert "skipped" in capsys.readouterr().out


# Several inputs, and pictures that must not be lost


def colors_of(folder):
    """The colour of every picture in the folder by its name."""
    return {
        str(path.relative_to(folder)): Image.open(path).convert("RGB").getpixel((0, 0)) for path in files_in(folder)
    }


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def save_colors(folder, *names):
    """Pictures of different colours, which come back."""
    pictures = {}
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (0, 0, 50 * index)).save(folder / name)
        pictures[name] = (0, 0, 50 * index)
    return pictures


@pytest.mark.parametrize(
    ("names", "results"),
    [
        (("a.gif", "a.gif.png"), ("a.gif.png.png", "a.gif.png")),
        (("a.bmp", "a.bmp.png", "a.bmp.png.png"), ("a.bmp.png.png.png", "a.bmp.png", "a.bmp.png.png")),
        (("A.png", "a.png", "b.png"), ("A.png", "a.png.png", "b.png")),
        (("b/A.png", "B/a.png"), ("b/A.png.png", "B/a.png")),
        (("caf\u00e9.png", "cafe\u0301.png"), ("caf\u00e9.png.png", "cafe\u0301.png")),
        (("A.gif", "a.gif.PNG"), ("A.gif.png.png", "a.gif.PNG")),
    ],
)
def test_no_two_pictures_of_a_folder_get_one_output(tmp_path, capsys, names, results):
    """Also where the disk takes upper and lower case, and two spellings of an accent, for the same."""
    colors = save_colors(tmp_path / "in", *names)
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--scale", "2") == 0
    assert colors_of(tmp_path / "out") == {result: colors[name] for name, result in zip(names, results)}
    assert f"{len(names)} done" in capsys.readouterr().out
    assert run(tmp_path / "in", "-o", tmp_path / "out", "--scale", "2") == 0
    assert f"{len(names)} skipped" in capsys.readouterr().out


def test_several_inputs_go_to_one_folder(tmp_path, monkeypatch):
    colors = save_colors(tmp_path, "a.png", "b/a.png", "b/a.bmp", "folder/c.png", "folder/deep/d.gif")
    monkeypatch.chdir(tmp_path)
    assert run("a.png", "--scale", "2", "b/a.png", "b/a.bmp", "folder", "./a.png", "-o", "out") == 0
    assert colors_of(tmp_path / "out") == {
        "a_x2.png": colors["a.png"],
        "a_x2.png.png": colors["b/a.png"],
        "a_x2.png.png.png": colors["b/a.bmp"],
        "folder_x2/c.png": colors["folder/c.png"],
        "folder_x2/deep/d.gif.png": colors["folder/deep/d.gif"],
    }


def test_options_may_stand_between_the_paths(folder):
    assert run(folder / "photo.png", "--scale", "2", folder / "out.png") == 0
    assert Image.open(folder / "out.png").size == (40, 24)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_no_output_is_the_file_of_another_input(tmp_path, capsys, options):
    before = save_colors(tmp_path, "a.png", "a_x2.png")
    error = usage_error(capsys, tmp_path / "a.png", tmp_path / "a_x2.png", "-o", tmp_path, "--scale", "2", *options)
    assert f"{tmp_path / 'a_x2.png'}: the output would overwrite the input" in error
    assert colors_of(tmp_path) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(tmp_path / "in" / "b.png")
    save_colors(tmp_path / "in", "a.png", "b.png")
    error = usage_error(capsys, tmp_path / "in", tmp_path / "out", *options)
    assert f"{tmp_path / 'out' / 'a.png'}: the output would overwrite the input" in error


def test_pictures_that_are_not_read_are_named_in_one_line(tmp_path, capsys):
    for name in ("b.heic", "deep/c.TGA", "d.nef", "notes.txt", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    error = usage_error(capsys, tmp_path)
    named = "pictures of kinds that are not read: " + ", ".join(
        str(tmp_path / name) for name in ("b.heic", "d.nef", "deep/c.TGA")
    )
    assert f"{tmp_path}: no images in this folder" in error and named in error
    photo().save(tmp_path / "a.png")
    assert run(tmp_path, "-o", tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "b.heic" in line]
    assert lines == [f"left out: {named} (pip install pillow-heif for HEIC)"]
    assert [path.name for path in files_in(tmp_path / "out")] == ["a.png"]


def test_a_heic_without_pillow_heif_says_what_reads_it(tmp_path, capsys):
    for name in ("a.heic", "a.jpg"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
        assert run(tmp_path / name) == 1
        assert "is a HEIC, which is read where pillow-heif is installed" in capsys.readouterr().err


def test_a_long_list_of_pictures_that_are_not_read_is_cut(tmp_path, capsys):
    for index in range(25):
        (tmp_path / f"{index:02}.tga").write_bytes(b"x")
    photo().save(tmp_path / "a.png")
    assert run(tmp_path, "-o", tmp_path / "out") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "19.tga and 5 more" in line and "20.tga" not in line and "pillow-heif" not in line


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    """A stand-in for it reads BMP by the name of HEIC."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pillow_heif.py").write_text(
        "from PIL import BmpImagePlugin, Image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', BmpImagePlugin.BmpImageFile, lambda start: start[:2] == b'BM')\n"
    )
    (tmp_path / "in").mkdir()
    photo().save(tmp_path / "in" / "a.heic", format="BMP")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    for source, result in (("in", "in_x4/a.heic.png"), ("in/a.heic", "in/a_x4.png")):
        command = [sys.executable, SCRIPT, source]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert (run.returncode, run.stderr) == (0, "")
        assert np.array_equal(np.asarray(Image.open(tmp_path / result)), np.asarray(photo().resize((80, 48), BICUBIC)))


def count_decoded(monkeypatch):
    """The names of the files that Pillow decodes, in their order, once for each time."""
    from PIL import ImageFile

    decoded, load = [], ImageFile.ImageFile.load

    def count(image):
        if getattr(image, "tile", None):
            decoded.append(Path(image.fp.name).name)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", count)
    return decoded


@pytest.mark.parametrize("options", [["--plan"], [], ["flux"]])
def test_every_picture_is_decoded_once_in_its_turn(folder, tiny_model, capsys, monkeypatch, options):
    for name in ("a.jpg", "b.png", "c.tif", "d.bmp"):
        photo().save(folder / name)
    decoded = count_decoded(monkeypatch)
    # The last one turns out to be damaged when the others are done.
    data = (folder / "photo.png").read_bytes()
    (folder / "z.png").write_bytes(data[: len(data) // 2])
    if options == ["flux"]:
        options = ["--use-flux", "--model", tiny_model, "--device", "cpu", "--steps", "1"]
    status = run(folder, "-o", folder.parent / f"{folder.name}_out", "--scale", "1", *options)
    if options == ["--plan"]:
        assert (status, decoded) == (0, [])
    else:
        assert (status, decoded) == (1, ["a.jpg", "b.png", "c.tif", "d.bmp", "photo.png", "z.png"])
        assert "5 done, 0 skipped, 1 failed" in capsys.readouterr().out


def test_a_png_whose_exif_stands_behind_the_pixels_is_planned_upright(tmp_path, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo(size=(20, 12)).save(tmp_path / "in.png", exif=exif)
    data = (tmp_path / "in.png").read_bytes()
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    (tmp_path / "in.png").write_bytes(moved)
    assert run(tmp_path / "in.png", "--plan", "--scale", "2") == 0
    assert "12x20 -> 24x40 px" in capsys.readouterr().out
    assert run(tmp_path / "in.png", "--scale", "2") == 0
    assert Image.open(tmp_path / "in_x2.png").size == (24, 40)


def test_second_run_skips_and_overwrite_does_not(folder, capsys):
    arguments = (folder / "photo.png", "-o", folder / "out.png")
    assert run(*arguments) == 0
    before = (folder / "out.png").read_bytes()
    capsys.readouterr()

    assert run(*arguments, "--scale", "2") == 0
    output, errors = capsys.readouterr()
    assert output == (
        f"{folder / 'photo.png'}: skipped, {folder / 'out.png'} is already there, whatever settings made it"
        " (--overwrite makes it anew)\n"
    )
    assert errors == ""
    assert (folder / "out.png").read_bytes() == before

    assert run(*arguments, "--scale", "2", "--overwrite") == 0
    assert Image.open(folder / "out.png").size == (40, 24)


# Errors of single images


def test_one_broken_file_does_not_stop_a_folder(folder, capsys):
    photo().save(folder / "also good.jpg")
    (folder / "broken.png").write_bytes((folder / "photo.png").read_bytes()[:300])
    (folder / "empty.jpg").touch()
    (folder / "text.webp").write_text("no image")
    output_folder = folder.with_name(f"{folder.name}_large")
    (output_folder).mkdir()
    photo().save(output_folder / "photo.png")
    assert run(folder, output_folder) == 1
    output, errors = capsys.readouterr()
    assert output.splitlines()[-1] == "1 done, 1 skipped, 3 failed"
    assert len(errors.splitlines()) == 3
    for name, reason in (
        ("broken.png", "cannot be read"),
        ("empty.jpg", "is empty"),
        ("text.webp", "is not an image"),
    ):
        assert any(f"{folder / name}: {reason}" in line for line in errors.splitlines())
    assert sorted(path.name for path in output_folder.iterdir()) == ["also good.jpg", "photo.png"]


def test_a_file_that_fails_gives_exit_code_1(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    assert run(tmp_path / "text.png") == 1
    assert (
        capsys.readouterr().err
        == f"upscale.py: error: {tmp_path / 'text.png'}: is not an image that Pillow can read\n"
    )


def test_errors_about_the_output_name_it(folder, capsys):
    (folder / "file").touch()
    long_name = f"{'a' * 300}.png"
    for output, reason in (
        ("/proc/foo.png", "No such file or directory"),
        (folder / "file" / "x.png", f"{folder / 'file'} is not a folder"),
        (folder / "file" / "deep" / "x.png", f"{folder / 'file'} is not a folder"),
        (folder / long_name, "File name too long"),
    ):
        assert run(folder / "photo.png", output) == 1
        message = f"upscale.py: error: {folder / 'photo.png'}: cannot write {output}: {reason}\n"
        assert capsys.readouterr().err == message
    assert sorted(path.name for path in folder.iterdir()) == ["file", "photo.png"]


def test_size_limits_are_known_before_the_work(tmp_path, capsys, monkeypatch):
    Image.new("L", (5000, 2)).save(tmp_path / "in.png")
    monkeypatch.setattr(BicubicEnlarger, "whole", None)
    assert run(tmp_path / "in.png", tmp_path / "out.webp") == 1
    assert "20000x8 px is more than the 16383 px that WEBP can hold" in capsys.readouterr().err


def test_losses_are_said(tmp_path, capsys):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (4, 4)).save(
        tmp_path / "moves.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]
    )
    assert run(tmp_path / "deep.png", tmp_path / "out.jpg") == 0
    assert run(tmp_path / "moves.gif") == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'deep.png'}: 16 bits become 8 in JPEG" in output
    assert f"{tmp_path / 'moves.gif'}: only the first of 2 frames is enlarged" in output


def test_interrupt_is_one_line(folder, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(BicubicEnlarger, "whole", interrupt)
    assert run(folder / "photo.png") == 130
    assert capsys.readouterr().err == "upscale.py: error: interrupted\n"
    assert [path.name for path in folder.iterdir()] == ["photo.png"]


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no input is given (--help"),
        ([""], "argument input: the name is empty"),
        (["photo.png", ""], "argument input: the name is empty"),
        (["photo.png", "-o", ""], "argument -o/--output: the name is empty"),
        (["photo.png", "--use-flux", "--model", ""], "argument --model: the name is empty"),
        (["photo.png", "--use-flux", "--model", "a/b", "--projector", ""], "--projector: the name is empty"),
        (["a" * 300], "no such file or folder"),
        (["photo.png", "--scale", "0.5"], "--scale: must be a number from 1 to 8, not '0.5'"),
        (["photo.png", "--scale", "9"], "--scale: must be"),
        (["photo.png", "--scale", "nan"], "--scale: must be"),
        (["photo.png", "--scale", "four"], "--scale: must be"),
        (["photo.png", "--wrong"], "--wrong"),
        (["missing.png"], "missing.png: no such file or folder"),
        (["empty"], "empty: no images in this folder"),
        (["empty", "--plan"], "empty: no images in this folder"),
        (["photo.png", "out.xyz"], "out.xyz: the output must be a folder or end in .png"),
        (["photo.png", "out"], "out: the output must be"),
        (["photo.png", "photo.png"], "would overwrite the input"),
        (["photo.png", "photo.png", "--overwrite"], "would overwrite the input"),
        (["photo.png", "./empty/../photo.png"], "would overwrite the input"),
        (["--scale", "2"], "no input is given (--help"),
        (["photo.png", "full/a.png"], "full/a.png: a picture that is already there is no output without -o"),
        (["photo.png", "full/a.png", "--overwrite"], "give -o FOLDER to enlarge both, or -o full/a.png"),
        (["photo.png", "full/a.png", "--plan"], "give -o FOLDER to enlarge both"),
        (["photo.png", "full/a.png", "new/"], "several inputs need a folder for the results: -o FOLDER"),
        (["photo.png", "full/a.png", "-o", "b.png"], "b.png: several inputs need a folder for the results"),
        (["photo.png", "a.png", "-o", "new/"], "a.png: no such file or folder"),
        (["full", "full"], "would overwrite the input"),
        (["full", "photo.png"], "photo.png: the input is a folder"),
        (["photo.png", "--use-flux", "--model", "empty"], "empty: the folder has no model_index.json"),
        (["photo.png", "--use-flux", "--model", "no folder"], "no folder: no such folder"),
        (["photo.png", "--use-flux", "--model", "a/b", "--projector", "empty"], "has no dino_projector/config.json"),
        (["photo.png", "--use-flux", "--model", "a/b", "--projector", "nothing"], "nothing: no such folder"),
        (["photo.png", "--use-flux", "--model", "a/b", "--dino-strength", "-1"], "--dino-strength: must be"),
        (["photo.png", "--use-flux", "--model", "a/b", "--start-sigma", "0"], "--start-sigma: must be"),
        (["photo.png", "--use-flux", "--model", "a/b", "--start-sigma", "1.1"], "--start-sigma: must be"),
        (["photo.png", "--use-flux", "--model", "a/b", "--steps", "0"], "--steps: must be a whole number"),
        (["photo.png", "--use-flux", "--model", "a/b", "--steps", "1.5"], "--steps: must be a whole number"),
        (["photo.png", "--use-flux", "--model", "a/b", "--guidance", "inf"], "--guidance: must be"),
        (
            ["photo.png", "--use-flux", "--model", "a/b", "--tile-size", "1000"],
            "--tile-size: must be a multiple of 16",
        ),
        (["photo.png", "--plan", "--tile-size", "1000"], "--tile-size: must be a multiple of 16"),
        (["photo.png", "--plan", "--tile-size", "64", "--tile-overlap", "64"], "--tile-overlap: must be below the 64"),
        (
            ["photo.png", "--plan", "--tile-size", "64", "--tile-overlap", "60"],
            "--tile-overlap: must be below the 64 px of --tile-size, but 60 is 64 px in whole tokens of 16 px",
        ),
        (["photo.png", "--use-flux", "--model", "a/b", "--tile-overlap", "-1"], "--tile-overlap: must be"),
        (["photo.png", "--use-flux", "--model", "a/b", "--tile-batch-size", "0"], "--tile-batch-size: must be"),
        (["photo.png", "--use-flux", "--model", "a/b", "--seed", "-1"], "from 0 to 18446744073709551615, not"),
        (["photo.png", "--use-flux", "--model", "a/b", "--offload", "disk"], "--offload: invalid choice"),
        (["photo.png", "--use-flux", "--model", "a/b", "--dtype", "int8"], "--dtype: invalid choice"),
        (["photo.png", "--use-flux", "--model", "a/b", "--color-fix", "auto"], "--color-fix: invalid choice"),
        (["photo.png", "--use-flux", "--model", "a/b", "--compile", "--offload", "group"], "--compile does not work"),
        (["photo.png", "--use-flux", "--model", "a/b", "--compile", "--memory", "8"], "--compile does not work"),
        (["photo.png", "--use-flux", "--model", "a/b", "--quantize", "nf4", "--memory", "8"], "--quantize does not"),
        (["photo.png", "--use-flux", "--model", "a/b", "--memory", "8", "--offload", "model"], "--memory 8 sets"),
        (["photo.png", "--use-flux", "--model", "a/b", "--memory", "6"], "--memory: invalid choice"),
        (["photo.png", "--use-flux", "--model", "a/b", "--text-tokens", "513"], "--text-tokens: must be"),
        (["photo.png", "--use-flux", "--model", "a/b", "--skip-flat-tiles", "2"], "--skip-flat-tiles: must be"),
        (["photo.png", "--plan", "--model", "empty"], "empty: the folder has no model_index.json"),
    ],
)
def test_usage_errors(folder, capsys, monkeypatch, arguments, message):
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    photo().save(folder / "full" / "a.png")
    monkeypatch.chdir(folder)
    before = (folder / "photo.png").read_bytes()
    assert message in usage_error(capsys, *arguments)
    assert (folder / "photo.png").read_bytes() == before
    assert sorted(path.name for path in folder.rglob("*")) == ["a.png", "empty", "full", "photo.png"]


DOG = {"prompt": "a dög", "box": [0, 0, 20, 12]}


def save_regions(folder, *regions):
    """The name of a file with these regions."""
    (folder / "regions.json").write_text(json.dumps(regions))
    return folder / "regions.json"


@pytest.mark.parametrize("option", FLUX_OPTIONS)
def test_flux_options_need_use_flux(folder, capsys, option):
    values = {
        "model": ["owner/name"],
        "projector": ["owner/name"],
        "start_sigma": ["0.5"],
        "dtype": ["float32"],
        "offload": ["model"],
        "color_fix": ["adain"],
        "vae_residual": [],
        "skip_flat_tiles": ["0.02"],
        "quantize": ["nf4"],
        "compile": [],
        "resume": [],
    }
    values["region_prompts"] = [save_regions(folder, DOG)]
    flag = f"--{option.replace('_', '-')}"
    command = [folder / "photo.png", flag, *values.get(option, ["16"])]
    assert usage_error(capsys, *command) == f"upscale.py: error: {flag} needs --use-flux\n"
    if option in PLAN_OPTIONS:
        assert parse(*command, "--tile-overlap", "0", "--plan").plan
    else:
        assert usage_error(capsys, *command, "--plan") == f"upscale.py: error: {flag} needs --use-flux\n"


def parse(*arguments):
    return parse_arguments([str(argument) for argument in arguments])


@pytest.mark.parametrize("memory", CARDS_GIB)
def test_memory_is_a_recipe(memory):
    command = ("photo.png", "--use-flux", "--model", "a/b", "--memory", memory)
    assert (parse(*command).offload, parse(*command).tile_batch_size) == ("group", 4)
    assert parse(*command, "--tile-batch-size", "2").tile_batch_size == 2


def test_quantized_layers_are_the_large_ones_of_the_blocks():
    """The whole list for one block of each kind; embedders, modulation and the last layers stay as they are."""
    import torch

    from flux_dino_tile.loading import is_quantized_layer
    from tiny_models import tiny_transformer

    transformer = tiny_transformer()
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    quantized = {name for name in layers if is_quantized_layer(name)}
    attention = ("to_q", "to_k", "to_v")
    added = ("add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    double = {*(f"attn.{name}" for name in attention + added), *feed_forward}
    single = {*(f"attn.{name}" for name in attention), "proj_mlp", "proj_out"}
    assert quantized == {
        *(f"transformer_blocks.{index}.{name}" for index in range(2) for name in double),
        *(f"single_transformer_blocks.{index}.{name}" for index in range(2) for name in single),
    }


def test_a_missing_quantizer_is_named_before_the_model_is_loaded(folder, tiny_model, capsys, monkeypatch):
    for module in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    command = (folder / "photo.png", "--use-flux", "--model", tiny_model, "--device", "cpu", "--quantize", "fp8")
    error = usage_error(capsys, *command)
    assert error.startswith("upscale.py: error: --quantize fp8: ") and error.endswith("the extra `quant` brings it\n")


def test_every_option_is_in_the_help_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("--help")
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in FLUX_OPTIONS:
        assert f"--{option.replace('_', '-')}" in text
    for name in ("scale", "tile_overlap", "tile_batch_size", "seed", "offload"):
        default = str(getattr(Options(), name)).removesuffix(".0")
        assert f"(default: {default})" in text.split(f"--{name.replace('_', '-')} ", 1)[1][:400]


def test_a_process_prints_errors_without_a_traceback(tmp_path):
    result = subprocess.run([sys.executable, SCRIPT, "missing.png"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "upscale.py: error: missing.png: no such file or folder\n"


def test_a_process_upscales_the_sample(tmp_path):
    command: list = [sys.executable, SCRIPT, ROOT / "samples" / "photo.jpg", "out.jpg", "--scale", "4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{ROOT / 'samples' / 'photo.jpg'} -> out.jpg (960x1280 px)\n"
    assert Image.open(tmp_path / "out.jpg").size == (960, 1280)


# The plan


def test_plan_prints_what_the_planner_says_and_writes_nothing(tmp_path, capsys):
    from pipeline_flux_dino_tile import plan_tiles

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (300, 500)).save(tmp_path / "a.jpg", exif=exif)
    assert run(tmp_path / "a.jpg", "--plan") == 0
    output = capsys.readouterr().out
    plan = plan_tiles(1200, 2000)
    tflop = transformer_flops(plan.tokens_per_tile + 768) / 1e12
    assert "500x300 -> 2000x1200 px" in output
    assert f"tiles: {len(plan)} ({len(plan.lefts)} across, {len(plan.tops)} down) of" in output
    assert f"{plan.tile_width}x{plan.tile_height} px, overlapping " in output
    assert f"{plan.tokens_per_tile} image + 512 text + 256 DINO" in output
    assert f"TFLOP per step: {len(plan) * tflop:.4g} ({tflop:.4g} per tile)" in output
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_plan_takes_tile_options_and_the_models_architecture(folder, tiny_model, capsys):
    options = ("--tile-size", "32", "--tile-overlap", "16", "--model", tiny_model)
    assert run(folder / "photo.png", "--plan", *options) == 0
    output = capsys.readouterr().out
    # 80x48 px in tiles of 32 px.
    assert "tiles: 8 (4 across, 2 down) of 32x32 px, overlapping 16 px\n" in output
    assert "tokens per tile: 4 image" in output
    for option, num_text_tokens in (((), 256), (("--text-tokens", "128"), 128)):
        assert run(folder / "photo.png", "--plan", *options, *option) == 0
        # The projector of the tiny model makes 4 x 4 tokens.
        tflop = transformer_flops(4 + num_text_tokens + 16, inner_dim=32, num_layers=4) / 1e12
        output = capsys.readouterr().out
        assert f"4 image + {num_text_tokens} text + 16 DINO" in output and f"({tflop:.4g} per tile)" in output


def test_plan_counts_the_dino_tokens_of_the_projector(folder, tiny_model, capsys):
    shutil.copytree(tiny_model, folder / "plain", ignore=shutil.ignore_patterns("dino_*"))
    for name, projector in (("nested/dino_projector", {"token_grid": 8}), ("flat", {})):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(projector))
    for options, count in (
        (["--model", tiny_model], 16),
        (["--model", tiny_model, "--projector", folder / "nested"], 64),
        (["--model", tiny_model, "--use-flux", "--dino-strength", "0"], 0),
        (["--model", folder / "plain"], 0),
        (["--model", folder / "plain", "--projector", folder / "flat"], 256),
        (["--projector", folder / "nested"], 64),
        ([], 256),
    ):
        assert run(folder / "photo.png", "--plan", *options) == 0
        assert f" text + {count} DINO\n" in capsys.readouterr().out, options
    (folder / "flat" / "config.json").write_text("[]")
    error = usage_error(capsys, folder / "photo.png", "--plan", "--projector", folder / "flat")
    assert f"--projector {folder / 'flat'}: not the folder of a projector" in error


def test_plan_gives_the_least_and_the_greatest_overlap(tmp_path, capsys):
    Image.new("RGB", (100, 64)).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--plan", "--scale", "1", "--tile-size", "48", "--tile-overlap", "16") == 0
    assert "tiles: 6 (3 across, 2 down) of 48x48 px, overlapping 16 to 32 px\n" in capsys.readouterr().out


def test_plan_names_a_model_folder_of_another_kind(folder, capsys):
    for file in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("{}")
    error = usage_error(capsys, folder / "photo.png", "--plan", "--model", folder)
    assert f"--model {folder}: not the folder of a FLUX.1 pipeline" in error


def test_plan_of_a_folder_adds_up_and_names_broken_files(folder, capsys):
    photo().save(folder / "b.jpg")
    (folder / "c.png").touch()
    assert run(folder, "--plan") == 1
    output, errors = capsys.readouterr()
    assert output.splitlines()[-1].startswith("2 images: 2 tiles, ")
    assert errors == f"upscale.py: error: {folder / 'c.png'}: is empty\n"


# FLUX on the tiny model


def forbid_loading(monkeypatch):
    from pipeline_flux_dino_tile import FluxDinoTilePipeline

    def fail(*arguments, **options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(FluxDinoTilePipeline, "from_pretrained", fail)


def flux(tiny_model, *arguments):
    return run("--use-flux", "--model", tiny_model, "--device", "cpu", "--steps", "1", *arguments)


def last_error(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_flux_gives_what_the_pipeline_gives(folder, tiny_model):
    import torch

    from flux_dino_tile.color_fix import match_color
    from pipeline_flux_dino_tile import FluxDinoTilePipeline

    options = ["--scale", "2", "--prompt", "a dög", "--start-sigma", "0.5", "--seed", "3", "--tile-size", "32"]
    options += [
        "--tile-overlap",
        "16",
        "--dino-strength",
        "0.5",
        "--color-fix",
        "wavelet",
        "--tile-batch-size",
        "2",
        "--vae-residual",
    ]
    assert flux(tiny_model, folder / "photo.png", folder / "out.png", *options) == 0

    pipe = FluxDinoTilePipeline.from_pretrained(tiny_model)
    pipe.load_dino_projector(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        image=photo(),
        upscale_factor=2,
        prompt="a dög",
        start_sigma=0.5,
        num_inference_steps=1,
        tile_size=32,
        tile_overlap=16,
        dino_conditioning_scale=0.5,
        vae_residual=True,
        generator=torch.Generator().manual_seed(3),
    )
    expected = match_color(pipe, output.images, photo(), "wavelet")[0]
    result = Image.open(folder / "out.png")
    assert result.size == (40, 24)
    assert np.abs(np.asarray(result).astype(int) - np.asarray(expected)).max() <= 1

    settings = settings_of(folder / "out.png")
    assert settings == {
        "method": "flux",
        "photo": {"name": "photo.png", "digest": hashlib.sha256(photo().tobytes()).hexdigest()[:16]},
        "scale": 2.0,
        "model": "model",
        "prompt": "a dög",
        "dino_strength": 0.5,
        "start_sigma": 0.5,
        "steps": 1,
        "guidance": 3.5,
        "tile_size": 32,
        "tile_overlap": 16,
        "seed": 3,
        "dtype": "float32",
        "color_fix": "wavelet",
        "vae_residual": True,
    }


def test_flux_writes_the_values_of_options_that_are_not_given(folder, tiny_model):
    assert run(folder / "photo.png", "--use-flux", "--model", tiny_model, "--device", "cpu", "--scale", "1") == 0
    settings = settings_of(folder / "photo_x1_flux.png")
    assert settings.pop("photo")["name"] == "photo.png"
    assert settings == {
        "method": "flux",
        "scale": 1.0,
        "model": "model",
        "dino_strength": 1.0,
        "start_sigma": 0.35,
        "steps": 4,
        "guidance": 3.5,
        "tile_overlap": 64,
        "seed": 0,
        "dtype": "float32",
    }


def test_flux_has_default_names_of_its_own(folder, tiny_model, capsys):
    for path in (folder / "photo.png", folder):
        assert run(path, "--scale", "1") == 0
        assert flux(tiny_model, path, "--scale", "1") == 0
    assert "is already there" not in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["photo.png", "photo_x1.png", "photo_x1_flux.png"]
    assert folder.with_name(f"{folder.name}_x1").is_dir()
    assert folder.with_name(f"{folder.name}_x1_flux").is_dir()


def test_flux_shows_the_bar_of_the_tiles_and_nothing_else(folder, tiny_model):
    command = [sys.executable, SCRIPT, "photo.png", "--use-flux", "--model", tiny_model, "--device", "cpu"]
    command += ["--scale", "1", "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (result.returncode, result.stdout) == (0, "photo.png -> photo_x1_flux.png (20x12 px)\n")
    shown = [text.strip() for text in re.split(r"[\r\n]", result.stderr) if text.strip()]
    assert shown[-1].startswith("100%|")
    assert all(re.fullmatch(r"\d+%\|.*\| \d/2 \[.*\]", text) for text in shown), shown

    plan = subprocess.run([sys.executable, SCRIPT, "photo.png", "--plan"], capture_output=True, text=True, cwd=folder)
    assert (plan.returncode, plan.stderr) == (0, "")


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled; nothing is, because that takes minutes."""
    import torch

    functions = []

    def compile_nothing(function, **options):
        functions.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return functions


def test_compile_takes_the_blocks_and_the_vae(folder, tiny_model, compiled):
    assert flux(tiny_model, folder / "photo.png", "--scale", "1", "--compile") == 0
    kinds = {type(function.__self__).__name__ for function in compiled}
    assert kinds == {"FluxTransformerBlock", "FluxSingleTransformerBlock", "Encoder", "Decoder"}


def test_compiled_images_get_one_tile_size_also_after_a_crash(folder, tiny_model, compiled, monkeypatch):
    """That of the largest, which is the second here."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    photo(size=(24, 24)).save(folder / "a.png")
    photo(size=(150, 130)).save(folder / "b.png")
    (folder / "photo.png").unlink()
    command = [folder, "-o", folder / "out", "--scale", "8", "--compile", "--resume"]
    with monkeypatch.context() as patch:
        steps, step = [], FlowMatchEulerDiscreteScheduler.step

        def interrupt(self, *arguments, **kwargs):
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return step(self, *arguments, **kwargs)

        patch.setattr(FlowMatchEulerDiscreteScheduler, "step", interrupt)
        assert flux(tiny_model, *command, "--steps", "2") == 130
    assert [path.name for path in files_in(folder / "out") if path.suffix == ".png"] == ["a.png"]
    assert flux(tiny_model, *command, "--steps", "2") == 0
    tile_sizes = [settings_of(folder / "out" / name)["tile_size"] for name in ("a.png", "b.png")]
    assert tile_sizes[0] == tile_sizes[1] and min(tile_sizes[0]) > 8 * 24


def test_flux_keeps_grey_alpha_and_orientation_and_says_that_16_bits_are_lost(tmp_path, tiny_model, capsys):
    source = tmp_path / "in"
    source.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Maker"
    for mode in ("L", "LA", "RGBA"):
        photo(mode).save(source / f"{mode}.png", exif=exif)
    Image.fromarray(np.zeros((12, 20), dtype=np.uint16)).save(source / "deep.png")

    assert flux(tiny_model, source, tmp_path / "out", "--scale", "1.5") == 0
    for mode in ("L", "LA", "RGBA"):
        result = Image.open(tmp_path / "out" / f"{mode}.png")
        assert (result.mode, result.size) == (mode, (18, 30))
        assert result.getexif()[ExifTags.Base.Make] == "Maker"
        if mode != "L":
            alpha = photo(mode).getchannel("A").transpose(Image.Transpose.ROTATE_270)
            assert result.getchannel("A").tobytes() == alpha.resize((18, 30), BICUBIC).tobytes()
    assert Image.open(tmp_path / "out" / "deep.png").mode == "L"
    assert f"{source / 'deep.png'}: 16 bits become 8 with FLUX" in capsys.readouterr().out


def test_flux_gives_the_same_image_for_the_same_seed(folder, tiny_model):
    for name, seed in (("a.png", "7"), ("b.png", "7"), ("c.png", "8")):
        assert flux(tiny_model, folder / "photo.png", folder / name, "--scale", "2", "--seed", seed) == 0
    a, b, c = (np.asarray(Image.open(folder / name)) for name in ("a.png", "b.png", "c.png"))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_flux_takes_another_projector_and_refuses_one_that_does_not_fit(folder, tiny_model, tmp_path, capsys):
    import torch

    from pipeline_flux_dino_tile import DinoProjector
    from tiny_models import tiny_dino, tiny_projector

    def save(name, **config):
        torch.manual_seed(9)
        DinoProjector(**{**dict(tiny_projector().config), **config}).save_pretrained(folder / name / "dino_projector")
        tiny_dino().save_pretrained(folder / name / "dino_encoder")
        return folder / name

    fitting, wrong = save("fitting"), save("wrong", out_dim=48)
    arguments = (folder / "photo.png", "--scale", "2", "--overwrite")
    for name, options in (("a.png", ()), ("b.png", ("--projector", fitting)), ("c.png", ("--dino-strength", "0"))):
        assert flux(tiny_model, *arguments, "-o", folder / name, *options) == 0
    a, b, c = (np.asarray(Image.open(folder / name)) for name in ("a.png", "b.png", "c.png"))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert settings_of(folder / "b.png")["projector"] == "fitting"

    capsys.readouterr()
    assert flux(tiny_model, *arguments, "--projector", wrong) == 2
    error = last_error(capsys)
    assert error.startswith(f"upscale.py: error: --projector {wrong}: ")
    assert "48" in error


def test_flux_without_a_projector(folder, tmp_path_factory, capsys):
    from tiny_models import save_tiny_pipeline

    model = tmp_path_factory.mktemp("plain") / "model"
    save_tiny_pipeline(model, with_dino=False)
    assert flux(model, folder / "photo.png", "--scale", "2") == 0
    assert "no DINO projector" in capsys.readouterr().out
    assert "dino_strength" not in settings_of(folder / "photo_x2_flux.png")
    error = usage_error(capsys, folder / "photo.png", "--use-flux", "--model", model, "--dino-strength", "1")
    assert "--dino-strength needs --projector" in error


def test_broken_model_folders_are_one_line(folder, tiny_model, tmp_path, capsys):
    for name, file, content in (
        ("no weights", "transformer/diffusion_pytorch_model.safetensors", None),
        ("half weights", "transformer/diffusion_pytorch_model.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{}"),
        ("no json", "model_index.json", b"{"),
        ("other model", "model_index.json", b'{"_class_name": "StableDiffusionPipeline"}'),
        ("no tokenizer", "tokenizer/tokenizer.json", b"{}"),
        ("other transformer", "transformer/config.json", b'{"_class_name": "FluxTransformer2DModel"}'),
    ):
        model = tmp_path / name
        shutil.copytree(tiny_model, model)
        if content is None:
            (model / file).unlink()
        else:
            (model / file).write_bytes(content)
        assert flux(model, folder / "photo.png") == 2, name
        assert last_error(capsys).startswith(f"upscale.py: error: --model {model}: "), name


@pytest.mark.parametrize("option", ["--use-flux", "--plan"])
@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_a_model_folder_without_a_part_is_named_before_loading(folder, tiny_model, capsys, monkeypatch, part, option):
    forbid_loading(monkeypatch)
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    shutil.rmtree(model / part)
    if (part, option) == ("scheduler", "--plan"):
        assert run(folder / "photo.png", option, "--model", model) == 0
    else:
        error = usage_error(capsys, folder / "photo.png", option, "--model", model)
        assert f"--model {model}: the folder has no {part}/" in error


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_that_cannot_be_reached(folder, variables):
    command = [sys.executable, SCRIPT, "photo.png", "--use-flux", "--model", "owner/name", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    environment |= {"HF_HOME": str(folder / "cache"), **variables}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "upscale.py: error: --model owner/name: not in the local cache, and the Hub cannot be reached"
    )


def test_a_projector_on_a_hub_that_cannot_be_reached(folder, tiny_model, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert flux(tiny_model, folder / "photo.png", "--projector", "owner/name") == 2
    assert "--projector owner/name: not in the local cache, and the Hub cannot be reached" in last_error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--offload", "model"], "--offload model needs an accelerator"),
        (["--device", "cpu", "--offload", "group"], "--offload group needs an accelerator"),
        (["--device", "banana"], "--device banana: not a device of this PyTorch: use cuda, mps or cpu"),
        (["--device", "cuda:x"], "--device cuda:x: not a device of this PyTorch: use cuda, mps or cpu"),
        (["--device", "vulkan"], "--device vulkan: not a device of this PyTorch: use cuda, mps or cpu"),
        (["--device", "hpu"], "--device hpu: not a device of this PyTorch: use cuda, mps or cpu"),
        (["--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_devices_that_are_not_there(folder, tiny_model, capsys, options, message):
    assert run(folder / "photo.png", "--use-flux", "--model", tiny_model, *options) == 2
    assert message in last_error(capsys)


def test_a_device_that_pytorch_is_not_built_for(folder, tiny_model, capsys, monkeypatch):
    import torch

    def fail(*args, **options):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", fail)
    assert run(folder / "photo.png", "--use-flux", "--model", tiny_model, "--device", "cuda") == 2
    assert last_error(capsys) == "upscale.py: error: --device cuda: Torch not compiled with CUDA enabled"


def test_nothing_is_loaded_when_nothing_is_left_to_do(folder, tiny_model, capsys, monkeypatch):
    forbid_loading(monkeypatch)
    photo().save(folder / "out.png")
    assert flux(tiny_model, folder / "photo.png", "-o", folder / "out.png") == 0
    (folder / "text.png").write_text("no image")
    assert flux(tiny_model, folder / "text.png") == 1
    photo(size=(250, 250)).save(folder / "large.png")
    assert flux(tiny_model, folder / "large.png", "--tile-overlap", "1600", "--scale", "8") == 1
    assert "`tile_overlap` must be below the tile's 1024 px" in last_error(capsys)
    (folder / "half.png").write_bytes((folder / "photo.png").read_bytes()[:300])
    assert flux(tiny_model, folder / "half.png") == 1
    assert f"{folder / 'half.png'}: cannot be read" in last_error(capsys)


def test_flat_tiles_are_skipped_also_with_a_contrast_of_0(folder, tiny_model, monkeypatch):
    """Four tiles: two of one colour, one of little contrast, one of noise."""
    from diffusers import FluxTransformer2DModel

    image = Image.new("RGB", (96, 96), (90, 120, 200))
    image.paste(photo(size=(48, 48)), (48, 48))
    image.paste(Image.effect_noise((48, 48), 3).convert("RGB"), (0, 48))
    image.save(folder / "flat.png")
    calls, forward = [], FluxTransformer2DModel.forward
    monkeypatch.setattr(
        FluxTransformer2DModel,
        "forward",
        lambda *arguments, **kwargs: calls.append(1) or forward(*arguments, **kwargs),
    )
    command = [folder / "flat.png", "-o", folder / "out.png", "--scale", "1", "--overwrite", "--dino-strength", "0"]
    command += ["--tile-size", "48", "--tile-overlap", "0"]
    for options, count, contrast in (
        ([], 4, None),
        (["--skip-flat-tiles", "0"], 2, 0),
        (["--skip-flat-tiles"], 2, 0.01),
        (["--skip-flat-tiles", "0.1"], 1, 0.1),
    ):
        calls.clear()
        assert flux(tiny_model, *command, *options) == 0
        assert len(calls) == count, options
        assert settings_of(folder / "out.png").get("skip_flat_tiles") == contrast


# --region-prompts


def region_options(tiny_model):
    return [
        "--use-flux",
        "--model",
        tiny_model,
        "--device",
        "cpu",
        "--steps",
        "1",
        "--scale",
        "2",
        "--tile-size",
        "16",
    ]


@pytest.mark.parametrize("prompt", [None, "a photo"])
def test_region_prompts_give_what_the_pipeline_gives(folder, tiny_model, prompt):
    import torch

    from pipeline_flux_dino_tile import FluxDinoTilePipeline

    regions = [
        DOG,
        {"prompt": "a cat", "box": [0.5, 0, 1, 0.5]},
        {"prompt": "sharp", "box": None},
        {"prompt": "night"},
    ]
    command = [folder / "photo.png", "-o", folder / "out.png", *region_options(tiny_model), "--tile-overlap", "0"]
    command += [] if prompt is None else ["--prompt", prompt]
    assert run(*command, "--region-prompts", save_regions(folder, *regions)) == 0

    pipe = FluxDinoTilePipeline.from_pretrained(tiny_model)
    pipe.load_dino_projector(tiny_model)
    pairs = [] if prompt is None else [(prompt, None)]
    pairs += [("a dög", (0, 0, 20, 12)), ("a cat", (20, 0, 40, 12)), ("sharp", None), ("night", None)]
    size = {"upscale_factor": 2, "tile_size": 16, "tile_overlap": 0, "num_inference_steps": 1}
    expected = pipe(image=photo(), prompt=pairs, **size, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(Image.open(folder / "out.png")), np.asarray(expected))
    settings = settings_of(folder / "out.png")
    assert settings["region_prompts"] == regions and settings.get("prompt") == prompt


def test_a_box_outside_of_a_picture_fails_before_a_model_is_loaded(folder, tiny_model, capsys, monkeypatch):
    """Of a folder the larger pictures are made."""
    photo(size=(40, 24)).save(folder / "large.png")
    regions = save_regions(folder, {"prompt": "a dog", "box": [0, 0, 41, 24]})
    options = [*region_options(tiny_model), "--tile-overlap", "0", "--region-prompts", regions]
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        assert run(folder / "photo.png", *options) == 1
    message = (
        "photo.png: `prompt` must be pairs of a string and a box (left, top, right, bottom) in the output's 40x24 px"
    )
    assert message in last_error(capsys)
    assert run(folder, "-o", folder / "out", *options) == 1
    assert [path.name for path in files_in(folder / "out")] == ["large.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        (b"\xff\xfe[]", "codec can't decode"),
        ("[]", 'must be a list of entries like {"prompt": "a red door", "box": [0, 0.2, 0.5, 1]}, not []'),
        ('{"prompt": "a", "box": [0, 0, 1, 1]}', "not {'prompt': 'a', "),
        ('["a"]', "not 'a'"),
        ('[{"prompt": "a"}, {"box": [0, 0, 1, 1]}]', "not {'box': [0, 0, 1, 1]}"),
        ('[{"prompt": 3}]', "not {'prompt': 3}"),
        ('[{"prompt": "a", "boxes": [0, 0, 1, 1]}]', "not {'prompt': 'a', 'boxes'"),
        ('[{"prompt": "a", "box": [0, 0, 1]}]', "not {'prompt': 'a', 'box': [0, 0, 1]}"),
        ('[{"prompt": "a", "box": [0, 0, 1, "1"]}]', "not {'prompt': 'a', 'box': [0, 0, 1, '1']}"),
        ('[{"prompt": "a", "box": [0, 0, 1, true]}]', "not {'prompt': 'a', 'box': [0, 0, 1, True]}"),
        ('[{"prompt": "a", "box": "left"}]', "not {'prompt': 'a', 'box': 'left'}"),
        (json.dumps([{"prompt": "a" * 30_000}]), "must have at most 30000 characters, not 30016"),
    ],
)
def test_a_file_without_regions_is_wrong_usage(folder, capsys, content, message):
    path = folder / "regions.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = usage_error(capsys, folder / "photo.png", "--use-flux", "--model", "owner/name", "--region-prompts", path)
    assert f"argument --region-prompts: {path}: " in error and message in error


def test_regions_of_the_longest_file_are_in_the_settings_of_a_jpeg(folder, tiny_model, capsys):
    """Read back with the mark that some editors put before the text."""
    regions = [{"prompt": "é" * 4996}]
    assert len(json.dumps(regions)) in range(29_990, 30_001)
    (folder / "regions.json").write_text(json.dumps(regions), encoding="utf-8-sig")
    options = [*region_options(tiny_model), "--tile-overlap", "0", "--region-prompts", folder / "regions.json"]
    assert run(folder / "photo.png", folder / "out.jpg", *options) == 0
    assert settings_of(folder / "out.jpg")["region_prompts"] == regions
    assert "EXIF" not in capsys.readouterr().out


def set_config(folder, file, **values):
    path = Path(folder, file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_prompt_needs_text_encoders(folder, tiny_model, capsys, monkeypatch):
    """Known before anything is loaded."""
    forbid_loading(monkeypatch)
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    for name in ("text_encoder", "text_encoder_2"):
        set_config(model, "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
        set_config(model, "model_index.json", **{name: [None, None]})
        error = usage_error(capsys, folder / "photo.png", "--use-flux", "--model", model, "--prompt", "a dog")
        assert f"--prompt needs text encoders, and --model {model} has none" in error
    for options in (["--prompt", "a dog"], ["--region-prompts", save_regions(folder, DOG)]):
        error = usage_error(capsys, folder / "photo.png", "--use-flux", *options)
        assert f"{options[0]} needs text encoders, and --model embedded has none" in error


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_without_text_encoders_the_projector_must_carry_the_empty_prompt(
    folder, tiny_model, capsys, monkeypatch, more
):
    forbid_loading(monkeypatch)
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    set_config(model, "model_index.json", text_encoder_2=[None, None])
    error = usage_error(capsys, folder / "photo.png", "--use-flux", "--model", model, *more)
    assert f"--model {model}: has no text encoders, so that it needs a projector that carries the empty" in error
    set_config(model, "dino_projector/config.json", num_prompt_tokens=64)
    assert run(folder / "photo.png", "--use-flux", "--model", model, "--plan") == 0
    # What a projector on the Hub carries is known when it is loaded.
    shutil.rmtree(model / "dino_projector")
    assert run(folder / "photo.png", "--use-flux", "--model", model, "--projector", "owner/name", "--plan") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a dog"], "--prompt needs text encoders, and --model owner/name has none"),
        (["--text-tokens", "64"], "--model owner/name: has no text encoders, so that it needs a projector"),
        (["--dino-strength", "0.5"], "--dino-strength needs --projector: the model has no DINO projector"),
    ],
)
def test_what_a_model_from_the_hub_cannot_take_is_wrong_usage_too(folder, capsys, monkeypatch, options, message):
    from pipeline_flux_dino_tile import FluxDinoTilePipeline
    from tiny_models import tiny_pipeline

    pipe = tiny_pipeline()
    if "--dino-strength" not in options:
        pipe.register_modules(text_encoder=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(FluxDinoTilePipeline, "from_pretrained", lambda *_arguments, **_options: pipe)
    error = usage_error(capsys, folder / "photo.png", "--use-flux", "--model", "owner/name", *options)
    assert message in error


def test_text_tokens_of_a_projector_that_carries_the_empty_prompt(folder, tiny_model, capsys, monkeypatch):
    forbid_loading(monkeypatch)
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    set_config(model, "dino_projector/config.json", num_prompt_tokens=64)
    command = [folder / "photo.png", "--use-flux", "--model", model]
    for options, count in (
        ([], 64),
        (["--text-tokens", "64"], 64),
        (["--prompt", "a dog"], 256),
        (["--prompt", "a dog", "--text-tokens", "128"], 128),
        (["--region-prompts", save_regions(folder, DOG)], 256),
        (["--region-prompts", save_regions(folder, DOG), "--text-tokens", "128"], 128),
    ):
        assert run(*command, "--plan", *options) == 0
        assert f" image + {count} text + " in capsys.readouterr().out
    for more in ([], ["--plan"]):
        error = usage_error(capsys, *command, "--text-tokens", "128", *more)
        assert "--text-tokens 128: without a prompt there are 64, those of the empty prompt" in error


def test_an_overlap_that_the_models_own_tile_size_does_not_hold(folder, tiny_model, capsys, monkeypatch):
    """Known before anything is loaded; an image that is one tile has no overlap."""
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    set_config(model, "model_index.json", default_tile_size=64)
    photo(size=(12, 12)).save(folder / "small.png")
    command = ["--use-flux", "--model", model, "--device", "cpu", "--steps", "1", "--tile-overlap", "64"]
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        assert run(folder / "photo.png", *command) == 1
    assert "`tile_overlap` must be" in last_error(capsys)
    assert run(folder / "small.png", *command) == 0


# --resume


def flux_command(folder, tiny_model, *more):
    arguments = [folder / "photo.png", "-o", folder / "out.png", "--scale", "2", "--use-flux", "--model", tiny_model]
    return [*arguments, "--steps", "3", "--tile-size", "32", "--tile-overlap", "16", "--device", "cpu", *more]


def run_interrupted(monkeypatch, command):
    """Runs the command until Ctrl-C comes in the last step."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    with monkeypatch.context() as patch:
        step = FlowMatchEulerDiscreteScheduler.step

        def interrupt(self, *arguments, **kwargs):
            if self.step_index == 2:
                raise KeyboardInterrupt
            return step(self, *arguments, **kwargs)

        patch.setattr(FlowMatchEulerDiscreteScheduler, "step", interrupt)
        assert run(*command) == 130


@pytest.fixture
def interrupted(folder, tiny_model, monkeypatch):
    """A folder in which Ctrl-C came in the last step."""
    run_interrupted(monkeypatch, flux_command(folder, tiny_model, "--resume"))
    assert (folder / ".out.png.checkpoint").is_dir()
    return folder


def test_resume_goes_on_with_the_image(interrupted, tiny_model, monkeypatch):
    from diffusers import FluxTransformer2DModel

    calls, forward = [], FluxTransformer2DModel.forward
    monkeypatch.setattr(
        FluxTransformer2DModel,
        "forward",
        lambda *arguments, **kwargs: calls.append(1) or forward(*arguments, **kwargs),
    )
    assert run(*flux_command(interrupted, tiny_model, "--resume")) == 0
    result, resumed_calls = (interrupted / "out.png").read_bytes(), len(calls)
    assert sorted(path.name for path in interrupted.iterdir()) == ["out.png", "photo.png"]
    calls.clear()
    assert run(*flux_command(interrupted, tiny_model, "--overwrite")) == 0
    assert (interrupted / "out.png").read_bytes() == result
    assert len(calls) == 3 * resumed_calls > 0
    assert "checkpoint" not in json.dumps(settings_of(interrupted / "out.png"))


def test_resume_goes_on_with_regions_and_refuses_others(folder, tiny_model, capsys, monkeypatch):
    command = flux_command(folder, tiny_model, "--region-prompts", save_regions(folder, DOG))
    run_interrupted(monkeypatch, [*command, "--resume"])
    save_regions(folder, {**DOG, "box": [0, 0, 40, 12]})
    assert run(*command, "--resume") == 1
    error = last_error(capsys)
    assert "prompt is [['a dög', [0, 0, 40, 12]]], in the checkpoint [['a dög', [0, 0, 20, 12]]]" in error
    save_regions(folder, DOG)
    assert run(*command, "--resume") == 0
    result = (folder / "out.png").read_bytes()
    assert run(*command, "--overwrite") == 0
    assert (folder / "out.png").read_bytes() == result


def test_resume_with_other_settings_fails_and_names_them(interrupted, tiny_model, capsys):
    assert run(*flux_command(interrupted, tiny_model, "--resume", "--seed", "1", "--prompt", "a dog")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "prompt is 'a dog', in the checkpoint None" in error
    assert "generator is 'seed 1, " in error and "or delete" in error
    assert (interrupted / ".out.png.checkpoint").is_dir() and not (interrupted / "out.png").exists()


@pytest.mark.parametrize("is_of_the_output", [True, False])
def test_a_checkpoint_left_beside_its_finished_output_is_deleted(interrupted, tiny_model, is_of_the_output):
    """One that is newer than the output belongs to a run with `--overwrite`."""
    photo().save(interrupted / "out.png")
    checkpoint = interrupted / ".out.png.checkpoint"
    moment = checkpoint.stat().st_mtime + (1 if is_of_the_output else -1)
    os.utime(interrupted / "out.png", (moment, moment))
    assert run(*flux_command(interrupted, tiny_model, "--resume")) == 0
    assert checkpoint.exists() != is_of_the_output
