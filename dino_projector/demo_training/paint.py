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
The paint stage: FLUX goes on as in the FLUX stage, and beside it is judged by the pictures that it makes.

Velocities are learned by their squared error, which knows nothing of what an eye sees. Here crops are enlarged as a
call does it, in a few steps from the noisy latents of the degraded crop, decoded, given back what the VAE lost of the
input, and compared with the sharp crop: by the loss that trained the VAE, and by a patch adversary. The gradient goes
through the last step. Captions stay in most steps, so that FLUX does not unlearn to listen.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_flux_dino_tile import DinoTokens

from ..training.flow_matching import StepInputs, restoration_weights
from ..training.losses import reconstruction_loss
from .crops import device_generator, draw_indices
from .flux import EncodedCrops, FluxStage, draw_starts
from .sizes import Sizes
from .stages import copy_weights, find_trained, update_average
from .vae import adversary_direction, make_adversary


STEP_COUNTS = (1, 2, 4)
PIXEL_WEIGHT = 8.0
LATENT_WEIGHT = 0.3
ADVERSARY_SHARE = 0.3  # of the norm of the other terms' gradient, at the decoded pixels
ADVERSARY_STEPS = 300  # that it learns before it is heard
ADVERSARY_SCALES = (1, 2)  # it looks at the pictures, and at their halves


class Adversary(torch.nn.Module):
    """Scores of patches at two scales; it sees the enlarged input beside the picture."""

    def __init__(self, width: int):
        super().__init__()
        self.scales = torch.nn.ModuleList(make_adversary(width, 6) for _ in ADVERSARY_SCALES)

    def forward(self, images: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        pairs = torch.cat([images, inputs], 1)
        scores = [net(F.avg_pool2d(pairs, scale)) for net, scale in zip(self.scales, ADVERSARY_SCALES)]
        return torch.cat([score.flatten(1) for score in scores], 1)


class PaintStage(FluxStage):
    name = "paint"
    learning_rate = 3e-4

    def __init__(self, sizes: Sizes, photos: list[torch.Tensor], work: Path, seed: int, device: torch.device):
        super().__init__(sizes, photos, work, seed, device)
        self.load_copies(find_trained(work, "flux"))
        self.adversary = Adversary(2 * sizes.vae_widths[0]).to(device)
        self.modules["adversary"] = self.adversary
        self.optimizers["adversary"] = self.make_optimizer(self.adversary, betas=(0.5, 0.99), weight_decay=0.0)
        if device.type == "cuda":
            self.pipe.vae.decoder.compile(dynamic=False)

    def train_step(self) -> dict[str, torch.Tensor]:
        rng = self.step_rng()
        num_flow, num_pictures = self.sizes.paint_batch
        copy_weights(self.transformer, self.working)
        flow_loss = self.flow_loss(num_flow, rng)
        values = {"flow": flow_loss.detach()}
        images, degraded, latent_loss, decoded = self.enlarge(num_pictures, rng)
        pixel_loss = reconstruction_loss(decoded, images)
        (gradient,) = torch.autograd.grad(PIXEL_WEIGHT * pixel_loss, decoded)
        fake = decoded.detach()
        if self.step >= ADVERSARY_STEPS:
            wanted = adversary_direction(partial(self.score, degraded=degraded), fake)
            gradient = gradient + ADVERSARY_SHARE * gradient.norm() * wanted
        values |= {"pixels": pixel_loss.detach(), "latents": latent_loss.detach()}
        loss = flow_loss + LATENT_WEIGHT * latent_loss + (gradient * decoded).sum()
        self.update("transformer", loss, self.working)
        values["adversary"] = self.train_adversary(images, fake, degraded)
        update_average(self.average, self.transformer, self.step)
        return values

    def enlarge(
        self, count: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Sharp and degraded pictures of a window of the crops, the error of all their enlarged latents, and the enlarged
        pictures; the last two have gradients.
        """
        crops: EncodedCrops = self.crops_of(self.sizes.crop)
        chosen = draw_indices(count, len(crops.sharp), rng, self.device)
        caption = self.draw_caption(crops.looks[chosen], self.sizes.crop, rng)
        starts = torch.from_numpy(draw_starts(count, rng)).float().to(self.device)
        degraded_latents = crops.degraded[chosen].float()
        inputs = self.step_inputs(degraded_latents, starts, device_generator(rng, self.device), self.dtype)
        latents = self.take_steps(inputs, caption, int(rng.choice(STEP_COUNTS)))
        errors = (latents - crops.sharp[chosen].float()).square().mean((1, 2, 3))
        # As much as the velocities at their starts, whose errors are these over the start.
        latent_loss = (restoration_weights(starts) * errors / starts.square()).mean()
        half = latents.shape[2] // 2  # cells: the decoder's convolutions need no more context
        top, left = (int(corner) for corner in rng.integers(half + 1, size=2))
        with self.autocast():
            with torch.no_grad():
                lost = self.decode(cut(degraded_latents, top, left, half))
            decoded = self.decode(cut(latents, top, left, half))
        window = [self.pipe.vae_scale_factor * cells for cells in (top, left, half)]
        images, degraded = (cut(pictures, *window) for pictures in crops.pairs.take(chosen))
        return images, degraded, latent_loss, decoded.float() + degraded - lost.float()

    def take_steps(self, inputs: StepInputs, caption: DinoTokens | None, num_steps: int) -> torch.Tensor:
        """From the noisy latents in equal steps to sharp ones, as the scheduler does; the last step has gradients."""
        starts = inputs.sigmas.view(-1, 1, 1, 1)
        latents = (1 - starts) * inputs.latents + starts * inputs.noise
        for step in range(num_steps):
            timesteps = 1000 * inputs.sigmas * (1 - step / num_steps)
            with torch.set_grad_enabled(step == num_steps - 1):
                velocity = self.pipe.predict_velocity(latents, timesteps, inputs.branch, None, caption)
                latents = latents - starts / num_steps * velocity
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample

    def score(self, pictures: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.adversary(pictures, degraded).float()

    def train_adversary(self, images: torch.Tensor, fake: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
        loss = F.relu(1 - self.score(images, degraded)).mean() + F.relu(1 + self.score(fake, degraded)).mean()
        self.update("adversary", loss)
        return loss.detach()


def cut(values: torch.Tensor, top: int, left: int, side: int) -> torch.Tensor:
    return values[..., top : top + side, left : left + side]
