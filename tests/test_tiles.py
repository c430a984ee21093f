"""The tile plan and its windows: coverage, sums, tokens; and what tiling does to the result."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline_flux_dino_tile import axis_windows, blend_tiles, plan_tiles, tile_starts
from tiny_models import ROOT, tiny_pipeline


lengths = st.integers(1, 20_000)  # pixels
grids = st.sampled_from([2, 8, 16])  # pixels per token
overlaps = st.integers(0, 256)  # pixels


@st.composite
def plans(draw, longest: int = 3000):
    """A plan with a chosen or a planned tile size, whose overlap fits into its tiles."""
    height, width = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    pixels_per_token = draw(grids)
    overlap = draw(overlaps)
    smallest = max(2 * math.ceil(overlap / pixels_per_token), math.ceil(longest / pixels_per_token / 8), 1)
    sides = st.integers(smallest, 2 * smallest).map(lambda tokens: tokens * pixels_per_token)
    return (
        plan_tiles(height, width, draw(st.tuples(sides, sides)), overlap, pixels_per_token),
        (height, width),
        overlap,
    )


def least_overlap(plan) -> float:
    """The least overlap of two neighbours in pixels."""
    axes = (plan.tops, plan.tile_height), (plan.lefts, plan.tile_width)
    overlaps = [start + size - after for starts, size in axes for start, after in itertools.pairwise(starts)]
    return min(overlaps, default=math.inf)


@given(plans())
def test_every_pixel_is_covered_by_tiles_of_one_size_on_the_grid(case):
    plan, (height, width), overlap = case
    assert plan.height - height in range(plan.pixels_per_token)
    assert plan.width - width in range(plan.pixels_per_token)
    covered = np.zeros((plan.height // plan.pixels_per_token, plan.width // plan.pixels_per_token), dtype=int)
    for tile in plan:
        assert (tile.height, tile.width) == (plan.tile_height, plan.tile_width)
        assert not any(value % plan.pixels_per_token for value in tile)
        assert tile.top >= 0 and tile.top + tile.height <= plan.height
        assert tile.left >= 0 and tile.left + tile.width <= plan.width
        covered[tile.slices(plan.pixels_per_token)] += 1
    assert covered.min() >= 1
    assert least_overlap(plan) >= overlap


@given(st.integers(2, 400), st.integers(1, 90), st.integers(0, 60))
def test_tiles_are_as_few_and_as_even_as_can_be(length, size, overlap):
    size = min(max(size, overlap + 1), length)
    starts = tile_starts(length, size, min(overlap, size - 1))
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert (starts[0], starts[-1]) == (0, length - size)
    assert not gaps or max(gaps) <= size - min(overlap, size - 1)
    assert not gaps or max(gaps) - min(gaps) <= 1
    # One tile fewer could not reach the end with this overlap.
    assert size + (len(starts) - 2) * (size - min(overlap, size - 1)) < length or len(starts) == 1


@given(plans(longest=800), st.sampled_from([1, 2]))
def test_windows_sum_to_one(case, cell):
    plan = case[0]
    total = torch.zeros(plan.height // cell, plan.width // cell, dtype=torch.float64)
    for tile, window in zip(plan, plan.windows(cell)):
        assert window.min() > 0
        total[tile.slices(cell)] += window.double()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_window_is_a_raised_cosine_as_wide_as_the_overlap():
    first, second = axis_windows([0, 24], 32)
    ramp = np.array([0.5 - 0.5 * math.cos(math.pi * (k + 0.5) / 8) for k in range(8)])
    np.testing.assert_allclose(second[:8], ramp, atol=1e-7)
    np.testing.assert_allclose(first[24:], ramp[::-1], atol=1e-7)
    assert (first[:24] == 1).all() and (second[8:] == 1).all()


@given(plans(longest=400), st.integers(0, 2**31))
def test_blending_the_crops_of_a_canvas_gives_the_canvas(case, seed):
    plan = case[0]
    cell = plan.pixels_per_token
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.randn(1, 2, plan.height // cell, plan.width // cell, generator=generator)
    crops = [canvas[tile.slices(cell)] for tile in plan]
    torch.testing.assert_close(blend_tiles(crops, plan, cell), canvas, atol=1e-5, rtol=1e-5)


TEXT_AND_DINO_TOKENS = 512  # beside those of the image, in every tile
LEAST, MOST = 3125, 5078  # tokens of a planned tile: 0.8 to 1.3 MP


def work(plan) -> int:
    return len(plan) * (plan.tokens_per_tile + TEXT_AND_DINO_TOKENS)


def least_work(rows: int, columns: int, overlap: int) -> float:
    """Of all tile sizes, by trying each of them; all lengths in tokens. Infinite if no size is as it should be."""
    height, width = np.arange(1, rows + 1)[:, None], np.arange(1, columns + 1)[None, :]
    tokens = height * width
    is_good = (tokens <= MOST) & ((tokens >= LEAST) | ((height == rows) & (width == columns)))
    is_good &= (np.maximum(height, width) <= 2 * np.minimum(height, width)) | (height == rows) | (width == columns)
    is_good &= ((height > overlap) | (height == rows)) & ((width > overlap) | (width == columns))

    def tiles(length, size):
        steps = np.maximum(size - overlap, 1)
        return np.where(size >= length, 1, -(-(length - overlap) // steps))

    everything = tiles(rows, height) * tiles(columns, width) * (tokens + TEXT_AND_DINO_TOKENS)
    return float(np.where(is_good, everything, np.inf).min())


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(0, 192))
@settings(max_examples=300)
def test_the_planner_does_no_more_work_than_the_best_of_all_sizes(height, width, overlap):
    """Where no size is as it should be, it takes tiles of 1024 px."""
    planned, fixed = plan_tiles(height, width, None, overlap), plan_tiles(height, width, 1024, overlap)
    best = least_work(planned.height // 16, planned.width // 16, math.ceil(overlap / 16))
    if best < math.inf:
        assert work(planned) == best
        assert planned.tokens_per_tile <= MOST
        assert planned.tokens_per_tile >= LEAST or len(planned) == 1
    else:
        assert planned == fixed
    assert least_overlap(planned) >= overlap


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 200), st.sampled_from([None, 256, 512]))
def test_neighbours_share_at_least_what_is_asked(pipe, height, width, overlap, tile_size):
    assert least_overlap(pipe.plan_tiles(height, width, tile_size, overlap)) >= overlap


def test_planned_tiles_at_4096_px():
    plan = plan_tiles(4096, 4096)
    assert (len(plan), plan.tile_height, plan.tile_width) == (16, 1072, 1072)
    fixed = plan_tiles(4096, 4096, 1024)
    assert len(fixed) == 25
    # 30 % fewer tokens.
    assert len(plan) * plan.tokens_per_tile / (len(fixed) * fixed.tokens_per_tile) == pytest.approx(0.70, abs=0.01)


# ---- What tiling does to the result -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dino="dinov2")


@pytest.fixture(scope="module")
def photo():
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")


def run(pipe, image, **settings):
    call = {
        "image": image,
        "upscale_factor": 1,
        "tile_size": 64,
        "tile_overlap": 32,
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(**{**call, **settings}).images


def test_the_result_does_not_depend_on_the_tile_batch_size(pipe, photo):
    image = photo.resize((160, 112))
    results = [run(pipe, image, tile_batch_size=size) for size in (1, 2, 3, 100)]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (33, 200), (16, 16), (1, 1), (3, 65)])
def test_any_output_size_comes_out_exactly(pipe, photo, size):
    result = run(pipe, photo.resize(size))
    assert result.shape == (1, size[1], size[0], 3)
    assert np.isfinite(result).all()


class AveragingVae:
    """A stand-in for the VAE's weights: encodes each cell to its mean grey value, decodes it to a flat square."""

    def encode(self, pixels):
        mean = F.avg_pool2d(pixels.mean(1, keepdim=True), 8).expand(-1, 4, -1, -1)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -30.0)], 1)))

    def decode(self, latents, return_dict):
        return (F.interpolate(latents[:, :1].expand(-1, 3, -1, -1), scale_factor=8.0),)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_image_stays_constant(pipe, monkeypatch, value):
    """With an exact velocity, tiles, windows, scheduler and decoding add nothing of their own."""
    vae_config = pipe.vae.config
    latent = (2 * value - 1 - vae_config.shift_factor) * vae_config.scaling_factor

    def exact_velocity(hidden_states, timestep, **kwargs):
        return ((hidden_states - latent) / timestep[:, None, None],)

    monkeypatch.setattr(pipe.vae, "encode", AveragingVae().encode)
    monkeypatch.setattr(pipe.vae, "decode", AveragingVae().decode)
    monkeypatch.setattr(pipe.transformer, "forward", exact_velocity)
    image = np.full((144, 208, 3), value, dtype=np.float32)
    result = run(pipe, image, start_sigma=0.8)
    np.testing.assert_allclose(result, np.broadcast_to(image, result.shape), atol=1e-5)


# ---- Decoding and encoding tile by tile ----------------------------------------------------------------------------


def border_gradient(difference: torch.Tensor, plan, pixels_per_cell: int) -> float:
    """Mean gradient across the lines where tiles begin or end, over that across all parallel lines."""
    ratios = []
    for dim, starts, size in ((2, plan.tops, plan.tile_height), (3, plan.lefts, plan.tile_width)):
        gradient = difference.diff(dim=dim).abs().mean([other for other in range(4) if other != dim])
        borders = [*starts[1:], *(start + size for start in starts[:-1])]
        lines = [border // pixels_per_cell - 1 for border in borders]
        ratios.append(float(gradient[lines].mean() / gradient.mean()))
    return max(ratios)


def paste_tiles(tiles, plan, pixels_per_cell: int) -> torch.Tensor:
    """What a tiler without blending does."""
    canvas = torch.zeros(1, tiles[0].shape[1], plan.height // pixels_per_cell, plan.width // pixels_per_cell)
    for tile, values in zip(plan, tiles):
        canvas[tile.slices(pixels_per_cell)] = values
    return canvas


def test_tiles_decode_without_seams(pipe, photo):
    """
    The photo's latents decoded in tiles and in one piece: what differs (a group norm sees its own tile only, and these
    weights are random) does not change at the tiles' borders.
    """
    plan = plan_tiles(256, 192, 96, 32, 16)
    pixels = pipe.prepare_image([photo], 256, 192)
    with torch.no_grad():
        posterior = pipe.encode_tiles(pixels, plan_tiles(256, 192, 256, 32, 16))
        latents = pipe.sample_latents(posterior, torch.Generator().manual_seed(0))
        whole = pipe.vae.decode(latents / 0.3611 + 0.1159).sample
        strips = list(pipe.decode_strips(latents, plan))
        tiles = [pipe.vae.decode(latents[tile.slices(8)] / 0.3611 + 0.1159).sample for tile in plan]
    assert len(strips) == len(plan.tops) > 2
    tiled, pasted = torch.cat(strips, dim=2), paste_tiles(tiles, plan, 1)
    assert (tiled - whole).square().mean() < (pasted - whole).square().mean()
    assert border_gradient(tiled - whole, plan, 1) < 1.1
    # The measure can fail: pasted tiles have seams.
    assert border_gradient(pasted - whole, plan, 1) > 1.5


def test_tiles_encode_without_seams(pipe, photo):
    plan = plan_tiles(256, 192, 96, 32, 16)
    pixels = pipe.prepare_image([photo], 256, 192)
    with torch.no_grad():
        whole, tiled = (pipe.encode_tiles(pixels, each) for each in (plan_tiles(256, 192, 256, 32, 16), plan))
        crops = [pixels[tile.slices()].float() / 127.5 - 1 for tile in plan]
        tiles = [pipe.vae.encode(crop).latent_dist.parameters for crop in crops]
    pasted = paste_tiles(tiles, plan, 8)
    # In latent cells an overlap is four wide: a ramp of four steps.
    assert border_gradient(tiled - whole, plan, 8) < 1.1 < border_gradient(pasted - whole, plan, 8)


def test_decoding_holds_one_row_of_tiles(pipe, monkeypatch):
    """A strip comes out as soon as its row of tiles is decoded."""
    plan = plan_tiles(320, 256, 128, 64, 16)
    calls = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    with torch.no_grad():
        strips = pipe.decode_strips(torch.zeros(1, 4, 40, 32), plan)
        heights = [next(strips).shape[2]]
        assert len(calls) == len(plan.lefts) == 3
        heights += [strip.shape[2] for strip in strips]
    assert heights == [64, 64, 64, 128] and len(calls) == len(plan)
