"""The documented recipe: compiled blocks and VAE, an explicit tile size; one warm-up serves every later picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import ROOT, tiny_pipeline


PHOTO = Image.open(ROOT / "samples" / "photo.jpg").convert("RGB")
SCALES = (0.5, 1, 2)
TILES = {"tile_size": 48, "tile_overlap": 16}


class CountingBackend:
    """A compiler that runs graphs as they are (tracing is what is tested here) and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def run(pipe, size: tuple[int, int], scale: float, **settings) -> np.ndarray:
    call = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np", **TILES, **settings}
    image, noise = PHOTO.resize(size), torch.Generator().manual_seed(0)
    return pipe(image=image, upscale_factor=1, dino_conditioning_scale=scale, generator=noise, **call).images


def compile_pipeline(pipe, backend) -> None:
    """The recipe; only the backend is another."""
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    pipe.vae.encoder.compile(backend=backend)
    pipe.vae.decoder.compile(backend=backend)


@pytest.fixture(scope="module", params=[0.3, 1], ids=["warm-up at strength 0.3", "warm-up at strength 1"])
def compiled(request):
    """A compiled pipeline that has made one picture, its backend, and the same pipeline as it was."""
    torch._dynamo.reset()
    pipe, plain, backend = tiny_pipeline(dino="dinov2"), tiny_pipeline(dino="dinov2"), CountingBackend()
    compile_pipeline(pipe, backend)
    run(pipe, (96, 64), request.param)
    yield pipe, backend, plain
    torch._dynamo.reset()


def test_one_warm_up_serves_every_size_and_strength(compiled):
    """Pictures of 12, 2, 9 and 1 tiles, each as it is without compiling; and the VAE's residual."""
    pipe, backend, plain = compiled
    graphs = backend.graphs
    # Three for the blocks, the VAE's encoder and decoder.
    assert graphs == 3 + 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((160, 112), (80, 48), (112, 112), (48, 48)):
            for scale in SCALES:
                np.testing.assert_allclose(run(pipe, size, scale), run(plain, size, scale), atol=1e-5)
        run(pipe, (80, 64), 0.7, vae_residual=True, start_sigma=0.9)
        run(pipe, (80, 64), 0.7, frozen_tiles=[1])
    assert backend.graphs == graphs


def test_without_dino_tokens_it_is_compiled_once_more(compiled):
    """Strength 0, and steps outside of the window, have no DINO tokens; then both forms are there."""
    pipe, backend, plain = compiled
    for settings in ({"scale": 0}, {"scale": 0.5, "dino_guidance_start": 0.5}):
        np.testing.assert_allclose(run(pipe, (96, 64), **settings), run(plain, (96, 64), **settings), atol=1e-5)
    graphs = backend.graphs
    assert graphs > 3 + 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0, 0.3, 1, 0, 2):
            run(pipe, (160, 112), scale)
        run(pipe, (80, 48), 1, dino_guidance_end=0.5)
    assert backend.graphs == graphs


def test_another_tile_size_is_compiled_again(compiled):
    """So that the checks above can fail."""
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        run(compiled[0], (96, 64), 0.5, tile_size=64)


@pytest.mark.parametrize("scale", [0, 1])
def test_a_backend_without_masks_runs_compiled_at_strengths_0_and_1(scale):
    """There strength 1 carries no bias, which the backend would refuse."""
    torch._dynamo.reset()
    pipe, plain = tiny_pipeline(dino="dinov2"), tiny_pipeline(dino="dinov2")
    expected = run(plain, (96, 64), scale)
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = "_native_flash"
    compile_pipeline(pipe, CountingBackend())
    with pytest.raises(ValueError, match=r"`dino_conditioning_scale` must be 0 or 1 with .*'_native_flash'"):
        run(pipe, (96, 64), 0.5)
    np.testing.assert_allclose(run(pipe, (96, 64), scale), expected, atol=1e-5)
    torch._dynamo.reset()
