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

"""Shows what DINO adds on a folder of pictures: enlarges them in many ways, measures, and writes a report."""

import argparse
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path

from dino_projector.comparison import ABLATIONS
from flux_dino_tile.embedded import EMBEDDED, locate_model
from flux_dino_tile.messages import Parser, UsageError, nonempty, number, run_script
from flux_dino_tile.options import Settings, check_repository


BASELINES = ("bicubic", "lanczos", "realesrgan")
EPILOG = """examples:
  compare.py photos/ --out report
  compare.py photos/ --out report --model black-forest-labs/FLUX.1-schnell --projector runs/first/final
  compare.py photos/ --out report --start-sigmas 0.2,0.35,0.5 --steps 4,8 --ablate overlap,color-fix
  compare.py small/ --out report --no-reference

Called again with the same --out, it makes only what is missing. docs/quality.md describes the report and its metrics.
Exit status: 0 done; 1 it failed; 2 wrong usage."""


def several(kind) -> "partial":
    """An argparse type: values with commas, each read by `kind`."""
    return partial(split_values, kind)


def split_values(kind, text: str) -> list:
    return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))


def one_of(choices: Collection[str]):
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, not {text!r}")
        return text

    return parse


def build_parser() -> Parser:
    parser = Parser(
        prog="compare.py",
        description="Enlarge pictures without FLUX, with it, and with DINO at several strengths, and measure all.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("images", type=nonempty, help="folder of sharp pictures, from which small ones are made")
    add("--out", type=nonempty, required=True, metavar="DIR", help="folder of the report; index.html is the page")
    add("--no-reference", action="store_true", help="the pictures are small ones themselves")
    add("--scale", type=number(float, 1, 8), default=4.0, help="enlargement of both sides, 1 to 8 (default: 4)")
    add(
        "--degradation",
        choices=["bicubic", "mild", "strong"],
        default="bicubic",
        help="how small pictures are made, see docs/training.md (default: bicubic)",
    )
    size_help = "cut a square out of the middle of each picture and shrink it to this side first (default: not)"
    add("--size", type=number(int, 16), metavar="PX", help=size_help)
    add("--limit", type=number(int, 1), metavar="N", help="only the first N pictures (default: all)")

    add = parser.add_argument_group("what is compared; several values with commas").add_argument
    baselines_help = "bicubic, lanczos, realesrgan or none (default: the first two, and the third if it is installed)"
    add("--baselines", type=several(one_of((*BASELINES, "none"))), metavar="LIST", help=baselines_help)
    model_help = "folders or Hub repositories of FLUX.1, or none (default: embedded, the small one of this program)"
    add("--model", type=several(nonempty), default=[EMBEDDED], metavar="LIST", help=model_help)
    projector_help = "folders or Hub repositories with a dino_projector/ (default: the model's own)"
    add("--projector", type=several(nonempty), default=[None], metavar="LIST", help=projector_help)
    strengths_help = "of DINO (default: 0,0.3,0.5,0.8,1); the greatest is also tried with another picture's tokens"
    strengths = [0.0, 0.3, 0.5, 0.8, 1.0]
    add("--strengths", type=several(number(float, 0, 100)), default=strengths, metavar="LIST", help=strengths_help)
    models_own = "(default: the model's)"
    sigmas_help = f"several with strength 0 are also compared at equal sharpness {models_own}"
    add("--start-sigmas", type=several(number(float, 0.01, 1)), default=[None], metavar="LIST", help=sigmas_help)
    add("--steps", type=several(number(int, 1)), default=[None], metavar="LIST", help=models_own)
    add("--seeds", type=several(number(int, 0, 2**32 - 1)), default=[0], metavar="LIST", help="(default: 0)")
    ablate_help = f"one thing at a time at the greatest strength: {', '.join(ABLATIONS)}"
    add("--ablate", type=several(one_of(ABLATIONS)), default=[], metavar="LIST", help=ablate_help)

    add = parser.add_argument_group("tiles and machine").add_argument
    add("--tile-size", type=number(int, 16), metavar="PX", help="a multiple of 16 (default: the model's, or planned)")
    add("--tile-overlap", type=number(int, 0), default=64, metavar="PX", help="(default: 64)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of them that is there)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="(default: bfloat16, on the CPU float32)")
    offloads = ["none", "model", "group", "sequential"]
    add("--offload", choices=offloads, default="none", help="as in upscale.py (default: none)")

    add = parser.add_argument_group("report").add_argument
    threshold_help = "DINO similarity below which tiles are outlined (default: 0.5)"
    add("--suspect-threshold", type=number(float, -1, 1), default=0.5, metavar="S", help=threshold_help)
    add("--report-pictures", type=number(int, 1), default=12, metavar="N", help="shown in the page (default: 12)")
    side_help = "longest side of the page's pictures; those in pictures/ are whole (default: 2048)"
    add("--report-side", type=number(int, 64), default=2048, metavar="PX", help=side_help)
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if not Path(args.images).is_dir():
        raise UsageError(f"{args.images}: no such folder")
    if args.tile_size and args.tile_size % 16:
        raise UsageError(f"argument --tile-size: must be a multiple of 16 px, not {args.tile_size}")
    args.model = [model for model in args.model if model != "none"]
    for model in args.model:
        check_repository("--model", locate_model(model), "model_index.json")
    for projector in args.projector:
        if projector is not None:
            check_repository("--projector", projector, "dino_projector/config.json", "config.json")
    if not args.model and (args.projector != [None] or args.ablate):
        raise UsageError("--projector and --ablate need a model, not --model none")
    args.baselines = choose_baselines(args.baselines)
    if not args.baselines and not args.model:
        raise UsageError("--baselines none and --model none: there is nothing to compare")
    return args


def choose_baselines(wanted: list[str] | None) -> list[str]:
    from dino_projector.comparison.baselines import find_missing_realesrgan

    reason = find_missing_realesrgan()
    if wanted is None:
        return [name for name in BASELINES if name != "realesrgan" or reason is None]
    if "realesrgan" in wanted and reason is not None:
        raise UsageError(f"--baselines realesrgan: {reason}")
    return [name for name in wanted if name != "none"]


def load_pipeline(args: argparse.Namespace, model: str, projector: str | None):
    from flux_dino_tile.loading import load_flux

    settings = Settings(model, projector, device=args.device, dtype=args.dtype, offload=args.offload)
    pipe, _ = load_flux(settings)
    pipe.set_progress_bar_config(disable=True)
    if pipe.dino_projector is None and max(args.strengths) > 0:
        raise UsageError(f"--model {model}: has no DINO projector; give --projector, or --strengths 0")
    return pipe


def describe_settings(args: argparse.Namespace, argv: list[str]) -> dict[str, str]:
    described = {"command": " ".join(["compare.py", *argv])}
    for name, value in vars(args).items():
        if name not in ("images", "out", "device", "offload"):
            values = value if isinstance(value, list) else [value]
            described[name.replace("_", " ")] = ", ".join("default" if item is None else str(item) for item in values)
    return described


def compare(args: argparse.Namespace, argv: list[str]) -> Path:
    from dino_projector.comparison.report import Results, page_data, write_report
    from dino_projector.comparison.sweep import load_samples, make_settings, run_sweep
    from dino_projector.metrics import load_judges

    output = Path(args.out)
    output.mkdir(parents=True, exist_ok=True)
    degradation = None if args.no_reference else args.degradation
    samples = load_samples(Path(args.images), args.scale, degradation, args.size, 0, args.limit)
    if len(samples) == 1 and args.model:
        print("a single picture: no other picture's tokens, and no tests")
    settings = make_settings(
        args.baselines,
        args.model,
        args.projector,
        args.strengths,
        args.start_sigmas,
        args.steps,
        args.seeds,
        args.ablate,
        has_control=len(samples) > 1,
        tile_size=args.tile_size,
        tile_overlap=args.tile_overlap,
    )
    judges, missing = load_judges()
    for name, reason in missing.items():
        print(f"{name}: not measured, {reason}")
    records = run_sweep(samples, settings, output, partial(load_pipeline, args), judges)
    results = Results(samples, settings, records, output)
    described = describe_settings(args, argv)
    data = page_data(results, missing, described, args.suspect_threshold, args.report_pictures, args.report_side)
    return write_report(results, data)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_script(
        "compare.py", lambda: print(compare(parse_arguments(argv), argv)), "interrupted; the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main())
