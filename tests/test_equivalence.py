"""With one tile, no projector and `strength`, the pipeline computes what `FluxImg2ImgPipeline` computes."""

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image

from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import ROOT, tiny_components


MAX_DIFFERENCE = 1e-5


def pipelines(**sizes):
    components = tiny_components(**sizes)
    pipes = FluxDinoTilePipeline(**components), FluxImg2ImgPipeline(**components)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def photo(width: int, height: int) -> Image.Image:
    return Image.open(ROOT / "samples" / "photo.jpg").convert("RGB").resize((width, height))


def assert_equal_results(ours, parent, seed=0, **settings):
    call = {
        "prompt": "a mossy stone",
        "image": photo(96, 64),
        "height": 64,
        "width": 96,
        "strength": 0.6,
        "num_inference_steps": 5,
        "guidance_scale": 3.5,
        "max_sequence_length": 16,
        "output_type": "np",
    }
    call.update(settings)

    def generators():
        if isinstance(seed, list):
            return [torch.Generator().manual_seed(value) for value in seed]
        return torch.Generator().manual_seed(seed)

    # `latents` are changed in place by neither; a fresh generator for each is what makes the noise equal.
    result = ours(**call, generator=generators()).images
    expected = parent(**call, generator=generators()).images
    assert result.shape == expected.shape
    difference = np.abs(np.asarray(result) - np.asarray(expected)).max()
    assert difference <= MAX_DIFFERENCE, difference


@pytest.fixture(scope="module", params=[False, True], ids=["schnell-like", "dev-like"])
def pair(request):
    return pipelines(guidance_embeds=request.param)


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_strength(pair, strength):
    assert_equal_results(*pair, strength=strength)


def test_image_is_resized_as_by_the_parent(pair):
    assert_equal_results(*pair, image=photo(37, 29))


def test_true_cfg(pair):
    assert_equal_results(*pair, negative_prompt="blur", true_cfg_scale=3.0)


def test_second_prompt_and_sigmas(pair):
    assert_equal_results(*pair, prompt_2="a stone in the forest", sigmas=[0.9, 0.5, 0.2], num_inference_steps=3)


def test_num_images_per_prompt(pair):
    assert_equal_results(*pair, num_images_per_prompt=3)


def test_list_of_generators(pair):
    assert_equal_results(*pair, seed=[5, 6], num_images_per_prompt=2)


def test_list_of_prompts_and_images(pair):
    images = [photo(96, 64), photo(96, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    assert_equal_results(*pair, prompt=["a stone", "moss"], image=images, seed=[7, 8])


def test_latents_as_image(pair):
    assert_equal_results(*pair, image=torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1)))


def test_given_latents_and_latent_output(pair):
    latents = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(2))
    assert_equal_results(*pair, latents=latents, output_type="latent")


@pytest.mark.parametrize(("size", "scale_factor"), [(64, 8), (32, 4), (8, 1)])
@pytest.mark.parametrize("latent_channels", [1, 4])
def test_other_vaes(size, scale_factor, latent_channels):
    """A VAE of scale factor 1 makes tokens of 2 px, so that an 8x8 px image is 16 tokens."""
    pair = pipelines(scale_factor=scale_factor, latent_channels=latent_channels)
    assert_equal_results(*pair, image=photo(size, size), height=size, width=size)


@pytest.mark.parametrize("difference", [{"seed": 1}, {"tile_size": 64, "tile_overlap": 32}, {"strength": 0.8}])
def test_the_comparison_can_fail(pair, difference):
    """Another seed, two tiles instead of one, or another strength is seen."""
    ours, parent = pair
    call = {"image": photo(96, 64), "height": 64, "width": 96, "num_inference_steps": 5, "prompt": "a"}
    call |= {"max_sequence_length": 16, "output_type": "np", "guidance_scale": 3.5, "strength": 0.6}
    expected = parent(**call, generator=torch.Generator().manual_seed(0)).images
    generator = torch.Generator().manual_seed(difference.get("seed", 0))
    call |= {name: value for name, value in difference.items() if name != "seed"}
    assert np.abs(ours(**call, generator=generator).images - expected).max() > 10 * MAX_DIFFERENCE
