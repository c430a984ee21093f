"""Several processes: they share the tiles of an image, or the images; the result is that of one, and none hangs."""

import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import worker_runs
from PIL import Image
from worker_runs import (
    NUM_STEPS,
    PHOTO,
    at_step,
    command_line,
    exchange_twice,
    exit_codes,
    fail_to_read,
    kill_itself,
    outputs,
    run_out_of_memory,
    spoil_the_transformer,
    start_ranks,
    stop_itself,
    write_in_strips,
    write_in_strips_killed_at_the_end,
    write_in_strips_to_a_small_disk,
    write_slowly,
)

from flux_dino_tile.resume import CHECKPOINT_NAME
from tiny_models import ROOT


FLUX = ["--use-flux", "--model", "tiny/model", "--scale", "2", "--tile-size", "48", "--tile-overlap", "16"]
FLUX += ["--steps", str(NUM_STEPS), "--text-tokens", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def context():
    return worker_runs.make_context()


def run_ranks(context, function, count, folder, *arguments):
    """Exit codes and outputs of `count` processes."""
    processes = start_ranks(context, function, count, folder, *arguments)
    return exit_codes(processes), outputs(folder, count)


def run_command(context, count, folder, *arguments, faults=None):
    return run_ranks(context, command_line, count, folder, [str(argument) for argument in arguments], faults)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        PHOTO.rotate(index).save(folder / f"{index}.png")
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- The same result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_images_are_split(context, tmp_path, photos, count):
    assert command_line_alone(context, tmp_path, photos, tmp_path / "expected", *FLUX) == 0
    codes, texts = run_command(context, count, tmp_path, photos, tmp_path / "result", *FLUX)
    assert codes == [0] * count, texts
    assert files(tmp_path / "result") == files(tmp_path / "expected")
    lines = [line for text in texts for line in text.splitlines() if " -> " in line]
    assert len(lines) == 5, "an image was made twice"
    assert "5 done, 0 skipped, 0 failed" in texts[0]
    assert "0 failed" not in "".join(texts[1:])


def command_line_alone(context, folder, *arguments):
    ((code,), _) = run_command(context, 1, folder, *arguments)
    return code


def test_bicubic_images_are_split_and_skipped_ones_counted(context, tmp_path, photos):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "3.png").write_bytes(b"")
    (photos / "broken.png").write_bytes(b"no image")
    codes, texts = run_command(context, 2, tmp_path, photos, tmp_path / "result", "--scale", "2")
    assert codes == [1, 0]
    assert "4 done, 1 skipped, 1 failed" in texts[0]
    assert len(files(tmp_path / "result")) == 5


@pytest.mark.parametrize("count", [2, 3])
def test_one_image_is_shared(context, tmp_path, photos, count):
    photo = photos / "1.png"
    assert command_line_alone(context, tmp_path, photo, tmp_path / "expected.png", *FLUX) == 0
    codes, texts = run_command(context, count, tmp_path, photo, tmp_path / "result.png", *FLUX)
    assert codes == [0] * count, texts
    assert (tmp_path / "result.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert [" -> " in text for text in texts] == [True] + [False] * (count - 1)


@pytest.mark.parametrize(
    ("suffix", "more"), [(".png", []), (".tif", ["--vae-residual"]), (".png", ["--skip-flat-tiles", "0.3"])]
)
def test_strips_of_one_image_are_shared(context, tmp_path, photos, suffix, more):
    photo, names = photos / "1.png", [tmp_path / f"{name}{suffix}" for name in ("whole", "strips", "shared")]
    assert command_line_alone(context, tmp_path, photo, names[0], *FLUX, *more) == 0
    for count, name in ((1, names[1]), (2, names[2])):
        faults = dict.fromkeys(range(count), write_in_strips)
        codes, texts = run_command(context, count, tmp_path, photo, name, *FLUX, *more, faults=faults)
        assert codes == [0] * count, texts
    whole, strips, shared = (name.read_bytes() for name in names)
    assert shared == strips != whole
    with Image.open(names[0]) as expected, Image.open(names[2]) as result:
        assert np.array_equal(np.asarray(result), np.asarray(expected))


def test_every_process_adds_to_the_summary(context, tmp_path, photos):
    """And its failures do not end it with an error, on which a launcher would end the others."""
    summary = tmp_path / "summary.json"
    arguments = [photos, tmp_path / "result", *FLUX, "--summary", summary]
    codes, texts = run_command(context, 2, tmp_path, *arguments, faults={1: fail_to_read})
    assert codes == [1, 0], texts
    content = json.loads(summary.read_text())
    failed = [image["input"] for image in content["images"] if image["error"] == "cannot be read: Input/output error"]
    assert content["outcomes"] == {"done": 5 - len(failed), "failed": len(failed)}
    assert failed == sorted(re.findall(r"error: (.*\.png): cannot be read", texts[1])) != []
    assert len(files(tmp_path / "result")) == 5 - len(failed)
    assert all(image["size"] == [96, 64] for image in content["images"] if image["outcome"] == "done")


def test_others_that_have_ended_are_not_missed(context, tmp_path, photos):
    """While the first process writes the picture, for longer than the timeout."""
    arguments = [photos / "1.png", tmp_path / "result.png", *FLUX, "--worker-timeout", "2"]
    codes, texts = run_command(context, 2, tmp_path, *arguments, faults={0: write_slowly})
    assert codes == [0, 0], texts
    assert (tmp_path / "result.png").exists()


def test_the_real_launcher(tmp_path, photos):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, ROOT / "scripts" / "upscale.py", photos, tmp_path / "result", "--scale", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" -> ") == 5, "an image was made twice"
    assert "5 done, 0 skipped, 0 failed" in result.stdout
    assert len(files(tmp_path / "result")) == 5


def test_every_exchange_has_a_value_of_its_own(context, tmp_path):
    codes, texts = run_ranks(context, exchange_twice, 3, tmp_path, tmp_path)
    assert codes == [0] * 3, texts
    results = [json.loads((tmp_path / f"exchanged-{rank}.json").read_text()) for rank in range(3)]
    assert [values for values, _ in results] == [["first of 0", "second of 0"]] * 3
    for turn in range(2):
        assert sorted(item for _, taken in results for item in taken[turn]) == [0, 1, 2, 3]


def test_pictures_that_are_not_read_are_named_once(context, tmp_path, photos):
    (photos / "a.heic").write_bytes(b"x")
    codes, texts = run_command(context, 2, tmp_path, photos, tmp_path / "result", "--scale", "2")
    assert codes == [0, 0]
    assert ["a.heic" in text for text in texts] == [True, False]


def test_a_plan_is_printed_once(context, tmp_path, photos):
    codes, texts = run_command(context, 2, tmp_path, photos, "--plan")
    assert codes == [0, 0]
    assert "5 images" in texts[0] and texts[1] == ""


# ---- Processes that die --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_killed_process_ends_a_shared_image_which_then_goes_on(context, tmp_path, photos, dead):
    """And it goes on with another number of processes."""
    photo, result = photos / "1.png", tmp_path / "result.png"
    assert command_line_alone(context, tmp_path, photo, tmp_path / "expected.png", *FLUX) == 0
    faults = {dead: partial(at_step, 3, kill_itself)}
    codes, texts = run_command(context, 3, tmp_path, photo, result, *FLUX, "--resume", faults=faults)
    assert codes[dead] == -9
    assert [code for rank, code in enumerate(codes) if rank != dead] == [1, 1]
    for rank in {0, 1, 2} - {dead}:
        assert "gone" in texts[rank] and "run the same command again" in texts[rank]
    assert not result.exists()
    assert (tmp_path / ".result.png.checkpoint" / CHECKPOINT_NAME).exists()

    assert run_command(context, 2, tmp_path, photo, result, *FLUX, "--resume")[0] == [0, 0]
    assert result.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert not (tmp_path / ".result.png.checkpoint").exists()


@pytest.mark.parametrize("moment", ["first tile", "first strip written", "all written"])
def test_killed_alone_while_strips_are_written(context, tmp_path, photos, moment):
    command = [photos / "1.png", tmp_path / "out.png", *FLUX, "--resume"]
    assert run_command(context, 1, tmp_path, *command, faults={0: write_in_strips})[0] == [0]
    expected = (tmp_path / "out.png").read_bytes()
    (tmp_path / "out.png").unlink()

    faults = {"first tile": partial(write_in_strips, 0), "first strip written": partial(write_in_strips, 5)}
    fault = faults.get(moment, write_in_strips_killed_at_the_end)
    assert run_command(context, 1, tmp_path, *command, faults={0: fault})[0] == [-9]
    assert not (tmp_path / "out.png").exists()
    # The finished file, or the folder of its strips.
    (left_over,) = tmp_path.glob(".upscale-*.tmp*")
    assert (left_over.is_file() and left_over.read_bytes() == expected) == (moment == "all written")

    assert run_command(context, 1, tmp_path, *command, faults={0: write_in_strips})[0] == [0]
    assert (tmp_path / "out.png").read_bytes() == expected
    assert not (tmp_path / ".out.png.checkpoint").exists()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_killed_while_strips_are_written(context, tmp_path, photos, dead):
    photo, result = photos / "1.png", tmp_path / "result.png"
    in_strips = dict.fromkeys(range(2), write_in_strips)
    assert run_command(context, 1, tmp_path, photo, tmp_path / "expected.png", *FLUX, faults=in_strips)[0] == [0]
    faults = {**in_strips, dead: partial(write_in_strips, 2)}
    codes, texts = run_command(context, 2, tmp_path, photo, result, *FLUX, "--resume", faults=faults)
    assert (codes[dead], codes[1 - dead]) == (-9, 1)
    assert "run the same command again" in texts[1 - dead]
    assert not result.exists()
    assert run_command(context, 2, tmp_path, photo, result, *FLUX, "--resume", faults=in_strips)[0] == [0, 0]
    assert result.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert not (tmp_path / ".result.png.checkpoint").exists()


def test_a_full_disk_costs_one_shared_image(context, tmp_path, photos):
    """The others go on with the decoding of the strips, and all with the next image."""
    for index in range(2, 5):
        (photos / f"{index}.png").unlink()
    PHOTO.resize((48, 128)).save(photos / "0.png")  # 73,728 bytes of pixels: too many before the last strip
    PHOTO.crop((0, 0, 16, 16)).save(photos / "1.png")
    in_strips = dict.fromkeys(range(3), write_in_strips)
    assert run_command(context, 1, tmp_path, photos, tmp_path / "expected", *FLUX, faults=in_strips)[0] == [0]
    faults = {**in_strips, 0: write_in_strips_to_a_small_disk}
    codes, texts = run_command(context, 3, tmp_path, photos, tmp_path / "result", *FLUX, faults=faults)
    assert codes == [1, 0, 0], texts
    assert re.search(r"0\.png: cannot write .*: File too large", texts[0])
    expected = files(tmp_path / "expected")
    assert files(tmp_path / "result") == {"1.png": expected["1.png"]}


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_silent_process_ends_a_shared_image(context, tmp_path, photos, stopped):
    """Stopped as a debugger stops it: its connections stay open."""
    faults = {stopped: partial(at_step, 2, stop_itself)}
    arguments = [photos / "1.png", tmp_path / "result.png", *FLUX, "--resume", "--worker-timeout", "4"]
    arguments += ["--summary", tmp_path / "summary.json"]
    processes = start_ranks(context, command_line, 2, tmp_path, [str(value) for value in arguments], faults)
    processes[1 - stopped].join(60)
    code, text = processes[1 - stopped].exitcode, outputs(tmp_path, 2)[1 - stopped]
    exit_codes(processes, timeout=0)
    assert code == 1
    assert "run the same command again" in text
    assert (tmp_path / ".result.png.checkpoint" / CHECKPOINT_NAME).exists()
    if stopped == 1:
        assert json.loads((tmp_path / "summary.json").read_text())["outcomes"] == {"ready": 1}


@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_out_of_memory_ends_a_shared_image_in_all(context, tmp_path, photos, ranks):
    """No second try with fewer tiles at once: the others would not make it."""
    faults = dict.fromkeys(ranks, partial(at_step, 2, run_out_of_memory))
    arguments = [photos / "1.png", tmp_path / "out.png", *FLUX, "--tile-batch-size", "2"]
    codes, texts = run_command(context, 2, tmp_path, *arguments, faults=faults)
    assert codes == [1, 1]
    assert "out of memory" in texts[1] and "run the same command again" in texts[1]
    assert "gone" in texts[0]
    assert "trying again" not in "".join(texts)


def test_an_error_that_all_see_costs_one_image(context, tmp_path, photos):
    for index in range(2, 5):
        (photos / f"{index}.png").unlink()
    faults = dict.fromkeys(range(3), spoil_the_transformer)
    codes, texts = run_command(context, 3, tmp_path, photos, tmp_path / "result", *FLUX, faults=faults)
    assert codes == [1, 0, 0]
    assert texts[0].count("NaN or infinite values in the velocity at step 1 of 3") == 2
    assert "0 done, 0 skipped, 2 failed" in texts[0]


def test_a_killed_process_costs_the_image_that_it_had(context, tmp_path, photos):
    assert command_line_alone(context, tmp_path, photos, tmp_path / "expected", *FLUX) == 0
    arguments = [photos, tmp_path / "result", *FLUX, "--resume"]
    faults = {1: partial(at_step, 2, kill_itself)}
    codes, texts = run_command(context, 2, tmp_path, *arguments, "--worker-timeout", "4", faults=faults)
    assert codes == [1, -9]
    assert re.search(r"\.png: the process that worked on it is gone; .*run the same command again", texts[0])
    assert "4 done, 0 skipped, 1 failed" in texts[0]

    codes, texts = run_command(context, 2, tmp_path, *arguments)
    assert codes == [0, 0], texts
    assert files(tmp_path / "result") == files(tmp_path / "expected")


def test_without_the_first_process_the_others_end(context, tmp_path, photos):
    """The launcher's store lives in it, when no launcher holds it."""
    faults = {0: partial(at_step, 2, kill_itself)}
    codes, texts = run_command(context, 2, tmp_path, photos, tmp_path / "result", *FLUX, "--resume", faults=faults)
    assert codes == [-9, 1]
    assert "run the same command again" in texts[1]
