"""Prompts that differ from tile to tile: regions, and a function that looks at a tile."""

import numpy as np
import pytest
import torch
import worker_runs
from PIL import Image
from worker_runs import PHOTO, enlarge, settings
from wrapped_runs import say_place

from flux_dino_tile.diagnostics import upscale_with_diagnosis
from tiny_models import tiny_ip_adapter, tiny_pipeline


PIPE = worker_runs.PIPE
# px, of the output; its tiles are 48 px wide and high and begin at 0, 32 and 48, and at 0 and 16
HEIGHT, WIDTH = 64, 96
PLAN = PIPE.plan_tiles(HEIGHT, WIDTH, 48, 16)
TRUE_CFG = {"negative_prompt": "blur", "true_cfg_scale": 2.0}


def pixels_of(image):
    """Of a prepared image: bytes `(rows, columns, 3)`."""
    values = image if image.dtype == torch.uint8 else ((image / 2 + 0.5) * 255).round().to(torch.uint8)
    return values[0].permute(1, 2, 0).numpy()


# ---- One prompt for all tiles is as before -------------------------------------------------------------------------

FOR_ALL = {
    "no box": [("a photo", None)],
    "a box of pixels": [("a photo", (0, 0, WIDTH, HEIGHT))],
    "a box of fractions": [["a photo", [0, 0.0, 1.0, 1]]],
    "NumPy's numbers": [("a photo", tuple(np.array([0, 0, WIDTH, HEIGHT])))],
    "beside an empty one": [("", None), ("a photo", None)],
    "function": lambda image, box: "a photo",
}
CALLS = {
    "plain": {},
    "batches of tiles": {"tile_batch_size": 4},
    "several results": {"num_images_per_prompt": 2, "tile_batch_size": 3},
    "true cfg": TRUE_CFG,
    "a negative prompt that is not used": {"negative_prompt": "blur"},
    "frozen tiles": {"frozen_tiles": [0, 3]},
    "all tiles frozen": {"frozen_tiles": range(6)},
}


@pytest.mark.parametrize("form", FOR_ALL)
def test_one_prompt_for_all_tiles_is_the_prompt(form):
    assert torch.equal(enlarge(prompt=FOR_ALL[form]), enlarge())


@pytest.mark.parametrize("call", CALLS)
def test_one_prompt_for_all_tiles_is_the_prompt_in_every_call(call):
    assert torch.equal(enlarge(prompt=FOR_ALL["no box"], **CALLS[call]), enlarge(**CALLS[call]))


def test_latents_have_regions_too():
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    call = {"image": latents, "upscale_factor": None, "dino_conditioning_scale": 0}
    assert torch.equal(enlarge(prompt=FOR_ALL["no box"], **call), enlarge(**call))


def test_an_ip_adapter_goes_with_regions():
    pipe = tiny_pipeline(dino="dinov2")
    pipe.transformer._load_ip_adapter_weights([tiny_ip_adapter(pipe.transformer)])
    call = {"ip_adapter_image_embeds": [torch.ones(1, 1, 8)], "num_images_per_prompt": 2, "tile_batch_size": 3}
    expected = pipe(**settings(**call)).images
    assert torch.equal(pipe(**settings(prompt=FOR_ALL["no box"], **call)).images, expected)
    assert not torch.equal(expected, enlarge(num_images_per_prompt=2, tile_batch_size=3))


# ---- Which prompts a tile gets -------------------------------------------------------------------------------------

WHOLE, DOG, CAT = ("a photo", None), ("a dog", (0, 0, 10, 10)), ("a cat", (5, 5, 40, 40))
REGIONS = {
    "the whole first": ([WHOLE, DOG], ["a photo, a dog", *["a photo"] * 5]),
    "the whole last": ([DOG, WHOLE], ["a dog, a photo", *["a photo"] * 5]),
    "a tile outside": ([DOG], ["a dog", *[""] * 5]),
    "over each other": ([CAT, DOG], ["a cat, a dog", "a cat", "", "a cat", "a cat", ""]),
    "the whole empty": ([("", None), DOG], ["a dog", *[""] * 5]),
    # The last pixel of the tile at 0, the first of the one at 48, and between them what only the one at 32 has.
    "one pixel": ([("a", (47, 0, 48, 1))], ["a", "a", "", "", "", ""]),
    "the next pixel": ([("a", (48, 0, 49, 1))], ["", "a", "a", "", "", ""]),
    "one row": ([("a", (95, 47, 96, 48))], ["", "", "a", "", "", "a"]),
    "the row above": ([("a", (95, 15, 96, 16))], ["", "", "a", "", "", ""]),
    "fractions": ([("a", (0.5, 0.75, 1, 1))], ["", "", "", "", "a", "a"]),
    # 32.00000000000001 px are 32, where the next tile begins.
    "rounded fractions": ([("a", (0, 0, 0.3333333333333334, 1))], ["a", "", "", "a", "", ""]),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_tile_gets_the_prompts_of_the_boxes_that_it_touches(name):
    regions, texts = REGIONS[name]
    place = {(tile.left, tile.top): text for tile, text in zip(PLAN, texts)}
    assert torch.equal(enlarge(prompt=regions), enlarge(prompt=lambda image, box: place[box[:2]]))


@pytest.mark.parametrize("scale", [1, 1.9])
@pytest.mark.parametrize("kind", ["PIL", "tensor"])
def test_a_function_gets_the_pixels_and_the_box_of_each_tile(scale, kind):
    """Also at the border, where the canvas is padded to whole tokens."""
    image = PHOTO if kind == "PIL" else torch.from_numpy(np.asarray(PHOTO, np.float32) / 255).permute(2, 0, 1)
    seen = {}

    def look(image, box):
        seen[box] = image
        return ""

    enlarge(image=image, upscale_factor=scale, prompt=look, num_inference_steps=1)
    height, width = PIPE.get_output_size(image, upscale_factor=scale)
    pixels = pixels_of(PIPE.prepare_image(image, height, width))[:height, :width]
    plan = PIPE.plan_tiles(height, width, 48, 16)
    assert list(seen) == [
        (x, y, min(x + plan.tile_width, width), min(y + plan.tile_height, height)) for y, x, *_ in plan
    ]
    for (left, top, right, bottom), tile in seen.items():
        assert np.array_equal(np.asarray(tile), pixels[top:bottom, left:right])


# ---- What a region changes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_region_changes_its_tiles_and_nothing_far_away(num_steps):
    """
    In each step the tiles hand a change on to those that overlap them, and in the end the VAE's tiles do; beyond that
    every bit is the same.
    """
    photo = Image.fromarray(np.random.default_rng(5).integers(0, 256, (48, 368, 3), dtype=np.uint8))
    call = {"image": photo, "upscale_factor": 1, "num_inference_steps": num_steps}
    plan = PIPE.plan_tiles(48, 368, 48, 16)
    touched = 48  # px, the right border of the first tile

    def right_border(border):
        return max(tile.left + tile.width for tile in plan if tile.left < border)

    for output_type in ("latent", "pt"):
        before = enlarge(**call, prompt=[WHOLE], output_type=output_type)
        after = enlarge(**call, prompt=[WHOLE, DOG], output_type=output_type)
        if output_type == "latent":
            before, after = (PIPE.unpack_canvas(latents, 48, 368) for latents in (before, after))
        border = touched
        for _ in range(num_steps - 1 if output_type == "latent" else num_steps):
            border = right_border(border)
        pixels_per_column = 368 // before.shape[-1]
        changed = (before != after).any(dim=(0, 1, 2)).repeat_interleave(pixels_per_column)
        assert changed[:touched].any() and not changed[border:].any() and border < 368


def test_true_cfg_extrapolates_from_one_negative_prompt():
    """One Euler step is linear in the velocity."""
    call = {"num_inference_steps": 1, "tile_batch_size": 4}
    positive, negative = enlarge(prompt=say_place, **call), enlarge(prompt="blur", **call)
    result = enlarge(prompt=say_place, negative_prompt="blur", true_cfg_scale=3.0, **call)
    torch.testing.assert_close(result, negative + 3 * (positive - negative), atol=1e-5, rtol=0)
    assert (positive - negative).abs().max() > 1e-3


@pytest.mark.parametrize("tile_batch_size", [2, 4, 6])
@pytest.mark.parametrize("call", [{}, {**TRUE_CFG, "num_images_per_prompt": 2}], ids=["plain", "true cfg"])
def test_tiles_of_other_prompts_in_one_batch(tile_batch_size, call):
    expected = enlarge(prompt=say_place, **call)
    torch.testing.assert_close(
        enlarge(prompt=say_place, tile_batch_size=tile_batch_size, **call), expected, atol=1e-5, rtol=0
    )
    assert (expected - enlarge(prompt="0 and 0", **call)).abs().max() > 1e-3


# ---- How often -----------------------------------------------------------------------------------------------------


def count_runs(monkeypatch, module):
    runs, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    return runs


@pytest.mark.parametrize(
    ("prompt", "count"),
    [([WHOLE], 1), ([WHOLE, DOG], 2), ([CAT, DOG], 3), (say_place, 6), (lambda image, box: f"a {box[0]}", 3)],
    ids=["one", "two", "over each other", "each tile", "each column"],
)
def test_each_text_is_encoded_once(monkeypatch, prompt, count):
    clip, t5 = (count_runs(monkeypatch, model) for model in (PIPE.text_encoder, PIPE.text_encoder_2))
    enlarge(prompt=prompt, tile_batch_size=2, num_images_per_prompt=2)
    assert len(clip) == len(t5) == count
    enlarge(prompt=prompt, **TRUE_CFG)
    assert len(clip) == len(t5) == 2 * count + 1


def test_a_callback_may_change_the_embeddings_of_the_texts():
    """One row for each, in the order of their first tiles."""
    seen = []

    def swap(pipeline, step, timestep, tensors):
        seen.append(tensors["prompt_embeds"])
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}

    call = {"num_inference_steps": 2, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    result = enlarge(prompt=[WHOLE, DOG], callback_on_step_end=swap, **call)
    assert [len(embeds) for embeds in seen] == [2, 2]
    assert torch.equal(seen[0], seen[1].flip(0)) and not torch.equal(seen[0], seen[1])
    assert not torch.equal(result, enlarge(prompt=[WHOLE, DOG], num_inference_steps=2))


def test_a_diagnosis_asks_a_function_once():
    boxes = []

    def ask(image, box):
        boxes.append(box)
        return say_place(image, box)

    output = upscale_with_diagnosis(PIPE, 1.0, 0.2, **settings(output_type="pt", prompt=ask))
    assert len(boxes) == len(output.suspects[0]) == 6
