"""`return_diagnostics` and `redo_start_sigma`: numbers of known cases, and that only the suspect tiles change."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline_flux_dino_tile import dino_similarity, plan_tiles, seam_ratio, tile_seam_scores
from tiny_models import ROOT, tiny_pipeline


SIZE = 256
TILES = {"tile_size": 128, "tile_overlap": 32}
REDO_SIGMA = 0.2


def photo(size: int = SIZE) -> Image.Image:
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((size, size))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dino="dinov2")


def upscale(pipe, **kwargs):
    settings = {
        "image": photo(),
        "upscale_factor": 1,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        **TILES,
    }
    return pipe(**{**settings, **kwargs})


@pytest.fixture(scope="module")
def diagnosed(pipe):
    return upscale(pipe, return_diagnostics=True)


def threshold_between(similarity: torch.Tensor) -> float:
    """Below which exactly the least similar tile lies."""
    lowest, second = similarity.flatten().sort().values[:2]
    return float(lowest + second) / 2


# ---- Numbers -------------------------------------------------------------------------------------------------------


def test_similarity_is_a_mean_cosine():
    features = torch.zeros(3, 1, 2, 2, 2)
    features[..., 0] = 2
    others = features.clone()
    others[1] *= -3
    others[2, 0, 0] = torch.tensor([0.0, 5.0])
    assert dino_similarity(features, others).tolist() == [[1], [-1], [0.5]]


def test_a_planted_seam_is_found_in_the_tiles_beside_it():
    plan = plan_tiles(SIZE, 480, tile_size=SIZE, tile_overlap=32)
    assert plan.borders == ([], [224, 256])
    wide = plan_tiles(SIZE, 704, tile_size=SIZE, tile_overlap=32)
    ramp = torch.arange(704.0).expand(3, SIZE, 704) / 1000
    assert tile_seam_scores(ramp, wide) == pytest.approx([1, 1, 1], abs=1e-2)
    seam = ramp + 0.003 * (torch.arange(704) >= wide.lefts[1])
    # One of the first tile's two borders is four times as high; the second has it among its four.
    assert tile_seam_scores(seam, wide) == pytest.approx([2.5, 1.75, 1], abs=2e-2)


def test_a_picture_without_steps_and_a_single_tile_have_no_seam():
    flat = torch.full((3, SIZE, 448), 0.2)
    assert tile_seam_scores(flat, plan_tiles(SIZE, 448, tile_size=SIZE)) == [1, 1]
    assert tile_seam_scores(flat, plan_tiles(SIZE, 448, tile_size=448)) == [1]
    # Nor has one in which every line that could be compared is a border.
    assert seam_ratio(torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0)), [16, 32], [16, 32, 48]) == 1


def test_a_swapped_object_is_suspect_at_its_place(pipe):
    features = pipe.encode_dino(photo(), upscale_factor=1, **TILES)
    plan = pipe.plan_tiles(SIZE, SIZE, **TILES)
    same = pipe.diagnose_tiles(photo(), plan, features)
    assert same.dino_similarity.flatten().tolist() == pytest.approx([1] * len(plan), abs=1e-5)
    assert same.suspects == [[]]
    swapped = np.array(photo())
    # In the middle of the last tile, away from its neighbours.
    swapped[-90:, -90:] = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    found = pipe.diagnose_tiles(Image.fromarray(swapped), plan, features)
    assert found.dino_similarity[-1, 0] < found.dino_similarity[:-1].min() - 0.05
    threshold = threshold_between(found.dino_similarity)
    assert pipe.diagnose_tiles(Image.fromarray(swapped), plan, features, threshold).suspects == [[plan[-1]]]


# ---- The output ----------------------------------------------------------------------------------------------------


def test_the_output_carries_plan_and_numbers(pipe, diagnosed):
    plan = pipe.plan_tiles(SIZE, SIZE, **TILES)
    assert diagnosed.tile_plan == plan and len(plan) == 9
    assert diagnosed.dino_similarity.shape == diagnosed.seam_score.shape == (9, 1)
    features = pipe.encode_dino(photo(), upscale_factor=1, **TILES)
    found = pipe.encode_dino(diagnosed.images[0], upscale_factor=1, **TILES)
    expected = torch.nn.functional.cosine_similarity(features, found, dim=-1).mean((2, 3))
    torch.testing.assert_close(diagnosed.dino_similarity, expected)
    pixels = torch.from_numpy(np.array(diagnosed.images[0])).permute(2, 0, 1) / 127.5 - 1
    assert diagnosed.seam_score[:, 0].tolist() == pytest.approx(tile_seam_scores(pixels, plan), rel=1e-4)


def test_a_diagnosis_changes_no_pixel_and_is_not_made_unasked(pipe, diagnosed):
    plain = upscale(pipe)
    assert plain.images[0].tobytes() == diagnosed.images[0].tobytes()
    assert plain.keys() == {"images"} and plain.dino_similarity is None
    assert len(upscale(pipe, return_dict=False)) == 1
    assert len(upscale(pipe, return_dict=False, return_diagnostics=True)) == 5


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_give_the_numbers_of_the_picture(pipe, diagnosed, output_type):
    output = upscale(pipe, return_diagnostics=True, output_type=output_type)
    torch.testing.assert_close(output.dino_similarity, diagnosed.dino_similarity, atol=1e-3, rtol=0)


def test_strength_0_is_diagnosed_too_and_no_dino_gives_nan(pipe):
    assert upscale(pipe, return_diagnostics=True, dino_conditioning_scale=0).dino_similarity.isfinite().all()
    output = upscale(tiny_pipeline(), return_diagnostics=True)
    assert output.dino_similarity.isnan().all() and output.seam_score.isfinite().all()
    assert output.suspects == [[]]


# ---- Redoing tiles -------------------------------------------------------------------------------------------------


def spy_on_canvases(pipe, monkeypatch) -> list[torch.Tensor]:
    canvases = []
    decode_image = pipe.decode_image

    def spy(canvas, *args):
        canvases.append(canvas)
        return decode_image(canvas, *args)

    monkeypatch.setattr(pipe, "decode_image", spy)
    return canvases


def test_only_the_suspect_is_redone_from_less_noise(pipe, diagnosed, monkeypatch):
    canvases = spy_on_canvases(pipe, monkeypatch)
    threshold = threshold_between(diagnosed.dino_similarity)
    output = upscale(pipe, suspect_threshold=threshold, redo_start_sigma=REDO_SIGMA)
    before, after = canvases
    plan, index = output.tile_plan, int(diagnosed.dino_similarity.argmin())
    is_outside = torch.ones(before.shape[2:], dtype=torch.bool)
    is_outside[plan[index].slices(8)] = False
    assert torch.equal(after[..., is_outside], before[..., is_outside])
    assert not torch.equal(output.dino_similarity, diagnosed.dino_similarity)

    # The same tile by a call of its own, from the noise that comes next from the generator.
    generator = torch.Generator().manual_seed(0)
    latents = pipe.encode_tiles(pipe.prepare_image(photo(), SIZE, SIZE), plan, generator)
    noise = [torch.randn(latents.shape, generator=generator) for _ in range(2)][1]
    noisy = (1 - REDO_SIGMA) * latents + REDO_SIGMA * noise
    tile = plan[index].slices(8)
    alone = upscale(
        pipe,
        image=latents[tile],
        upscale_factor=None,
        latents=pipe.pack_canvas(noisy[tile]),
        dino_embeds=pipe.encode_dino(photo(), upscale_factor=1, **TILES)[index][None],
        start_sigma=REDO_SIGMA,
        tile_size=128,
        output_type="latent",
    ).images
    expected = pipe.unpack_canvas(alone, 128, 128)
    window = list(plan.windows(8))[index]
    blended = before[tile] + window * (expected - before[tile])
    torch.testing.assert_close(after[tile], blended, atol=1e-4, rtol=1e-4)


def test_of_two_images_only_the_suspect_one_changes(pipe):
    images = [photo(), photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    plain = upscale(pipe, image=images, return_diagnostics=True)
    threshold = threshold_between(plain.dino_similarity)
    changed = int(plain.dino_similarity.min(0).values.argmin())
    redone = upscale(pipe, image=images, suspect_threshold=threshold, redo_start_sigma=REDO_SIGMA)
    same = [a.tobytes() == b.tobytes() for a, b in zip(plain.images, redone.images)]
    assert same[1 - changed] and not same[changed]


def test_without_suspects_nothing_is_redone(pipe, diagnosed):
    output = upscale(pipe, suspect_threshold=-1, redo_start_sigma=REDO_SIGMA)
    assert output.images[0].tobytes() == diagnosed.images[0].tobytes()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suspect_threshold": 2}, "`suspect_threshold` must be a number from -1 to 1 but is 2"),
        ({"output_type": "latent"}, r"compare pixels, but `image` or `output_type` \('latent'\) is latents"),
        ({"redo_start_sigma": 0.35}, "`redo_start_sigma` must be a number from 0.01 to 0.35 but is 0.35.*less noise"),
        ({"redo_start_sigma": 0.2, "latents": torch.zeros(1, 256, 16)}, "needs a DINO projector .* and no `latents`"),
    ],
)
def test_wrong_arguments_are_named(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        upscale(pipe, return_diagnostics=True, **kwargs)


def test_redoing_needs_dino():
    with pytest.raises(ValueError, match="needs a DINO projector"):
        upscale(tiny_pipeline(), redo_start_sigma=0.2)
