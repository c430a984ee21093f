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

"""What is measured about an enlargement; docs/quality.md has the formulas."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image

from flux_dino_tile.diagnostics import diagnose, seam_ratio, tile_borders
from pipeline_flux_dino_tile import TilePlan

from ..metrics import color_drift, dss, gradient_energy, grid_ratio, haarpsi, low_res_psnr, psnr_y, shrink, ssim_y
from ..pictures import to_pixels


class Metric(NamedTuple):
    """A column of the tables."""

    label: str
    better: str  # "higher", "lower" or "1" for closer to one
    digits: int
    meaning: str


METRICS = {
    "psnr_y": Metric("PSNR (dB)", "higher", 2, "of the luma against the reference"),
    "ssim_y": Metric("SSIM", "higher", 4, "of the luma against the reference"),
    "haarpsi": Metric("HaarPSI", "higher", 4, "similarity of edges and colours to the reference's"),
    "dss": Metric("DSS", "higher", 4, "similarity of local contrast to the reference's; sharpening alone raises it"),
    "lpips": Metric("LPIPS", "lower", 4, "learned distance to the reference, AlexNet"),
    "dists": Metric("DISTS", "lower", 4, "structure and texture distance to the reference, VGG16"),
    "feature_distance": Metric(
        "feature distance", "lower", 4, "to the reference, by a classifier that no training here has seen"
    ),
    "input_distance": Metric(
        "distance to input", "lower", 4, "feature distance to the small picture, at its size: what was swapped"
    ),
    "low_res_psnr": Metric("consistency (dB)", "higher", 2, "PSNR of the shrunk result against the small picture"),
    "dino_similarity": Metric("DINO similarity", "higher", 4, "of tiles to the input's, their mean; DINO also steers"),
    "least_dino_similarity": Metric("least DINO similarity", "higher", 4, "of the picture's least similar tile"),
    "seam_ratio": Metric("seams", "1", 3, "steps across tile borders against parallel lines elsewhere"),
    "overlap_disagreement": Metric("overlaps", "lower", 4, "difference of neighbouring tiles' latents, unblended"),
    "grid_ratio": Metric("16 px grid", "1", 3, "steps on every 16th line against the others"),
    "color_drift": Metric("colour drift", "lower", 2, "of the low frequencies, in grey levels of 255"),
    "sharpness": Metric("sharpness", "1", 3, "gradient energy against the reference's"),
    "seconds": Metric("seconds", "lower", 2, "without encoding by DINO"),
}


def measure_pixels(images: torch.Tensor, small: torch.Tensor, reference, judges: dict[str, Callable]) -> dict:
    """What needs no tiles, of `(1, 3, height, width)` tensors in [-1, 1]; `reference` may be `None`."""
    enlarged = torch.nn.functional.interpolate(small, images.shape[2:], mode="bicubic").clamp(-1, 1)
    values: dict[str, Any] = {
        "low_res_psnr": low_res_psnr(images, small),
        "color_drift": color_drift(images, enlarged),
    }
    if reference is not None:
        values |= {
            "psnr_y": psnr_y(images, reference),
            "ssim_y": ssim_y(images, reference),
            "haarpsi": haarpsi(images, reference),
            "dss": dss(images, reference),
            "sharpness": gradient_energy(images) / gradient_energy(reference),
            **{name: judge(images, reference) for name, judge in judges.items()},
        }
    values["grid_ratio"] = grid_ratio(images[0], period=16)
    # The PSNR of equal pictures has no number.
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def measure_tiles(pipe, picture: Image.Image, images, small, plan: TilePlan, features, judges) -> list[dict[str, Any]]:
    """For each tile its place in pixels, DINO's similarity, the seam score and the judge's distance to the input."""
    diagnosis = diagnose(pipe, picture, plan, features)
    factors = [length / original for length, original in zip(images.shape[2:], small.shape[2:])]
    shrunk = shrink(images, *small.shape[2:])
    tiles = []
    for index, tile in enumerate(plan):
        similarity, seam = float(diagnosis.dino_similarity[index, 0]), float(diagnosis.seam_score[index, 0])
        box = [round(tile.top / factors[0]), round(tile.left / factors[1])]
        box += [round((tile.top + tile.height) / factors[0]), round((tile.left + tile.width) / factors[1])]
        place = (..., slice(box[0], box[2]), slice(box[1], box[3]))
        judge = judges.get("feature_distance")
        tiles.append(
            {
                **tile._asdict(),
                "dino_similarity": None if features is None else similarity,
                "seam_score": seam,
                "input_distance": None if judge is None else float(judge(shrunk[place], small[place])),
            }
        )
    return tiles


@torch.no_grad()
def measure(
    pipe, sample, picture: Image.Image, plan: TilePlan | None, features, judges: dict[str, Callable]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """
    Numbers about an enlargement, by the names in `METRICS`, and about its tiles. What cannot be measured is left out.

    Args:
        pipe ([`FluxDinoTilePipeline`], *optional*): Whose DINO looks.
        sample ([`~dino_projector.comparison.sweep.Sample`]): What was enlarged.
        plan ([`TilePlan`], *optional*): The tiles, also of a baseline, for which they are lines like others.
        features (`torch.Tensor`, *optional*): DINO's of the input's tiles.
    """
    images, small = to_pixels(picture), to_pixels(sample.small)
    reference = None if sample.reference is None else to_pixels(sample.reference)
    scores = measure_pixels(images, small, reference, judges)
    if "feature_distance" in judges:
        shrunk = shrink(images, *small.shape[2:])
        scores["input_distance"] = float(judges["feature_distance"](shrunk, small))
    if plan is None:
        return scores, []
    tiles = measure_tiles(pipe, picture, images, small, plan, features, judges)
    if features is not None:
        similarities = [tile["dino_similarity"] for tile in tiles]
        scores["dino_similarity"] = sum(similarities) / len(similarities)
        scores["least_dino_similarity"] = min(similarities)
    lines = [
        [line for line in borders if line < length] for borders, length in zip(tile_borders(plan), images.shape[2:])
    ]
    if any(lines):
        scores["seam_ratio"] = seam_ratio(images[0], *lines)
    return scores, tiles
