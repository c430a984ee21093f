"""Diagnoses of tiles, and suspect ones done again: numbers of known cases, and that only suspect tiles change."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from flux_dino_tile.diagnostics import (
    diagnose,
    dino_similarity,
    seam_ratio,
    tile_borders,
    tile_seam_scores,
    upscale_with_diagnosis,
)
from pipeline_flux_dino_tile import plan_tiles
from tiny_models import ROOT, tiny_pipeline


SIZE = 256
TILES = {"tile_size": 128, "tile_overlap": 32}
REDO_SIGMA = 0.2


def photo(size: int = SIZE) -> Image.Image:
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((size, size))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dino="dinov2")


def settings(**kwargs) -> dict:
    values = {"image": photo(), "upscale_factor": 1, "num_inference_steps": 2, "max_sequence_length": 16}
    return {**values, "generator": torch.Generator().manual_seed(0), **TILES, **kwargs}


@pytest.fixture(scope="module")
def diagnosed(pipe):
    return upscale_with_diagnosis(pipe, **settings())


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
    assert tile_borders(plan) == ([], [224, 256])
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
    same = diagnose(pipe, photo(), plan, features)
    assert same.dino_similarity.flatten().tolist() == pytest.approx([1] * len(plan), abs=1e-5)
    assert same.suspects == [[]]
    swapped = np.array(photo())
    # In the middle of the last tile, away from its neighbours.
    swapped[-90:, -90:] = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    found = diagnose(pipe, Image.fromarray(swapped), plan, features)
    assert found.dino_similarity[-1, 0] < found.dino_similarity[:-1].min() - 0.05
    threshold = threshold_between(found.dino_similarity)
    assert diagnose(pipe, Image.fromarray(swapped), plan, features, threshold).suspects == [[plan[-1]]]


@pytest.mark.parametrize(
    ("size", "plan_size", "message"),
    [
        (SIZE, 384, r"`plan` must be of this picture, .* are \(256, 256\), but is \(384, 384\)"),
        (
            384,
            384,
            r"`dino_embeds` must be the input's features, of shape \(16, 1, 4, 4, 24\), but is Tensor of shape \(9,",
        ),
    ],
)
def test_what_belongs_to_another_picture_is_refused(pipe, size, plan_size, message):
    features = pipe.encode_dino(photo(), upscale_factor=1, **TILES)
    with pytest.raises(ValueError, match=message):
        diagnose(pipe, photo(size), pipe.plan_tiles(plan_size, plan_size, **TILES), features)


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
    assert len(diagnosed.to_tuple()) == 5


def test_a_diagnosis_changes_no_pixel(pipe, diagnosed):
    plain = pipe(**settings())
    assert plain.images[0].tobytes() == diagnosed.images[0].tobytes()
    assert plain.keys() == {"images"}


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_give_the_numbers_of_the_picture(pipe, diagnosed, output_type):
    output = upscale_with_diagnosis(pipe, **settings(output_type=output_type))
    torch.testing.assert_close(output.dino_similarity, diagnosed.dino_similarity, atol=1e-3, rtol=0)


def test_strength_0_is_diagnosed_too_and_no_dino_gives_nan(pipe):
    assert upscale_with_diagnosis(pipe, **settings(dino_conditioning_scale=0)).dino_similarity.isfinite().all()
    output = upscale_with_diagnosis(tiny_pipeline(), **settings())
    assert output.dino_similarity.isnan().all() and output.seam_score.isfinite().all()
    assert output.suspects == [[]]


def test_dino_looks_at_every_picture_once(pipe):
    """At the input, at the result, and at the picture with the redone tiles: nine tiles each."""
    looks = []
    handle = pipe.dino_encoder.register_forward_pre_hook(lambda *_: looks.append(1))
    upscale_with_diagnosis(pipe, **settings())
    assert len(looks) == 2 * 9
    features = pipe.encode_dino(photo(), upscale_factor=1, **TILES)
    looks.clear()
    upscale_with_diagnosis(pipe, 1.0, REDO_SIGMA, **settings(dino_embeds=features))
    assert len(looks) == 2 * 9
    handle.remove()


def test_results_of_several_prompts_are_compared_with_their_images(pipe):
    """Two images, two prompts for each and two results for each of them, all almost as the input."""
    images = [photo(), photo().transpose(Image.Transpose.ROTATE_180)]
    kwargs = settings(image=images, prompt=list("abcd"), num_images_per_prompt=2, frozen_tiles=range(9))
    output = upscale_with_diagnosis(pipe, **kwargs)
    features = pipe.encode_dino(images, upscale_factor=1, **TILES)
    found = pipe.encode_dino(output.images, upscale_factor=1, **TILES)
    expected = dino_similarity(found, features[:, [0, 0, 1, 1, 0, 0, 1, 1]])
    torch.testing.assert_close(output.dino_similarity, expected)


# ---- Redoing tiles -------------------------------------------------------------------------------------------------


def as_array(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def test_only_the_suspect_is_redone_from_less_noise(pipe, diagnosed):
    times = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(
            (float(kwargs["timestep"]), kwargs["encoder_hidden_states"].shape[1])
        ),
        with_kwargs=True,
    )
    threshold = threshold_between(diagnosed.dino_similarity)
    output = upscale_with_diagnosis(pipe, threshold, REDO_SIGMA, **settings(dino_guidance_end=0.5))
    handle.remove()
    first, again = times[:18], times[18:]
    # Text and DINO tokens: in the first of two steps, and then in both.
    assert [tokens for _, tokens in first] == [32] * 9 + [16] * 9
    assert again == [(pytest.approx(REDO_SIGMA, abs=1e-3), 32), (pytest.approx(REDO_SIGMA / 2, abs=1e-3), 32)]
    assert output.dino_similarity.shape == (9, 1)


def test_the_redone_tile_is_that_of_a_call_with_the_others_frozen(pipe, diagnosed):
    threshold = threshold_between(diagnosed.dino_similarity)
    output = upscale_with_diagnosis(pipe, threshold, REDO_SIGMA, **settings())
    plan, index = output.tile_plan, int(diagnosed.dino_similarity.argmin())
    assert np.abs(as_array(output.images) - as_array(diagnosed.images)).max() > 8
    assert not torch.equal(output.dino_similarity, diagnosed.dino_similarity)

    generator = torch.Generator().manual_seed(0)
    canvas = pipe(**settings(generator=generator, output_type="latent")).images
    frozen = [number for number in range(9) if number != index]
    again = {"start_sigma": REDO_SIGMA, "frozen_tiles": frozen, "frozen_latents": canvas, "output_type": "latent"}
    redone = pipe(**settings(generator=generator, **again)).images
    before, after = (pipe.unpack_canvas(latents, SIZE, SIZE) for latents in (canvas, redone))
    is_outside = torch.ones(before.shape[2:], dtype=torch.bool)
    is_outside[plan[index].slices(8)] = False
    torch.testing.assert_close(after[..., is_outside], before[..., is_outside], atol=1e-5, rtol=1e-5)
    # After both steps, what is left to do is to decode.
    decoded = pipe(**settings(latents=redone, first_step=2)).images
    assert np.abs(as_array(decoded) - as_array(output.images)).max() <= 1


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_of_two_images_only_the_suspect_one_changes(pipe, output_type):
    images = [photo(), photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    kwargs = {"image": images, "output_type": output_type}
    plain = upscale_with_diagnosis(pipe, **settings(**kwargs))
    threshold = threshold_between(plain.dino_similarity)
    changed = int(plain.dino_similarity.min(0).values.argmin())
    redone = upscale_with_diagnosis(pipe, threshold, REDO_SIGMA, **settings(**kwargs))
    same = [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain.images, redone.images)]
    assert same[1 - changed] and not same[changed]


def test_without_suspects_nothing_is_redone(pipe, diagnosed):
    output = upscale_with_diagnosis(pipe, -1, REDO_SIGMA, **settings())
    assert output.images[0].tobytes() == diagnosed.images[0].tobytes()


def test_tiles_that_the_caller_froze_are_not_redone(pipe):
    output = upscale_with_diagnosis(pipe, 1.0, REDO_SIGMA, **settings(frozen_tiles=range(9)))
    assert output.images[0].tobytes() == pipe(**settings(frozen_tiles=range(9))).images[0].tobytes()


def test_from_latents_and_a_step_the_tiles_start_from_the_input(pipe, diagnosed):
    canvases = []

    def keep(pipeline, index, timestep, tensors):
        canvases.append(tensors["latents"])
        return {}

    generator = torch.Generator().manual_seed(0)
    pipe(**settings(generator=generator, callback_on_step_end=keep))
    threshold = threshold_between(diagnosed.dino_similarity)
    half = settings(latents=canvases[0], first_step=1, generator=generator)
    whole = upscale_with_diagnosis(pipe, threshold, REDO_SIGMA, **settings())
    assert upscale_with_diagnosis(pipe, threshold, REDO_SIGMA, **half).images[0].tobytes() == whole.images[0].tobytes()


@pytest.mark.parametrize("stop", [1, 2], ids=["in the last step", "while tiles are redone"])
def test_an_interrupted_call_redoes_nothing(pipe, diagnosed, stop):
    calls = iter(range(100))
    times = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: times.append(1))

    def interrupt(pipeline, index, timestep, tensors):
        pipeline._interrupt = next(calls) == stop
        return {}

    threshold = threshold_between(diagnosed.dino_similarity)
    output = upscale_with_diagnosis(pipe, threshold, REDO_SIGMA, **settings(callback_on_step_end=interrupt))
    handle.remove()
    assert output.images[0].tobytes() == diagnosed.images[0].tobytes()
    assert len(times) == 2 * 9 + stop - 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suspect_threshold": 2}, "`suspect_threshold` must be a number from -1 to 1, .*, but is 2"),
        ({"suspect_threshold": "0.5"}, "`suspect_threshold` must be a number from -1 to 1, .*, but is '0.5'"),
        ({"output_type": "latent"}, "`output_type` must be 'pil', 'np' or 'pt', to compare pixels, but is 'latent'"),
        ({"output_type": "strips"}, "`output_type` must be .*, but is 'strips'"),
        ({"image": torch.zeros(1, 4, 32, 32), "upscale_factor": None}, "`image` must be pixels to compare"),
        ({"return_dict": False}, "`return_dict` must be True; the output has a `to_tuple`, but is False"),
        ({"redo_start_sigma": 0.35}, "`redo_start_sigma` must be a number from 0.01 to 0.35, less noise .*is 0.35"),
        ({"redo_start_sigma": 0}, "`redo_start_sigma` must be a number from 0.01 to 0.35, .*but is 0"),
        ({"redo_start_sigma": 0.5, "start_sigma": None, "strength": 0.5}, "`redo_start_sigma` must be a number from"),
    ],
)
def test_wrong_arguments_are_named(pipe, kwargs, message):
    handle = pipe.dino_encoder.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message):
        upscale_with_diagnosis(pipe, **settings(**kwargs))
    handle.remove()


def test_redoing_needs_dino():
    with pytest.raises(ValueError, match="`redo_start_sigma` must be None without a DINO projector"):
        upscale_with_diagnosis(tiny_pipeline(), redo_start_sigma=0.2, **settings())


def test_a_noise_that_the_scheduler_cannot_start_from_is_refused_before_the_picture_is_made():
    pipe = tiny_pipeline(dino="dinov2")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        return {}

    options = settings(strength=0.9, callback_on_step_end=callback)
    with pytest.raises(ValueError, match="`start_sigma` must be what this FlowMatchEulerDiscreteScheduler starts at"):
        upscale_with_diagnosis(pipe, suspect_threshold=1.0, redo_start_sigma=0.2, **options)
    assert steps == []
