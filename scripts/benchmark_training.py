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

"""Measures samples per second and peak memory of the projector's training step, on models with random weights."""

import argparse
import gc
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import benchmark
import torch
import train_projector
from accelerate import Accelerator
from benchmark import PRESETS, Preset, build_pipeline, describe_machine, save_json, time_calls

from dino_projector.training.checkpoints import error_line
from dino_projector.training.dropout import Dropout
from dino_projector.training.flow_matching import InputMaker, NoiseLevels
from dino_projector.training.models import freeze, load_transformer
from dino_projector.training.trainer import ProjectorTrainer
from flux_dino_tile.loading import choose_device
from flux_dino_tile.messages import Parser, UsageError, number
from pipeline_flux_dino_tile import FluxDinoTilePipeline


class Recipe(NamedTuple):
    quantization: str = "none"
    compiles: bool = False


RECIPES = {
    "plain": Recipe(),
    "compiled": Recipe(compiles=True),
    "fp8": Recipe("fp8"),
    "fp8-compiled": Recipe("fp8", compiles=True),
    "nf4": Recipe("nf4"),
}
# (resolution in px, samples)
BATCHES = {"full": [(512, 8), (1024, 4)], "small": [(64, 2), (96, 1)]}
NUM_WARM_UPS = 2
COLUMNS = {
    "recipe": ("recipe", ""),
    "resolution": ("px", "d"),
    "batch_size": ("batch", "d"),
    "seconds": ("s/step", ".3f"),
    "samples_per_second": ("samples/s", ".3g"),
    "peak_gib": ("peak GiB", ".1f"),
    "first_step_s": ("first step, s", ".1f"),
    "error": ("error", ""),
}


def build_parser() -> Parser:
    description = "Measure the projector's training step on models with random weights."
    parser = Parser(prog="benchmark_training.py", description=description)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full", help="FLUX.1's architecture, or a small one (default: full)")
    add("--device", help="cuda, cuda:1 or cpu (default: the first that is there)")
    recipes_help = f"of {', '.join(RECIPES)}, with commas (default: plain,compiled)"
    add("--recipes", metavar="LIST", default="plain,compiled", help=recipes_help)
    add("--text-tokens", metavar="N", type=number(int, 1, 512), help="(default: 256, small: 32)")
    checkpointing = "compute the blocks once, which needs far more memory"
    add("--no-gradient-checkpointing", action="store_true", help=checkpointing)
    add("--repeats", metavar="N", type=number(int, 1), default=5, help="timed steps (default: 5)")
    add("--json", metavar="FILE", type=Path, help="write the results here, after every measurement")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    args.device = torch.empty(0, device=choose_device(args.device)).device  # with its index
    args.dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    args.recipes = args.recipes.split(",")
    for name in args.recipes:
        if name not in RECIPES:
            raise UsageError(f"--recipes: must be of {', '.join(RECIPES)}, not {name!r}")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    return args


def quantize(pipe: FluxDinoTilePipeline, quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    """Puts the transformer through a folder, since diffusers quantizes while it loads."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(Path(folder) / "transformer")
        pipe.register_modules(transformer=None)
        gc.collect()
        config = train_projector.training_quantization(quantization, dtype)
        pipe.register_modules(transformer=load_transformer(folder, dtype, config))
    pipe.to(device)


def build_recipe(preset: Preset, recipe: Recipe, args: argparse.Namespace) -> FluxDinoTilePipeline:
    """Random models, ready to be trained."""
    pipe = build_pipeline(FluxDinoTilePipeline, preset, args.device, args.dtype)
    if recipe.quantization != "none":
        quantize(pipe, recipe.quantization, args.device, args.dtype)
    for parameter in pipe.dino_projector.parameters():
        parameter.data = parameter.data.float()
    freeze(pipe)
    return pipe


def make_trainer(
    pipe, compiles: bool, resolution: int, batch_size: int, args, accelerator: Accelerator
) -> ProjectorTrainer:
    """A trainer with the defaults of `train_projector.py`, but for what is measured."""
    sizes = ["--resolution", str(resolution), "--train_batch_size", str(batch_size)]
    names = ["--pretrained_model_name_or_path", "random", "--output_dir", "none"]
    options = train_projector.build_parser().parse_args([*names, *sizes])
    options.compile = compiles
    options.gradient_checkpointing = not args.no_gradient_checkpointing
    dropout = Dropout(options.dino_dropout, options.token_dropout, options.strength_jitter)
    plan = pipe.plan_tiles(resolution, resolution, resolution)
    embed_captions = partial(repeat_embeds, *pipe.default_prompt_embeds)
    levels = NoiseLevels(options.sigma_min, options.sigma_max)
    make_inputs = InputMaker(pipe, plan, embed_captions, levels, dropout, options.guidance_scale, options.seed)
    return ProjectorTrainer(pipe, make_inputs, accelerator, options)


def repeat_embeds(embeds: torch.Tensor, pooled_embeds: torch.Tensor, captions) -> tuple[torch.Tensor, torch.Tensor]:
    """The same prompt for every caption."""
    return embeds.expand(len(captions), -1, -1), pooled_embeds.expand(len(captions), -1)


def random_batch(resolution: int, batch_size: int) -> dict:
    """Noise, with as many bytes as photos have."""
    pictures = torch.randint(0, 256, (2, batch_size, 3, resolution, resolution), dtype=torch.uint8)
    texts = {"caption": [""] * batch_size, "name": ["noise"] * batch_size}
    return {"sharp": pictures[0], "degraded": pictures[1], "number": torch.arange(batch_size), **texts}


def measure(trainer: ProjectorTrainer, batch: dict, repeats: int, device: torch.device) -> dict:
    step = partial(trainer.train_step, [batch])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = time_calls(step, 1, device)
    time_calls(step, NUM_WARM_UPS, device)
    seconds = time_calls(step, repeats, device)
    peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    samples_per_second = len(batch["number"]) / seconds
    return {
        "seconds": seconds,
        "samples_per_second": samples_per_second,
        "peak_gib": peak_gib,
        "first_step_s": first,
    }


def measure_recipe(
    pipe: FluxDinoTilePipeline, recipe: Recipe, resolution: int, batch_size: int, args, accelerator: Accelerator
) -> dict:
    torch.compiler.reset()  # so that no shape of an earlier batch counts
    trainer = make_trainer(pipe, recipe.compiles, resolution, batch_size, args, accelerator)
    try:
        return measure(trainer, random_batch(resolution, batch_size), args.repeats, args.device)
    except RuntimeError as error:  # memory, mostly
        return {"error": error_line(error)}


def run_benchmark(args: argparse.Namespace) -> dict:
    preset = PRESETS[args.preset]
    preset = preset._replace(num_text_tokens=args.text_tokens or preset.num_text_tokens)
    accelerator = Accelerator(
        cpu=args.device.type == "cpu", mixed_precision="no" if args.dtype == torch.float32 else "bf16"
    )
    report: dict = {"machine": describe_machine(args.device), "num_text_tokens": preset.num_text_tokens, "steps": []}
    report["gradient_checkpointing"] = not args.no_gradient_checkpointing
    for name in args.recipes:
        pipe, failure = None, None
        try:
            pipe = build_recipe(preset, RECIPES[name], args)
        # A recipe that this machine lacks memory or packages for must not take the others with it.
        except (RuntimeError, UsageError) as error:
            failure = error_line(error)
        for resolution, batch_size in BATCHES[args.preset]:
            print(f"benchmark_training.py: {name}, {resolution} px", file=sys.stderr, flush=True)
            record = {"recipe": name, "resolution": resolution, "batch_size": batch_size, "error": failure}
            if pipe is not None:
                record |= measure_recipe(pipe, RECIPES[name], resolution, batch_size, args, accelerator)
            report["steps"].append(record)
            save_json(report, args.json)
    return report


def format_report(report: dict) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "transformers"))
    checkpointing = "gradient checkpointing" if report["gradient_checkpointing"] else "no gradient checkpointing"
    head = f"# Training step\n\n- {machine['device']}, {machine['date']}, {versions}\n- random weights,"
    head += f" {report['num_text_tokens']} text tokens, {checkpointing}\n"
    rows = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    rows += [
        [benchmark.format_cell(step.get(key), form) for key, (_, form) in COLUMNS.items()] for step in report["steps"]
    ]
    return "\n".join([head, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
    except UsageError as error:
        print(f"benchmark_training.py: error: {error}", file=sys.stderr)
        return 2
    print(format_report(run_benchmark(args)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
