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

"""`--plan`: the tiles that FLUX would work on, and what they cost."""

from collections import Counter
from itertools import pairwise

from .architecture import Architecture, read_architecture
from .image_files import upright_size
from .jobs import Job, count_outcomes, run_step, target_size
from .messages import print_line
from .options import Options
from .regions import call_prompt


def transformer_flops(num_tokens: int, inner_dim: int = 3072, num_layers: int = 57) -> float:
    """
    Floating-point operations of one FLUX forward pass for one tile.

    A block's linear layers hold `12 * inner_dim**2` weights for a token, in double and single blocks alike, and
    attention does `4 * num_tokens * inner_dim` operations for a token; a multiply-add counts as two.

    Args:
        num_tokens (`int`): Image, text and DINO tokens together.
        inner_dim (`int`, defaults to 3072): Heads times head dimension.
        num_layers (`int`, defaults to 57): Double plus single blocks.
    """
    return 4.0 * inner_dim * num_layers * num_tokens * (6 * inner_dim + num_tokens)


def plan_picture(size: tuple[int, int], options: Options, architecture: Architecture):
    """The tiles of an enlarged picture of `size` (width, height); a `ValueError` if the options leave none."""
    from pipeline_flux_dino_tile import plan_tiles

    tile_size = options.tile_size or architecture.tile_size
    return plan_tiles(size[1], size[0], tile_size, options.tile_overlap, architecture.pixels_per_token)


def check_tiles(jobs: list[Job], options: Options) -> None:
    """Finds out before a model is loaded for which images the options leave no tiles, or have no place for a box."""
    from pipeline_flux_dino_tile import check_regions

    architecture = read_architecture(options.model, options.projector)
    regions = call_prompt(None, options.region_prompts) or []

    def check(job: Job) -> str:
        width, height = target_size(upright_size(job.source), options.scale)
        plan_picture((width, height), options, architecture)
        check_regions(regions, height, width)
        return job.outcome

    for job in jobs:
        if job.outcome == "ready":
            run_step(check, job)


def print_plan(job: Job, options: Options, architecture: Architecture, totals: Counter) -> str:
    size = upright_size(job.source)
    width, height = target_size(size, options.scale)
    plan = plan_picture((width, height), options, architecture)
    text_tokens = options.text_tokens or architecture.text_tokens
    if not options.has_prompt and architecture.prompt_tokens:
        text_tokens = architecture.prompt_tokens
    dino_tokens = 0 if options.dino_strength == 0 else architecture.dino_tokens
    num_tokens = plan.tokens_per_tile + text_tokens + dino_tokens
    tflop = transformer_flops(num_tokens, architecture.inner_dim, architecture.num_layers) / 1e12
    overlaps = sorted(
        {
            start + length - following
            for starts, length in ((plan.tops, plan.tile_height), (plan.lefts, plan.tile_width))
            for start, following in pairwise(starts)
        }
    )
    widths = " to ".join(map(str, overlaps[:1] + overlaps[1:][-1:]))
    overlap = f", overlapping {widths} px" if overlaps else ""
    print_line(
        f"{job.source}: {size[0]}x{size[1]} -> {width}x{height} px\n"
        f"  tiles: {len(plan)} ({len(plan.lefts)} across, {len(plan.tops)} down) of"
        f" {plan.tile_width}x{plan.tile_height} px{overlap}\n"
        f"  tokens per tile: {plan.tokens_per_tile} image + {text_tokens} text + {dino_tokens} DINO\n"
        f"  TFLOP per step: {len(plan) * tflop:.4g} ({tflop:.4g} per tile)"
    )
    totals["tiles"] += len(plan)
    totals["tflop"] += len(plan) * tflop  # type: ignore[assignment]
    return "planned"


def print_plans(jobs: list[Job], options: Options) -> None:
    architecture = read_architecture(options.model, options.projector)
    totals: Counter = Counter()
    for job in jobs:
        run_step(print_plan, job, options, architecture, totals)
    if len(jobs) > 1:
        planned = count_outcomes(jobs)["planned"]
        print_line(f"{planned} images: {totals['tiles']} tiles, {totals['tflop']:.4g} TFLOP per step")
