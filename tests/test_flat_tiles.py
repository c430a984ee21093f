"""Flat tiles: which tiles count as flat, and that they end exactly at the input's latents once they are frozen."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from flux_dino_tile.flat_tiles import feature_spread, find_flat_tiles, tile_contrast
from tiny_models import ROOT, tiny_pipeline


TILES = {"tile_size": 128, "tile_overlap": 32}
FLAT = [0, 1, 2, 3, 6]


def sky_and_photo(height: int = 256, width: int = 256) -> Image.Image:
    """A gradient like clear sky, with a photo in the lower right quarter."""
    ramp = np.linspace(90, 200, height)[:, None, None] + np.linspace(0, 30, width)[None, :, None]
    pixels = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8).copy()
    photo = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((width // 2, height // 2))
    pixels[height // 2 :, width // 2 :] = np.asarray(photo)
    return Image.fromarray(pixels)


def upscale(pipe, **kwargs):
    settings = {
        "image": sky_and_photo(),
        "upscale_factor": 1,
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **TILES,
    }
    return pipe(**{**settings, **kwargs}).images


def encoded(pipe, plan):
    """The latents of the input, the mode of what the VAE says."""
    pixels = pipe.prepare_image([sky_and_photo()], plan.height, plan.width)
    with torch.no_grad():
        return pipe.sample_latents(pipe.encode_tiles(pixels, plan), sample_mode="argmax")


# ---- What is flat --------------------------------------------------------------------------------------------------


def test_contrast_of_known_pictures():
    constant = torch.full((1, 3, 128, 192), 0.3)
    gradient = torch.linspace(-1, 1, 192).expand(1, 3, 128, 192)
    assert tile_contrast(constant) == 0
    # Away from the repeated border a blur leaves a ramp as it is.
    assert tile_contrast(gradient) < 0.05
    checkered = torch.ones(1, 3, 128, 192)
    checkered[..., ::2, 1::2] = checkered[..., 1::2, ::2] = -1
    # The blur (1, 2, 1)/4 takes away the finest checkers: what is left is the picture, which swings from 0 to 1.
    assert float(tile_contrast(checkered)) == pytest.approx(0.5, rel=0.05)


def test_a_bird_in_the_sky_counts():
    """A small thing in a large tile raises the contrast of its own square, not of the tile's mean."""
    sky = torch.zeros(2, 3, 512, 512)
    sky[1, :, 200:212, 300:312] = 1.0
    quiet, bird = tile_contrast(sky)
    assert quiet == 0 and bird > 0.05
    assert math.sqrt((sky[1] / 2).square().mean()) < 0.02


def test_feature_spread():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 1, 1, 64, generator=generator).expand(1, 4, 5, 64)
    noise = torch.randn(1, 4, 5, 64, generator=generator)
    spread = feature_spread(torch.cat([one, 3 * one, noise]))
    torch.testing.assert_close(spread[:2], torch.zeros(2), atol=1e-5, rtol=0)
    vectors = noise.double().flatten(1, 2)[0]
    mean = vectors.mean(0)
    cosines = (vectors @ mean) / (vectors.norm(dim=1) * mean.norm())
    assert float(spread[2]) == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


def find(pipe, image=None, **kwargs):
    return find_flat_tiles(pipe, sky_and_photo() if image is None else image, upscale_factor=1, **TILES, **kwargs)


def test_tiles_are_found_by_contrast_and_by_what_dino_sees():
    pipe = tiny_pipeline(dino="dinov2")
    assert find(pipe, max_contrast=0.02) == FLAT
    assert find(pipe, max_contrast=1.0) == list(range(9))
    features = torch.ones(9, 1, 4, 4, 24)
    features[1] = torch.randn(1, 4, 4, 24, generator=torch.Generator().manual_seed(0))
    assert find(pipe, max_contrast=0.02, dino_embeds=features) == [0, 2, 3, 6]
    both = [sky_and_photo(), Image.new("RGB", (256, 256))]
    assert find(pipe, both, max_contrast=0.02) == FLAT
    assert find(pipe, Image.new("RGB", (256, 256))) == list(range(9))


def test_sizes_and_tiles_are_those_of_a_call():
    pipe = tiny_pipeline()
    assert find_flat_tiles(pipe, sky_and_photo(), height=300, width=500, max_contrast=1.0) == [0]
    plan = pipe.plan_tiles(300, 500, **TILES)
    found = find_flat_tiles(pipe, sky_and_photo(), height=300, width=500, **TILES, max_contrast=1.0)
    assert found == list(range(len(plan)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_contrast": 2}, "`max_contrast` must be a number from 0 to 1, a contrast, but is 2"),
        ({"max_contrast": True}, "`max_contrast` must be a number from 0 to 1, a contrast, but is True"),
        (
            {"dino_embeds": torch.ones(4, 1, 4, 4, 24)},
            "`dino_embeds` must be of the 9 tiles of this image, but is Tensor of",
        ),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        find(tiny_pipeline(dino="dinov2"), **kwargs)


def test_latents_are_refused():
    with pytest.raises(ValueError, match="`image` must be pixels, whose contrast can be seen, not latents"):
        find_flat_tiles(tiny_pipeline(), torch.zeros(1, 4, 32, 32))


# ---- What becomes of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_embeds", [False, True], ids=["schnell", "dev"])
def test_flat_tiles_end_at_the_input_and_the_others_do_not(guidance_embeds):
    pipe = tiny_pipeline(guidance_embeds)
    plan = pipe.plan_tiles(256, 256, **TILES)
    flat, plain = (pipe.unpack_canvas(upscale(pipe, frozen_tiles=frozen), 256, 256) for frozen in (FLAT, []))
    clean = encoded(pipe, plan)
    inner = plan.tops[1] // 8
    # What only the first tile covers is the input; without skipping it is something else, as in the last tile.
    torch.testing.assert_close(flat[..., :inner, :inner], clean[..., :inner, :inner], atol=1e-5, rtol=1e-5)
    assert (plain - clean)[..., :inner, :inner].abs().max() > 0.05
    assert (flat - clean)[..., -inner:, -inner:].abs().max() > 0.05


def test_all_tiles_flat_is_the_input_and_no_transformer_call(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(pipe.transformer, "forward", None)
    result = pipe.unpack_canvas(upscale(pipe, frozen_tiles=find(pipe, max_contrast=1.0)), 256, 256)
    clean = encoded(pipe, pipe.plan_tiles(256, 256, **TILES))
    torch.testing.assert_close(result, clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile_batch_size", [2, 4, 9])
def test_the_batch_size_changes_nothing(tile_batch_size):
    pipe = tiny_pipeline()
    one, many = (upscale(pipe, frozen_tiles=FLAT, tile_batch_size=size) for size in (1, tile_batch_size))
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-5)


def test_the_transformer_runs_for_the_other_tiles_only():
    pipe = tiny_pipeline()
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    upscale(pipe, frozen_tiles=FLAT)
    assert len(calls) == 3 * (9 - 5)
    upscale(pipe)
    assert len(calls) == 3 * (9 - 5) + 3 * 9


def test_a_picture_without_flat_tiles_is_not_changed():
    pipe = tiny_pipeline()
    photo = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((256, 256))
    assert find(pipe, photo, max_contrast=1e-4) == []
    assert torch.equal(upscale(pipe, image=photo), upscale(pipe, image=photo, frozen_tiles=[]))
