"""The training step against the pipeline's own forward, and what it leaves alone."""

import math
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_projector
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from training_runs import arguments, parse, save_model, save_photos, start
from transformers import SiglipVisionConfig, SiglipVisionModel

from dino_projector.training import run
from dino_projector.training.cache import (
    EmptyPrompt,
    TensorCache,
    TextEmbeddings,
    cache_key,
    model_fingerprint,
    text_fingerprint,
)
from dino_projector.training.dropout import Dropout, draw_caption, draw_log_scale
from dino_projector.training.flow_matching import (
    NoiseLevels,
    StepInputs,
    denoising_losses,
    draw_part_ahead,
    draw_sigma,
    draw_start,
    lead_from_degraded,
    project_tokens,
    restoration_weights,
)
from dino_projector.training.models import ReduxTeacher, distillation_loss, match_token_rms
from dino_projector.training.samples import sample_rng
from dino_projector.training.signals import StopSignal
from dino_projector.training.trainer import TrainingError
from dino_projector.training.validation import (
    Validator,
    bin_centers,
    log_strips,
    summarize,
    upscale_examples,
    validation_losses,
)
from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import JOINT_ATTENTION_DIM, tiny_pipeline


RESTORED = ("--restoration_share", 0.5, "--pixel_loss_weight", 0.7)
EVERYTHING = ("--dino_dropout", 0.3, "--token_dropout", 0.5, "--strength_jitter", 0.5, "--train_batch_size", 6)
EVERYTHING += RESTORED


@pytest.fixture(scope="module", params=[False, True], ids=["schnell", "dev"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, guidance_embeds=request.param)
    return folder


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schnell")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    save_photos(folder)
    return folder


# ---- One step ------------------------------------------------------------------------------------------------------


def test_step_with_everything_on_is_the_pipelines_forward(model, photos, tmp_path):
    """Each sample alone through the pipeline, its dropped tokens left out instead of masked, its loss written out."""
    trainer, loader, _ = start(model, photos, tmp_path, *EVERYTHING, "--guidance_scale", 1.5, "--random_flip")
    batch = next(iter(loader))
    inputs = trainer.make_inputs(batch)
    assert inputs.log_scale is not None and len({float(row.max()) for row in inputs.log_scale}) > 2
    assert torch.isinf(inputs.log_scale).all(1).any() and (torch.isinf(inputs.log_scale).sum(1) % 16 != 0).any()
    assert 0 < inputs.starts.isfinite().sum() < 6
    dino = project_tokens(trainer.pipe, trainer.make_inputs.plan, inputs)
    with trainer.pipe.dino_attention(dino):
        losses = denoising_losses(trainer.pipe, inputs, dino)

    pipe = trainer.pipe
    for index in range(len(losses)):
        sigma = float(inputs.sigmas[index])
        latents, noise = inputs.latents[index : index + 1], inputs.noise[index : index + 1]
        branch = inputs.branch._replace(
            prompt_embeds=inputs.branch.prompt_embeds[index : index + 1],
            pooled_prompt_embeds=inputs.branch.pooled_prompt_embeds[index : index + 1],
        )
        guidance = torch.tensor([1.5]) if pipe.transformer.config.guidance_embeds else None
        kept = torch.isfinite(inputs.log_scale[index])
        alone = None
        if kept.any():
            scale = float(inputs.log_scale[index][kept][0].exp())
            alone = pipe.prepare_dino_tokens(inputs.features[:, index : index + 1], trainer.make_inputs.plan, scale)
            alone = alone._replace(tokens=alone.tokens[:, :, kept], ids=alone.ids[kept])
        with torch.no_grad(), pipe.dino_attention(alone):
            velocity = pipe.predict_velocity(
                torch.lerp(latents, noise, sigma), torch.tensor(1000 * sigma), branch, guidance, alone
            )
        path_start = float(inputs.starts[index])
        weight = path_start**2 / (path_start**2 + 0.03) if math.isfinite(path_start) else 1.0
        wanted = weight * F.mse_loss(velocity, noise - latents)
        torch.testing.assert_close(losses[index], wanted, rtol=1e-4, atol=1e-6)


def test_inputs_are_the_pipelines_encodings(schnell, photos, tmp_path):
    trainer, loader, _ = start(schnell, photos, tmp_path)
    batch = next(iter(loader))
    inputs, pipe = trainer.make_inputs(batch), trainer.pipe
    seen = batch["degraded"].float() / 255
    features = pipe.encode_dino(list(seen), height=64, width=64)
    torch.testing.assert_close(inputs.features, features)
    posterior = pipe.vae.encode(batch["sharp"].float() / 127.5 - 1).latent_dist
    latents = (posterior.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    deviation = (inputs.latents - latents) / (posterior.std * pipe.vae.config.scaling_factor)
    assert float(deviation.mean()) == pytest.approx(0, abs=0.15) and float(deviation.std()) == pytest.approx(
        1, abs=0.1
    )
    full = FluxDinoTilePipeline.from_pretrained(schnell)
    embeds, pooled_embeds, _ = full.encode_prompt("", None, max_sequence_length=16)
    torch.testing.assert_close(inputs.branch.prompt_embeds, embeds.expand(2, -1, -1))
    torch.testing.assert_close(inputs.branch.pooled_prompt_embeds, pooled_embeds.expand(2, -1))


def test_restored_samples_start_at_their_noisy_degraded_latents(schnell, photos, tmp_path):
    options = ("--train_batch_size", 12, "--degradation", "mild", "bicubic")
    plain, loader, _ = start(schnell, photos, tmp_path, *options)
    trainer, _, _ = start(schnell, photos, tmp_path, *options, "--restoration_share", 0.6)
    batch = next(iter(loader))
    inputs, unrestored = trainer.make_inputs(batch), plain.make_inputs(batch)
    restored = inputs.starts.isfinite()
    at_start = restored & (inputs.sigmas == inputs.starts)
    assert 0 < at_start.sum() < restored.sum() < 12
    assert (inputs.sigmas[restored] <= inputs.starts[restored]).all()
    for found, wanted in zip(inputs[:3], unrestored[:3]):
        assert torch.equal(found[~restored], wanted[~restored])
    assert torch.equal(inputs.latents, unrestored.latents)

    vae = trainer.pipe.vae
    posterior = vae.encode(batch["degraded"].float() / 127.5 - 1).latent_dist
    latents = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    sigmas = inputs.sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * inputs.latents + sigmas * inputs.noise
    degraded = (noisy - sigmas * unrestored.noise) / (1 - sigmas)
    deviation = ((degraded - latents) / (posterior.std * vae.config.scaling_factor))[at_start]
    assert float(deviation.mean()) == pytest.approx(0, abs=0.15)
    assert float(deviation.std()) == pytest.approx(1, abs=0.1)


def test_the_path_of_a_restored_sample_leads_from_the_degraded_latents_to_the_sharp():
    sharp, degraded, noise = torch.randn(3, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0.4, 0.4, math.inf])
    inputs = StepInputs(sharp, noise, torch.tensor([0.4, 0.1, 0.9]), torch.empty(0), None, None)
    led = lead_from_degraded(inputs, degraded, starts)
    sigmas = inputs.sigmas.view(-1, 1, 1, 1)
    noisy, velocity = (1 - sigmas) * led.latents + sigmas * led.noise, led.noise - led.latents
    torch.testing.assert_close(noisy[0], 0.6 * degraded[0] + 0.4 * noise[0])
    torch.testing.assert_close((noisy - sigmas * velocity)[:2], sharp[:2])
    # A quarter of the straight way is left.
    torch.testing.assert_close(noisy[1], sharp[1] + (0.6 * degraded[1] + 0.4 * noise[1] - sharp[1]) / 4)
    assert torch.equal(led.noise[2], noise[2])


def written_out_loss(decoded, sharp):
    """L1 of pixels, of their steps down and to the right, and of these steps' root mean square in windows of 8 px."""
    pairs = [(decoded, sharp)]
    for axis in (2, 3):
        steps = [item.diff(dim=axis)[:, :, :63, :63] for item in (decoded, sharp)]
        squares = [item.square().unfold(2, 8, 4).unfold(3, 8, 4).mean((-2, -1)) for item in steps]
        pairs += [steps, [(item + 1e-6).sqrt() for item in squares]]
    means = [(a - b).abs().mean() for a, b in pairs]
    # Both directions have as many edges, which are averaged over.
    return means[0] + (means[1] + means[3]) / 2 + (means[2] + means[4]) / 2


@pytest.mark.parametrize("has_residual", [False, True])
def test_pixel_loss_is_that_of_the_pictures_after_one_step(schnell, photos, tmp_path, has_residual):
    off = ("--dino_dropout", 0, "--token_dropout", 0, "--strength_jitter", 0, "--train_batch_size", 5)
    trainer, loader, _ = start(schnell, photos, tmp_path, *off, *RESTORED)
    pipe, batch = trainer.pipe, next(iter(loader))
    pipe.register_to_config(default_vae_residual=has_residual)
    inputs = trainer.make_inputs(batch)
    starts = inputs.starts.tolist()
    assert 0 < sum(map(math.isfinite, starts)) < 5
    config, total = pipe.vae.config, 0.0

    def decode(latents):
        return pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample

    with torch.no_grad():
        dino = project_tokens(pipe, trainer.make_inputs.plan, inputs)
        for index, path_start in enumerate(starts):
            sigma, latents, noise = (item[index : index + 1] for item in (inputs.sigmas, inputs.latents, inputs.noise))
            noisy = torch.lerp(latents, noise, float(sigma))
            branch = trainer.make_inputs.branch([""])
            tokens = dino._replace(tokens=dino.tokens[:, index : index + 1])
            velocity = pipe.predict_velocity(noisy, 1000 * sigma, branch, None, tokens)
            error = float(F.mse_loss(velocity, noise - latents))
            if math.isinf(path_start):
                total += error / 5
                continue
            total += path_start**2 / (path_start**2 + 0.03) * error / 5
            sharp, degraded = (batch[name][index : index + 1].float() / 127.5 - 1 for name in ("sharp", "degraded"))
            decoded = decode(noisy - sigma * velocity)
            if has_residual:
                mean = pipe.vae.encode(degraded).latent_dist.mean
                decoded += degraded - pipe.vae.decode(mean).sample
            total += 0.7 * float(written_out_loss(decoded, sharp)) / 5
    assert float(trainer.backward(batch, 1.0)) == pytest.approx(total, rel=1e-4)


def test_the_gradient_of_a_restored_batch_is_the_slope_of_its_loss(schnell, photos, tmp_path):
    more = ("--dino_dropout", 0, "--restoration_share", 1, "--pixel_loss_weight", 10)
    trainer, loader, _ = start(schnell, photos, tmp_path, *more)
    batch, gain = next(iter(loader)), trainer.projector.gain
    trainer.backward(batch, 1.0)
    direction, before, losses = gain.grad.clone(), gain.detach().clone(), []
    step = 0.05 * before.norm() / direction.norm()
    for sign in (-1, 1):
        gain.data.copy_(before + sign * step * direction)
        losses.append(float(trainer.backward(batch, 1.0)))
    slope = (losses[1] - losses[0]) / (2 * float(step))
    assert slope == pytest.approx(float(direction.square().sum()), rel=0.02)


@pytest.mark.parametrize("checkpointing", ["--gradient_checkpointing", "--no-gradient_checkpointing"])
def test_gradient_reaches_the_projector_and_nothing_else(model, photos, tmp_path, checkpointing):
    trainer, loader, _ = start(model, photos, tmp_path, *EVERYTHING, checkpointing)
    trainer.backward(next(iter(loader)), 1.0)
    for name, parameter in trainer.projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.dtype == torch.float32
    for part in (trainer.pipe.transformer, trainer.pipe.vae, trainer.pipe.dino_encoder):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in part.parameters())
    assert trainer.pipe.transformer.gradient_checkpointing == (checkpointing == "--gradient_checkpointing")


def test_gradient_checkpointing_changes_no_gradient(schnell, photos, tmp_path):
    gradients = []
    for option in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
        trainer, loader, _ = start(schnell, photos, tmp_path, *EVERYTHING, option)
        trainer.backward(next(iter(loader)), 1.0)
        gradients.append([parameter.grad for parameter in trainer.projector.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_captions_stay_with_their_pictures(schnell, photos, tmp_path):
    captioned = tmp_path / "captioned"
    shutil.copytree(photos, captioned)
    for path in captioned.glob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    options = ("--proportion_empty_prompts", 0.5, "--train_batch_size", 12)
    trainer, loader, _ = start(schnell, captioned, tmp_path / "out", *options)
    batch = next(iter(loader))
    assert [f"{caption}.png" for caption in batch["caption"]] == [Path(name).name for name in batch["name"]]
    found = trainer.make_inputs(batch).branch
    pipe, num_empty = FluxDinoTilePipeline.from_pretrained(schnell), 0
    for index, caption in enumerate(batch["caption"]):
        wanted = [pipe.encode_prompt(text, None, max_sequence_length=16)[:2] for text in (caption, "")]
        is_own, is_empty = (
            torch.allclose(found.prompt_embeds[index], embeds[0], atol=1e-6)
            and torch.allclose(found.pooled_prompt_embeds[index], pooled_embeds[0], atol=1e-6)
            for embeds, pooled_embeds in wanted
        )
        assert is_own != is_empty
        num_empty += is_empty
    assert 0 < num_empty < 12


def test_a_wholly_dropped_batch_has_zero_gradients(schnell, photos, tmp_path):
    """Not missing ones: the other processes average with them."""
    trainer, loader, _ = start(schnell, photos, tmp_path, "--dino_dropout", 1)
    batch = next(iter(loader))
    loss = trainer.backward(batch, 1.0)
    assert all(parameter.grad.abs().max() == 0 for parameter in trainer.projector.parameters())
    inputs = trainer.make_inputs(batch)
    torch.testing.assert_close(loss, denoising_losses(trainer.pipe, inputs, None).mean())


def test_accumulated_batches_are_one_large_batch(schnell, photos, tmp_path):
    def trained(*options):
        trainer, loader, args = start(schnell, photos, tmp_path, *RESTORED, *options)
        values = trainer.train_step(list(islice(iter(loader), args.gradient_accumulation_steps)))
        return values, list(trainer.projector.parameters())

    whole, whole_weights = trained("--train_batch_size", 4)
    parts, part_weights = trained("--train_batch_size", 1, "--gradient_accumulation_steps", 4)
    assert whole == pytest.approx(parts, rel=1e-4)
    for a, b in zip(whole_weights, part_weights):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_step_clips_schedules_and_averages(schnell, photos, tmp_path):
    options = ("--max_grad_norm", 1e-3, "--learning_rate", 0.01, "--lr_warmup_steps", 2, "--max_train_steps", 10)
    trainer, loader, _ = start(schnell, photos, tmp_path, *options)
    rates, shadow = [], None
    for batches in islice(zip(iter(loader)), 5):
        before = [parameter.detach().clone() for parameter in trainer.projector.parameters()]
        values = trainer.train_step(batches)
        rates.append(values["lr"])
        after = [parameter.detach().clone() for parameter in trainer.projector.parameters()]
        if trainer.step > 1:
            decay = trainer.step / (9 + trainer.step)
            wanted = [decay * s + (1 - decay) * a for s, a in zip(shadow, after)]
            torch.testing.assert_close(trainer.ema.shadow_params, wanted)
        shadow = [item.clone() for item in trainer.ema.shadow_params]
        assert trainer.step == 1 or any(not torch.equal(a, b) for a, b in zip(before, after))
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(3)]
    assert rates == pytest.approx([0, 0.005, *cosine])
    # Adam's first moment is a tenth of the clipped gradient, and its sum over steps is bounded by the clip.
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert math.sqrt(sum(float(item.square().sum()) for item in moments)) <= 1e-3 * (1 - 0.9**5) * 1.001


@pytest.fixture
def own_precision():
    """accelerate keeps the precision of a process's first accelerator."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_bf16_keeps_the_projector_in_float32(schnell, photos, tmp_path, own_precision):
    args = parse(schnell, photos, tmp_path, "--mixed_precision", "bf16", *EVERYTHING)
    trainer, loader = run.start_run(args, run.make_accelerator(args))
    assert trainer.pipe.transformer.dtype == trainer.pipe.vae.dtype == torch.bfloat16
    inputs = trainer.make_inputs(next(iter(loader)))
    assert inputs.sigmas.dtype == inputs.noise.dtype == inputs.latents.dtype == torch.float32
    values = trainer.train_step([next(iter(loader))])
    assert math.isfinite(values["loss"]) and values["grad_norm"] > 0
    assert {parameter.dtype for parameter in trainer.projector.parameters()} == {torch.float32}


def test_cudnns_attention_is_off(schnell, photos, tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    start(schnell, photos, tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_nan_stops_with_the_names_before_the_weights_are_touched(schnell, photos, tmp_path):
    trainer, loader, _ = start(schnell, photos, tmp_path)
    batch = next(iter(loader))
    trainer.projector.gain.data[0] = math.nan
    before = trainer.projector.linear_1.weight.clone()
    with pytest.raises(TrainingError, match=r"the loss is nan .* at step 1, on") as error:
        trainer.train_step([batch])
    assert all(name in str(error.value) for name in batch["name"])
    assert torch.equal(trainer.projector.linear_1.weight, before)


def test_the_empty_prompt_stands_for_every_caption():
    prompt = EmptyPrompt(torch.full((1, 3, 4), 2.0), torch.zeros(1, 5))
    embeds, pooled = prompt(["", "a"])
    assert embeds.shape == (2, 3, 4) and pooled.shape == (2, 5)
    assert prompt.token_rms() == 2


def test_the_end_of_the_time_stops_as_a_signal_does():
    accelerator = Accelerator(cpu=True)
    assert StopSignal(0.0).reached_any(accelerator)
    assert not StopSignal(1000.0).reached_any(accelerator)
    assert not StopSignal().reached_any(accelerator)


# ---- What is drawn -------------------------------------------------------------------------------------------------


def test_sigmas_are_even_or_logit_normal_in_their_range():
    def sigmas(*levels):
        return torch.cat([draw_sigma(NoiseLevels(*levels), np.random.default_rng(i)) for i in range(3000)])

    even = sigmas(0.1, 0.5, "none")
    assert even.dtype == torch.float32
    assert 0.1 <= even.min() < 0.11 and 0.49 < even.max() <= 0.5
    histogram = torch.histc(even, 4, 0.1, 0.5) / len(even)
    torch.testing.assert_close(histogram, torch.full((4,), 0.25), atol=0.04, rtol=0)
    normal = torch.logit((sigmas(0.1, 0.5, "logit_normal", 0.5, 0.8) - 0.1) / 0.4)
    assert float(normal.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(normal.std()) == pytest.approx(0.8, abs=0.05)


def test_starts_are_even_in_their_logarithm_and_half_of_the_samples_lie_there():
    def drawn(levels):
        rngs = [np.random.default_rng(i) for i in range(3000)]
        starts = [draw_start(levels, rng) for rng in rngs]
        return torch.tensor(starts), torch.tensor([draw_part_ahead(rng) for rng in rngs])

    levels = NoiseLevels(0.05, 0.8, restoration_share=0.6)
    starts, parts = drawn(levels)
    restored = starts[starts.isfinite()]
    assert len(restored) / len(starts) == pytest.approx(0.6, abs=0.03)
    histogram = torch.histc(restored.log2(), 4, math.log2(0.05), math.log2(0.8)) / len(restored)
    torch.testing.assert_close(histogram, torch.full((4,), 0.25), atol=0.04, rtol=0)
    assert float((parts == 1).float().mean()) == pytest.approx(0.5, abs=0.03)
    below = torch.histc(parts[parts < 1], 4, 0, 1) / (parts < 1).sum()
    torch.testing.assert_close(below, torch.full((4,), 0.25), atol=0.04, rtol=0)
    # From no noise at all no path starts.
    assert 0.02 <= drawn(levels._replace(sigma_min=0.0))[0].min() < 0.021
    assert drawn(levels._replace(restoration_share=0.0))[0].isinf().all()


def test_small_starts_weigh_little():
    found = restoration_weights(torch.tensor([0.02, 0.03**0.5, 0.6, math.inf]))
    torch.testing.assert_close(found, torch.tensor([0.0004 / 0.0304, 0.5, 0.36 / 0.39, 1.0]))


def test_dropout_has_its_shares_and_ranges():
    dropout = Dropout(dino=0.2, token=0.3, strength=0.4)
    rows = torch.stack([draw_log_scale(16, dropout, np.random.default_rng(i)) for i in range(3000)])
    dropped = torch.isinf(rows).all(1)
    assert float(dropped.float().mean()) == pytest.approx(0.2, abs=0.03)
    kept = rows[~dropped]
    num_kept = torch.isfinite(kept).sum(1)
    assert float((num_kept < 16).float().mean()) == pytest.approx(0.3 * 15 / 16, abs=0.04)
    # A quarter to all of the tokens, whichever they are.
    assert num_kept.min() >= 4 and torch.isinf(kept).any(0).all()
    scales = kept.max(1).values.exp()
    assert float((scales < 1).float().mean()) == pytest.approx(0.4, abs=0.04)
    assert 0.1 <= scales.min() < 0.13
    finite = torch.where(torch.isfinite(kept), kept, kept.max(1, keepdim=True).values)
    assert (finite == finite[:, :1]).all()


@given(st.integers(0, 2**32))
def test_without_dropout_nothing_changes(seed):
    rng = np.random.default_rng(seed)
    assert torch.equal(draw_log_scale(9, Dropout(), rng), torch.zeros(9))
    assert draw_caption("dogs", Dropout(), rng) == "dogs"
    assert draw_caption("dogs", Dropout(caption=1.0), rng) == ""


# ---- Caches --------------------------------------------------------------------------------------------------------


def test_cache_computes_once_and_leaves_no_part_of_a_file(tmp_path):
    cache, calls = TensorCache(tmp_path), []

    def compute():
        calls.append(1)
        return {"x": torch.ones(2)}

    assert torch.equal(cache.get("key", compute)["x"], cache.get("key", compute)["x"]) and calls == [1]
    with pytest.raises(RuntimeError):
        cache.get("other", lambda: {"x": torch.ones(2).to_sparse()})
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


@given(st.lists(st.text(max_size=4), max_size=3), st.lists(st.text(max_size=4), max_size=3))
def test_keys_differ_where_their_parts_do(left, right):
    assert (cache_key(*left) == cache_key(*right)) == (left == right)


def test_a_changed_option_never_reuses_text_embeddings(tmp_path):
    pipe, cache = tiny_pipeline(), TensorCache(tmp_path)
    fingerprint = text_fingerprint(pipe)
    first = TextEmbeddings(pipe, cache, fingerprint, 16, torch.float32)
    keys = {first.key("a"), first.key("b")}
    keys.add(TextEmbeddings(pipe, cache, fingerprint, 8, torch.float32).key("a"))
    keys.add(TextEmbeddings(pipe, cache, fingerprint, 16, torch.bfloat16).key("a"))
    pipe.text_encoder_2.shared.weight.data[5] += 1
    keys.add(TextEmbeddings(pipe, cache, text_fingerprint(pipe), 16, torch.float32).key("a"))
    assert len(keys) == 5


def test_fingerprint_sees_values_names_and_dtypes():
    layer = torch.nn.Linear(4, 4)
    prints = {model_fingerprint(layer), model_fingerprint(torch.nn.Sequential(layer))}
    prints.add(model_fingerprint(layer.to(torch.bfloat16)))
    layer.weight.data[2, 2] += 1
    prints.add(model_fingerprint(layer))
    assert len(prints) == 4


def test_text_embeddings_need_no_encoder_once_they_are_stored(tmp_path):
    pipe, cache = tiny_pipeline(), TensorCache(tmp_path)
    texts = ("two dogs", "")
    stored = TextEmbeddings(pipe, cache, "print", 16, torch.float32)(texts)
    again = TextEmbeddings(None, cache, "print", 16, torch.float32)(texts)
    embeds, pooled_embeds, _ = pipe.encode_prompt(list(texts), None, max_sequence_length=16)
    for found in (stored, again):
        torch.testing.assert_close(found, (embeds, pooled_embeds))


def test_cached_latents_are_those_of_the_picture_and_vae(schnell, photos, tmp_path):
    options = (schnell, photos, tmp_path, "--cache_latents", "--train_batch_size", 6)
    trainer, loader, _ = start(*options)
    batch = next(iter(loader))
    inputs = trainer.make_inputs(batch)
    folder = tmp_path / "precomputed" / "latents"
    assert len(list(folder.iterdir())) == len(set(batch["name"]))
    batch["number"] += 1000
    torch.testing.assert_close(trainer.make_inputs(batch).latents, inputs.latents, rtol=0, atol=0)
    stored = [load_file(path)["latents"] for path in folder.iterdir()]
    assert all(any(torch.equal(latents, item[0]) for item in stored) for latents in inputs.latents)
    # Another VAE, or another scale of its latents, shares the folder, but no entry.
    found = [inputs.latents]
    for change in (
        lambda vae: vae.encoder.conv_in.weight.data.mul_(1.1),
        lambda vae: vae.register_to_config(scaling_factor=0.5),
        lambda vae: vae.register_to_config(shift_factor=0.2),
    ):
        change(trainer.pipe.vae)
        other = run.make_input_maker(parse(*options), trainer.pipe, trainer.make_inputs.embed_captions)
        found.append(other(batch).latents)
        assert not torch.equal(found[-1], found[-2])


# ---- Initial weights -----------------------------------------------------------------------------------------------


def test_first_tokens_have_the_scale_of_text(schnell, photos, tmp_path):
    (photos / "dogs.txt").write_text("two dogs on planks")
    trainer, loader, _ = start(schnell, photos, tmp_path, "--train_batch_size", 6)
    (photos / "dogs.txt").unlink()
    pipe = FluxDinoTilePipeline.from_pretrained(schnell)
    embeds = pipe.encode_prompt("two dogs on planks", None, max_sequence_length=16)[0]
    num_tokens = min(16, len(pipe.tokenizer_2("two dogs on planks").input_ids))
    wanted = float(embeds[0, :num_tokens].detach().square().mean().sqrt())
    inputs = trainer.make_inputs(next(iter(loader)))
    with torch.no_grad():
        tokens = project_tokens(trainer.pipe, trainer.make_inputs.plan, inputs).tokens
    # The gain is measured on other crops of the same photos.
    assert float(tokens.square().mean().sqrt()) == pytest.approx(wanted, rel=0.02)


def test_rms_of_given_features_is_matched_exactly():
    projector = tiny_pipeline(dino="dinov2").dino_projector
    features = torch.randn(2, 16, 24)
    match_token_rms(projector, features, 0.37)
    assert float(projector(features).square().mean().sqrt()) == pytest.approx(0.37, rel=1e-5)


@pytest.fixture(scope="module")
def redux(tmp_path_factory):
    """A small FLUX Redux: SigLIP of 3 x 3 patches and its embedder."""
    folder = tmp_path_factory.mktemp("redux")
    torch.manual_seed(6)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14
    )
    encoder, embedder = SiglipVisionModel(config), ReduxImageEncoder(16, JOINT_ATTENTION_DIM)
    FluxPriorReduxPipeline(encoder, None, embedder).save_pretrained(folder)
    return folder


def test_redux_tokens_are_those_of_diffusers(redux):
    teacher = ReduxTeacher(str(redux), torch.device("cpu"), torch.float32)
    images = torch.rand(2, 3, 42, 42) * 2 - 1
    states = SiglipVisionModel.from_pretrained(redux / "image_encoder")(images).last_hidden_state
    wanted = ReduxImageEncoder.from_pretrained(redux, subfolder="image_embedder")(states).image_embeds
    torch.testing.assert_close(teacher.tokens(images, (3, 3)).flatten(1, 2), wanted)
    assert teacher.tokens(images, (4, 4)).shape == (2, 4, 4, JOINT_ATTENTION_DIM)
    # A flat field stays flat on another grid.
    assert teacher.tokens(images, (1, 1)).shape == (2, 1, 1, JOINT_ATTENTION_DIM)


def test_init_from_redux_comes_closer_to_its_tokens(schnell, photos, tmp_path, redux):
    def relative_error(*options):
        trainer, loader, _ = start(schnell, photos, tmp_path, "--train_batch_size", 6, *options)
        batch = next(iter(loader))
        images = batch["sharp"].float() / 127.5 - 1
        target = ReduxTeacher(str(redux), torch.device("cpu"), torch.float32).tokens(images, (4, 4))
        return float(distillation_loss(trainer.projector, trainer.make_inputs(batch).features[0], target))

    assert relative_error("--init_from_redux", redux, "--redux_steps", 30) < 0.5 * relative_error()


# ---- Validation ----------------------------------------------------------------------------------------------------


def test_validation_losses_are_means_over_the_examples(schnell, photos, tmp_path):
    trainer, loader, args = start(schnell, photos, tmp_path, "--num_validation_images", 3)
    validator = Validator(trainer, loader.dataset.source, args)
    pipe, examples = trainer.pipe, validator.examples
    found = validation_losses(pipe, validator.plan, examples, validator.branch, None, [0.2, 0.5])
    with torch.no_grad():
        for column, sigma in enumerate((0.2, 0.5)):
            totals = dict.fromkeys(found, 0.0)
            for index, example in enumerate(examples):
                for name, features in (
                    ("with_tokens", example.features),
                    ("without_tokens", None),
                    ("other_tokens", examples[(index + 1) % 3].features),
                ):
                    tokens = None if features is None else pipe.prepare_dino_tokens(features, validator.plan, 1.0)
                    noisy = torch.lerp(example.latents, example.noise, sigma)
                    timestep = torch.tensor([1000 * sigma])
                    velocity = pipe.predict_velocity(noisy, timestep, validator.branch, None, tokens)
                    totals[name] += float(F.mse_loss(velocity, example.noise - example.latents)) / 3
            for name, total in totals.items():
                assert found[name][column] == pytest.approx(total, rel=1e-5)
    assert found == validation_losses(pipe, validator.plan, examples, validator.branch, None, [0.2, 0.5])


def test_a_training_that_restores_is_validated_at_the_starts(schnell, photos, tmp_path, capsys):
    options = ("--num_validation_images", 2, "--restoration_share", 0.1, "--sigma_min", 0.05, "--sigma_max", 0.8)
    trainer, loader, args = start(schnell, photos, tmp_path, *options)
    validator = Validator(trainer, loader.dataset.source, args)
    # Factors of two from 0.05 to 0.8, at the middles of which the losses are.
    assert validator.sigmas == pytest.approx([0.05 * 2 ** (n + 0.5) for n in range(4)])
    found, pipe = validator.validate(), trainer.pipe
    assert "validation loss at start" in capsys.readouterr().out
    losses = []
    for sigma in validator.sigmas:
        for example in validator.examples:
            noisy = (1 - sigma) * example.degraded + sigma * example.noise
            timestep = torch.tensor([1000 * sigma])
            with torch.no_grad():
                velocity = pipe.predict_velocity(noisy, timestep, validator.branch, None, None)
            target = (noisy - example.latents) / sigma
            losses.append(sigma**2 / (sigma**2 + 0.03) * float(F.mse_loss(velocity, target)))
    assert found["validation/without_tokens"] == pytest.approx(np.mean(losses), rel=1e-5)
    # The degraded latents are a sample of what the VAE sees in the degraded picture.
    example = validator.examples[0]
    pixels = torch.from_numpy(np.array(example.pair.degraded)).permute(2, 0, 1)[None].float() / 127.5 - 1
    posterior = pipe.vae.encode(pixels).latent_dist
    mean = (posterior.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    deviation = (example.degraded - mean) / (posterior.std * pipe.vae.config.scaling_factor)
    assert float(deviation.std()) == pytest.approx(1, abs=0.1)


def test_validation_and_checkpoints_borrow_the_averaged_weights(schnell, photos, tmp_path):
    trainer, loader, args = start(schnell, photos, tmp_path, "--learning_rate", 0.1)
    validator = Validator(trainer, loader.dataset.source, args)
    for batches in islice(zip(iter(loader)), 3):
        trainer.train_step(batches)
    weights = [parameter.detach().clone() for parameter in trainer.projector.parameters()]
    losses = validator.validate()
    run.save_run(trainer, loader, args)
    torch.testing.assert_close(list(trainer.projector.parameters()), weights, rtol=0, atol=0)
    what = (trainer.pipe, validator.plan, validator.examples, validator.branch, None, validator.sigmas)
    own = summarize(validation_losses(*what), validator.sigmas)
    for parameter, average in zip(trainer.projector.parameters(), trainer.ema.shadow_params):
        parameter.data.copy_(average)
    averaged = summarize(validation_losses(*what), validator.sigmas)
    assert losses == averaged and own["validation/with_tokens"] != averaged["validation/with_tokens"]


def test_pictures_are_the_input_the_result_without_and_with_tokens_and_the_photo(schnell, photos, tmp_path):
    trainer, loader, args = start(schnell, photos, tmp_path)
    validator = Validator(trainer, loader.dataset.source, args)
    strip = np.asarray(upscale_examples(trainer.pipe, validator.plan, validator.examples, 0.5, 3)[0])
    pair, wanted = validator.examples[0].pair, []
    for scale in (0.0, 1.0):
        options = {"height": 64, "width": 64, "start_sigma": 0.5, "generator": torch.Generator().manual_seed(3)}
        wanted.append(trainer.pipe(image=pair.small, dino_conditioning_scale=scale, **options).images[0])
    for part, picture in zip(np.split(strip, 4, axis=1), (pair.degraded, *wanted, pair.sharp)):
        np.testing.assert_array_equal(part, np.asarray(picture))
    assert not np.array_equal(*map(np.asarray, wanted))


def test_summary_has_gaps_in_percent():
    losses = {"with_tokens": [1.0, 3.0], "without_tokens": [2.0, 3.0], "other_tokens": [1.0, 3.4]}
    values = summarize(losses, bin_centers(0.0, 0.8, 2))
    assert values["validation/with_tokens/sigma_0.200"] == 1.0 and values["validation/other_tokens/sigma_0.600"] == 3.4
    assert values["validation/gap_without_tokens_percent"] == pytest.approx(25)
    assert values["validation/gap_other_tokens_percent"] == pytest.approx(10)


def test_pictures_reach_each_tracker_in_its_layout():
    logged = {}

    def tracker(name):
        return SimpleNamespace(
            name=name, log_images=lambda values, step, **layout: logged.update({name: (values, step, layout)})
        )

    log_strips([tracker("tensorboard"), tracker("wandb")], [Image.new("RGB", (8, 4), "red")] * 3, 7)
    assert logged["tensorboard"][1:] == (7, {"dataformats": "NHWC"}) and logged["wandb"][1:] == (7, {})
    for values, _, _ in logged.values():
        assert values["validation/pictures"].shape == (3, 4, 8, 3)


# ---- The whole -----------------------------------------------------------------------------------------------------


def overfit(photos, tmp_path, *more):
    """Six photos, always the same crops, validated on the very same before and after; and the validator."""
    model = tmp_path / "model"
    save_model(model, is_sensitive=True)
    fixed = ("--cache_latents", "--degradation", "bicubic", "--scale_factor", 2, 2, "--no-gradient_checkpointing")
    steady = ("--dino_dropout", 0, "--token_dropout", 0, "--strength_jitter", 0, "--ema_decay", 0.9)
    size = ("--train_batch_size", 6, "--num_validation_images", 6, "--hidden_dim", 64, "--position_mode", "tile")
    options = ("--learning_rate", 0.01, "--seed", 1, *more)
    args = train_projector.parse_arguments(arguments(model, photos, tmp_path, *fixed, *steady, *size, *options))
    train_projector.fill_in_defaults(args)
    trainer, loader = run.start_run(args, Accelerator(cpu=True))
    validator = Validator(trainer, loader.dataset.source, args)
    before = validator.validate()
    is_finished, after = run.run_steps(trainer, loader, validator, StopSignal(), args)
    assert is_finished
    return before, after, validator


def test_overfits_so_that_its_own_tokens_help_and_anothers_less(photos, tmp_path):
    """
    It shows that the loop can put what DINO sees into the tokens and that FLUX uses it, not that anything is learned
    that holds for other pictures.
    """
    before, after, validator = overfit(photos, tmp_path, "--max_train_steps", 200)
    trainer = validator.trainer
    assert after["validation/with_tokens"] < 0.95 * before["validation/with_tokens"]
    assert after["validation/gap_without_tokens_percent"] > 5
    assert after["validation/gap_other_tokens_percent"] > 2
    assert before["validation/gap_without_tokens_percent"] < 0
    # Against all the other pictures, not only the next.
    with trainer.ema_weights():
        losses = np.array(
            [
                [
                    validation_losses(
                        trainer.pipe,
                        validator.plan,
                        [example._replace(features=other.features)],
                        validator.branch,
                        None,
                        validator.sigmas,
                    )["with_tokens"]
                    for other in validator.examples
                ]
                for example in validator.examples
            ]
        ).mean(2)
    own = np.eye(len(losses), dtype=bool)
    assert losses[own].mean() < 0.98 * losses[~own].mean()


def test_overfits_restored_paths_so_that_its_own_tokens_help_there(photos, tmp_path):
    more = ("--max_train_steps", 60, "--restoration_share", 1, "--pixel_loss_weight", 1, "--sigma_min", 0.1)
    before, after, _ = overfit(photos, tmp_path, *more)
    assert after["validation/with_tokens"] < 0.97 * before["validation/with_tokens"]
    for gap in ("validation/gap_without_tokens_percent", "validation/gap_other_tokens_percent"):
        assert before[gap] < 1 and after[gap] > 2.5


def test_result_is_what_the_pipeline_loads(schnell, photos, tmp_path):
    assert train_projector.main(arguments(schnell, photos, tmp_path)) == 0
    pipe = FluxDinoTilePipeline.from_pretrained(schnell, dino_encoder=None, dino_projector=None)
    pipe.load_dino_projector(tmp_path / "final")
    state = torch.load(tmp_path / "checkpoint-4" / "training_state.pt", weights_only=True)
    for found, wanted in zip(pipe.dino_projector.parameters(), state["trainer"]["ema"]["shadow_params"]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    config = pipe.dino_projector.config
    assert (config.sigma_min, config.sigma_max, config.token_grid) == (0.02, 0.6, 4)
    embeds, pooled_embeds, _ = pipe.encode_prompt("", None, max_sequence_length=16)
    torch.testing.assert_close(pipe.default_prompt_embeds, (embeds, pooled_embeds))
    facts = (tmp_path / "final" / "training.json").read_text()
    assert (
        '"steps": 4' in facts and '"samples": 8' in facts and str(tmp_path) not in facts and str(schnell) not in facts
    )
    assert (tmp_path / "validation" / "step-000004.png").is_file()


def test_step_inputs_without_dropout_are_plain_attention(schnell, photos, tmp_path):
    trainer, loader, _ = start(
        schnell, photos, tmp_path, "--dino_dropout", 0, "--token_dropout", 0, "--strength_jitter", 0
    )
    inputs = trainer.make_inputs(next(iter(loader)))
    assert isinstance(inputs, StepInputs) and inputs.log_scale is None
    assert sample_rng(1, 2).random() == sample_rng(1, 2).random() != sample_rng(1, 3).random()
