"""Previews: that a tile comes out as in the whole picture, that no other is computed, and what the sheet shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux_dino_tile.preview import preview
from tiny_models import tiny_pipeline


WIDTH, HEIGHT = 72, 60
TILES = {"tile_size": (64, 48), "tile_overlap": 0}  # of 144 x 120 px: three columns and two rows, none overlap
SIGMAS, SCALES = [0.2, 0.6], [0, 0.5]


def photo() -> Image.Image:
    """Noise, but less in the left and least in the middle third."""
    pixels = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, 3))
    pixels[:, :24] //= 2
    pixels[:, 24:48] //= 4
    return Image.fromarray((pixels + 100).astype(np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dino="dinov2")


def settings(**kwargs) -> dict:
    values = {"image": photo(), "upscale_factor": 2, "num_inference_steps": 2, "max_sequence_length": 16}
    return {**values, "generator": torch.Generator().manual_seed(7), **TILES, **kwargs}


def show(pipe, **kwargs):
    return preview(pipe, **{"start_sigma": SIGMAS, "dino_conditioning_scale": SCALES, **settings(**kwargs)})


def part(image: Image.Image, tile) -> np.ndarray:
    pixels = np.asarray(image, dtype=int)
    return pixels[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]


def distance(image: Image.Image, pixels: np.ndarray) -> float:
    return float(np.abs(np.asarray(image, dtype=int) - pixels).mean())


# ---- As in the whole picture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance_embeds", "vae_residual"), [(False, True), (True, False)], ids=["schnell", "dev"])
def test_tiles_that_do_not_overlap_are_those_of_the_picture(guidance_embeds, vae_residual):
    """To the bit, also where the picture is padded: its height is 8 px short of whole tokens."""
    pipe = tiny_pipeline(guidance_embeds, dino="dinov2_with_registers")
    kwargs = {"vae_residual": vae_residual, "prompt": "a photo"}
    shown = show(pipe, at=[(10, 10), (71, 59)], **kwargs)
    assert [tuple(tile) for tile in shown.tiles] == [(0, 0, 64, 48), (64, 96, 56, 48)]
    painted = set()
    for row, sigma in enumerate(SIGMAS):
        for column, scale in enumerate(SCALES):
            whole = pipe(**settings(start_sigma=sigma, dino_conditioning_scale=scale, **kwargs)).images[0]
            for tile, images in zip(shown.tiles, shown.images):
                assert np.array_equal(images[row][column], part(whole, tile)), (sigma, scale)
                painted.add(images[row][column].tobytes())
    assert len(painted) == 2 * len(SIGMAS) * len(SCALES)


@pytest.mark.parametrize(
    "prompt",
    [
        [("sky", None), ("a dog", (97, 65, 144, 120)), ("grass", (0, 0.9, 0.5, 1))],
        [("a dog", (0, 0, 48, 64))],
        lambda image, box: f"{box} of {image.width}",
    ],
    ids=["regions", "one region", "function"],
)
def test_prompts_for_regions_are_those_of_the_picture(pipe, prompt):
    kwargs = {"start_sigma": 0.6, "dino_conditioning_scale": 0.5, "prompt": prompt}
    shown = show(pipe, at=[(10, 10), (71, 59)], **kwargs)
    whole = pipe(**settings(**kwargs)).images[0]
    for tile, images in zip(shown.tiles, shown.images):
        assert np.array_equal(images[0][0], part(whole, tile))


def test_a_picture_of_one_tile_is_its_preview(pipe):
    kwargs = {"tile_size": None, "start_sigma": 0.4, "dino_conditioning_scale": 1.0}
    kwargs |= {"height": 120, "width": 144, "upscale_factor": None}
    shown = show(pipe, **kwargs)
    assert shown.tiles == [(0, 0, 120, 144)]
    assert shown.images[0][0][0].tobytes() == pipe(**settings(**kwargs)).images[0].tobytes()


def test_inside_a_tile_that_others_overlap_it_is_nearly_the_same(pipe):
    kwargs = {"tile_size": 64, "tile_overlap": 16, "start_sigma": 0.4, "dino_conditioning_scale": 1.0}
    whole = part(pipe(**settings(**kwargs)).images[0], tile := pipe.plan_tiles(120, 144, 64, 16)[0])
    same, other = (
        show(pipe, at=(0, 0), **kwargs, generator=torch.Generator().manual_seed(seed)).images[0][0][0]
        for seed in (7, 8)
    )
    assert tile.height == same.height == 64
    inner = (slice(0, 40), slice(0, 40))
    assert distance(same.crop((0, 0, 40, 40)), whole[inner]) < distance(other.crop((0, 0, 40, 40)), whole[inner]) / 4


@pytest.mark.parametrize("form", ["array", "tensor"])
def test_an_image_may_be_an_array_or_a_tensor(pipe, form):
    pixels = np.asarray(photo(), dtype=np.float32)[None] / 255
    image = pixels if form == "array" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    kwargs = {"image": image, "start_sigma": 0.4, "dino_conditioning_scale": 1.0}
    shown = show(pipe, at=(10, 10), **kwargs)
    whole = part(pipe(**settings(**kwargs)).images[0], shown.tiles[0])
    assert np.abs(np.asarray(shown.images[0][0][0], dtype=int) - whole).max() <= 1


def test_no_other_tile_is_computed_and_the_generator_keeps_its_state(pipe):
    runs = []
    parts = {"encode": pipe.vae.encoder, "decode": pipe.vae.decoder, "dino": pipe.dino_encoder}
    parts["denoise"] = pipe.transformer
    handles = [x.register_forward_pre_hook(lambda *_, name=name: runs.append(name)) for name, x in parts.items()]
    generator = torch.Generator().manual_seed(7)
    show(pipe, at=(10, 10), generator=generator)
    for handle in handles:
        handle.remove()
    # One tile, two start sigmas, two DINO scales of which one is 0, two steps.
    assert {name: runs.count(name) for name in parts} == {"encode": 1, "decode": 4, "dino": 2, "denoise": 8}
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())


# ---- Which tiles and settings --------------------------------------------------------------------------------------


def test_by_default_the_tile_with_the_most_detail_and_settings_around_the_pipelines_own(pipe):
    shown = preview(pipe, **settings(tile_size=(128, 48), num_inference_steps=1))
    assert shown.tiles == [(0, 96, 120, 48)]
    assert shown.start_sigmas == pytest.approx([0.175, 0.35, 0.7])
    assert shown.dino_conditioning_scales == [0, 0.5, 1]
    plain = tiny_pipeline()
    plain.register_to_config(default_start_sigma=0.6)
    shown = preview(plain, **settings(num_inference_steps=1), at=(0, 0))
    assert (shown.start_sigmas, shown.dino_conditioning_scales) == ([0.3, 0.6, 1.0], [0])


def test_places_are_of_the_photo_and_stand_for_the_nearest_tile_once(pipe):
    kwargs = {"start_sigma": 0.2, "dino_conditioning_scale": 1.0, "num_inference_steps": 1}
    assert show(pipe, at=(24.5, 31), **kwargs).tiles == [(0, 48, 64, 48)]
    # Of two tiles that overlap by 32 px.
    kwargs |= {"tile_size": (128, 80), "tile_overlap": 16}
    shown = show(pipe, at=[(35, 0), (36.5, 59), (71, 30)], **kwargs)
    assert shown.tiles == [(0, 0, 120, 80), (0, 64, 120, 80)]


# ---- The sheet -----------------------------------------------------------------------------------------------------


def find(sheet: np.ndarray, pixels: np.ndarray) -> list[tuple[int, int]]:
    """Where the sheet has these pixels: the places of their corner."""
    places = np.argwhere((sheet == pixels[0, 0]).all(2))
    height, width = pixels.shape[:2]
    return [(y, x) for y, x in places if np.array_equal(sheet[y : y + height, x : x + width], pixels)]


def test_the_sheet_has_every_picture_and_bicubic_side_by_side(pipe):
    shown = show(pipe, at=[(10, 10), (71, 59)])
    sheet = np.asarray(shown.sheet)
    enlarged = photo().resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)
    for tile, images in zip(shown.tiles, shown.images):
        bicubic = find(sheet, part(enlarged, tile))
        assert len(bicubic) == len(SIGMAS)
        for (top, left), row in zip(bicubic, images):
            places = [find(sheet, np.asarray(image)) for image in row]
            assert [[y for y, _ in place] for place in places] == [[top], [top]]
            assert left < places[0][0][1] < places[1][0][1]
            # A caption over each.
            assert all(
                (sheet[top - 10 : top, x : x + 30] < 128).any() for x in (left, *(place[0][1] for place in places))
            )


# ---- Wrong arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"at": (72, 0)}, r"`at` must be \(x, y\) in the photo's 72x60 px, or a list of such, but is \(72, 0\)"),
        ({"at": [(0, 0), (0, -1)]}, r"`at` must be .* but is \(0, -1\)"),
        ({"at": []}, "`at` must be"),
        ({"at": "middle"}, "`at` must be .* but is 'middle'"),
        (
            {"dino_conditioning_scale": [0.5, 101]},
            "`dino_conditioning_scale` must be a number from 0 to 100 .* is 101",
        ),
        ({"start_sigma": (0.5, 0)}, "`start_sigma` must be a number from 0.01 to 1 .* but is 0"),
        ({"start_sigma": []}, r"`start_sigma` must be a number or several, but is \[\]"),
        ({"image": [photo(), photo()]}, "`image` must be one picture, but is 2"),
        ({"image": torch.zeros(1, 4, 18, 16), "upscale_factor": 1}, "`image` must be pixels, not latents"),
        ({"prompt": ["a", "b"]}, "`prompt` must be one for the picture, but is 2"),
        ({"num_images_per_prompt": 2}, "`num_images_per_prompt` must be 1, but is 2"),
        ({"strength": 0.5}, "`strength` must be left out where a part of a picture is painted, but is 0.5"),
        ({"sigmas": np.ones(2)}, "`sigmas` must be left out where a part of a picture is painted"),
        ({"first_step": 1}, "`first_step` must be left out where a part of a picture is painted, but is 1"),
        ({"frozen_tiles": [0]}, r"`frozen_tiles` must be left out where a part of a picture is painted, but is \[0\]"),
        ({"latents": torch.zeros(1, 2, 3)}, "`latents` must be left out where a part of a picture is painted"),
        ({"generator": 7}, "`generator` must be a `torch.Generator`, but is 7"),
        ({"guidance_scale": -1}, "`guidance_scale` must be a number from 0 to 1000"),
        ({"tile_batch_size": 0}, "`tile_batch_size` must be"),
    ],
)
def test_wrong_arguments_are_named_before_a_model_runs(pipe, monkeypatch, kwargs, message):
    for part in (pipe.vae, pipe.transformer, pipe.dino_encoder, pipe.text_encoder):
        monkeypatch.setattr(part, "forward", None)
    monkeypatch.setattr(pipe.vae, "encode", None)
    with pytest.raises(ValueError, match=message):
        show(pipe, **kwargs)


def test_a_scheduler_that_draws_noise_in_its_steps_is_refused():
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(stochastic_sampling=True)
    with pytest.raises(ValueError, match=r"`scheduler` must be .* whose steps need the canvas alone"):
        show(pipe)
