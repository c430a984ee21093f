"""diffusers' caches: each tile and each side of true CFG keeps a state of its own, or the call is refused."""

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig
from PIL import Image

from flux_dino_tile.resume import Checkpoint
from tiny_models import tiny_pipeline


STEPS = 6
CACHES = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.5),
    "MagCache": MagCacheConfig(num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), threshold=0.5),
    "TaylorSeer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
}
MIXING = {
    "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCache": FasterCacheConfig(current_timestep_callback=lambda: 500),
}
# Two tiles side by side that share nothing, of 4 x 6 cells each.
ARGUMENTS = {"prompt": "a", "max_sequence_length": 16, "num_inference_steps": STEPS, "start_sigma": 0.5}
TILES = {"tile_size": (32, 48), "tile_overlap": 0}


def picture(left: float = 0.0) -> torch.Tensor:
    """Latents of both tiles; the first tile's are moved by `left`."""
    latents = torch.randn(1, 4, 4, 12, generator=torch.Generator().manual_seed(5))
    latents[..., :6] += left
    return latents


def enlarge(pipe, image: torch.Tensor, **arguments) -> torch.Tensor:
    """The two tiles' packed latents, `(2, tokens, channels)`."""
    generator = torch.Generator().manual_seed(0)
    options = {**ARGUMENTS, **TILES, **arguments}
    latents = pipe(image=image, generator=generator, output_type="latent", **options).images
    return latents.reshape(2, 2, 3, -1).transpose(0, 1).flatten(1, 2)


def cached_pipeline(name: str | None):
    pipe = tiny_pipeline()
    if name is not None:
        pipe.transformer.enable_cache(CACHES[name])
    return pipe


GUIDED = {"true_cfg_scale": 2.0, "negative_prompt": "b"}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["one side", "true CFG"])
def test_no_tile_depends_on_another(name, guidance):
    pipe = cached_pipeline(name)
    first, second = enlarge(pipe, picture(), **guidance), enlarge(pipe, picture(left=2.0), **guidance)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    # Each tile is as a picture of its own, so that the sides of true CFG are not mixed either.
    noise = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    both = enlarge(pipe, picture(), latents=noise, **guidance)
    alone = noise.reshape(2, 6, 16)[:, 3:].reshape(1, 6, 16)
    half = pipe(image=picture()[..., 6:], latents=alone, output_type="latent", **ARGUMENTS, **guidance).images
    torch.testing.assert_close(both[1], half[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_saves_blocks_and_changes_the_picture_a_little(name):
    counts, results = [], []
    for cache in (None, name):
        pipe, calls = cached_pipeline(cache), []
        last = pipe.transformer.single_transformer_blocks[-1]
        last.attn.to_q.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(enlarge(pipe, picture()))
        counts.append(len(calls))
    assert counts[0] == 2 * STEPS and counts[1] < counts[0]
    difference = float((results[0] - results[1]).abs().max())
    assert 0 < difference < float(results[0].std())


@pytest.mark.parametrize("name", CACHES)
def test_the_next_picture_begins_with_an_empty_cache(name):
    pipe = cached_pipeline(name)
    expected = enlarge(pipe, picture())
    enlarge(pipe, picture(left=2.0))
    assert torch.equal(enlarge(pipe, picture()), expected)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("window", [{"dino_guidance_start": 0.5}, {"dino_guidance_end": 0.5}], ids=["late", "early"])
def test_steps_with_and_without_dino_keep_caches_of_their_own(name, window):
    """Their text streams have different lengths."""
    pipe = tiny_pipeline(dino="dinov2")
    pipe.transformer.enable_cache(CACHES[name])
    image = Image.effect_noise((48, 32), 80).convert("RGB")
    options = {**ARGUMENTS, **TILES, **window, "image": image, "upscale_factor": 2, "output_type": "pt"}
    assert torch.isfinite(pipe(**options).images).all()


@pytest.mark.parametrize("name", CACHES)
def test_a_call_that_was_not_read_to_its_end_leaves_nothing_behind(name):
    pipe = cached_pipeline(name)
    expected = enlarge(pipe, picture())
    pipe(image=picture(left=2.0), output_type="strips", **ARGUMENTS, **TILES)
    assert torch.equal(enlarge(pipe, picture()), expected)


@pytest.mark.parametrize("name", MIXING)
def test_caches_that_would_mix_tiles_are_refused(name):
    pipe = tiny_pipeline()
    pipe.transformer.enable_cache(MIXING[name])
    with pytest.raises(ValueError, match=f"`transformer` must be .*FirstBlockCacheConfig.* but is '{name}Config'"):
        enlarge(pipe, picture())


def test_a_checkpoint_does_not_hold_a_cache(tmp_path):
    pipe = cached_pipeline("FirstBlockCache")
    with pytest.raises(ValueError, match="`transformer` must be without diffusers' caches"):
        Checkpoint(tmp_path / "checkpoint").run(pipe, image=picture(), **ARGUMENTS, **TILES)
    assert not (tmp_path / "checkpoint").exists()
