# Copyright 2026 The flux-dino-tile authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
One training step: the inputs of the frozen transformer, and the flow-matching loss of its velocity.

Flow matching leads from noise to the sharp latents. An enlargement starts at the noisy latents of a degraded picture;
so do the paths of restored samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image

from pipeline_flux_dino_tile import DinoTokens, FluxDinoTilePipeline, PromptBranch, TilePlan

from ..pictures import to_bytes
from .cache import TensorCache, cache_key
from .dropout import Dropout, draw_caption, draw_log_scale
from .losses import reconstruction_loss
from .samples import sample_rng


LEAST_START = 0.02  # the velocities of a restored path are as large as 1 / start
AT_START_SHARE = 0.5  # of the restored samples; the others are on their way, as in the later steps of an enlargement
# About the mean square of degraded less sharp latents: the velocities of smaller starts would drown the others.
DEGRADED_SQUARE = 0.03


class NoiseLevels(NamedTuple):
    """From which noise levels a sample draws its own."""

    sigma_min: float = 0.0
    sigma_max: float = 1.0
    weighting_scheme: str = "none"  # uniform, or "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    restoration_share: float = 0.0  # of samples that start at their noisy degraded latents, even in log(sigma)

    def start_range(self) -> tuple[float, float]:
        return max(self.sigma_min, LEAST_START), self.sigma_max


class RestoredPixels(NamedTuple):
    """What the decoded estimates of the restored samples are compared with, in [-1, 1]."""

    places: torch.Tensor  # (restored,) in the batch
    sharp: torch.Tensor  # (restored, 3, height, width)
    residual: torch.Tensor | float  # what the VAE loses of the degraded pictures; 0 if a call does not give it back


class StepInputs(NamedTuple):
    """What a batch is trained on; everything but the tokens, which need a gradient."""

    latents: torch.Tensor  # (batch, channels, rows, columns) of the sharp pictures, in float32
    noise: torch.Tensor
    sigmas: torch.Tensor  # (batch,) in float32
    features: torch.Tensor  # (1, batch, grid rows, grid columns, dim) of the degraded pictures
    branch: PromptBranch
    guidance: torch.Tensor | None  # (batch,)
    log_scale: torch.Tensor | None = None  # (batch, num_tokens); None is plain attention
    starts: torch.Tensor | None = None  # (batch,) levels where restored paths start, infinity for other samples
    pixels: RestoredPixels | None = None


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(int(rng.integers(2**63)))


def standard_normal(shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
    """On the CPU, so that a sample has the same noise on every device."""
    return torch.randn(tuple(shape), generator=torch_generator(rng))


def draw_sigma(levels: NoiseLevels, rng: np.random.Generator) -> torch.Tensor:
    """A noise level `(1,)` in float32: in bfloat16 neighbouring levels would fall together."""
    density = compute_density_for_timestep_sampling(
        levels.weighting_scheme, 1, levels.logit_mean, levels.logit_std, generator=torch_generator(rng)
    )
    return levels.sigma_min + (levels.sigma_max - levels.sigma_min) * density


def draw_start(levels: NoiseLevels, rng: np.random.Generator) -> float:
    """The level at which a restored sample's path starts, or infinity if the sample is not restored."""
    if rng.random() >= levels.restoration_share:
        return math.inf
    low, high = levels.start_range()
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def draw_part_ahead(rng: np.random.Generator) -> float:
    """The part of its path that a restored sample has before it, above 0 and at most 1."""
    return 1.0 if rng.random() < AT_START_SHARE else 1 - rng.random()


def lead_from_degraded(inputs: StepInputs, degraded: torch.Tensor, starts: torch.Tensor) -> StepInputs:
    """
    Has paths start at the noisy latents of degraded pictures.

    An enlargement starts there, at `(1 - start) * degraded + start * noise`, and follows the velocity straight to the
    sharp latents. At a level `sigma` below, a part `sigma / start` of the way is left, which is what flow matching
    with the noise `noise + (1 - start) / start * (degraded - sharp)` says. A start at infinity leaves a sample as it
    is.

    Args:
        inputs ([`StepInputs`]): Of sharp latents.
        degraded (`torch.Tensor` of shape `(batch, channels, rows, columns)`): Latents of the degraded pictures.
        starts (`torch.Tensor` of shape `(batch,)`): Noise levels, not below those of `inputs`.
    """
    parts = torch.where(starts.isinf(), 0, 1 / starts - 1).view(-1, 1, 1, 1)
    return inputs._replace(noise=inputs.noise + parts * (degraded - inputs.latents), starts=starts)


def restoration_weights(starts: torch.Tensor) -> torch.Tensor:
    """Of samples by the level where their paths start: `start^2 / (start^2 + DEGRADED_SQUARE)`, 1 at infinity."""
    return 1 / (1 + DEGRADED_SQUARE / starts.square())


@torch.no_grad()
def encode_latents(
    pipe: FluxDinoTilePipeline, plan: TilePlan, sharp: torch.Tensor, rngs: Sequence[np.random.Generator]
) -> torch.Tensor:
    return pipe.sample_latents(pipe.encode_tiles(sharp, plan), [torch_generator(rng) for rng in rngs])


def encode_pairs(
    pipe: FluxDinoTilePipeline, plan: TilePlan, sharp: list[Image.Image], degraded: list[Image.Image], rngs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of sharp pictures and DINO features of degraded ones."""
    sharp_bytes, degraded_bytes = (torch.stack([to_bytes(item) for item in items]) for items in (sharp, degraded))
    with torch.no_grad():
        features = pipe.encode_dino_tiles(degraded_bytes, plan)
    return encode_latents(pipe, plan, sharp_bytes, rngs), features


def noisy_latents(inputs: StepInputs) -> torch.Tensor:
    sigmas = inputs.sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * inputs.latents + sigmas * inputs.noise


def step_velocity(pipe: FluxDinoTilePipeline, inputs: StepInputs, dino: DinoTokens | None) -> torch.Tensor:
    """What the transformer predicts `(batch, channels, rows, columns)`, in float32."""
    timesteps = inputs.sigmas * pipe.scheduler.config.num_train_timesteps
    return pipe.predict_velocity(noisy_latents(inputs), timesteps, inputs.branch, inputs.guidance, dino)


def velocity_losses(inputs: StepInputs, velocity: torch.Tensor) -> torch.Tensor:
    """Each sample's mean squared error `(batch,)` of the velocity `noise - latents`, weighted if it is restored."""
    errors = (velocity - (inputs.noise - inputs.latents)).square().mean((1, 2, 3))
    return errors if inputs.starts is None else restoration_weights(inputs.starts) * errors


def pixel_loss(pipe: FluxDinoTilePipeline, plan: TilePlan, inputs: StepInputs, velocity: torch.Tensor) -> torch.Tensor:
    """The batch's mean [`reconstruction_loss`] of one step to the end, decoded as by a call; 0 for other samples."""
    if inputs.pixels is None:
        return torch.zeros((), device=velocity.device)
    places, sharp, residual = inputs.pixels
    estimates = noisy_latents(inputs) - inputs.sigmas.view(-1, 1, 1, 1) * velocity
    decoded = pipe.decode_tile(estimates[places], plan[0]) + residual
    return len(places) / len(velocity) * reconstruction_loss(decoded, sharp)


def denoising_losses(pipe: FluxDinoTilePipeline, inputs: StepInputs, dino: DinoTokens | None) -> torch.Tensor:
    """The [`velocity_losses`] of what the transformer predicts."""
    return velocity_losses(inputs, step_velocity(pipe, inputs, dino))


def project_tokens(pipe: FluxDinoTilePipeline, plan: TilePlan, inputs: StepInputs) -> DinoTokens:
    """
    The tokens of a batch, with each sample's own strengths. Unlike the pipeline's they may be NaN: so is the loss
    then, and the trainer stops all processes with the pictures' names.
    """
    projector = pipe.dino_projector
    tokens = projector(inputs.features.flatten(2, 3).to(projector.dtype))
    ids = projector.position_ids((inputs.features.shape[2], inputs.features.shape[3]), plan.tile_tokens)
    return DinoTokens(tokens, ids.to(tokens.device), inputs.log_scale)


class InputMaker:
    """
    Turns batches of samples into a step's inputs. All that it draws depends on the seed and a sample's number only.

    Args:
        pipe ([`FluxDinoTilePipeline`]): With all but the text encoders.
        plan ([`TilePlan`]): Of one tile.
        embed_captions (`Callable`): As [`TextEmbeddings`].
        levels, dropout: What a sample's noise level and drop-out are drawn from.
        guidance_scale (`float`): For a transformer with guidance embeddings.
        seed (`int`): Of the run.
        keeps_pixels (`bool`): Whether a [`pixel_loss`] follows.
        latent_cache ([`TensorCache`], *optional*): Keeps the latents of sharp pictures.
        vae_fingerprint (`str`): Part of the latents' key.
    """

    def __init__(
        self,
        pipe: FluxDinoTilePipeline,
        plan: TilePlan,
        embed_captions: Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]],
        levels: NoiseLevels,
        dropout: Dropout,
        guidance_scale: float,
        seed: int,
        keeps_pixels: bool = False,
        latent_cache: TensorCache | None = None,
        vae_fingerprint: str = "",
    ):
        self.pipe, self.plan, self.embed_captions = pipe, plan, embed_captions
        self.levels, self.dropout, self.guidance_scale, self.seed = levels, dropout, guidance_scale, seed
        self.keeps_pixels = keeps_pixels
        self.latent_cache, self.vae_fingerprint = latent_cache, vae_fingerprint

    def branch(self, captions: Sequence[str]) -> PromptBranch:
        dtype, device = self.pipe.transformer.dtype, self.pipe.device
        embeds, pooled_embeds = (item.to(device=device, dtype=dtype) for item in self.embed_captions(captions))
        return PromptBranch(embeds, pooled_embeds)

    def guidance(self, batch_size: int) -> torch.Tensor | None:
        if not self.pipe.transformer.config.guidance_embeds:
            return None
        return torch.full([batch_size], self.guidance_scale, device=self.pipe.device)

    @torch.no_grad()
    def __call__(self, batch: dict) -> StepInputs:
        device = self.pipe.device
        rngs = [sample_rng(self.seed, int(number), 1) for number in batch["number"]]
        latents = self.latents(batch["sharp"], rngs)
        features = self.pipe.encode_dino_tiles(batch["degraded"], self.plan)
        sigmas = torch.cat([draw_sigma(self.levels, rng) for rng in rngs])
        noise = torch.stack([standard_normal(latents.shape[1:], rng) for rng in rngs])
        captions = [draw_caption(caption, self.dropout, rng) for caption, rng in zip(batch["caption"], rngs)]
        log_scale = None
        if self.dropout.dino or self.dropout.token or self.dropout.strength:
            num_tokens = features.shape[2] * features.shape[3]
            log_scale = torch.stack([draw_log_scale(num_tokens, self.dropout, rng) for rng in rngs]).to(device)
        guidance = self.guidance(len(rngs))
        inputs = StepInputs(
            latents, noise.to(device), sigmas.to(device), features, self.branch(captions), guidance, log_scale
        )
        return self.restore(inputs, batch, rngs) if self.levels.restoration_share else inputs

    def restore(self, inputs: StepInputs, batch: dict, rngs: Sequence[np.random.Generator]) -> StepInputs:
        """Draws the samples that are restored, and has their paths start at the latents of their degraded pictures."""
        device = self.pipe.device
        starts = torch.tensor([draw_start(self.levels, rng) for rng in rngs])
        parts = torch.tensor([draw_part_ahead(rng) for rng in rngs])
        places = starts.isfinite().nonzero().flatten()
        if len(places) == 0:
            return inputs
        posterior = self.pipe.encode_tiles(batch["degraded"][places], self.plan)
        sigmas, degraded = inputs.sigmas.clone(), inputs.latents.clone()
        sigmas[places] = (parts * starts)[places].to(device)
        degraded[places] = self.pipe.sample_latents(posterior, [torch_generator(rngs[place]) for place in places])
        inputs = lead_from_degraded(inputs._replace(sigmas=sigmas), degraded, starts.to(device))
        return inputs._replace(pixels=self.pixels(batch, places, posterior)) if self.keeps_pixels else inputs

    def pixels(self, batch: dict, places: torch.Tensor, posterior: torch.Tensor) -> RestoredPixels:
        """Of the restored samples, the posterior of whose degraded pictures is given."""
        tile = self.plan[0]
        residual: torch.Tensor | float = 0.0
        if self.pipe.config.default_vae_residual:
            latents = self.pipe.sample_latents(posterior, sample_mode="argmax")
            residual = self.pipe.get_vae_residual(batch["degraded"][places], latents, tile)
        return RestoredPixels(places, self.pipe.crop_pixels(batch["sharp"][places], tile), residual)

    def latents(self, sharp: torch.Tensor, rngs: Sequence[np.random.Generator]) -> torch.Tensor:
        cache = self.latent_cache
        if cache is None:
            return encode_latents(self.pipe, self.plan, sharp, rngs)
        return torch.cat([self.cached_latents(picture, cache) for picture in sharp]).to(self.pipe.device)

    def cached_latents(self, picture: torch.Tensor, cache: TensorCache) -> torch.Tensor:
        key = cache_key("latents", self.vae_fingerprint, list(picture.shape), picture.numpy().tobytes())
        # The posterior's noise, too, depends on the picture alone.
        rng = np.random.default_rng(int(key[:16], 16))
        entry = cache.get(key, lambda: {"latents": encode_latents(self.pipe, self.plan, picture[None], [rng])})
        return entry["latents"]
