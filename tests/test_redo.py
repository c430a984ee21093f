"""One region again: that it changes and nothing else does, and that it is what the settings say."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux_dino_tile.color_fix import match_color
from flux_dino_tile.redo import redo
from pipeline_flux_dino_tile import axis_windows
from tiny_models import ROOT, tiny_pipeline


WIDTH, HEIGHT = 250, 180  # of the result, which is padded to 256 x 192 px
OVERLAP = 16
REGION = (70, 60, 40, 30)


def photo() -> Image.Image:
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((WIDTH // 2, HEIGHT // 2))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dino="dinov2")


def settings(seed: int = 0, **kwargs) -> dict:
    values = {"image": photo(), "upscale_factor": 2, "num_inference_steps": 2, "max_sequence_length": 16}
    values |= {"tile_size": 96, "tile_overlap": OVERLAP, "generator": torch.Generator().manual_seed(seed)}
    return {**values, **kwargs}


@pytest.fixture(scope="module")
def result(pipe):
    return pipe(**settings()).images[0]


def changed_box(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not the same."""
    rows, columns = np.nonzero((np.asarray(before) != np.asarray(after)).any(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


# ---- What changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "reach"),
    [
        (REGION, (54, 44, 126, 106)),
        # In a corner, where nothing is faded at the picture's border.
        ((230, 150, 20, 30), (214, 134, 250, 180)),
        # Larger than a tile.
        ((10, 10, 220, 150), (0, 0, 246, 176)),
    ],
)
def test_the_region_and_a_border_change_and_nothing_else(pipe, result, region, reach):
    again = redo(pipe, result, region, **settings(seed=1))
    left, top, right, bottom = changed_box(result, again)
    assert reach[0] <= left and reach[1] <= top and right <= reach[2] and bottom <= reach[3]
    x, y, width, height = region
    box = (x, y, x + width, y + height)
    difference = np.abs(np.asarray(again.crop(box), dtype=int) - np.asarray(result.crop(box), dtype=int))
    assert difference.mean() > 2


def test_the_region_gets_the_prompts_of_the_boxes_there(pipe, result):
    """Its tile lies from 32 px down and 48 px across: one box touches it, the other ends before."""
    boxes = [("a dog", (60, 50, 80, 70)), ("sky", (0, 0, 48, 180))]
    found = redo(pipe, result, REGION, **settings(seed=1, prompt=boxes))
    assert found.tobytes() == redo(pipe, result, REGION, **settings(seed=1, prompt="a dog")).tobytes()
    assert found.tobytes() != redo(pipe, result, REGION, **settings(seed=1, prompt="sky")).tobytes()


@pytest.mark.parametrize("color_fix", [None, "wavelet", "adain"])
def test_the_region_is_a_tile_of_the_photo_and_fades_by_the_tiles_ramp(pipe, result, color_fix):
    """A tile of its own with the region in its middle, from 32 px down and 48 px across."""
    other = {"seed": 1, "start_sigma": 0.5, "prompt": "a dog"}
    again = redo(pipe, result, REGION, color_fix=color_fix, **settings(**other))
    pixels = pipe.prepare_image(photo(), HEIGHT, WIDTH)[0, :, 32:128, 48:144].permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels)
    tiles = pipe(**settings(**other, image=small, upscale_factor=1)).images
    if color_fix is not None:
        tiles = match_color(pipe, tiles, small, color_fix)
    old, tile = np.asarray(result, dtype=float)[32:128, 48:144], np.asarray(tiles[0], dtype=float)
    ramp = axis_windows([0, 80], 96)[1, :OVERLAP].numpy()
    rows = np.concatenate([np.zeros(12), ramp, np.ones(30), ramp[::-1], np.zeros(22)])
    columns = np.concatenate([np.zeros(6), ramp, np.ones(40), ramp[::-1], np.zeros(18)])
    expected = old + rows[:, None, None] * columns[:, None] * (tile - old)
    assert np.abs(np.asarray(again, dtype=float)[32:128, 48:144] - expected).max() < 0.501


def test_without_overlap_the_region_has_hard_edges(pipe, result):
    again = redo(pipe, result, REGION, **settings(seed=1, tile_overlap=0))
    left, top, right, bottom = changed_box(result, again)
    assert (left, top, right, bottom) == (70, 60, 110, 90)


def test_the_same_settings_give_the_same_region_and_others_another(pipe, result):
    first = redo(pipe, result, REGION, **settings(seed=1))
    assert first.tobytes() == redo(pipe, result, REGION, **settings(seed=1)).tobytes()
    for other in ({"seed": 2}, {"start_sigma": 0.7}, {"prompt": "a cat"}, {"dino_conditioning_scale": 0.0}):
        assert first.tobytes() != redo(pipe, result, REGION, **settings(**{"seed": 1, **other})).tobytes(), other


def test_only_one_tile_is_painted(pipe, result):
    """Also where the region lies over the border of four tiles of the picture."""
    runs = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    redo(pipe, result, (70, 70, 40, 40), **settings(seed=1))
    handle.remove()
    assert len(runs) == 2  # steps


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_picture_keeps_its_mode_and_transparency(pipe, result, mode):
    before = result.convert(mode)
    if mode in ("LA", "RGBA"):
        before.putalpha(Image.linear_gradient("L").resize(before.size))
    again = redo(pipe, before, REGION, **settings(seed=1))
    assert again.mode == mode and again.tobytes() != before.tobytes()
    if mode in ("LA", "RGBA"):
        assert again.getchannel("A").tobytes() == before.getchannel("A").tobytes()
    for picture in (before, again):
        picture.paste(0, (54, 44, 126, 106))
    assert again.tobytes() == before.tobytes()


# ---- Wrong arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"region": (240, 0, 20, 20)}, r"`region` must be \(x, y, width, height\) .* 250x180 px, but is \(240, 0, 20"),
        ({"region": (0, 0, 0, 20)}, r"`region` must be .* but is \(0, 0, 0, 20\)"),
        ({"region": (-1, 0, 20, 20)}, r"`region` must be"),
        ({"region": (0.5, 0, 20, 20)}, r"`region` must be .* in whole pixels"),
        ({"region": (0, 0, 20)}, r"`region` must be .* but is \(0, 0, 20\)"),
        ({"result": Image.new("RGB", (100, 100))}, r"`result` must be of the 250x180 px .*, but is \(100, 100\)"),
        ({"result": Image.new("CMYK", (250, 180))}, r"`result` must be a PIL image of mode L, LA, RGB, RGBA"),
        ({"upscale_factor": 3}, r"`result` must be of the 375x270 px that this call makes, but is \(250, 180\)"),
        ({"color_fix": "auto"}, r"`color_fix` must be None or one of wavelet, adain, but is 'auto'"),
        ({"image": [photo(), photo()]}, r"`image` must be one picture, but is 2"),
        ({"frozen_tiles": [0]}, r"`frozen_tiles` must be left out where a part of a picture is painted, but is \[0\]"),
        ({"start_sigma": 2}, r"`start_sigma` must be a number from 0.01 to 1"),
    ],
)
def test_wrong_arguments_are_named_before_a_model_runs(pipe, result, monkeypatch, kwargs, message):
    monkeypatch.setattr(pipe.vae, "encode", None)
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(ValueError, match=message):
        redo(pipe, **{"result": result, "region": REGION, **settings(**kwargs)})
