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

"""Numbers about the tiles of a picture: which are flat, which show a seam, and which to mistrust and do again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput

from flux_dino_tile.calls import check_number, complete_call, observe_steps, settle_prompt
from pipeline_flux_dino_tile import (
    FluxDinoTilePipeline,
    Tile,
    TilePlan,
    check,
    repeat_images,
)


SEAM_OFFSETS = (-32, -16, 16, 32)  # px, of the lines that a tile's border is compared with
LEAST_STEP = 1e-6
SUSPECT_SIMILARITY = 0.5  # a guess: below it a tile may show something else than the input


# ---- Numbers -------------------------------------------------------------------------------------------------------


def dino_similarity(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean cosine of features `(..., rows, columns, dim)` at the same place, from -1 to 1 for equal ones."""
    return F.cosine_similarity(features.float(), others.float().to(features.device), dim=-1).mean((-2, -1)).cpu()


def line_steps(image: torch.Tensor, axis: int) -> np.ndarray:
    """Mean step of a `(3, height, width)` picture across each line between two rows (axis 0) or columns (axis 1)."""
    return image.diff(dim=axis + 1).abs().mean((0, 2 - axis)).cpu().numpy()


def tile_borders(plan: TilePlan) -> tuple[list[int], list[int]]:
    """The first pixel row, and column, beyond each border of a tile inside the canvas."""
    rows = {*plan.tops[1:], *(top + plan.tile_height for top in plan.tops[:-1])}
    columns = {*plan.lefts[1:], *(left + plan.tile_width for left in plan.lefts[:-1])}
    return sorted(rows), sorted(columns)


def seam_ratio(image: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> float:
    """
    How much larger the steps across the tiles' borders are than those one and two tokens away: 1 without seams, and
    where all lines are borders.

    Lines on the token grid are compared with each other, for a grid of the VAE's own is not a seam.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): The picture.
        rows, columns (`Sequence[int]`): The first pixel row or column beyond each border inside the picture.
    """
    across, beside = [], []
    for axis, lines in enumerate((rows, columns)):
        steps = line_steps(image, axis)
        for line in lines:
            others = {line + offset for offset in SEAM_OFFSETS if 0 < line + offset <= len(steps)} - set(lines)
            if others:
                across.append(steps[line - 1])
                beside.append(np.mean([steps[other - 1] for other in others]))
    if not across:
        return 1.0
    # The least step keeps a picture without any from dividing by 0.
    return float((np.mean(across) + LEAST_STEP) / (np.mean(beside) + LEAST_STEP))


def tile_seam_scores(image: torch.Tensor, plan: TilePlan) -> list[float]:
    """
    For each tile of a padded `(3, height, width)` picture the [`seam_ratio`] of its and its neighbours' borders in it
    and on its edge; 1 for a single tile.
    """
    margin = max(SEAM_OFFSETS)
    scores = []
    for top, left, height, width in plan:
        starts = (max(0, top - margin), max(0, left - margin))
        region = image[:, starts[0] : top + height + margin, starts[1] : left + width + margin]
        lines = [
            [border - start for border in borders if first <= border <= first + length]
            for borders, first, length, start in zip(tile_borders(plan), (top, left), (height, width), starts)
        ]
        scores.append(seam_ratio(region, *lines))
    return scores


# ---- Tiles to mistrust ---------------------------------------------------------------------------------------------


@dataclass
class DiagnosedOutput(FluxPipelineOutput):
    """Images and numbers about their tiles, in tensors of shape `(num_tiles, batch)`."""

    tile_plan: TilePlan | None = None
    dino_similarity: Any = None  # of result and input, from -1 to 1 for equal ones; NaN without a DINO encoder
    seam_score: Any = None  # see `tile_seam_scores`; 1 is no seam
    suspects: list[list[Tile]] | None = None  # for each image the tiles of too little similarity


@torch.no_grad()
def diagnose(
    pipe: FluxDinoTilePipeline,
    images: PipelineImageInput,
    plan: TilePlan,
    dino_embeds: torch.Tensor | None = None,
    suspect_threshold: float = SUSPECT_SIMILARITY,
) -> DiagnosedOutput:
    """
    Compares the tiles of results with what DINO saw in the input. DINO steers the result too, so that its similarity
    is no independent judgement.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The pipeline that made them.
        images (`PipelineImageInput`): What the call returned, pixels.
        plan ([`TilePlan`]): The tiles of the call, from [`~FluxDinoTilePipeline.plan_tiles`].
        dino_embeds (`torch.Tensor`, *optional*):
            Features of the input, from [`~FluxDinoTilePipeline.encode_dino`] with the call's size and tiles.
        suspect_threshold (`float`, defaults to 0.5): Similarity, from -1 to 1, below which a tile is suspect.

    Raises:
        `ValueError`: If `plan` or `dino_embeds` belong to another picture, or an argument is out of range.
    """
    check_number("suspect_threshold", suspect_threshold, -1, 1, "a mean cosine of DINO features")
    checked = pipe.check_image(images)
    check("images", images, not pipe.is_latents(checked), "pixels, not latents")
    pixels = pipe.resize_image(checked, *pipe.get_output_size(checked, upscale_factor=1))
    own, planned = tuple(pixels.shape[2:]), (plan.height, plan.width)
    check("plan", planned, own == planned, f"of this picture, whose padded height and width are {own}")
    whole = Tile(0, 0, plan.height, plan.width)
    scores = torch.tensor([tile_seam_scores(pipe.crop_pixels(item[None], whole)[0], plan) for item in pixels]).T
    similarity = torch.full_like(scores, torch.nan)
    if dino_embeds is not None and pipe.dino_encoder is not None:
        features = pipe.encode_dino_tiles(pixels, plan)
        fits = dino_embeds.shape in (features.shape, (len(plan), 1, *features.shape[2:]))
        check("dino_embeds", dino_embeds, fits, f"the input's features, of shape {tuple(features.shape)}")
        similarity = dino_similarity(features, dino_embeds)
        pipe.maybe_free_model_hooks()
    suspects = [[tile for tile, value in zip(plan, column) if value < suspect_threshold] for column in similarity.T]
    return DiagnosedOutput(images, plan, similarity, scores, suspects)


@torch.no_grad()
def upscale_with_diagnosis(
    pipe: FluxDinoTilePipeline,
    suspect_threshold: float = SUSPECT_SIMILARITY,
    redo_start_sigma: float | None = None,
    **arguments,
) -> DiagnosedOutput:
    """
    `pipe(**arguments)` with a diagnosis of its tiles and, on request, another try at the suspect ones.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The pipeline, with DINO if tiles shall be compared with the input's.
        suspect_threshold (`float`, defaults to 0.5):
            Similarity, from -1 to 1, below which a tile is suspect: it may show what the input does not.
        redo_start_sigma (`float`, *optional*):
            Denoises suspect tiles once more, from the input with this lower share of noise and with DINO's tokens in
            every step, while all others are frozen as they are. Numbers and suspects are then those of the new
            picture. Of several pictures only those with suspects change, and a tile that is suspect in one is done
            again in all of these. A callback is called in these steps too; if it interrupts, the first picture stays.
        **arguments: Of the call; `output_type` "pil", "np" or "pt".

    Raises:
        `ValueError`: If an argument is out of range or does not fit another.
    """
    check_number("suspect_threshold", suspect_threshold, -1, 1, "a mean cosine of DINO features")
    call, plan = complete_call(pipe, arguments)
    output_type, has_dino = call["output_type"], pipe.dino_encoder is not None and pipe.dino_projector is not None
    check("output_type", output_type, output_type in ("pil", "np", "pt"), "'pil', 'np' or 'pt', to compare pixels")
    check("image", arguments["image"], not pipe.is_latents(call["image"]), "pixels to compare, not latents")
    check("return_dict", call["return_dict"], call["return_dict"], "True; the output has a `to_tuple`")
    if redo_start_sigma is not None:
        check("redo_start_sigma", redo_start_sigma, has_dino, "None without a DINO projector, which finds the tiles")
        schedule = (call["num_inference_steps"], call["sigmas"], call["strength"], call["start_sigma"])
        first_sigma = float(pipe.get_tile_timesteps(*schedule, plan)[0]) / pipe.scheduler.config.num_train_timesteps
        below = np.nextafter(first_sigma, 0)
        check_number("redo_start_sigma", redo_start_sigma, 0.01, below, "less noise than the call starts from")
        # Refuses what this scheduler cannot start from.
        pipe.get_tile_timesteps(call["num_inference_steps"], None, None, redo_start_sigma, plan)

    features, canvas = call["dino_embeds"], call["latents"]
    if features is None and has_dino:
        names = ("image", "height", "width", "tile_size", "tile_overlap")
        features = pipe.encode_dino(**{name: call[name] for name in names})

    def keep_canvas(pipeline, step, latents, changes):
        nonlocal canvas
        canvas = latents

    arguments = {**settle_prompt(pipe, arguments), "dino_embeds": features}
    images = pipe(**observe_steps(arguments, keep_canvas)).images
    if features is not None:
        num_prompts = len(images) // call["num_images_per_prompt"]
        features = repeat_images(features.transpose(0, 1), num_prompts, len(images)).transpose(0, 1)
    output = diagnose(pipe, images, plan, features, suspect_threshold)
    suspects = output.dino_similarity < suspect_threshold
    frozen = [index for index in range(len(plan)) if index in call["frozen_tiles"] or not suspects[index].any()]
    if redo_start_sigma is None or len(frozen) == len(plan) or pipe.interrupt:
        return output

    arguments |= {"start_sigma": redo_start_sigma, "strength": None, "sigmas": None, "latents": None, "first_step": 0}
    arguments |= {"num_inference_steps": call["num_inference_steps"], "frozen_tiles": frozen, "frozen_latents": canvas}
    redone = pipe(**{**arguments, "dino_guidance_start": 0.0, "dino_guidance_end": 1.0}).images
    if pipe.interrupt:
        return output
    for index in suspects.any(0).nonzero().flatten().tolist():
        images[index] = redone[index]
    return diagnose(pipe, images, plan, features, suspect_threshold)
