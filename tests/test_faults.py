"""What can go wrong with files, machines and people while a folder is enlarged: nothing stops it, nothing is lost."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin
from test_image_files import png_bytes, tiff_bytes
from test_upscale_cli import SCRIPT, photo, run

from flux_dino_tile.enlargers import BicubicEnlarger


def noise(size=(64, 64)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image, name, **options):
    from io import BytesIO

    file = BytesIO()
    image.save(file, Image.registered_extensions()[Path(name).suffix], **options)
    return file.getvalue()


def half(name):
    data = encoded(noise(), name)
    return data[: len(data) // 2]


FRAMES = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
DEEP = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
# File name -> content, then the size and mode of the result at scale 2, and what is noted; or the error.
INPUTS = {
    "half.png": (half("a.png"), "cannot be read"),
    "half.jpg": (half("a.jpg"), "cannot be read"),
    "half.webp": (half("a.webp"), "cannot be read|not an image"),
    "half.gif": (half("a.gif"), "cannot be read"),
    "half.tif": (half("a.tif"), "cannot be read"),
    "half.avif": (half("a.avif"), "cannot be read|not an image"),
    "half.bmp": (half("a.bmp"), "cannot be read"),
    "empty.png": (b"", "is empty"),
    "text.jpg": (b"no image", "is not an image"),
    "page.png": (b"<html><body>404</body></html>", "is not an image"),
    "float.tif": (tiff_bytes(32, sample_format=3), "TIFF whose kind of pixels"),
    "planes.tif": (tiff_bytes(16, planar=2), "separate planes"),
    "bomb.png": (png_bytes(8, 2, 20000, 20000, b""), "more than 179 megapixels"),
    "none.png": (png_bytes(8, 2, 0, 0, b""), "cannot be read|not an image"),
    "really_png.jpg": (encoded(photo(), "a.png"), (40, 24), "RGB", None),
    "moves.gif": (encoded(FRAMES[0], "a.gif", save_all=True, append_images=FRAMES[1:]), (16, 16), "RGB", "first of 3"),
    "moves.webp": (encoded(FRAMES[0], "a.webp", save_all=True, append_images=FRAMES[1:]), (16, 16), "RGB", "first of"),
    "cmyk.jpg": (encoded(Image.new("CMYK", (20, 12)), "a.jpg"), (40, 24), "RGB", None),
    "palette.png": (encoded(photo().convert("P"), "a.png"), (40, 24), "RGB", None),
    "bits.png": (encoded(photo("L").convert("1"), "a.png"), (40, 24), "L", None),
    "deep.png": (encoded(Image.fromarray(DEEP), "a.png"), (24, 16), "I;16", None),
    "deep_colour.png": (png_bytes(16, 2, 4, 4, (b"\0" + bytes(24)) * 4), (8, 8), "RGB", "16 bits per channel"),
    "long.png": (encoded(Image.new("RGB", (3000, 2)), "a.png"), (6000, 4), "RGB", None),
    "column.png": (encoded(Image.new("L", (1, 50)), "a.png"), (2, 100), "L", None),
    "pixel.png": (encoded(Image.new("RGB", (1, 1)), "a.png"), (2, 2), "RGB", None),
}


def read_summary(path):
    summary = json.loads(Path(path).read_text())
    return summary["outcomes"], {Path(image["input"]).name: image for image in summary["images"]}


def test_every_kind_of_input_has_a_defined_result(tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, (content, *_) in INPUTS.items():
        (source / name).write_bytes(content)
    (source / "folder.png").mkdir()
    (source / "gone.png").symlink_to("nowhere")
    os.mkfifo(source / "pipe.png")

    assert run(source, output, "--scale", "2", "--summary", tmp_path / "summary.json") == 1
    outcomes, images = read_summary(tmp_path / "summary.json")
    lines, errors = capsys.readouterr()
    for name, (_, *expected) in INPUTS.items():
        image = images.pop(name)
        if len(expected) == 1:
            assert (image["outcome"], image["size"]) == ("failed", None), name
            assert re.search(expected[0], image["error"]), (name, image["error"])
            assert f"upscale.py: error: {source / name}: {image['error']}\n" in errors
            assert not Path(image["output"]).exists()
        else:
            size, mode, note = expected
            assert (image["outcome"], image["error"], tuple(image["size"])) == ("done", None, size), (name, image)
            with Image.open(image["output"]) as result:
                result.load()
                assert (result.size, result.mode) == (size, "RGB" if result.format == "WEBP" else mode), name
            assert len(image["notes"]) == (note is not None), (name, image["notes"])
            assert all(note in text and f"{source / name}: {text}\n" in lines for text in image["notes"])
    assert {name: image["error"] for name, image in images.items()} == {
        "gone.png": "No such file or directory",
        "pipe.png": "is no regular file",
    }
    good = sum(len(expected) > 1 for _, *expected in INPUTS.values())
    assert outcomes == {"done": good, "failed": len(INPUTS) - good + 2}
    assert lines.splitlines()[-1] == f"{good} done, 0 skipped, {len(INPUTS) - good + 2} failed"


def test_a_large_input_is_read_if_it_is_allowed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    photo().save(tmp_path / "in.png")
    assert run(tmp_path / "in.png", "--scale", "2") == 1
    assert "(--allow-large-input reads it)" in capsys.readouterr().err
    assert run(tmp_path / "in.png", "--scale", "2", "--allow-large-input") == 0
    assert Image.MAX_IMAGE_PIXELS == 100


def test_names_cannot_leave_the_output_folder_nor_move_the_cursor(tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    text = PngImagePlugin.PngInfo()
    for key in ("Title", "Software", "Filename", "Comment"):
        text.add_text(key, "../../escaped.png")
    exif = Image.Exif()
    for tag in (ExifTags.Base.DocumentName, ExifTags.Base.ImageDescription, ExifTags.Base.Software):
        exif[tag] = "../../escaped.png"
    photo().save(source / "%2e%2e%2fescaped.png", pnginfo=text, exif=exif)
    photo().save(source / "a\x1b[2J\nb.png")
    photo().save(os.path.join(os.fsencode(source), b"\xff\xfe.png"))

    assert run(source, output, "--scale", "1", "--summary", tmp_path / "summary.json") == 0
    assert {os.fsencode(path.name) for path in output.iterdir()} == {
        b"%2e%2e%2fescaped.png",
        b"a\x1b[2J\nb.png",
        b"\xff\xfe.png",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in", "summary.json"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    lines = capsys.readouterr().out
    assert "\x1b" not in lines
    assert "a\\x1b[2J" in lines
    assert len(json.loads((tmp_path / "summary.json").read_text())["images"]) == 3


# Disks


def run_limited(limit, value, *arguments, check=None):
    """Runs the command line in a process of its own under a resource limit."""

    def set_limit():
        resource.setrlimit(limit, (value, value))

    command = [sys.executable, SCRIPT, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, preexec_fn=set_limit, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_full_disk_stops_one_image_and_keeps_what_was_there(tmp_path, suffix):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    noise((120, 120)).save(source / f"b_large{suffix}")
    for name in ("a_small", "c_small"):
        Image.new("RGB", (8, 8)).save(source / f"{name}{suffix}")
    (output / f"b_large{suffix}").write_bytes(b"old")
    summary = tmp_path / "summary.json"
    arguments = [source, output, "--scale", "2", "--overwrite", "--summary", summary]
    result = run_limited(resource.RLIMIT_FSIZE, 8000, *arguments)
    assert result.returncode == 1, result.stderr
    path = output / f"b_large{suffix}"
    assert f"b_large{suffix}: cannot write {path}: File too large\n" in result.stderr
    assert result.stdout.splitlines()[-1] == "2 done, 0 skipped, 1 failed"
    assert path.read_bytes() == b"old"
    assert sorted(path.name for path in output.iterdir()) == [
        f"{name}{suffix}" for name in ("a_small", "b_large", "c_small")
    ]
    assert read_summary(summary)[0] == {"done": 2, "failed": 1}


def test_a_disk_that_is_full_is_known_before_the_work(tmp_path):
    photo().save(tmp_path / "in.png")
    for place in ("/dev/full/out.png", "/proc/out.png"):
        result = run_limited(resource.RLIMIT_FSIZE, 10**6, tmp_path / "in.png", place)
        assert result.returncode == 1
        assert f"cannot write {place}: " in result.stderr
    result = run_limited(resource.RLIMIT_FSIZE, 10**6, tmp_path / "in.png", "--summary", "/proc/summary.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--summary: cannot write /proc/summary.json" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


# Memory


def test_too_little_main_memory_stops_one_image(tmp_path):
    Image.new("RGB", (7000, 7000)).save(tmp_path / "a.webp", lossless=True)
    photo().save(tmp_path / "b.webp")
    result = run_limited(resource.RLIMIT_AS, 900 * 2**20, tmp_path, tmp_path / "out", "--scale", "2")
    assert result.returncode == 1, result.stderr
    assert result.stderr == f"upscale.py: error: {tmp_path / 'a.webp'}: out of memory\n"
    assert result.stdout.splitlines()[-1] == "1 done, 0 skipped, 1 failed"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tiny_models import save_tiny_pipeline

    save_tiny_pipeline(folder := tmp_path_factory.mktemp("faults") / "model")
    return folder


def flux(tiny_model, *arguments):
    options = ["--use-flux", "--model", tiny_model, "--device", "cpu", "--steps", "1", "--scale", "2"]
    return run(*options, "--tile-size", "32", "--tile-overlap", "16", *arguments)


def fail_on_batches_above(monkeypatch, limit):
    """Lets the real transformer run out of memory on more tiles than `limit` at once; returns the batches it saw."""
    import torch
    from diffusers import FluxTransformer2DModel

    forward, batches = FluxTransformer2DModel.forward, []

    def forward_or_fail(self, hidden_states, *args, **kwargs):
        batches.append(len(hidden_states))
        if len(hidden_states) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward_or_fail)
    return batches


def test_out_of_gpu_memory_is_tried_again_with_fewer_tiles(tmp_path, tiny_model, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        photo(size=(40, 40)).save(tmp_path / name)
    assert flux(tiny_model, tmp_path, tmp_path / "expected", "--tile-batch-size", "1") == 0
    capsys.readouterr()

    batches = fail_on_batches_above(monkeypatch, 2)
    assert flux(tiny_model, tmp_path, tmp_path / "out", "--tile-batch-size", "8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "trying again" in line] == [
        "out of GPU memory: trying again with --tile-batch-size 4",
        "out of GPU memory: trying again with --tile-batch-size 2",
    ]
    # The second image starts with what the first ended with.
    assert max(batches) > 2 and set(batches[2:]) <= {1, 2}
    for name in ("a.png", "b.png"):
        images = [np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("out", "expected")]
        assert np.abs(images[0] - images[1]).max() <= 1


def test_out_of_gpu_memory_goes_on_from_the_checkpoint(tmp_path, tiny_model, monkeypatch, capsys):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    photo(size=(40, 40)).save(tmp_path / "a.png")
    step, steps = FlowMatchEulerDiscreteScheduler.step, []

    def step_or_fail(self, *args, **kwargs):
        steps.append(self.step_index)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step_or_fail)
    assert flux(tiny_model, tmp_path / "a.png", "--tile-batch-size", "4", "--resume", "--steps", "3") == 0
    assert "trying again with --tile-batch-size 2" in capsys.readouterr().out
    assert len(steps) == 4, "steps before the checkpoint were repeated"


def test_out_of_gpu_memory_with_one_tile_says_what_helps(tmp_path, tiny_model, monkeypatch, capsys):
    photo(size=(40, 40)).save(tmp_path / "a.png")
    fail_on_batches_above(monkeypatch, 0)
    assert flux(tiny_model, tmp_path / "a.png", "--tile-batch-size", "2") == 1
    assert "a.png: out of GPU memory with one tile at a time: try --memory 8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_error_that_nobody_thought_of_stops_one_image(tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        photo().save(tmp_path / name)
    whole = BicubicEnlarger.whole
    failures = iter([ZeroDivisionError("float division by zero")])

    def fail_once(self, image, size):
        for failure in failures:
            raise failure
        return whole(self, image, size)

    monkeypatch.setattr(BicubicEnlarger, "whole", fail_once)
    assert run(tmp_path, tmp_path / "out") == 1
    assert (
        capsys.readouterr().err
        == f"upscale.py: error: {tmp_path / 'a.png'}: ZeroDivisionError: float division by zero\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


# People


def test_an_interrupt_leaves_a_summary_of_what_is_missing(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        photo().save(tmp_path / name)
    whole, calls = BicubicEnlarger.whole, []

    def interrupt(self, image, size):
        calls.append(size)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, image, size)

    monkeypatch.setattr(BicubicEnlarger, "whole", interrupt)
    assert run(tmp_path, tmp_path / "out", "--summary", tmp_path / "summary.json") == 130
    outcomes, images = read_summary(tmp_path / "summary.json")
    assert outcomes == {"done": 1, "ready": 2}
    assert [image["outcome"] for image in images.values()] == ["done", "ready", "ready"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_a_killed_run_leaves_whole_files_and_the_next_does_the_rest(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for index in range(12):
        noise((150, 150)).save(source / f"{index:02}.png")
    command = [sys.executable, SCRIPT, source, output, "--scale", "4"]
    for number in (1, 4, 8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(output.glob("*.png"))) < number and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in output.glob("*.png"):
            with Image.open(path) as image:
                image.load()
                assert image.size == (600, 600)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+ done, [1-9]\d* skipped, 0 failed", done.stdout.splitlines()[-1])
    assert len(list(output.glob("*.png"))) == 12


# The page that lists all this
