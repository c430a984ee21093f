"""The metrics of the comparison, on pictures with a known answer."""

import math

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dino_projector import metrics
from pipeline_flux_dino_tile import plan_tiles


def noise(height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def to_array(images: torch.Tensor) -> np.ndarray:
    return ((images[0] + 1) / 2).permute(1, 2, 0).double().numpy()


def test_psnr_and_ssim_of_the_luma_agree_with_skimage():
    original = noise()
    image = (original + 0.2 * noise(seed=1)).clamp(-1, 1)
    lumas = [rgb2ycbcr(to_array(picture))[..., 0] / 255 for picture in (image, original)]
    np.testing.assert_allclose(metrics.luma(image)[0, 0].numpy(), lumas[0], atol=1e-4)
    expected = peak_signal_noise_ratio(*lumas, data_range=1)
    assert float(metrics.psnr_y(image, original)) == pytest.approx(expected, abs=1e-3)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    assert float(metrics.ssim_y(image, original)) == pytest.approx(structural_similarity(*lumas, **options), abs=1e-3)
    assert float(metrics.ssim_y(original, original)) == pytest.approx(1)


def blurred_photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Two photos of odd sides, and the same blurred."""
    photos = [getattr(skimage.data, name)()[100:197, 50:181] for name in ("chelsea", "coffee")]
    originals = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 127.5 - 1
    return F.avg_pool2d(F.pad(originals, (2, 2, 2, 2), mode="replicate"), 5, stride=1), originals


# What piq 0.8.0 gives for them, and for a sharpened picture.
@pytest.mark.parametrize(
    ("metric", "of_blurred", "of_sharpened"),
    [
        (metrics.haarpsi, [0.882676, 0.829015], [0.921561, 0.896528]),
        (metrics.dss, [0.836474, 0.819202], [0.926821, 0.926871]),
    ],
)
def test_haarpsi_and_dss_agree_with_piq(metric, of_blurred, of_sharpened):
    blurred, originals = blurred_photos()
    sharpened = (2 * originals - blurred).clamp(-1, 1)
    assert metric(blurred, originals).tolist() == pytest.approx(of_blurred, abs=2e-5)
    assert metric(sharpened, originals).tolist() == pytest.approx(of_sharpened, abs=2e-5)


@pytest.mark.parametrize("metric", [metrics.haarpsi, metrics.dss])
def test_equal_pictures_are_similar_by_one_whatever_they_show(metric):
    small, black = noise(16, 24), -torch.ones(1, 3, 16, 24)
    assert metric(small, small).tolist() == metric(black, black).tolist() == [pytest.approx(1, abs=1e-5)]


def test_a_shifted_colour_drifts_by_as_much():
    original = noise() / 2
    shift = torch.tensor([3.0, -4.0, 0.0]).view(1, 3, 1, 1)
    drift = float(metrics.color_drift(original + shift / 127.5, original))
    assert drift == pytest.approx(math.sqrt((9 + 16) / 3), rel=1e-4)
    # Fine detail is no drift.
    checkers = torch.ones(1, 3, 48, 64)
    checkers[..., ::2, 1::2] = checkers[..., 1::2, ::2] = -1
    assert float(metrics.color_drift(original + 0.1 * checkers, original)) < 1


def test_a_picture_is_consistent_with_what_it_was_made_of():
    small = noise(12, 16) / 2
    blocks = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    smooth = torch.full((1, 3, 48, 64), 0.25)
    assert float(metrics.low_res_psnr(smooth, torch.full((1, 3, 12, 16), 0.05))) == pytest.approx(20, abs=1e-3)
    assert float(metrics.low_res_psnr(blocks, small)) > float(metrics.low_res_psnr(blocks.flip(3), small)) + 10


def test_overlaps_disagree_by_the_difference_of_their_tiles():
    plan = plan_tiles(128, 224, tile_size=128, tile_overlap=32)
    canvas = torch.randn(1, 4, 16, 28, generator=torch.Generator().manual_seed(0))
    tiles = torch.stack([canvas[tile.slices(8)] for tile in plan])
    assert metrics.overlap_disagreement(tiles, plan, 8) == 0
    tiles[1] += 0.5
    assert metrics.overlap_disagreement(tiles, plan, 8) == pytest.approx(0.5, rel=1e-5)
    # Only the right quarter of the first tile is shared: what happens elsewhere is no disagreement.
    tiles[0, ..., :12] += 9
    assert metrics.overlap_disagreement(tiles, plan, 8) == pytest.approx(0.5, rel=1e-5)
    tall = plan_tiles(224, 128, tile_size=128, tile_overlap=32)
    turned = tiles.transpose(3, 4)
    assert metrics.overlap_disagreement(turned, tall, 8) == pytest.approx(0.5, rel=1e-5)
    assert metrics.overlap_disagreement(tiles[:1], plan_tiles(128, 128), 8) == 0


def test_a_grid_of_16_px_is_found():
    ramp = torch.arange(64.0).expand(3, 64, 64)
    diagonal = ramp + ramp.transpose(1, 2)
    grid = diagonal + diagonal[:, :, :1] // 16 + diagonal[:, :1] // 16
    assert metrics.grid_ratio(grid, period=16) == pytest.approx(2)
    assert metrics.grid_ratio(diagonal, period=16) == pytest.approx(1)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        mean, low, high = metrics.bootstrap_mean(rng.normal(3, 2, 40))
        assert low <= mean <= high
        hits += low <= 3 <= high
    assert 88 <= hits <= 99
    # Equal values, and a single one, have an interval without width.
    assert metrics.bootstrap_mean([5.0, 5.0]) == metrics.bootstrap_mean([5.0]) == (5, 5, 5)


def test_weights_that_are_not_there_are_said_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in metrics.WEIGHTS:
        assert "is not in" in metrics.find_missing(name) or "not installed" in metrics.find_missing(name)
    judges, missing = metrics.load_judges()
    assert set(missing) >= set(metrics.WEIGHTS) and not set(judges) & set(missing)
    assert list(tmp_path.iterdir()) == []
