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
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from pipeline_flux_dino_tile import DinoProjector, FluxDinoTilePipeline

from ..comparison.baselines import enlarge
from ..metrics import Interval, bootstrap_mean, dss, gradient_energy, haarpsi, psnr_y
from ..pictures import to_pixels
from .captions import Language, describe_squares
from .crops import center_crop


FACTOR = 4
CONDITIONS = ("none", "caption", "right", "other")
METRICS = ("distance", "psnr", "energy", "haarpsi", "dss")


class CaptionProjector(DinoProjector):
    """Passes captions on as tokens, so that a call takes them as `dino_embeds`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


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
        self.pipe, self.judge, self.seed, self.tile_size = pipe, judge, seed, tile_size or side
        self.originals = torch.cat([center_crop(photo, side) for photo in photos]).cpu()
        size = (side // FACTOR, side // FACTOR)
        self.small = [
            Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).resize(
                size, Image.Resampling.BICUBIC
            )
            for image in self.originals
        ]
        self.size = (side, side)
        dim = pipe.transformer.config.joint_attention_dim
        language = Language(dim, torch.device("cpu"))
        grid = pipe.dino_projector.config.token_grid
        plan = pipe.plan_tiles(*self.size, self.tile_size)
        tiles = [self.originals[tile.slices()] for tile in plan]
        self.captions = torch.stack(
            [
                language.caption(describe_squares(tile, grid), tile.shape[-1]).tokens[0].unflatten(1, (grid, grid))
                for tile in tiles
            ]
        )
        caption_projector = CaptionProjector(
            dim,
            dim,
            hidden_dim=1,
            token_grid=grid,
            position_mode="tile",
            num_prompt_tokens=pipe.dino_projector.config.num_prompt_tokens,
            pooled_dim=pipe.dino_projector.config.pooled_dim,
        )
        caption_projector.prompt_embeds, caption_projector.pooled_prompt_embeds = (
            pipe.dino_projector.prompt_embeds,
            pipe.dino_projector.pooled_prompt_embeds,
        )
        self.caption_projector = caption_projector.to(pipe.device, pipe.dino_projector.dtype)
        self.features = pipe.encode_dino(self.small, upscale_factor=FACTOR, tile_size=self.tile_size)

    @contextmanager
    def captioning(self):
        projector = self.pipe.dino_projector
        self.pipe.register_modules(dino_projector=self.caption_projector)
        try:
            yield
        finally:
            self.pipe.register_modules(dino_projector=projector)

    def upscale(self, condition: str, start_sigma: float, **settings) -> torch.Tensor:
        """Enlargements `(photos, 3, side, side)` in [-1, 1] under one of `CONDITIONS`."""
        if condition == "caption":
            with self.captioning():
                return self.call(self.captions, start_sigma, **settings)
        features = self.features.roll(1, dims=1) if condition == "other" else self.features
        return self.call(features, start_sigma, dino_conditioning_scale=float(condition != "none"), **settings)

    def call(self, features: torch.Tensor, start_sigma: float, **settings) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(self.seed) for _ in self.small]
        common = {"upscale_factor": FACTOR, "tile_size": self.tile_size, "start_sigma": start_sigma}
        images = self.pipe(image=self.small, dino_embeds=features, generator=generators, **common, **settings).images
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
