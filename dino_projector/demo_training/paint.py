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

from pipeline_flux_dino_tile import DinoTokens, Tile

from ..training.flow_matching import StepInputs, noisy_latents, restoration_weights
from ..training.losses import reconstruction_loss
from .crops import device_generator, draw_indices
from .flux import EncodedCrops, FluxStage, draw_starts
from .sizes import Sizes
from .stages import copy_weights, find_trained, update_average
from .vae import adversary_direction, hinge_loss, make_adversary


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
        shared = self.shared_rng()
        crops: EncodedCrops = self.crops_of(self.sizes.crop)
        chosen = draw_indices(count, len(crops.sharp), rng, self.device)
        caption = self.draw_caption(crops.looks[chosen], self.sizes.crop, shared)
        starts = torch.from_numpy(draw_starts(count, rng)).float().to(self.device)
        degraded_latents = crops.degraded[chosen].float()
        inputs = self.step_inputs(degraded_latents, starts, device_generator(rng, self.device), self.dtype)
        latents = self.take_steps(inputs, caption, int(shared.choice(STEP_COUNTS)))
        errors = (latents - crops.sharp[chosen].float()).square().mean((1, 2, 3))
        # As much as the velocities at their starts, whose errors are these over the start.
        latent_loss = (restoration_weights(starts) * errors / starts.square()).mean()
        tile = self.draw_window(shared)
        images, degraded = crops.pairs.take(chosen)
        with self.autocast():
            with torch.no_grad():
                lost = self.pipe.get_vae_residual(degraded, degraded_latents, tile)
            decoded = self.pipe.decode_tile(latents, tile) + lost
        return images[tile.slices()], degraded[tile.slices()], latent_loss, decoded

    def draw_window(self, rng: np.random.Generator) -> Tile:
        """Half of the crops' sides: the decoder's convolutions need no more context."""
        cell, half = self.pipe.vae_scale_factor, self.sizes.crop // 2
        top, left = (cell * int(corner) for corner in rng.integers(half // cell + 1, size=2))
        return Tile(top, left, half, half)

    def take_steps(self, inputs: StepInputs, caption: DinoTokens | None, num_steps: int) -> torch.Tensor:
        """From the noisy latents in equal steps to sharp ones, as the scheduler does; the last step has gradients."""
        starts, latents = inputs.sigmas.view(-1, 1, 1, 1), noisy_latents(inputs)
        for step in range(num_steps):
            timesteps = 1000 * inputs.sigmas * (1 - step / num_steps)
            with torch.set_grad_enabled(step == num_steps - 1):
                velocity = self.pipe.predict_velocity(latents, timesteps, inputs.branch, None, caption)
                latents = latents - starts / num_steps * velocity
        return latents

    def score(self, pictures: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.adversary(pictures, degraded).float()

    def train_adversary(self, images: torch.Tensor, fake: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
        loss = hinge_loss(self.score(images, degraded), self.score(fake, degraded))
        self.update("adversary", loss)
        return loss.detach()
