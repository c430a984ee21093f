"""The tile plan and its windows: coverage, sums, cost; and what tiling does to the result."""

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

from pipeline_flux_dino_tile import (
    MAX_TILE_TOKENS,
    axis_windows,
    blend_tiles,
    crop_tiles,
    plan_tiles,
    tile_cost,
    tile_starts,
    transformer_flops,
)
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
    for starts, size in ((plan.tops, plan.tile_height), (plan.lefts, plan.tile_width)):
        assert all(start + size - next_start >= overlap for start, next_start in itertools.pairwise(starts))


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
    torch.testing.assert_close(blend_tiles(crop_tiles(canvas, plan, cell), plan, cell), canvas, atol=1e-5, rtol=1e-5)


@given(lengths, lengths, st.integers(0, 128), st.sampled_from([128, 768, 1536]))
@settings(max_examples=200)
def test_the_planner_never_does_more_work_than_a_fixed_1024_px_plan(height, width, overlap, extra_tokens):
    def work(plan):
        return len(plan) * tile_cost(plan.tokens_per_tile, extra_tokens)

    planned = plan_tiles(height, width, None, overlap, extra_tokens=extra_tokens)
    fixed = plan_tiles(height, width, 1024, overlap, extra_tokens=extra_tokens)
    assert work(planned) <= work(fixed)
    assert planned.tokens_per_tile <= MAX_TILE_TOKENS


def test_planned_tiles_at_4096_px():
    plan = plan_tiles(4096, 4096)
    assert (len(plan), plan.tile_height, plan.tile_width) == (16, 1072, 1072)
    fixed = plan_tiles(4096, 4096, 1024)
    assert len(fixed) == 25
    # design.md: 30 % fewer tokens.
    assert len(plan) * plan.tokens_per_tile / (len(fixed) * fixed.tokens_per_tile) == pytest.approx(0.70, abs=0.01)


def test_flops_agree_with_a_count_of_the_real_transformer():
    """FlopCounterMode on FLUX.1's configuration without weights; modulation and embedders are what is left out."""
    from diffusers import FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=4)
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
    assert transformer_flops(4608, num_layers=6) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_cost_of_a_tile_is_four_steps_and_the_vae():
    """4 steps of 57 blocks: 12 h^2 weights and 2 S h attention products for a token; 9 GFLOP for an image token."""
    tokens, h = 4096 + 768, 3072
    step = 57 * tokens * 2 * (12 * h**2 + 2 * tokens * h)
    assert tile_cost(4096, 768) == pytest.approx(4 * step + 4096 * 9e9)


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


@pytest.mark.parametrize("fusion", ["step", "final"])
def test_the_result_does_not_depend_on_the_tile_batch_size(pipe, photo, fusion):
    image = photo.resize((160, 112))
    results = [run(pipe, image, tile_batch_size=size, tile_fusion=fusion) for size in (1, 2, 3, 100)]
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


@pytest.mark.parametrize("fusion", ["step", "final"])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_image_stays_constant(pipe, monkeypatch, fusion, value):
    """With an exact velocity, tiles, windows, fusion, scheduler and decoding add nothing of their own."""
    vae_config = pipe.vae.config
    latent = (2 * value - 1 - vae_config.shift_factor) * vae_config.scaling_factor

    def exact_velocity(hidden_states, timestep, **kwargs):
        return ((hidden_states - latent) / timestep[:, None, None],)

    monkeypatch.setattr(pipe.vae, "encode", AveragingVae().encode)
    monkeypatch.setattr(pipe.vae, "decode", AveragingVae().decode)
    monkeypatch.setattr(pipe.transformer, "forward", exact_velocity)
    image = np.full((144, 208, 3), value, dtype=np.float32)
    result = run(pipe, image, start_sigma=0.8, tile_fusion=fusion)
    np.testing.assert_allclose(result, np.broadcast_to(image, result.shape), atol=1e-5)


def bistable_velocity(hidden_states, timestep, **kwargs):
    """
    The flow to an image that a tile makes up from what it sees of itself: bright if it looks bright, else dark.

    It stands in for a denoiser whose answer depends on the whole tile, which random weights do not give: with the tiny
    transformer both fusions change by the same 0.127.
    """
    answer = torch.tanh(6 * hidden_states.mean((1, 2), keepdim=True)) * 0.5 + 0.5 * hidden_states
    return ((hidden_states - answer) / timestep[:, None, None],)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_step_fusion_depends_less_on_the_tile_grid_than_final_fusion(pipe, monkeypatch, capsys, seed):
    """The same noise and the same tiles, with the grid moved by half a tile over the picture."""
    monkeypatch.setattr(pipe.transformer, "forward", bistable_velocity)
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(seed))
    noise += 2 * F.interpolate(noise[..., :8, :8], (64, 64), mode="bilinear")
    changes = {}
    for fusion in ("step", "final"):
        results = []
        for shift in (0, 8):  # latent cells: half a tile
            latents = pipe.pack_canvas(0.8 * noise.roll((shift, shift), (2, 3)))
            settings = {"start_sigma": 0.8, "num_inference_steps": 8, "tile_size": 128, "output_type": "latent"}
            result = run(pipe, Image.new("RGB", (512, 512)), latents=latents, tile_fusion=fusion, **settings)
            canvas = pipe.unpack_canvas(result, 512, 512)
            results.append(canvas[..., shift + 8 : shift + 48, shift + 8 : shift + 48])
        changes[fusion] = (results[0] - results[1]).square().mean().sqrt().item()
    with capsys.disabled():
        print(f"\n  change by a grid moved half a tile: step {changes['step']:.3f}, final {changes['final']:.3f}")
    assert changes["step"] < changes["final"]


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
    pixels = pipe.prepare_image(photo, 256, 192)
    with torch.no_grad():
        latents = pipe.encode_tiles(pixels, plan_tiles(256, 192, 256, 32, 16), torch.Generator().manual_seed(0))
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
    pixels = pipe.prepare_image(photo, 256, 192)
    with torch.no_grad():
        whole = pipe.encode_tile(pixels)
        tiles = [pipe.encode_tile(pixels[tile.slices()]) for tile in plan]
    tiled, pasted = blend_tiles(tiles, plan, 8), paste_tiles(tiles, plan, 8)
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
