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
The VAE stage. L1 alone blurs, so three terms stand beside it: L1 of the edges, the local energy of the edges, and a
patch adversary (hinge loss, as in VQGAN, arXiv 2012.09841), which comes in when the rest has settled.

The decoder stage trains the decoder further while the encoder, and with it the latents that FLUX learns, stays. Its
latents get a little noise, as FLUX's have errors (RAE, arXiv 2510.11690, does so for the same reason).

No network trained elsewhere takes part: the perceptual distance that judges the result must not have trained it.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ..metrics import gradient_energy, psnr
from ..training.losses import reconstruction_loss
from ..training.samples import sample_rng
from .crops import (
    GROUP,
    center_crop,
    crops_from_bytes,
    crops_to_bytes,
    device_generator,
    draw_crops,
    draw_indices,
)
from .sizes import Sizes, make_vae
from .stages import (
    MAX_SHARD_SIZE,
    STATE_FOLDER,
    Stage,
    find_trained,
    load_shards,
    update_average,
)


KL_WEIGHT = 1e-4  # of the divergence for a colour value
STATISTICS_CROPS = 64
LATENT_NOISE = 0.15  # at most, in the decoder stage; of the latents' standard deviation


def make_adversary(width: int, channels: int = 3) -> torch.nn.Sequential:
    """Scores `(batch, 1, rows, columns)` of overlapping patches of 22 px: high for photographs."""
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(channels, width, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    for inputs, outputs, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 1)):
        layers += [torch.nn.Conv2d(inputs, outputs, 4, stride, 1), torch.nn.GroupNorm(8, outputs)]
        layers += [torch.nn.LeakyReLU(0.2)]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(4 * width, 1, 1))


def adversary_direction(score: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Where the adversary wants the pixels, with a norm of one."""
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(-score(images).mean(), images)
    return gradient / (gradient.norm() + 1e-12)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Of an adversary's scores."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class VaeStage(Stage):
    name = "vae"
    learning_rate = 5e-4
    adversary_steps = 1500  # before it comes in
    adversary_share = 0.3  # of the norm of the other terms' gradient, at the decoded pixels

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.vae = make_vae(self.sizes).to(self.device)
        self.average = deepcopy(self.vae).eval().requires_grad_(False)
        if self.device.type == "cuda":
            # Norms and activations at full size take most of a step, unless they are fused.
            self.vae.encoder.compile()
            self.vae.decoder.compile()
        self.adversary = make_adversary(2 * self.sizes.vae_widths[0]).to(self.device)
        self.modules = {"vae": self.vae, "average": self.average, "adversary": self.adversary}
        self.copies = [self.vae, self.average]
        self.optimizers = {
            name: self.make_optimizer(module, betas=(0.5, 0.99), weight_decay=0.0)
            for name, module in (("vae", self.trained_module()), ("adversary", self.adversary))
        }

    def trained_module(self) -> torch.nn.Module:
        return self.vae

    def train_step(self) -> dict[str, torch.Tensor]:
        rng = self.step_rng()
        # Half the side: convolutions need no more context. Half the batch: more steps help more than larger ones.
        images = self.draw_images(self.sizes.batch // 2, rng)
        with self.autocast():
            latents, kl = self.draw_latents(images, device_generator(rng, self.device))
            decoded = self.vae.decode(latents).sample
        decoded = decoded.float()
        loss = reconstruction_loss(decoded, images)
        values = {"loss": loss.detach()}
        (gradient,) = torch.autograd.grad(loss, decoded)
        if self.step >= self.adversary_steps:
            wanted = adversary_direction(self.score, decoded.detach())
            gradient = gradient + self.adversary_share * gradient.norm() * wanted
            values["adversary"] = self.train_adversary(images, decoded.detach())
        self.update("vae", (gradient * decoded).sum() + kl)
        update_average(self.average, self.vae, self.step)
        return values

    def draw_images(self, count: int, rng: np.random.Generator) -> torch.Tensor:
        crops = self.crops_of(self.sizes.crop // 2)
        return crops_from_bytes(crops[draw_indices(count, len(crops), rng, self.device)])

    def prepare_crops(self, side: int, count: int, rng: np.random.Generator) -> torch.Tensor:
        groups = [draw_crops(self.photos, GROUP, side, rng) for _ in range(-(-count // GROUP))]
        return torch.cat([crops_to_bytes(crops) for crops in groups])

    def draw_latents(self, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents to decode, and what their divergence adds to the loss."""
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
        kl = KL_WEIGHT * posterior.kl().mean() / images[0].numel()
        return posterior.mean + posterior.std * noise, kl

    def score(self, images: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.adversary(images).float()

    def train_adversary(self, images: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        loss = hinge_loss(*self.score(torch.cat([images, decoded])).chunk(2))
        self.update("adversary", loss)
        return loss.detach()

    def save_model(self, folder: Path) -> None:
        scaling_factor, shift_factor = self.latent_scale()
        vae = deepcopy(self.average)
        vae.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor)
        vae.half().save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)

    @torch.no_grad()
    def latent_scale(self) -> tuple[float, float]:
        """The scale and the shift that bring the latents of training crops to unit variance and zero mean."""
        images = self.draw_images(STATISTICS_CROPS, sample_rng(self.seed, 0, 1))
        std, mean = torch.std_mean(self.average.encode(images).latent_dist.mean)
        return 1 / float(std), float(mean)

    @torch.no_grad()
    def measure(self, validation: list[torch.Tensor]) -> dict[str, float]:
        """Reconstruction of the middles of the photos, at twice the crop's side."""
        images = torch.cat([center_crop(photo, 2 * self.sizes.crop) for photo in validation])
        decoded = torch.cat(
            [self.average.decode(self.average.encode(x).latent_dist.mean).sample for x in images.split(1)]
        )
        return {
            "psnr_db": float(psnr(decoded.clamp(-1, 1), images).mean()),
            "gradient_energy": float((gradient_energy(decoded) / gradient_energy(images)).mean()),
        }


class DecoderStage(VaeStage):
    """
    Trains the decoder of the VAE stage's result further; may run while FLUX trains on its latents.

    Arguments are those of [`Stage`].
    """

    name = "decoder"
    adversary_steps = 0
    adversary_share = 0.5

    def __init__(self, sizes: Sizes, photos: list[torch.Tensor], work: Path, seed: int, device: torch.device):
        super().__init__(sizes, photos, work, seed, device)
        folder = find_trained(work, "vae")
        self.load_copies(folder)
        config = AutoencoderKL.load_config(folder)
        self.scaling_factor, self.shift_factor = config["scaling_factor"], config["shift_factor"]
        state = folder.with_name(STATE_FOLDER)
        if state.is_dir():
            self.load_module("adversary", load_shards(state))

    def trained_module(self) -> torch.nn.Module:
        return self.vae.decoder

    def draw_latents(self, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.mean
        share = torch.rand((len(images), 1, 1, 1), generator=generator, device=self.device)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        return latents + LATENT_NOISE / self.scaling_factor * share * noise, torch.zeros((), device=self.device)

    def latent_scale(self) -> tuple[float, float]:
        return self.scaling_factor, self.shift_factor
