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
Shows whether the tokens are used: losses on fixed crops and noise, and upscaled pictures.

The loss with tokens must fall below the loss without, and below the loss with another picture's tokens: otherwise the
projector has learned nothing, or nothing about the picture. With restored paths that is measured where these start.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from pipeline_flux_dino_tile import FluxDinoTilePipeline, PromptBranch, TilePlan

from ..pictures import to_bytes
from .flow_matching import (
    NoiseLevels,
    StepInputs,
    denoising_losses,
    encode_latents,
    encode_pairs,
    lead_from_degraded,
    standard_normal,
)
from .samples import Pair, Sampling, first_pairs, sample_rng
from .trainer import ProjectorTrainer


CONDITIONS = ("with_tokens", "without_tokens", "other_tokens")
NUM_PICTURES = 4
NUM_SIGMAS = 4


class Example(NamedTuple):
    pair: Pair
    latents: torch.Tensor  # (1, channels, rows, columns)
    noise: torch.Tensor
    features: torch.Tensor  # (1, 1, grid rows, grid columns, dim)
    degraded: torch.Tensor  # latents, as those of the sharp picture


def make_examples(pipe: FluxDinoTilePipeline, plan: TilePlan, pairs: Sequence[Pair], seed: int) -> list[Example]:
    """Encodes the pairs, and draws noise that stays the same for the whole run."""
    examples = []
    for number, pair in enumerate(pairs):
        rng = sample_rng(seed, number, 2)
        latents, features = encode_pairs(pipe, plan, [pair.sharp], [pair.degraded], [rng])
        noise = standard_normal(latents.shape, rng).to(latents.device)
        degraded = encode_latents(pipe, plan, to_bytes(pair.degraded)[None], [rng])
        examples.append(Example(pair, latents, noise, features, degraded))
    return examples


def bin_centers(sigma_min: float, sigma_max: float, count: int) -> list[float]:
    """The middles of `count` equal noise ranges."""
    return [sigma_min + (sigma_max - sigma_min) * (index + 0.5) / count for index in range(count)]


def validation_sigmas(levels: NoiseLevels) -> list[float]:
    """The middles of equal ranges of what samples draw: of noise levels, or of the logarithms of starts."""
    if not levels.restoration_share:
        return bin_centers(levels.sigma_min, levels.sigma_max, NUM_SIGMAS)
    low, high = np.log(levels.start_range())
    return np.exp(bin_centers(low, high, NUM_SIGMAS)).tolist()


@torch.no_grad()
def example_losses(
    pipe: FluxDinoTilePipeline,
    plan: TilePlan,
    examples: Sequence[Example],
    branch: PromptBranch,
    guidance: torch.Tensor | None,
    sigmas: Sequence[float],
    is_restored: bool = False,
) -> dict[str, np.ndarray]:
    """
    For each of `CONDITIONS` the losses `(len(sigmas), len(examples))`, on request at the starts of restored paths.
    Other tokens are the next example's.
    """
    losses = {name: np.empty((len(sigmas), len(examples))) for name in CONDITIONS}
    for row, sigma in enumerate(sigmas):
        for index, example in enumerate(examples):
            other = examples[(index + 1) % len(examples)]
            conditions = {"with_tokens": example.features, "without_tokens": None, "other_tokens": other.features}
            sigma_of_sample = torch.tensor([sigma], device=example.latents.device)
            inputs = StepInputs(example.latents, example.noise, sigma_of_sample, example.features, branch, guidance)
            if is_restored:
                inputs = lead_from_degraded(inputs, example.degraded, sigma_of_sample)
            for name, features in conditions.items():
                dino = None if features is None else pipe.prepare_dino_tokens(features, plan, 1.0)
                losses[name][row, index] = float(denoising_losses(pipe, inputs, dino))
    return losses


def validation_losses(*arguments) -> dict[str, list[float]]:
    """For each of `CONDITIONS` the mean loss at each sigma, from the arguments of [`example_losses`]."""
    return {name: losses.mean(axis=1).tolist() for name, losses in example_losses(*arguments).items()}


def summarize(losses: dict[str, list[float]], sigmas: Sequence[float]) -> dict[str, float]:
    """The losses by sigma and their means, and the gaps: how much higher, in percent, a loss is without the tokens."""
    means = {name: float(np.mean(values)) for name, values in losses.items()}
    values = {f"validation/{name}": mean for name, mean in means.items()}
    for name in CONDITIONS:
        values |= {f"validation/{name}/sigma_{sigma:.3f}": loss for sigma, loss in zip(sigmas, losses[name])}
    for name in CONDITIONS[1:]:
        values[f"validation/gap_{name}_percent"] = 100 * (means[name] / means["with_tokens"] - 1)
    return values


def format_losses(losses: dict[str, list[float]], sigmas: Sequence[float], is_restored: bool) -> str:
    """A table with a row for each condition."""
    header = (
        f"validation loss at {'start' if is_restored else 'sigma'}"
        + "".join(f"{sigma:>9.3f}" for sigma in sigmas)
        + "     mean"
    )
    rows = [
        f"{name.replace('_', ' '):>24}" + "".join(f"{v:>9.5f}" for v in [*losses[name], np.mean(losses[name])])
        for name in CONDITIONS
    ]
    return "\n".join([header, *rows])


def upscale_examples(
    pipe: FluxDinoTilePipeline, plan: TilePlan, examples: Sequence[Example], start_sigma: float, seed: int
) -> list[Image.Image]:
    """A strip for each example: the enlarged input, the result without and with the tokens, and the sharp picture."""
    strips = []
    for example in examples[:NUM_PICTURES]:
        size = {"height": plan.height, "width": plan.width, "tile_size": plan.height, "start_sigma": start_sigma}
        results = [
            pipe(
                image=example.pair.small,
                dino_conditioning_scale=scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                **size,
            ).images[0]
            for scale in (0.0, 1.0)
        ]
        parts = [example.pair.degraded, *results, example.pair.sharp]
        strips.append(Image.fromarray(np.concatenate([np.asarray(part) for part in parts], axis=1)))
    return strips


def save_strips(strips: Sequence[Image.Image], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips])).save(path)


def log_strips(trackers, strips: Sequence[Image.Image], step: int) -> None:
    for tracker in trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        images = np.stack([np.asarray(strip) for strip in strips])
        tracker.log_images({"validation/pictures": images}, step=step, **layout)


class Validator:
    """What the validation looks at; on the main process only."""

    def __init__(self, trainer: ProjectorTrainer, source, args):
        self.trainer, self.args = trainer, args
        self.pipe, self.plan = trainer.pipe, trainer.make_inputs.plan
        sampling = Sampling(args.resolution, tuple(args.scale_factor), tuple(args.degradation))
        pairs = first_pairs(source, args.num_validation_images, sampling, self.pipe.image_processor, args.seed)
        if len(pairs) < 2:
            raise ValueError("the validation needs two pictures, to show one the tokens of the other")
        self.examples = make_examples(self.pipe, self.plan, pairs, args.seed)
        self.branch = trainer.make_inputs.branch([""])
        self.guidance = trainer.make_inputs.guidance(1)
        levels = trainer.make_inputs.levels
        self.sigmas, self.is_restored = validation_sigmas(levels), levels.restoration_share > 0
        default_sigma = self.pipe.get_default_settings()[2]
        self.start_sigma = min(default_sigma, args.sigma_max)

    def validate(self) -> dict[str, float]:
        """Prints and logs losses and pictures of the averaged weights; returns the losses."""
        step, trackers = self.trainer.step, self.trainer.accelerator.trackers
        with self.trainer.ema_weights():
            what = (self.examples, self.branch, self.guidance, self.sigmas, self.is_restored)
            losses = validation_losses(self.pipe, self.plan, *what)
            strips = upscale_examples(self.pipe, self.plan, self.examples, self.start_sigma, self.args.seed)
        tqdm.write(f"step {step}\n{format_losses(losses, self.sigmas, self.is_restored)}")
        save_strips(strips, Path(self.args.output_dir) / "validation" / f"step-{step:06d}.png")
        log_strips(trackers, strips, step)
        values = summarize(losses, self.sigmas)
        for tracker in trackers:
            tracker.log(values, step=step)
        return values
