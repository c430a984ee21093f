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
The DINO stage: self-distillation without labels, after iBOT (arXiv 2111.07832) and DINOv2 (arXiv 2304.07193).

A teacher, the student's moving average, sees a sharp crop. The student sees the same crop degraded, with patches
hidden behind the mask token, and must give every patch and the CLS token the teacher's soft choice among prototypes.
The choices are balanced over the batch by Sinkhorn-Knopp, so that not all fall on one. Geometry is the same for both,
so what the student learns to overlook is degradation: the encoder of an upscaler sees only degraded pictures.

It has the architecture of DINOv2 with registers, and neither its weights nor its data.
"""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers import Dinov2WithRegistersModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from flux_dino_tile.flat_tiles import feature_spread

from ..training.samples import sample_rng
from .captions import NUM_LOOKS, describe_squares
from .crops import CropPairs, center_crop, degrade_crops, draw_indices
from .sizes import PATCH_SIZE, PIXELS_PER_TOKEN, make_dino
from .stages import Stage, update_average


PROTOTYPES_PER_DIM = 4  # prototypes for a feature
TEACHER_DECAY = 0.996
TEACHER_TEMPERATURE = 0.06
STUDENT_TEMPERATURE = 0.1
MASKED_SHARE = 0.4
SINKHORN_ROUNDS = 3
LOOK_WEIGHT = 10.0
PROBE_CROPS = 64
PROBE_RIDGE = 1e-3


class Distiller(torch.nn.Module):
    """An encoder with the head that compares its features with prototypes."""

    def __init__(self, encoder: Dinov2WithRegistersModel):
        super().__init__()
        dim = encoder.config.hidden_size
        self.encoder = encoder
        self.head = torch.nn.Sequential(torch.nn.Linear(dim, 2 * dim), torch.nn.GELU(), torch.nn.Linear(2 * dim, dim))
        self.prototypes = weight_norm(torch.nn.Linear(dim, PROTOTYPES_PER_DIM * dim, bias=False))
        self.looks = torch.nn.Linear(dim, NUM_LOOKS)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cosines `(batch, 1 + patches, prototypes)` of CLS and patches, and the patches' looks `(batch, patches, 22)`;
        `mask` `(batch, patches)` hides patches.
        """
        states = self.encoder(pixels, bool_masked_pos=mask).last_hidden_state
        first_patch = 1 + self.encoder.config.num_register_tokens
        states = torch.cat([states[:, :1], states[:, first_patch:]], dim=1)
        length = torch.linalg.vector_norm(self.prototypes.weight, dim=1)
        return self.prototypes(F.normalize(self.head(states), dim=-1)) / length, self.looks(states[:, 1:])


def look_tokens(images: torch.Tensor) -> torch.Tensor:
    """How the squares under the patches look, `(batch, patches, 22)`."""
    return describe_squares(images, images.shape[-1] // PIXELS_PER_TOKEN).flatten(2).transpose(1, 2)


def look_error(guesses: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
    """Mean squared error, each value in units of its deviation in the batch."""
    return ((guesses - looks) / (looks.std((0, 1)) + 1e-3)).square().mean()


def linear_r2(train: torch.Tensor, train_targets: torch.Tensor, test: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of the variance of `targets` `(samples, values)`, averaged over values, that ridge regression explains."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    inputs, test_inputs = (F.pad((x - mean) / std, (0, 1), value=1.0).double() for x in (train, test))
    gram = inputs.T @ inputs + PROBE_RIDGE * len(inputs) * torch.eye(inputs.shape[1], device=train.device)
    found = test_inputs @ torch.linalg.solve(gram, inputs.T @ train_targets.double())
    unexplained = (found - targets).square().mean(0) / targets.double().var(0)
    return float((1 - unexplained).mean())


@torch.no_grad()
def balance(logits: torch.Tensor) -> torch.Tensor:
    """Sinkhorn-Knopp: `(samples, prototypes)` logits to choices that sum to one and use every prototype alike."""
    logits = logits.float()
    choices = torch.exp(logits - logits.max())
    for _ in range(SINKHORN_ROUNDS):
        choices = choices / choices.sum(0, keepdim=True).clamp_min(1e-12)
        choices = choices / choices.sum(1, keepdim=True).clamp_min(1e-12)
    return choices


def to_dino_pixels(images: torch.Tensor) -> torch.Tensor:
    """Crops in [-1, 1] as the pipeline shows them to DINO: one patch for a token of 16 px, normalised."""
    side = images.shape[-1] // PIXELS_PER_TOKEN * PATCH_SIZE
    mean, std = (
        images.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return F.interpolate((images / 2 + 0.5 - mean) / std, (side, side), mode="bicubic", antialias=True)


class DinoStage(Stage):
    name = "dino"
    learning_rate = 5e-4

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.student = Distiller(make_dino(self.sizes)).to(self.device)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.modules = {"student": self.student, "teacher": self.teacher}
        self.copies = [self.student.encoder, self.teacher.encoder]
        self.optimizers = {"student": self.make_optimizer(self.student, weight_decay=0.04)}

    def train_step(self) -> dict[str, torch.Tensor]:
        rng = self.step_rng()
        sharp, degraded = self.draw_pairs(self.sizes.batch, rng)
        patches = (self.sizes.crop // PIXELS_PER_TOKEN) ** 2
        mask = torch.from_numpy(rng.random((len(sharp), patches)) < MASKED_SHARE).to(self.device)
        with self.autocast():
            with torch.no_grad():
                choices, _ = self.teacher(to_dino_pixels(sharp))
            guesses, looks = self.student(to_dino_pixels(degraded), mask)
        targets = torch.cat(
            [
                balance(part.flatten(0, 1) / TEACHER_TEMPERATURE).unflatten(0, part.shape[:2])
                for part in choices.float().split([1, patches], dim=1)  # CLS and patches, each balanced by itself
            ],
            dim=1,
        )
        losses = -(targets * F.log_softmax(guesses.float() / STUDENT_TEMPERATURE, dim=-1)).sum(-1)
        error = look_error(looks.float(), look_tokens(sharp))
        loss = losses[:, 0].mean() + losses[:, 1:].mean() + LOOK_WEIGHT * error
        self.update("student", loss)
        update_average(self.teacher, self.student, self.step, TEACHER_DECAY)
        entropy = -(targets * targets.clamp_min(1e-12).log()).sum(-1).mean()
        return {"loss": loss.detach(), "target_entropy": entropy, "look_error": error.detach()}

    def draw_pairs(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        pairs: CropPairs = self.crops_of(self.sizes.crop)
        return pairs.take(draw_indices(count, len(pairs.sharp), rng, self.device))

    def save_model(self, folder: Path) -> None:
        """The teacher's encoder."""
        deepcopy(self.teacher.encoder).half().save_pretrained(folder)

    @torch.no_grad()
    def measure(self, validation: list[torch.Tensor]) -> dict[str, float]:
        """
        What a linear readout of degraded patches knows of the sharp squares under them, and how far features are from
        their mean (0 would be a collapse).
        """
        rng = sample_rng(self.seed, 0, 1)
        test = torch.cat([center_crop(photo, self.sizes.crop) for photo in validation])
        pairs = (self.draw_pairs(PROBE_CROPS, rng), (test, degrade_crops(test, rng)))
        features, looks = zip(*(self.probe(*pair) for pair in pairs))
        spread = feature_spread(features[1][None, None])
        return {"look_r2": linear_r2(features[0], looks[0], features[1], looks[1]), "spread": float(spread)}

    def probe(self, sharp: torch.Tensor, degraded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(patches, dim)` of degraded crops, and what the sharp squares under them look like."""
        pixels = to_dino_pixels(degraded)
        first_patch = 1 + self.teacher.encoder.config.num_register_tokens
        features = self.teacher.encoder(pixels).last_hidden_state[:, first_patch:].flatten(0, 1)
        return features, look_tokens(sharp).flatten(0, 1)
