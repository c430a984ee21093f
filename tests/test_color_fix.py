"""Colours of a result after those of its input."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux_dino_tile.color_fix import low_frequencies, match_color
from tiny_models import ROOT, tiny_pipeline


PIPE = tiny_pipeline()
PHOTO = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((120, 90))


def as_array(image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def enlarged(scale: float = 1.0, shift: float = 0.0) -> Image.Image:
    """The photo at three times its size, with other colours."""
    pixels = as_array(PHOTO.resize((360, 270), Image.Resampling.LANCZOS))
    return Image.fromarray((pixels * scale + shift).clip(0, 255).astype(np.uint8))


def test_low_frequencies_keep_a_constant_and_lose_stripes():
    constant = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(low_frequencies(constant), constant)
    stripes = torch.ones(1, 3, 64, 128)
    stripes[..., ::2] = -1
    # Away from the border, to which the blurs reach over 1 + 2 + 4 + 8 + 16 px.
    assert low_frequencies(stripes)[..., 32:-32].abs().max() < 1e-6
    assert low_frequencies(stripes, levels=0) is stripes


@pytest.mark.parametrize(("method", "share"), [("wavelet", 0.4), ("adain", 0.1)])
def test_a_cast_is_taken_back(method, share):
    """By wavelets but for the weaker contrast of the detail, which they keep."""
    cast = enlarged(0.8, 20)
    (result,) = match_color(PIPE, cast, PHOTO, method)
    before, after = (np.abs(as_array(image) - as_array(enlarged())).mean() for image in (cast, result))
    assert result.size == (360, 270) and before > 8 and after < share * before


def test_wavelet_keeps_detail_and_adain_matches_mean_and_deviation():
    cast = enlarged(0.5, 60)
    wavelet, adain = (as_array(match_color(PIPE, cast, PHOTO, method)[0]) for method in ("wavelet", "adain"))
    reference = as_array(enlarged())
    np.testing.assert_allclose(adain.mean((0, 1)), reference.mean((0, 1)), atol=1.5)
    np.testing.assert_allclose(adain.std((0, 1)), reference.std((0, 1)), atol=1.5)
    detail = [
        x - low_frequencies(x, levels=2)
        for x in (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (wavelet, as_array(cast)))
    ]
    assert (detail[0] - detail[1]).abs().mean() < 0.4 < 0.1 * detail[1].abs().max()


def test_the_form_of_the_result_stays():
    cast = enlarged(0.8, 20)
    (expected,) = match_color(PIPE, cast, PHOTO, "wavelet")
    array = np.asarray(cast, dtype=np.float32)[None] / 255
    for images in (array, torch.from_numpy(array).permute(0, 3, 1, 2), [array[0]]):
        result = match_color(PIPE, images, PHOTO, "wavelet")
        assert isinstance(result, torch.Tensor if isinstance(images, torch.Tensor) else np.ndarray)
        result = result.permute(0, 2, 3, 1).numpy() if isinstance(result, torch.Tensor) else result
        assert result.shape == array.shape
        np.testing.assert_allclose(result[0] * 255, as_array(expected), atol=0.6)


def test_results_of_one_input_and_of_several():
    casts = [enlarged(0.8, 20), enlarged(0.9)]
    for reference in (PHOTO, [PHOTO, PHOTO]):
        results = match_color(PIPE, casts, reference, "adain")
        for result, cast in zip(results, casts):
            assert result.tobytes() == match_color(PIPE, cast, PHOTO, "adain")[0].tobytes()


@pytest.mark.parametrize(
    ("images", "reference", "method", "message"),
    [
        (PHOTO, PHOTO, "magic", "`method` must be one of 'wavelet', 'adain', but is 'magic'"),
        (PHOTO, PHOTO, ["adain"], "`method` must be one of 'wavelet', 'adain'"),
        ([PHOTO] * 3, [PHOTO] * 2, "adain", "`reference` must be 1 picture, or one for each of 3, but is 2"),
        (torch.zeros(1, 4, 8, 8), PHOTO, "adain", "`images` must be pixels, not latents"),
        (PHOTO, torch.zeros(1, 4, 8, 8), "adain", "`reference` must be pixels, not latents"),
        (PHOTO, None, "adain", "must be a PIL image, an array, a tensor"),
    ],
)
def test_wrong_arguments_are_named(images, reference, method, message):
    with pytest.raises(ValueError, match=message):
        match_color(PIPE, images, reference, method)
