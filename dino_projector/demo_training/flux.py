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
The FLUX stage: a small transformer of FLUX.1's architecture that depends on its text stream, as FLUX.1 does.

It has no text encoder. Its captions are codes: for every square of the SHARP crop a token says how it looks (colour,
contrast, edges at three scales and four directions, a 2 x 2 thumbnail) and where it is, through a fixed random matrix.
They tell what noisy latents do not, so that the transformer learns to listen. What a projector has to learn afterwards
is to say the like from DINO's view of the degraded crop; it is never shown a caption.

A third of a step's crops are learned as flow matching says, from noise to the sharp latents. The others are restored:
their paths start at the noisy latents of the degraded crop, as an enlargement does. A prior as small as this one would
take a blurred picture with a little noise for a blurred photograph.

Crops are cut, degraded and encoded once for many steps: that would take longer than a step.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from pipeline_flux_dino_tile import DinoTokens, FluxDinoTilePipeline

from ..training.flow_matching import (
    NoiseLevels,
    StepInputs,
    denoising_losses,
    draw_part_ahead,
    draw_start,
    lead_from_degraded,
)
from .captions import Language, describe_squares
from .crops import CropPairs, center_crop, device_generator, draw_indices, draw_pairs
from .sizes import PIXELS_PER_TOKEN, TOKEN_GRID, Sizes, make_transformer
from .stages import MAX_SHARD_SIZE, Stage, copy_weights, find_trained, update_average


CAPTION_DROP = 0.15  # share of the steps
MIN_SIGMA = 0.02
SIGMA_POWER = 1.5  # of an even draw: half of the samples lie below 0.35, where an enlargement starts
RESTORED_SHARE = 0.65  # of the crops of a step
STARTS = NoiseLevels(0.03, 0.5, restoration_share=1.0)
MEASURE_SIGMAS = (0.2, 0.35, 0.5, 0.8)
ENCODED_PIXELS = 2**21  # in a batch


def make_pipeline(vae, transformer, **defaults) -> FluxDinoTilePipeline:
    """Without text encoders; calls need `prompt_embeds`, or the embeddings that come with a projector."""
    without: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxDinoTilePipeline(scheduler, vae, transformer=transformer, **without, **defaults)


def draw_starts(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise levels at which enlargements start, as many in each octave."""
    return np.array([draw_start(STARTS, rng) for _ in range(count)])


def draw_sigmas(count: int, num_restored: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels of `count` crops, the first of which are restored, and where these start; infinity for others."""
    starts = np.full(count, np.inf)
    starts[:num_restored] = draw_starts(num_restored, rng)
    sigmas = MIN_SIGMA + (1 - MIN_SIGMA) * rng.random(count) ** SIGMA_POWER
    sigmas[:num_restored] = starts[:num_restored] * [draw_part_ahead(rng) for _ in range(num_restored)]
    return torch.from_numpy(sigmas).float(), torch.from_numpy(starts).float()


class EncodedCrops(NamedTuple):
    """Crops that are encoded: latents `(count, channels, rows, columns)`, and how the sharp ones' squares look."""

    pairs: CropPairs
    sharp: torch.Tensor
    degraded: torch.Tensor
    looks: torch.Tensor


class FluxStage(Stage):
    name = "flux"
    learning_rate = 7e-4

    def __init__(self, sizes: Sizes, photos: list[torch.Tensor], work: Path, seed: int, device: torch.device):
        super().__init__(sizes, photos, work, seed, device)
        vae = AutoencoderKL.from_pretrained(find_trained(work, "decoder", "vae"), torch_dtype=torch.float32).to(device)
        self.transformer = make_transformer(sizes).to(device)
        self.average = deepcopy(self.transformer).requires_grad_(False)
        # FLUX.1's own precision. The optimizer moves the weights in float32, of which this is a copy in every step.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.working = deepcopy(self.transformer).to(self.dtype)
        if device.type == "cuda":
            # A batch may be as large as a head is wide. Sizes that are equal by chance must not be taken for one.
            torch.fx.experimental._config.use_duck_shape = False
            # PyTorch 2.11 ends in an AssertionError where it analyses these blocks with dynamic sizes.
            torch._inductor.config.triton.coalesce_tiling_analysis = False
            self.working.compile_repeated_blocks(dynamic=True)
            vae.encoder.compile(dynamic=False)  # two kinds of batches, one for each side
        self.language = Language(sizes.text_dim, device)
        self.pipe = make_pipeline(vae.eval().requires_grad_(False), self.working)
        self.copies = [self.transformer, self.average]
        self.modules = {"transformer": self.transformer, "average": self.average}
        self.optimizers = {"transformer": self.make_optimizer(self.transformer, betas=(0.9, 0.99), weight_decay=0.01)}

    def train_step(self) -> dict[str, torch.Tensor]:
        rng = self.step_rng()
        copy_weights(self.transformer, self.working)
        loss = self.flow_loss(self.sizes.flux_batch, rng)
        self.update("transformer", loss, self.working)
        update_average(self.average, self.transformer, self.step)
        return {"loss": loss.detach()}

    def flow_loss(self, batch: int, rng: np.random.Generator) -> torch.Tensor:
        """Of `batch` crops of the smallest side, or of larger ones that have as many pixels."""
        shared = self.shared_rng()
        side = int(shared.choice(self.sizes.flux_crops))
        count = max(1, batch * self.sizes.crop**2 // side**2)
        crops: EncodedCrops = self.crops_of(side)
        chosen = draw_indices(count, len(crops.sharp), rng, self.device)
        sigmas, starts = (values.to(self.device) for values in draw_sigmas(count, round(RESTORED_SHARE * count), rng))
        caption = self.draw_caption(crops.looks[chosen], side, shared)
        generator = device_generator(rng, self.device)
        inputs = self.step_inputs(crops.sharp[chosen].float(), sigmas, generator, self.dtype)
        inputs = lead_from_degraded(inputs, crops.degraded[chosen].float(), starts)
        return denoising_losses(self.pipe, inputs, caption).mean()

    @torch.no_grad()
    def prepare_crops(self, side: int, count: int, rng: np.random.Generator) -> EncodedCrops:
        pairs = draw_pairs(self.photos, count, side, rng)
        generator = device_generator(rng, self.device)
        sharp, degraded, looks = [], [], []
        batch = max(1, ENCODED_PIXELS // side**2)
        for chosen in torch.arange(len(pairs.sharp), device=self.device).split(batch):
            images, degraded_images = pairs.take(chosen)
            sharp.append(self.encode(images, generator).half())
            degraded.append(self.encode(degraded_images, generator).half())
            looks.append(self.describe(images).half())
        return EncodedCrops(pairs, torch.cat(sharp), torch.cat(degraded), torch.cat(looks))

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """How the squares look that tokens stand for, as many as a projector has for a tile of this side."""
        return describe_squares(images, min(TOKEN_GRID, images.shape[-1] // PIXELS_PER_TOKEN))

    def encode(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        side = images.shape[-1]
        posterior = self.pipe.encode_tiles(images, self.pipe.plan_tiles(side, side, side))
        return self.pipe.sample_latents(posterior, generator)

    def step_inputs(
        self, latents: torch.Tensor, sigmas: torch.Tensor, generator: torch.Generator, dtype: torch.dtype
    ) -> StepInputs:
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        no_features = torch.empty(0)
        branch = self.language.empty_branch(dtype)
        return StepInputs(latents, noise, sigmas.to(self.device), no_features, branch, None)

    def draw_caption(self, looks: torch.Tensor, side: int, rng: np.random.Generator) -> DinoTokens | None:
        return None if rng.random() < CAPTION_DROP else self.language.caption(looks.float(), side)

    def save_model(self, folder: Path) -> None:
        deepcopy(self.average).half().save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # another size of batch, once
    def measure(self, validation: list[torch.Tensor]) -> dict[str, float]:
        """Velocity loss with a photo's own caption, with the next photo's, and without."""
        side = self.sizes.crop
        images = torch.cat([center_crop(photo, side) for photo in validation])
        own = self.language.caption(self.describe(images), side)
        captions = {"own": own, "other": own._replace(tokens=own.tokens.roll(1, dims=1)), "none": None}
        pipe = make_pipeline(self.pipe.vae, self.average)
        numbers = {}
        for name, caption in captions.items():
            for sigma in MEASURE_SIGMAS:
                generator = torch.Generator(self.device).manual_seed(self.seed)
                sigmas = torch.full((len(images),), sigma)
                inputs = self.step_inputs(self.encode(images, generator), sigmas, generator, torch.float32)
                numbers[f"{name}_caption_sigma_{sigma}"] = float(denoising_losses(pipe, inputs, caption).mean())
            values = [numbers[f"{name}_caption_sigma_{sigma}"] for sigma in MEASURE_SIGMAS]
            numbers[f"{name}_caption"] = float(np.mean(values))
        return numbers
