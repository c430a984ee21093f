"""NaN and infinite values are reported where they appear, not as a black picture at the end."""

import re

import pytest
import torch
import worker_runs
from PIL import Image
from safetensors.torch import load_file
from worker_runs import NUM_STEPS, enlarge

from pipeline_flux_dino_tile import CHECKPOINT_NAME
from tiny_models import save_tiny_pipeline, tiny_pipeline


NUM_TILES = 6


@pytest.fixture
def pipe(monkeypatch):
    """A pipeline of its own for `enlarge`, to be changed."""
    monkeypatch.setattr(worker_runs, "PIPE", tiny_pipeline(dino="dinov2"))
    return worker_runs.PIPE


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
@pytest.mark.parametrize("fusion", ["step", "final"])
@pytest.mark.parametrize(("call", "step", "sigma", "top", "left"), [(0, 1, "0.6", 0, 0), (10, 2, "0.4", 16, 32)])
def test_velocity_of_one_tile(pipe, value, fusion, call, step, sigma, top, left):
    """Six tiles, so the eleventh call of the transformer is for the fifth tile in the second step."""
    spoil_call(pipe.transformer, call, value)
    plan = pipe.plan_tiles(64, 96, 48, 16)
    assert (plan[call % NUM_TILES].top, plan[call % NUM_TILES].left) == (top, left)
    message = (
        f"NaN or infinite values in the velocity at step {step} of {NUM_STEPS}, sigma {sigma}, in 1 of 6 tiles,"
        f" first in that at top {top}, left {left} px."
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        enlarge(tile_fusion=fusion)


def test_several_tiles_of_a_batch(pipe):
    pipe.transformer.proj_out.bias.data[3] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"at step 1 of 3, sigma 0.6, in 6 of 6 tiles, first in that at top 0"
    ):
        enlarge(tile_batch_size=4)


def test_the_negative_branch(pipe):
    spoil_call(pipe.transformer, 3, torch.nan)
    with pytest.raises(FloatingPointError, match=r"at step 1 of 3, sigma 0.6, in 1 of 6 tiles, first .* left 32 px"):
        enlarge(negative_prompt="blur", true_cfg_scale=2.0)


def test_latents_from_a_callback():
    def spoil(pipeline, index, timestep, kwargs):
        if index == 1:
            kwargs["latents"][0, -1, 0] = torch.nan
        return kwargs

    message = (
        "in the latents from the callback at step 2 of 3, sigma 0.4, in 1 of 6 tiles, first in that at top 16, left 48"
    )
    with pytest.raises(FloatingPointError, match=message):
        enlarge(callback_on_step_end=spoil)


def test_the_checkpoint_is_from_before(pipe, tmp_path):
    """What is saved is finite, and the run goes on from it."""
    expected = enlarge()
    weight = pipe.transformer.proj_out.weight

    def break_weight(pipeline, index, timestep, kwargs):
        if index == 1:
            weight.data[3, 4] = torch.inf
        return kwargs

    value = weight[3, 4].item()
    with pytest.raises(FloatingPointError, match="at step 3 of 3"):
        enlarge(checkpoint_dir=tmp_path, callback_on_step_end=break_weight)
    checkpoint = load_file(tmp_path / CHECKPOINT_NAME)
    assert int(checkpoint["step"]) == 2 and checkpoint["state"].isfinite().all()
    weight.data[3, 4] = value
    assert torch.equal(enlarge(checkpoint_dir=tmp_path), expected)


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
    with pytest.raises(FloatingPointError, match=f"the embeddings of `{prefix}prompt`. T5 overflows in float16"):
        enlarge(negative_prompt="blur", true_cfg_scale=2.0)


def test_dino_tokens_of_one_tile(pipe):
    spoil_call(pipe.dino_encoder, 4, torch.nan)
    with pytest.raises(FloatingPointError, match=r"the DINO tokens in 1 of 6 tiles, first .* top 16, left 32 px"):
        enlarge()


def test_a_projector_that_overflows(pipe):
    pipe.dino_projector.gain.data *= 1e38
    pipe.dino_projector.linear_2.weight.data *= 1e10
    with pytest.raises(FloatingPointError, match="the DINO tokens in 6 of 6 tiles"):
        enlarge()


# ---- float16 in the VAE --------------------------------------------------------------------------------------------


def test_an_encoder_that_overflows_in_float16(pipe):
    pipe.vae.encoder.conv_in.weight.data *= 3e5
    enlarge()
    pipe.vae.half()
    message = re.escape("the image as the VAE encodes it in 6 of 6 tiles, first in that at top 0, left 0 px.")
    with pytest.raises(FloatingPointError, match=f"{message}.*run it in float32 with `pipe.vae.to"):
        enlarge()


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_a_decoder_that_overflows_in_float16_is_run_again_in_float32(pipe, tmp_path, output_type):
    """As the message says, and without denoising again."""
    pipe.vae.decoder.conv_in.weight.data *= 3e5
    pipe.vae.half()
    message = re.escape("the result as the VAE decodes it in 3 of 6 tiles, first in that at top 0, left 0 px.")
    with pytest.raises(FloatingPointError, match=f"{message}.*run it in float32 with `pipe.vae.to"):
        enlarge(output_type=output_type, checkpoint_dir=tmp_path)
    pipe.vae.to(torch.float32)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    enlarge(output_type=output_type, checkpoint_dir=tmp_path)
    assert calls == []


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
