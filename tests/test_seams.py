"""The three places where what wraps a call takes hold of it: a step to go on from, frozen tiles, the map of tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiny_models import tiny_pipeline


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
NUM_STEPS, NUM_TILES = 3, 6
# px, of a canvas of 64 x 96
SIZE = (64, 96)
PIPE = tiny_pipeline(dino="dinov2")
# The latents of a canvas: 4 x 6 tokens of 16 numbers.
LATENTS = torch.linspace(-1, 1, 24 * 16).view(1, 24, 16)


def enlarge(pipe=PIPE, **kwargs):
    """Six tiles of 48 x 48 px in three steps; latents unless `kwargs` say otherwise."""
    values = {"image": PHOTO, "upscale_factor": 2, "start_sigma": 0.6, "num_inference_steps": NUM_STEPS}
    values |= {"max_sequence_length": 16, "tile_size": 48, "tile_overlap": 16, "output_type": "latent"}
    return pipe(**{**values, "generator": torch.Generator().manual_seed(0), **kwargs}).images


def canvases(**kwargs) -> list[torch.Tensor]:
    """The canvas after each step of a call, as a callback sees it."""
    seen = []

    def keep(pipeline, index, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    enlarge(callback_on_step_end=keep, **kwargs)
    return seen


def coverage(tiles) -> torch.Tensor:
    """The weight `(rows, columns)` that the windows of these tiles have in each cell of the canvas."""
    plan, total = PIPE.plan_tiles(*SIZE, 48, 16), torch.zeros(8, 12)
    for index, (tile, window) in enumerate(zip(plan, plan.windows(8))):
        if index in tiles:
            total[tile.slices(8)] += window
    return total


def cells(latents: torch.Tensor) -> torch.Tensor:
    return PIPE.unpack_canvas(latents, *SIZE)


# ---- A step to go on from ------------------------------------------------------------------------------------------

CALLS = {
    "plain": {},
    "strength": {"start_sigma": None, "strength": 0.7, "num_inference_steps": 4},
    "sigmas": {"start_sigma": None, "num_inference_steps": None, "sigmas": [0.9, 0.5, 0.2]},
    "true cfg": {"negative_prompt": "blur", "true_cfg_scale": 2.0},
    "a window of DINO": {"dino_guidance_start": 0.3, "dino_guidance_end": 0.7},
    "a batch": {"num_images_per_prompt": 2, "dino_conditioning_scale": 0.5},
    "frozen tiles": {"frozen_tiles": [0, 5]},
}


@pytest.mark.parametrize("name", CALLS)
def test_goes_on_from_any_step_bit_for_bit(name):
    expected, seen = enlarge(**CALLS[name]), canvases(**CALLS[name])
    for step, latents in enumerate(seen, 1):
        assert torch.equal(enlarge(first_step=step, latents=latents, **CALLS[name]), expected)
    assert torch.equal(seen[-1], expected)


def test_a_call_after_one_that_went_on_starts_at_its_start():
    expected, seen = enlarge(), canvases()
    enlarge(first_step=2, latents=seen[1])
    assert torch.equal(enlarge(), expected)


def test_the_callback_sees_the_steps_that_are_left():
    steps = []

    def note(pipeline, index, timestep, tensors):
        steps.append((index, float(timestep)))
        return {}

    enlarge(callback_on_step_end=note)
    enlarge(callback_on_step_end=note, first_step=1, latents=LATENTS)
    assert steps[3:] == steps[1:3]


@pytest.mark.parametrize("output_type", ["np", "strips"])
def test_after_the_last_step_the_latents_are_only_decoded(monkeypatch, output_type):
    latents, expected = enlarge(), np.concatenate(list(enlarge(output_type=output_type)), axis=-3)
    monkeypatch.setattr(PIPE.transformer, "forward", None)
    monkeypatch.setattr(PIPE.vae.encoder, "forward", None)
    result = enlarge(first_step=NUM_STEPS, latents=latents, output_type=output_type)
    assert np.array_equal(np.concatenate(list(result), axis=-3), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"first_step": 1}, "`first_step` must be 0 without `latents` to go on from, but is 1"),
        ({"first_step": -1, "latents": LATENTS}, "`first_step` must be a whole number of at least 0"),
        ({"first_step": 1.0, "latents": LATENTS}, "`first_step` must be a whole number"),
        ({"first_step": 4, "latents": LATENTS}, "`first_step` must be at most the 3 steps of this call, but is 4"),
        ({"latents": LATENTS[:, 1:]}, r"`latents` must be a tensor of shape \(1, 24, 16\)"),
        ({"latents": LATENTS * torch.nan}, "`latents` must be free of NaN"),
        ({"frozen_tiles": [6]}, r"`frozen_tiles` must be a list of numbers of the plan's 6 tiles, but is \[6\]"),
        ({"frozen_tiles": [-1]}, "`frozen_tiles` must be a list of numbers of the plan's 6 tiles"),
        ({"frozen_tiles": 3}, "`frozen_tiles` must be a list of numbers of the plan's 6 tiles, but is 3"),
        ({"frozen_tiles": None}, "`frozen_tiles` must be a list of numbers of the plan's 6 tiles, but is None"),
        ({"frozen_tiles": ["sky"]}, "`frozen_tiles` must be a list of numbers of the plan's 6 tiles"),
        ({"frozen_tiles": [0], "frozen_latents": LATENTS[:, 1:]}, r"`frozen_latents` must be a tensor of shape \(1,"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        enlarge(**kwargs)


# ---- Frozen tiles --------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    tiles=st.sets(st.integers(0, NUM_TILES - 1)),
    batch_size=st.integers(1, NUM_TILES),
    start_sigma=st.floats(0.05, 1),
    scale=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_frozen_tiles_end_at_their_latents(tiles, batch_size, start_sigma, scale):
    """Where their windows have all the weight; where they have none, the step before knows nothing of them."""
    kwargs = {"start_sigma": start_sigma, "dino_conditioning_scale": scale, "tile_batch_size": batch_size}
    result = cells(enlarge(frozen_tiles=sorted(tiles), frozen_latents=LATENTS, **kwargs))
    is_frozen = coverage(tiles) > 1 - 1e-6
    torch.testing.assert_close(result[..., is_frozen], cells(LATENTS)[..., is_frozen], atol=2e-5, rtol=1e-5)
    one_step = {**kwargs, "num_inference_steps": 1}
    result, plain = (cells(enlarge(frozen_tiles=x, frozen_latents=LATENTS, **one_step)) for x in (sorted(tiles), []))
    is_free = coverage(tiles) == 0
    torch.testing.assert_close(result[..., is_free], plain[..., is_free], atol=2e-5, rtol=1e-5)


def test_frozen_tiles_end_at_the_input_by_default():
    plan = PIPE.plan_tiles(*SIZE, 48, 16)
    with torch.no_grad():
        posterior = PIPE.encode_tiles(PIPE.prepare_image([PHOTO], *SIZE), plan)
    clean = PIPE.sample_latents(posterior, sample_mode="argmax")
    result = cells(enlarge(frozen_tiles=range(NUM_TILES)))
    torch.testing.assert_close(result, clean, atol=1e-5, rtol=1e-5)
    from_latents = cells(enlarge(image=clean, upscale_factor=None, dino_conditioning_scale=0, frozen_tiles=range(6)))
    torch.testing.assert_close(from_latents, clean, atol=1e-5, rtol=1e-5)


def test_a_frozen_canvas_for_each_of_a_batch():
    both = torch.cat([LATENTS, -LATENTS])
    result = enlarge(num_images_per_prompt=2, frozen_tiles=range(NUM_TILES), frozen_latents=both)
    torch.testing.assert_close(result, both, atol=1e-5, rtol=1e-5)


# ---- The map of tiles ----------------------------------------------------------------------------------------------


def test_everything_computed_tile_by_tile_goes_through_the_map(monkeypatch):
    """DINO, the VAE's encoder, three steps of batches, the VAE's decoder; it gives the results in order."""
    expected, phases = enlarge(output_type="np", tile_batch_size=2), []

    def backwards(compute, items):
        phases.append(len(items))
        results = {index: compute(items[index]) for index in reversed(range(len(items)))}
        return (results[index] for index in range(len(items)))

    monkeypatch.setattr(PIPE, "map_tiles", backwards)
    assert np.array_equal(enlarge(output_type="np", tile_batch_size=2), expected)
    assert phases == [6, 6, 3, 3, 3, 6]


def test_the_models_run_in_the_map_alone(monkeypatch):
    """A map that computes nothing gives what it wants, and no model is called."""
    monkeypatch.setattr(PIPE, "map_tiles", lambda compute, items: iter(()))
    for name in ("transformer", "vae", "dino_encoder"):
        monkeypatch.setattr(getattr(PIPE, name), "forward", None)
    with pytest.raises((StopIteration, RuntimeError)):
        enlarge()


# ---- Strips --------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(height=st.integers(48, 150), width=st.integers(48, 110), residual=st.booleans(), batch=st.integers(1, 2))
def test_strips_are_the_picture_from_top_to_bottom(height, width, residual, batch):
    kwargs = {"upscale_factor": None, "height": height, "width": width, "num_inference_steps": 1}
    kwargs |= {"vae_residual": residual, "num_images_per_prompt": batch}
    strips = list(enlarge(output_type="strips", **kwargs))
    assert all(strip.dtype == np.uint8 and strip.shape[0::2] == (batch, width) for strip in strips)
    expected = np.stack([np.asarray(image) for image in enlarge(output_type="pil", **kwargs)])
    assert np.array_equal(np.concatenate(strips, axis=1), expected)


def test_strips_are_decoded_while_they_are_read():
    decoded = []
    handle = PIPE.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(1))
    strips = enlarge(output_type="strips")
    assert decoded == []
    next(strips)
    assert len(decoded) == 3, "more than the first row of tiles"
    list(strips)
    assert len(decoded) == NUM_TILES
    handle.remove()
