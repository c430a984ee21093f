"""`compile_for_upscaling`: the same result, and no graph more for another size, strength or number of tiles."""

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import ROOT, tiny_pipeline


PHOTO = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")
SCALES = (0, 0.5, 1)


def run(pipe, size: tuple[int, int], scale: float, **settings) -> np.ndarray:
    return pipe(
        image=PHOTO.resize(size),
        upscale_factor=1,
        dino_conditioning_scale=scale,
        max_sequence_length=16,
        num_inference_steps=2,
        output_type="np",
        tile_overlap=16,
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).images


@pytest.fixture(scope="module")
def compiled():
    """A pipeline that has compiled what all strengths need, its results, and those from before compiling."""
    torch._dynamo.reset()
    pipe = tiny_pipeline(dino="dinov2")
    expected = {scale: run(pipe, (96, 64), scale, tile_size=48, tile_batch_size=2) for scale in SCALES}
    # Tracing is what is tested here; "eager" leaves the code generation out.
    pipe.compile_for_upscaling(backend="eager")
    results = {scale: run(pipe, (96, 64), scale, tile_size=48, tile_batch_size=2) for scale in SCALES}
    yield pipe, results, expected
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", SCALES)
def test_compiled_gives_the_same(compiled, scale):
    _, results, expected = compiled
    np.testing.assert_allclose(results[scale], expected[scale], atol=1e-5)


def test_nothing_is_compiled_again(compiled):
    pipe = compiled[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((160, 112), (96, 64), (48, 176)):
            for scale in (0, 0.3, 0.5, 2, 1):
                run(pipe, size, scale, tile_size=48, tile_batch_size=2)


def test_another_tile_size_would_be_compiled_again(compiled):
    """The check above can fail."""
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        run(compiled[0], (96, 64), 0, tile_size=64, tile_batch_size=2)


def test_the_planner_keeps_to_the_first_tile_size():
    pipe = tiny_pipeline()
    free = pipe.plan_tiles(4096, 4096)
    pipe.compile_for_upscaling(backend="eager")
    assert pipe.plan_tiles(4096, 4096) == free
    run(pipe, (64, 48), 0)
    for size in ((48, 64), (2048, 3072)):
        plan = pipe.plan_tiles(*size, tile_overlap=16)
        assert (plan.tile_height, plan.tile_width) == (48, 64)
    assert pipe.plan_tiles(2048, 3072, tile_size=512).tile_height == 512
    torch._dynamo.reset()
