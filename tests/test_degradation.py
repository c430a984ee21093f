"""Degradation: what is drawn lies in the published ranges, and each part does what its name promises."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from dino_projector.training.degradation import (
    BLURS,
    DEGRADATIONS,
    Blur,
    Noise,
    apply_blur,
    apply_jpeg,
    apply_noise,
    blur_kernel,
    degrade,
    draw_degradation,
    to_picture,
    to_tensor,
)
from tiny_models import ROOT


# Real-ESRGAN's and SeeSR's options, written down again: blur sigma, resize, Gaussian, Poisson, JPEG of both rounds.
PUBLISHED = {
    "strong": [
        ((0.2, 3), (0.15, 1.5), (1, 30), (0.05, 3), (30, 95)),
        ((0.2, 1.5), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ],
    "mild": [
        ((0.2, 3), (0.3, 1.5), (1, 15), (0.05, 2), (60, 95)),
        ((0.2, 1.5), (0.6, 1.2), (1, 12), (0.05, 1), (60, 100)),
    ],
}
SECOND_BLUR = {"strong": 0.8, "mild": 0.5}


def photo(side=96):
    picture = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")
    return picture.crop((60, 60, 60 + side, 60 + side))


def draws(kind, count=2000):
    return [draw_degradation(kind, np.random.default_rng(seed)) for seed in range(count)]


def inside(values, low, high):
    """All in the range, and over the whole of it."""
    assert low <= min(values) and max(values) <= high
    margin = 0.1 * (high - low)
    assert min(values) < low + margin and max(values) > high - margin


@pytest.mark.parametrize("kind", ["mild", "strong"])
@pytest.mark.parametrize("index", [0, 1])
def test_draws_fill_the_published_ranges(kind, index):
    sigma, factor, gaussian, poisson, quality = PUBLISHED[kind][index]
    stages = [drawn[index] for drawn in draws(kind)]
    blurs = [stage.blur for stage in stages if stage.blur is not None and stage.blur.kind != "sinc"]
    inside([value for blur in blurs for value in blur.sigmas], *sigma)
    inside([stage.resize_factor for stage in stages], *factor)
    inside([stage.jpeg_quality for stage in stages], *quality)
    for name, limits in (("gaussian", gaussian), ("poisson", poisson)):
        inside([stage.noise.strength for stage in stages if stage.noise.kind == name], *limits)
    assert {blur.size for blur in blurs} == set(range(7, 22, 2))


@pytest.mark.parametrize("kind", ["mild", "strong"])
def test_draws_have_the_published_frequencies(kind):
    """Within four standard deviations of 2000 draws."""
    drawn = draws(kind)

    def share(values, wanted):
        values = list(values)
        assert abs(np.mean(values) - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / len(values))

    first, second = [item.first for item in drawn], [item.second for item in drawn]
    assert all(stage.blur is not None for stage in first)
    share((stage.blur is not None for stage in second), SECOND_BLUR[kind])
    share((stage.resize_factor > 1 for stage in first), 0.2)
    share((stage.resize_factor < 1 for stage in first), 0.7)
    share((stage.resize_factor > 1 for stage in second), 0.3)
    share((stage.resize_factor < 1 for stage in second), 0.4)
    share((stage.noise.kind == "gaussian" for stage in first), 0.5)
    share((stage.noise.is_grey for stage in first), 0.4)
    share((stage.blur.kind == "sinc" for stage in first), 0.1)
    share((item.sinc is not None for item in drawn), 0.8)
    share((item.is_jpeg_last for item in drawn), 0.5)
    kinds = Counter(stage.blur.kind for stage in first if stage.blur.kind != "sinc")
    for name, wanted in BLURS.items():
        share((stage.blur.kind == name for stage in first if stage.blur.kind != "sinc"), wanted)
    assert set(kinds) == set(BLURS)


@pytest.mark.parametrize("kind", ["mild", "strong"])
def test_sinc_cutoffs_are_what_the_kernel_can_hold(kind):
    filters = [stage.blur for item in draws(kind) for stage in item[:2] if stage.blur and stage.blur.kind == "sinc"]
    inside([item.cutoff for item in filters if item.size < 13], math.pi / 3, math.pi)
    inside([item.cutoff for item in filters if item.size >= 13], math.pi / 5, math.pi)
    inside([item.sinc.cutoff for item in draws(kind) if item.sinc], math.pi / 3, math.pi)


@given(st.sampled_from([*BLURS, "sinc"]), st.sampled_from(range(7, 22, 2)), st.integers(0, 2**32))
def test_kernels_keep_the_mean_and_the_symmetry(kind, size, seed):
    rng = np.random.default_rng(seed)
    sigmas = (rng.uniform(0.2, 3), rng.uniform(0.2, 3))
    kernel = blur_kernel(
        Blur(kind, size, sigmas, rng.uniform(-3, 3), rng.uniform(0.5, 4), rng.uniform(math.pi / 5, math.pi))
    )
    assert kernel.shape == (size, size)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(kernel, kernel.flip(0, 1))


def test_gaussian_kernel_has_the_variances_of_its_axes():
    kernel = blur_kernel(Blur("anisotropic gaussian", 21, (2.0, 1.0), angle=math.pi / 6)).double()
    axis = torch.arange(21) - 10.0
    y, x = torch.meshgrid(axis.double(), axis.double(), indexing="ij")
    covariance = torch.stack([(kernel * a * b).sum() for a, b in ((x, x), (x, y), (y, y))])
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    wanted = torch.tensor([4 * cos**2 + sin**2, (4 - 1) * sin * cos, 4 * sin**2 + cos**2], dtype=torch.float64)
    torch.testing.assert_close(covariance, wanted, rtol=0.01, atol=0.01)


def test_sinc_passes_low_and_stops_high_frequencies():
    kernel = blur_kernel(Blur("sinc", 21, cutoff=math.pi / 2))
    columns = torch.arange(96)

    def passed(frequency):
        wave = (0.5 + 0.4 * torch.cos(frequency * columns)).expand(3, 96, 96)
        blurred = apply_blur(wave, Blur("sinc", 21, cutoff=math.pi / 2))
        return float((blurred - 0.5)[..., 30:66].std() / (wave - 0.5)[..., 30:66].std())

    assert kernel.max() == kernel[10, 10]
    assert passed(math.pi / 4) == pytest.approx(1, abs=0.1)
    assert passed(0.8 * math.pi) < 0.1


@pytest.mark.parametrize("size", [(1, 3), (37, 108), (64, 64)])
@pytest.mark.parametrize("blur", [Blur("anisotropic gaussian", 21, (3.0, 0.5), 0.7), Blur("sinc", 7, cutoff=1.0)])
def test_a_blur_is_the_convolution_with_its_kernel(size, blur):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    padded = F.pad(image[:, None], [blur.size // 2] * 4, mode="replicate")
    wanted = F.conv2d(padded, blur_kernel(blur)[None, None])[:, 0].clamp(0, 1)
    torch.testing.assert_close(apply_blur(image, blur), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_grey", [False, True])
def test_gaussian_noise_has_its_strength(is_grey):
    image = torch.full((3, 200, 200), 0.5)
    noise = apply_noise(image, Noise("gaussian", 12.0, is_grey), np.random.default_rng(0)) - image
    assert float(noise.std()) == pytest.approx(12 / 255, rel=0.03)
    assert torch.equal(noise[0], noise[1]) == is_grey


def test_poisson_noise_grows_with_the_root_of_brightness():
    image = torch.linspace(0, 1, 256).repeat(3, 400, 1).round(decimals=4)
    noise = apply_noise(image, Noise("poisson", 0.5, False), np.random.default_rng(0)) - image
    # 256 grey levels are 256 photons at white, so the deviation is sqrt(brightness / 256), times the strength.
    for column in (64, 128, 192):
        wanted = 0.5 * math.sqrt(column / 255 / 256)
        assert float(noise[:, :, column].std()) == pytest.approx(wanted, rel=0.1)


def test_jpeg_is_pillows():
    picture = photo()
    errors = [float((apply_jpeg(to_tensor(picture), q) - to_tensor(picture)).abs().mean()) for q in (95, 60, 30)]
    assert errors == sorted(errors) and errors[0] > 0


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_degrading_is_seeded_and_of_the_asked_size(kind):
    picture = photo()
    small = degrade(picture, (31, 24), kind, np.random.default_rng(7))
    assert small.size == (31, 24) and small.mode == "RGB"
    assert small.tobytes() == degrade(picture, (31, 24), kind, np.random.default_rng(7)).tobytes()
    other = degrade(picture, (31, 24), kind, np.random.default_rng(8))
    assert (small.tobytes() == other.tobytes()) == (kind == "bicubic")


def test_strong_is_worse_than_mild_and_mild_worse_than_bicubic():
    picture = photo()
    reference = to_tensor(picture.resize((32, 32), Image.Resampling.LANCZOS))

    def error(kind):
        results = [to_tensor(degrade(picture, (32, 32), kind, np.random.default_rng(seed))) for seed in range(40)]
        return float(torch.stack([(result - reference).abs().mean() for result in results]).mean())

    assert error("strong") > error("mild") > error("bicubic")


def test_degrading_keeps_the_picture():
    """The low frequencies survive even the strong degradation."""
    picture = photo()
    small = degrade(picture, (24, 24), "strong", np.random.default_rng(3)).filter(ImageFilter.GaussianBlur(3))
    reference = picture.resize((24, 24), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(3))
    correlation = np.corrcoef(np.asarray(small).ravel(), np.asarray(reference).ravel())[0, 1]
    assert correlation > 0.9


def test_tensors_and_pictures_are_the_same_thing():
    assert to_picture(to_tensor(photo())).tobytes() == photo().tobytes()
