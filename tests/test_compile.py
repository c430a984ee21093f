"""`compile_for_upscaling`: the same result from few graphs, and none more for another size, strength or tile count."""

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import ROOT, tiny_pipeline


PHOTO = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")
SCALES = (0, 0.5, 1)
TILES = {"tile_size": 48, "tile_overlap": 16, "tile_batch_size": 2}


class CountingBackend:
    """A compiler that runs graphs as they are (tracing is what is tested here) and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def run(pipe, size: tuple[int, int], scale: float, **settings) -> np.ndarray:
    return pipe(
        image=PHOTO.resize(size),
        upscale_factor=1,
        dino_conditioning_scale=scale,
        max_sequence_length=16,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).images


@pytest.fixture(scope="module")
def compiled():
    """A compiled pipeline that has run once, its backend, and the results of all strengths before compiling."""
    torch._dynamo.reset()
    pipe, backend = tiny_pipeline(dino="dinov2"), CountingBackend()
    expected = {scale: run(pipe, (96, 64), scale, **TILES) for scale in SCALES}
    pipe.compile_for_upscaling(backend=backend)
    run(pipe, (96, 64), 0.3, **TILES)
    yield pipe, backend, expected
    torch._dynamo.reset()


def test_transformer_takes_three_graphs_and_the_vae_two(compiled):
    assert compiled[1].graphs == 3 + 2


@pytest.mark.parametrize("scale", SCALES)
def test_compiled_gives_the_same(compiled, scale):
    pipe, _, expected = compiled
    np.testing.assert_allclose(run(pipe, (96, 64), scale, **TILES), expected[scale], atol=1e-5)


def test_nothing_is_compiled_again(compiled):
    """Sizes of 12, 2, 9 and 1 tiles, every strength, steps with and without DINO, and flat tiles left out."""
    pipe = compiled[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((160, 112), (80, 48), (112, 112), (48, 48)):
            for scale in (0, 0.3, 1, 2):
                run(pipe, size, scale, **TILES)
        run(pipe, (96, 64), 0.5, dino_guidance_start=0.5, **TILES)
        run(pipe, (96, 64), 0.5, skip_flat_tiles=0.1, **TILES)
    assert compiled[1].graphs == 3 + 2


def test_another_tile_size_would_be_compiled_again(compiled):
    """The check above can fail."""
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        run(compiled[0], (96, 64), 0, **{**TILES, "tile_size": 64})


def test_a_backend_without_masks_runs_compiled_at_strengths_0_and_1(compiled):
    """There the DINO tokens have no place in a graph without them, and the backend's own kernel is kept."""
    pipe = tiny_pipeline(dino="dinov2")
    assert pipe.find_obstacle_to_strength() is None
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = "_native_flash"
    assert "'_native_flash'" in pipe.find_obstacle_to_strength()


def test_the_planner_keeps_to_the_first_tile_size():
    pipe = tiny_pipeline()
    free = pipe.plan_tiles(4096, 4096)
    pipe.compile_for_upscaling(backend="eager")
    assert pipe.plan_tiles(4096, 4096) == free
    run(pipe, (64, 48), 0, tile_overlap=16)
    for size in ((48, 64), (2048, 3072)):
        plan = pipe.plan_tiles(*size, tile_overlap=16)
        assert (plan.tile_height, plan.tile_width) == (48, 64)
    assert pipe.plan_tiles(2048, 3072, tile_size=512).tile_height == 512
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compiled", "size", "expected"),
    [(False, 3, [[0, 1, 2], [3, 4]]), (True, 3, [[0, 1, 2], [3, 4, 4]]), (True, 8, [[0, 1, 2, 3, 4, 4, 4, 4]])],
)
def test_batches_of_a_compiled_transformer_are_filled_up(monkeypatch, compiled, size, expected):
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe), "is_compiled", compiled)
    assert pipe.get_tile_batches([0, 1, 2, 3, 4], size) == expected
    assert pipe.get_tile_batches([], size) == []


def test_group_offloading_cannot_be_compiled():
    pipe = tiny_pipeline()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="does not work with group or sequential offloading"):
        pipe.compile_for_upscaling()
    assert not pipe.is_compiled
