"""NaN and infinite values are reported where they appear, not as a black picture at the end."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import save_tiny_pipeline, tiny_pipeline


NUM_TILES, NUM_STEPS = 6, 3
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture
def pipe():
    """Of its own for each test, to be changed."""
    return tiny_pipeline(dino="dinov2")


def enlarge(pipe, **kwargs):
    """Six tiles of 48 x 48 px in three steps; latents unless `kwargs` say otherwise."""
    settings = {"image": PHOTO, "upscale_factor": 2, "prompt": "a photo", "start_sigma": 0.6}
    settings |= {"num_inference_steps": NUM_STEPS, "max_sequence_length": 16, "tile_size": 48, "tile_overlap": 16}
    settings |= {"dino_conditioning_scale": 0.5, "output_type": "latent"}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(0), **kwargs}).images


def spoil_call(model, number, value):
    """Puts `value` into the last element of the output of the model's call of this number, from 0."""
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        if len(calls) - 1 == number:
            output[0].view(-1)[-1] = value
        return output

    model.register_forward_hook(spoil)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("call", "step", "sigma", "top", "left"), [(0, 1, "0.6", 0, 0), (10, 2, "0.4", 16, 32)])
def test_velocity_of_one_tile(pipe, value, call, step, sigma, top, left):
    """Six tiles, so the eleventh call of the transformer is for the fifth tile in the second step."""
    spoil_call(pipe.transformer, call, value)
    plan = pipe.plan_tiles(64, 96, 48, 16)
    assert (plan[call % NUM_TILES].top, plan[call % NUM_TILES].left) == (top, left)
    # The last of the tile's 6 x 6 cells.
    message = (
        f"NaN or infinite values in the velocity at step {step} of {NUM_STEPS}, sigma {sigma}, at {top + 40} px"
        f" from the top, {left + 40} px from the left. Check the weights"
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        enlarge(pipe)


def test_several_tiles_of_a_batch(pipe):
    pipe.transformer.proj_out.bias.data[3] = torch.nan
    # The fourth element of a token is the lower right of its four cells.
    message = "at step 1 of 3, sigma 0.6, at 8 px from the top, 8 px from the left"
    with pytest.raises(FloatingPointError, match=message):
        enlarge(pipe, tile_batch_size=4)


def test_the_negative_branch(pipe):
    spoil_call(pipe.transformer, 3, torch.nan)
    # The second call for the second tile, which begins 32 px from the left.
    message = "at step 1 of 3, sigma 0.6, at 40 px from the top, 72 px from the left"
    with pytest.raises(FloatingPointError, match=message):
        enlarge(pipe, negative_prompt="blur", true_cfg_scale=2.0)


def test_latents_from_a_callback(pipe):
    def spoil(pipeline, index, timestep, kwargs):
        if index == 1:
            kwargs["latents"][0, -1, 0] = torch.nan
        return kwargs

    message = "in the latents from the callback at step 2 of 3, sigma 0.4, at 48 px from the top, 80 px from the left"
    with pytest.raises(FloatingPointError, match=message):
        enlarge(pipe, callback_on_step_end=spoil)


def test_the_step_before_is_finite(pipe):
    """What a callback saw last is finite, and the call goes on from it."""
    expected = enlarge(pipe)
    weight = pipe.transformer.proj_out.weight
    seen = []

    def break_weight(pipeline, index, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        if index == 1:
            weight.data[3, 4] = torch.inf
        return kwargs

    value = weight[3, 4].item()
    with pytest.raises(FloatingPointError, match="at step 3 of 3"):
        enlarge(pipe, callback_on_step_end=break_weight)
    assert len(seen) == 2 and seen[1].isfinite().all()
    weight.data[3, 4] = value
    assert torch.equal(enlarge(pipe, latents=seen[1], first_step=2), expected)


@pytest.mark.parametrize(
    ("component", "prefix"), [("text_encoder", ""), ("text_encoder_2", ""), ("text_encoder_2", "negative_")]
)
def test_embeddings_of_the_prompt(pipe, component, prefix):
    call = 0 if prefix == "" else 1
    encoder = getattr(pipe, component)

    def spoil(module, inputs, output, calls=[]):
        calls.append(1)
        if len(calls) - 1 == call:
            output[0 if component == "text_encoder_2" else "pooler_output"][..., 0] = torch.nan

    encoder.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"in the prompt's embeddings\. T5 overflows in float16"):
        enlarge(pipe, negative_prompt="blur", true_cfg_scale=2.0)


def test_dino_tokens_of_one_tile(pipe):
    spoil_call(pipe.dino_encoder, 4, torch.nan)
    with pytest.raises(FloatingPointError, match=r"in the DINO tokens\. Check the weights"):
        enlarge(pipe)


def test_a_projector_that_overflows(pipe):
    pipe.dino_projector.gain.data *= 1e38
    pipe.dino_projector.linear_2.weight.data *= 1e10
    with pytest.raises(FloatingPointError, match=r"in the DINO tokens\. Check the weights"):
        enlarge(pipe)


# ---- float16 in the VAE --------------------------------------------------------------------------------------------


def test_an_encoder_that_overflows_in_float16(pipe):
    pipe.vae.encoder.conv_in.weight.data *= 3e5
    enlarge(pipe)
    pipe.vae.half()
    message = re.escape("the image as the VAE encodes it at 0 px from the top, 0 px from the left.")
    with pytest.raises(FloatingPointError, match=f"{message} .* run it in float32 with `pipe.vae.to"):
        enlarge(pipe)


@pytest.mark.parametrize("output_type", ["pil", "np", "strips"])
def test_a_decoder_that_overflows_in_float16_is_run_again_in_float32(pipe, output_type):
    """As the message says, and without denoising again."""
    pipe.vae.decoder.conv_in.weight.data *= 3e5
    pipe.vae.half()
    seen = []

    def keep(pipeline, index, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        return kwargs

    message = re.escape("the result as the VAE decodes it at 0 px from the top, 0 px from the left.")
    with pytest.raises(FloatingPointError, match=f"{message} .* run it in float32 with `pipe.vae.to"):
        list(enlarge(pipe, output_type=output_type, callback_on_step_end=keep))
    pipe.vae.to(torch.float32)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    images = list(enlarge(pipe, output_type=output_type, latents=seen[-1], first_step=NUM_STEPS))
    assert calls == []
    height = sum(strip.shape[1] for strip in images) if output_type == "strips" else np.asarray(images[0]).shape[0]
    assert height == 64


def test_the_place_in_a_later_strip(pipe):
    """A strip that is decoded last is counted from the top of the picture."""
    spoil_call(pipe.vae.decoder, 5, torch.nan)
    message = "the result as the VAE decodes it at 63 px from the top, 95 px from the left"
    strips = enlarge(pipe, output_type="strips")
    with pytest.raises(FloatingPointError, match=message):
        list(strips)


@pytest.mark.parametrize(("dtype", "vae_dtype"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_command_line_runs_a_vae_that_says_it_overflows_in_float32(tmp_path, monkeypatch, dtype, vae_dtype):
    from flux_dino_tile import upscale
    from pipeline_flux_dino_tile import FluxDinoTilePipeline

    save_tiny_pipeline(tmp_path / "model")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    loaded, load = [], FluxDinoTilePipeline.from_pretrained

    def from_pretrained(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(FluxDinoTilePipeline, "from_pretrained", from_pretrained)
    arguments = [tmp_path / "a.png", "--use-flux", "--model", tmp_path / "model", "--steps", "1", "--dtype", dtype]
    assert upscale.main([str(argument) for argument in [*arguments, "--scale", "2", "--device", "cpu"]]) == 0
    assert loaded[0].vae.dtype == vae_dtype
    assert loaded[0].transformer.dtype == getattr(torch, dtype)
