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

No network trained elsewhere takes part: the perceptual distance that judges the result must not have trained it.
"""

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data import sample_rng
from ..metrics import edges, gradient_energy, psnr
from .crops import center_crop, device_generator, draw_crops
from .sizes import make_vae
from .stages import MAX_SHARD_SIZE, Stage, update_average


KL_WEIGHT = 1e-4  # of the divergence for a colour value
EDGE_WEIGHT = 1.0
ENERGY_WEIGHT = 1.0
ENERGY_WINDOW = 8  # px
ADVERSARY_STEPS = 1500  # before it comes in
# How strong the adversary's gradient is at the last layer, beside that of the other terms.
ADVERSARY_SHARE = 0.3
STATISTICS_CROPS = 64


def local_edge_energy(images: torch.Tensor) -> torch.Tensor:
    """Root mean square of the edges `(batch, 6, rows, columns)` in windows that overlap by half."""
    squares = F.avg_pool2d(edges(images).square(), ENERGY_WINDOW, ENERGY_WINDOW // 2)
    return (squares + 1e-6).sqrt()


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Of `(batch, 3, height, width)` images in [-1, 1]. The energy term makes a blurred texture dear."""
    return (
        F.l1_loss(decoded, images)
        + EDGE_WEIGHT * F.l1_loss(edges(decoded), edges(images))
        + ENERGY_WEIGHT * F.l1_loss(local_edge_energy(decoded), local_edge_energy(images))
    )


def make_adversary(width: int) -> torch.nn.Sequential:
    """Scores `(batch, 1, rows, columns)` of overlapping patches of 22 px: high for photographs."""
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, width, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    for inputs, outputs, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 1)):
        layers += [torch.nn.Conv2d(inputs, outputs, 4, stride, 1), torch.nn.GroupNorm(8, outputs)]
        layers += [torch.nn.LeakyReLU(0.2)]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(4 * width, 1, 1))


class VaeStage(Stage):
    name = "vae"
    learning_rate = 5e-4

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
            for name, module in (("vae", self.vae), ("adversary", self.adversary))
        }

    def train_step(self) -> dict[str, torch.Tensor]:
        rng = sample_rng(self.seed, self.step)
        # Half the side: convolutions need no more context. Half the batch: more steps help more than larger ones.
        images = draw_crops(self.photos, self.sizes.batch // 2, self.sizes.crop // 2, rng)
        with self.autocast():
            posterior = self.vae.encode(images).latent_dist
            generator = device_generator(rng, self.device)
            noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
            decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        decoded = decoded.float()
        loss = reconstruction_loss(decoded, images)
        values = {"loss": loss.detach()}
        (gradient,) = torch.autograd.grad(loss, decoded)
        if self.step >= ADVERSARY_STEPS:
            gradient = gradient + self.adversary_gradient(decoded.detach(), gradient)
            values["adversary"] = self.train_adversary(images, decoded.detach())
        kl = KL_WEIGHT * posterior.kl().mean() / images[0].numel()
        self.update("vae", (gradient * decoded).sum() + kl)
        update_average(self.average, self.vae, self.step)
        return values

    def adversary_gradient(self, decoded: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Where the adversary wants the decoded pixels, at a share of the norm of the loss's gradient."""
        decoded.requires_grad_(True)
        with self.autocast():
            score = self.adversary(decoded).float().mean()
        (wanted,) = torch.autograd.grad(-score, decoded)
        return ADVERSARY_SHARE * gradient.norm() / (wanted.norm() + 1e-12) * wanted

    def train_adversary(self, images: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            real, fake = self.adversary(torch.cat([images, decoded])).float().chunk(2)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.update("adversary", loss)
        return loss.detach()

    @torch.no_grad()
    def save_model(self, folder: Path) -> None:
        """With the scale and the shift that bring the latents of training crops to unit variance and zero mean."""
        rng = sample_rng(self.seed, 0, 1)
        side = self.sizes.crop // 2
        latents = [
            self.average.encode(draw_crops(self.photos, 8, side, rng)).latent_dist.mean
            for _ in range(STATISTICS_CROPS // 8)
        ]
        std, mean = torch.std_mean(torch.cat(latents))
        vae = deepcopy(self.average)
        vae.register_to_config(scaling_factor=1 / float(std), shift_factor=float(mean))
        vae.half().save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)

    @torch.no_grad()
    def measure(self, held_out: list[torch.Tensor]) -> dict[str, float]:
        """Reconstruction of the middles of held-out photos, at twice the crop's side."""
        images = torch.cat([center_crop(photo, 2 * self.sizes.crop) for photo in held_out])
        decoded = torch.cat(
            [self.average.decode(self.average.encode(x).latent_dist.mean).sample for x in images.split(1)]
        )
        return {
            "psnr_db": float(psnr(decoded.clamp(-1, 1), images).mean()),
            "gradient_energy": float((gradient_energy(decoded) / gradient_energy(images)).mean()),
        }
