"""The examples of docs/wrapping.md, as they stand there, on small models."""

import re

import pytest
import torch
import worker_runs
from PIL import Image
from worker_runs import PHOTO, exit_codes, generator, outputs, start_ranks
from wrapped_runs import run_code

from flux_dino_tile.diagnostics import upscale_with_diagnosis
from tiny_models import ROOT


RESUME, SHARING, DIAGNOSIS = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "wrapping.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def context():
    return worker_runs.make_context()


@pytest.fixture(scope="module")
def expected():
    return worker_runs.PIPE(image=PHOTO, upscale_factor=4, generator=generator()).images[0]


def run(context, count, folder, code):
    processes = start_ranks(context, run_code, count, folder, folder, code)
    codes = exit_codes(processes)
    texts = outputs(folder, count)
    assert codes == [0] * count, texts
    return Image.open(folder / "photo_x4.png"), texts


def test_going_on(context, tmp_path, expected):
    picture, _ = run(context, 1, tmp_path, RESUME)
    assert picture.tobytes() == expected.tobytes()
    assert not (tmp_path / "photo.checkpoint").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_sharing(context, tmp_path, expected, count):
    picture, _ = run(context, count, tmp_path, SHARING)
    assert picture.tobytes() == expected.tobytes()


def test_diagnosis(context, tmp_path):
    picture, (text,) = run(context, 1, tmp_path, DIAGNOSIS)
    arguments = {"image": PHOTO, "upscale_factor": 4, "generator": torch.Generator().manual_seed(0)}
    assert picture.tobytes() == upscale_with_diagnosis(worker_runs.PIPE, 0.5, 0.2, **arguments).images[0].tobytes()
    assert re.fullmatch(r"Tile\(top=0, .*\) similarity -?\d\.\d\d, seam 1\.00 suspect\n", text)
