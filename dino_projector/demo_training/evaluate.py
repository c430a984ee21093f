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

"""What the checkpoint does on held-out photos, enlarged four times: a table of numbers and a sheet of pictures."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from flux_dino_tile.diagnostics import seam_ratio, tile_borders
from pipeline_flux_dino_tile import FluxDinoTilePipeline, PromptBranch

from ..comparison.baselines import enlarge
from ..metrics import Interval, bootstrap_mean, dss, gradient_energy, grid_ratio, haarpsi, is_monotone, psnr
from ..pictures import to_pixels
from ..training.flow_matching import NoiseLevels
from ..training.samples import Sampling, first_pairs
from ..training.sources import ImageFolder
from ..training.validation import CONDITIONS, example_losses, make_examples, validation_sigmas
from .crops import center_crop, load_photos
from .projector import SIGMA_MAX, SIGMA_MIN


FACTOR = 4
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOSS_CROPS = 4  # of each photo
DETAIL = 256  # px, side of a sheet's pictures


def load_checkpoint(folder: Path, device: torch.device) -> FluxDinoTilePipeline:
    """Through the calls of every user."""
    pipe = FluxDinoTilePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.load_dino_projector(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """A `(1, 3, height, width)` tensor in [-1, 1]."""
    return Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy())


class Upscaled:
    """
    A held-out photo and its enlargements, `(1, 3, side, side)` in [-1, 1]: by bicubic, by Lanczos (what FLUX starts
    from), without DINO, with it, with another photo's tokens, and in one tile, which can have no seams.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The checkpoint.
        photo (`torch.Tensor`): Bytes `(3, height, width)`.
        other (`torch.Tensor`): Another photo, whose tokens are tried too.
        side (`int`): Of the enlargement, in pixels.
        tile_size (`int`, *optional*): In pixels; the checkpoint's default if not given.
        start_sigma (`float`, *optional*): The checkpoint's default if not given.
        seed (`int`): Of the noise.
    """

    def __init__(
        self,
        pipe,
        photo: torch.Tensor,
        other: torch.Tensor,
        side: int,
        tile_size: int | None,
        start_sigma: float | None,
        seed: int,
    ):
        self.original = center_crop(photo, side)
        self.small, other_small = (
            to_picture(center_crop(item, side)).resize((side // FACTOR,) * 2, Image.Resampling.BICUBIC)
            for item in (photo, other)
        )
        self.bicubic, self.lanczos = (
            to_pixels(enlarge(method, self.small, (side, side))) for method in ("bicubic", "lanczos")
        )

        def encode(source: Image.Image, tile: int | None) -> torch.Tensor:
            return pipe.encode_dino(source, upscale_factor=FACTOR, tile_size=tile)

        def upscale(features: torch.Tensor, tile: int | None, strength: float = 1.0) -> torch.Tensor:
            output = pipe(
                image=self.small,
                upscale_factor=FACTOR,
                tile_size=tile,
                start_sigma=start_sigma,
                dino_embeds=features,
                dino_conditioning_scale=strength,
                generator=torch.Generator().manual_seed(seed),
            )
            return to_pixels(output.images[0])

        features = encode(self.small, tile_size)
        self.by_strength = [upscale(features, tile_size, strength) for strength in STRENGTHS]
        self.without, self.with_dino = self.by_strength[0], self.by_strength[-1]
        self.with_other = upscale(encode(other_small, tile_size), tile_size)
        self.in_one_tile = self.with_dino
        if len(pipe.plan_tiles(side, side, tile_size)) > 1:
            self.in_one_tile = upscale(encode(self.small, side), side)


def velocity_losses(pipe: FluxDinoTilePipeline, held_out: Path, resolution: int, seed: int) -> dict[str, np.ndarray]:
    """For each of the validation's conditions the losses `(starts, photos)`, each over `LOSS_CROPS` crops."""
    source = ImageFolder(held_out, seed)
    sampling = Sampling(resolution, (float(FACTOR), float(FACTOR)), ("bicubic",))
    plan = pipe.plan_tiles(resolution, resolution, resolution)
    branch = PromptBranch(pipe.dino_projector.prompt_embeds, pipe.dino_projector.pooled_prompt_embeds)
    starts = validation_sigmas(NoiseLevels(SIGMA_MIN, SIGMA_MAX, restoration_share=1.0))
    losses = []
    for crop in range(LOSS_CROPS):
        pairs = first_pairs(source, len(source), sampling, pipe.image_processor, seed + crop)
        examples = make_examples(pipe, plan, pairs, seed + crop)
        losses.append(example_losses(pipe, plan, examples, branch, None, starts, is_restored=True))
    return {name: np.mean([entry[name] for entry in losses], axis=0) for name in CONDITIONS}


def measure_pictures(results: Sequence[Upscaled], judge: Callable, borders) -> dict[str, Any]:
    """Of enlarged photos: sharpness, likeness to the original, strength, the latents' grid and seams."""
    numbers: dict[str, Any] = {}
    kinds = ("bicubic", "lanczos", "without", "with_dino", "with_other")
    measures = {"psnr": psnr, "haarpsi": haarpsi, "dss": dss, "distance": judge}
    values = {}
    for kind in kinds:
        pairs = [(getattr(result, kind), result.original) for result in results]
        energies = [float(gradient_energy(picture) / gradient_energy(original)) for picture, original in pairs]
        numbers[f"gradient_energy_{kind}"] = bootstrap_mean(energies)
        for name, measure in measures.items():
            values[name, kind] = np.array([float(measure(*pair)) for pair in pairs])
            numbers[f"{name}_{kind}"] = bootstrap_mean(values[name, kind])
    for name in ("haarpsi", "dss", "distance"):
        for kind in ("bicubic", "lanczos", "without", "with_other"):
            gaps = values[name, kind] - values[name, "with_dino"]
            numbers[f"{name}_{kind}_minus_with_dino"] = bootstrap_mean(gaps)
    effects = np.array(
        [[float(F.l1_loss(picture, result.without)) for picture in result.by_strength] for result in results]
    )
    numbers["strength_effect"] = effects.mean(axis=0).tolist()
    numbers["strength_is_monotone"] = all(is_monotone(effect) for effect in effects.tolist())
    for kind in ("with_dino", "lanczos", "bicubic", "original"):
        numbers[f"grid_ratio_{kind}"] = bootstrap_mean([grid_ratio(getattr(result, kind)[0]) for result in results])
    if borders[0] or borders[1]:
        # What lies along a border by chance counts too: the pictures without tiles show how much that is.
        ratios = {
            kind: np.array([seam_ratio(getattr(result, kind)[0], *borders) for result in results])
            for kind in ("with_dino", "in_one_tile", "bicubic", "original")
        }
        numbers |= {f"seam_ratio_{kind}": bootstrap_mean(values) for kind, values in ratios.items()}
        numbers["seam_ratio_with_dino_minus_in_one_tile"] = bootstrap_mean(ratios["with_dino"] - ratios["in_one_tile"])
    return numbers


def measure_losses(losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means of the conditions, and by how much the right tokens lower a photo's loss, in percent of it."""
    by_photo = {name: values.mean(axis=0) for name, values in losses.items()}
    numbers: dict[str, Any] = {f"loss_{name}": bootstrap_mean(values) for name, values in by_photo.items()}
    for name in CONDITIONS[1:]:
        gaps = 100 * (by_photo[name] / by_photo["with_tokens"] - 1)
        numbers[f"loss_gap_{name}_percent"] = bootstrap_mean(gaps)
    return numbers


@torch.no_grad()
def measure_vae(pipe: FluxDinoTilePipeline, results: Sequence[Upscaled]) -> dict[str, Any]:
    values, energies = [], []
    for result in results:
        images = result.original.to(pipe.device)
        decoded = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        values.append(float(psnr(decoded, images)))
        energies.append(float(gradient_energy(decoded) / gradient_energy(images)))
    return {"vae_psnr": bootstrap_mean(values), "vae_gradient_energy": bootstrap_mean(energies)}


def make_sheet(results: Sequence[Upscaled]) -> Image.Image:
    """A row for each photo: the middle of the input (in blocks), bicubic, without DINO, with DINO, and original."""
    rows = []
    for result in results:
        side = result.original.shape[-1]
        detail = min(DETAIL, side)
        start = (side - detail) // 2
        blocks = to_pixels(result.small.resize((side, side), Image.Resampling.NEAREST))
        pictures = (blocks, result.bicubic, result.without, result.with_dino, result.original)
        cut = [picture[..., start : start + detail, start : start + detail] for picture in pictures]
        rows.append(torch.cat(cut, dim=3))
    return to_picture(torch.cat(rows, dim=2))


def format_table(numbers: dict[str, Any]) -> str:
    """Markdown, with the intervals of 95 %."""
    rows = []
    for name, value in numbers.items():
        if isinstance(value, Interval):
            text = f"{value.mean:.4f} ({value.low:.4f} to {value.high:.4f})"
        elif isinstance(value, list):
            text = ", ".join(f"{item:.4f}" for item in value)
        else:
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
        rows.append(f"| {name.replace('_', ' ')} | {text} |")
    return "\n".join(["| what | mean, with its bootstrap interval of 95 % |", "|---|---|", *rows]) + "\n"


def time_call(folder: Path, side: int, tile_size: int | None) -> float:
    """Seconds on the CPU from nothing loaded to the enlarged picture."""
    start = time.monotonic()
    pipe = load_checkpoint(folder, torch.device("cpu"))
    small = Image.effect_noise((side // FACTOR,) * 2, 50).convert("RGB")
    pipe(image=small, upscale_factor=FACTOR, tile_size=tile_size)
    return time.monotonic() - start


def evaluate(
    checkpoint: Path,
    held_out: Path,
    resolution: int,
    tile_size: int | None,
    start_sigma: float | None,
    seed: int,
    device: torch.device,
    judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[dict[str, Any], Image.Image]:
    """
    The numbers and the sheet.

    Args:
        checkpoint (`Path`): From [`assemble`].
        held_out (`Path`): Folder of photos that were not trained on.
        resolution (`int`): Of the crops that the projector was trained on; photos are enlarged to four times that.
        judge (`Callable`): A [`Judge`].
    """
    pipe = load_checkpoint(checkpoint, device)
    numbers = measure_losses(velocity_losses(pipe, held_out, resolution, seed))
    side, photos = FACTOR * resolution, load_photos(held_out, torch.device("cpu"))
    others = [*photos[1:], photos[0]]
    settings = (side, tile_size, start_sigma, seed)
    results = [Upscaled(pipe, photo, other, *settings) for photo, other in zip(photos, others)]
    numbers |= measure_vae(pipe, results)
    numbers |= measure_pictures(results, judge, tile_borders(pipe.plan_tiles(side, side, tile_size)))
    numbers["seconds_on_cpu"] = time_call(checkpoint, side, tile_size)
    numbers["cpu_threads"] = torch.get_num_threads()
    return numbers, make_sheet(results)
