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
The table by which a stage is judged and the checkpoint's defaults are chosen, on validation photos.

Photos are enlarged four times from several start sigmas: without tokens, with the caption of the SHARP photo (what
perfect tokens could bring), and with the projector's tokens, right ones and another photo's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from pipeline_flux_dino_tile import DinoProjector, FluxDinoTilePipeline, TilePlan

from ..comparison.baselines import enlarge
from ..metrics import Interval, bootstrap_mean, dss, gradient_energy, haarpsi, psnr_y
from ..pictures import to_pixels
from .captions import Language, describe_squares
from .crops import center_crop
from .evaluate import FACTOR, to_picture


CONDITIONS = ("none", "caption", "right", "other")
METRICS = ("distance", "psnr_y", "energy", "haarpsi", "dss")


class CaptionProjector(DinoProjector):
    """Passes captions on as tokens, so that a call takes them as `dino_embeds`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def make_caption_projector(projector: DinoProjector) -> CaptionProjector:
    """With the empty prompt, the number and the places of the other's tokens."""
    dim = projector.config.out_dim
    config = {**projector.config, "in_dim": dim, "hidden_dim": 1, "position_mode": "tile"}
    made = CaptionProjector.from_config(config)
    made.prompt_embeds.copy_(projector.prompt_embeds)
    made.pooled_prompt_embeds.copy_(projector.pooled_prompt_embeds)
    return made.to(projector.device, projector.dtype)


def make_captions(projector: DinoProjector, images: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    """What there is to say of sharp images, in the form of `dino_embeds`."""
    language = Language(projector.config.out_dim, images.device)
    rows, columns = projector.grid(plan.tile_tokens)
    tiles = [images[tile.slices()] for tile in plan]
    captions = [language.caption(describe_squares(tile, rows), tile.shape[-1]).tokens[0] for tile in tiles]
    return torch.stack(captions).unflatten(2, (rows, columns))


class Trial:
    """
    Photos, and what there is to enlarge them with.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The checkpoint, with a projector.
        photos (`Sequence[torch.Tensor]`): Bytes `(3, height, width)`.
        side (`int`): Of the enlargements, in pixels.
        tile_size (`int`, *optional*): In pixels; one tile for all by default.
        judge (`Callable`): A [`~dino_projector.metrics.Judge`].
        seed (`int`): Of the noise.
    """

    def __init__(
        self,
        pipe: FluxDinoTilePipeline,
        photos: Sequence[torch.Tensor],
        side: int,
        tile_size: int | None,
        judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        seed: int = 0,
    ):
        self.pipe, self.judge, self.seed = pipe, judge, seed
        self.size, self.tile_size = (side, side), tile_size or side
        self.originals = torch.cat([center_crop(photo, side) for photo in photos]).cpu()
        small_size = (side // FACTOR, side // FACTOR)
        self.small = [
            to_picture(image).resize(small_size, Image.Resampling.BICUBIC) for image in self.originals.split(1)
        ]
        plan = pipe.plan_tiles(*self.size, self.tile_size)
        self.projectors = {"tokens": pipe.dino_projector, "caption": make_caption_projector(pipe.dino_projector)}
        self.captions = make_captions(pipe.dino_projector, self.originals, plan)
        self.features = pipe.encode_dino(self.small, upscale_factor=FACTOR, tile_size=self.tile_size)

    def upscale(self, condition: str, start_sigma: float, **settings) -> torch.Tensor:
        """Enlargements `(photos, 3, side, side)` in [-1, 1] under one of `CONDITIONS`."""
        features = {"caption": self.captions, "other": self.features.roll(1, dims=1)}.get(condition, self.features)
        self.pipe.register_modules(dino_projector=self.projectors["caption" if condition == "caption" else "tokens"])
        images = self.pipe(
            image=self.small,
            upscale_factor=FACTOR,
            tile_size=self.tile_size,
            start_sigma=start_sigma,
            dino_embeds=features,
            dino_conditioning_scale=float(condition != "none"),
            generator=[torch.Generator().manual_seed(self.seed) for _ in self.small],
            **settings,
        ).images
        self.pipe.register_modules(dino_projector=self.projectors["tokens"])
        return torch.cat([to_pixels(image) for image in images])

    def enlarge(self, method: str) -> torch.Tensor:
        return torch.cat([to_pixels(enlarge(method, image, self.size)) for image in self.small])

    def measure(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        """Each of `METRICS` for every photo."""
        device = self.pipe.device
        rows = []
        for image, original in zip(images.split(1), self.originals.split(1)):
            pair = (image.to(device), original.to(device))
            energy = gradient_energy(pair[0]) / gradient_energy(pair[1])
            values = (self.judge(*pair), psnr_y(*pair), energy, haarpsi(*pair), dss(*pair))
            rows.append([float(value) for value in values])
        return dict(zip(METRICS, np.array(rows).T))


def measure_conditions(
    trial: Trial, sigmas: Sequence[float], conditions: Sequence[str] = CONDITIONS, **settings
) -> dict[str, dict[str, np.ndarray]]:
    """By name of a row (a method, or a condition and its start sigma) each of `METRICS` for every photo."""
    rows = {method: trial.measure(trial.enlarge(method)) for method in ("bicubic", "lanczos")}
    for sigma in sigmas:
        for condition in conditions:
            rows[f"{condition} {sigma:g}"] = trial.measure(trial.upscale(condition, sigma, **settings))
    return rows


def difference(rows: dict[str, dict[str, np.ndarray]], first: str, second: str, metric: str) -> Interval:
    return bootstrap_mean(rows[first][metric] - rows[second][metric])


def format_rows(rows: dict[str, dict[str, np.ndarray]], sigmas: Sequence[float]) -> str:
    """Markdown: the means, then what captions and tokens change, with bootstrap intervals of 95 %."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[metric].mean():.4f}" for metric in METRICS) + " |")
    pairs = (("caption", "none"), ("right", "none"), ("right", "other"))
    lines += ["", "| | distance | dss |", "|---|---|---|"]
    for sigma in sigmas:
        for first, second in pairs:
            names = (f"{first} {sigma:g}", f"{second} {sigma:g}")
            if all(name in rows for name in names):
                cells = []
                for metric in ("distance", "dss"):
                    interval = difference(rows, *names, metric)
                    cells.append(f"{interval.mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})")
                lines.append(f"| {names[0]} less {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
