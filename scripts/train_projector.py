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

"""Trains the projector that tells a frozen FLUX.1 by DINO features what each tile shows."""

import argparse
import os
import sys
import warnings
from functools import partial
from typing import Any

from flux_dino_tile.messages import Parser, UsageError, first_line, hide_loading_bars, nonempty, number, run_script
from flux_dino_tile.options import check_repository


MODEL_FILES = ("model_index.json",)
DEGRADATIONS = ("mild", "strong", "bicubic")

EPILOG = """examples:
  accelerate launch scripts/train_projector.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-schnell \\
      --train_data_dir photos --validation_data_dir held_out --output_dir runs/first
  ... --resume_from_checkpoint latest        goes on after Ctrl-C, SIGTERM or a crash

docs/training.md takes you from a folder of photos to a published projector.
Exit status: 0 finished, or stopped by a signal with a checkpoint; 1 the training failed; 2 wrong usage."""


def build_parser() -> Parser:
    parser = Parser(
        prog="train_projector.py",
        usage="%(prog)s --pretrained_model_name_or_path MODEL (--train_data_dir DIR | --dataset_name NAME |\n"
        "       --train_shards URLS) --output_dir DIR [options]",
        description="Train the projector that tells FLUX.1 by DINO features what each tile shows. FLUX.1, its VAE\n"
        "and DINO stay as they are.",
        epilog=EPILOG,
    )

    add = parser.add_argument_group("models").add_argument
    add("--pretrained_model_name_or_path", type=nonempty, required=True, metavar="MODEL", help="a FLUX.1 pipeline")
    add("--revision", help="branch, tag or commit of its repository")
    add("--variant", help="variant of its weights, such as fp16")
    add(
        "--dino_model",
        type=nonempty,
        metavar="MODEL",
        default="facebook/dinov2-with-registers-base",
        help="DINOv2, with registers or without, or DINOv3 (default: %(default)s)",
    )
    add("--mixed_precision", choices=["no", "bf16"], help="bf16: FLUX in bfloat16 (default: bf16, on the CPU no)")
    add(
        "--quantization",
        choices=["none", "fp8", "nf4"],
        default="none",
        help="keep FLUX in 8 bits (needs torchao) or 4 (needs bitsandbytes) to save memory (default: none)",
    )
    add(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute FLUX's blocks, and the VAE's in the pixel loss, twice to save memory (default: yes)",
    )
    add("--compile", action="store_true", help="compile FLUX's blocks and the VAE: minutes at first, faster after")

    add = parser.add_argument_group("projector").add_argument
    add("--token_grid", type=number(int, 1), default=16, metavar="N", help="N x N tokens for a tile (default: 16)")
    add("--hidden_dim", type=number(int, 1), default=4096, metavar="N", help="hidden width (default: 4096)")
    add("--dino_layers", type=int, nargs="+", default=[-1], metavar="N", help="hidden states of DINO (default: -1)")
    add(
        "--position_mode",
        choices=["zero", "tile"],
        default="zero",
        help="place of the tokens for FLUX: none, as text has, or where they look (default: zero)",
    )
    add(
        "--init_from_redux",
        type=nonempty,
        metavar="MODEL",
        help="first learn to imitate FLUX Redux's tokens (black-forest-labs/FLUX.1-Redux-dev). Its licence is"
        " non-commercial, and the projector becomes a derivative of it",
    )
    add("--redux_steps", type=number(int, 1), default=1000, metavar="N", help="steps of that (default: 1000)")
    add("--redux_learning_rate", type=number(float, 0), default=1e-3, metavar="RATE", help="(default: 1e-3)")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", type=nonempty, metavar="DIR", help="folder of pictures, searched with its subfolders")
    add("--dataset_name", type=nonempty, metavar="NAME", help="data set of the Hub, or a folder of Parquet files")
    add("--dataset_config_name", metavar="NAME", help="its configuration")
    add("--dataset_split", default="train", metavar="NAME", help="(default: train)")
    add("--streaming", action="store_true", help="read the data set while training instead of downloading it first")
    add("--train_shards", type=nonempty, metavar="URLS", help='webdataset shards, as in "photos-{000..127}.tar"')
    add("--image_column", default="image", metavar="NAME", help="column of a data set (default: image)")
    add(
        "--caption_column",
        metavar="NAME",
        help="column of a data set or of metadata.jsonl, or suffix in shards; none: no captions (default: text; in"
        " shards txt; of a data set none)",
    )
    add("--resolution", type=number(int, 16), default=512, metavar="PX", help="side of a crop (default: 512)")
    add("--random_flip", action="store_true", help="mirror half of the crops")
    add(
        "--degradation",
        nargs="+",
        choices=DEGRADATIONS,
        default=["mild"],
        help="how a small picture is made of a sharp one; of several, each sample draws one (default: mild)",
    )
    add(
        "--scale_factor",
        nargs=2,
        type=number(float, 1, 8),
        default=[2.0, 8.0],
        metavar=("MIN", "MAX"),
        help="enlargements to train for (default: 2 8)",
    )
    add(
        "--max_sequence_length",
        type=number(int, 1, 512),
        metavar="N",
        help="T5 tokens (default: 256 for FLUX.1-schnell, 512 for dev)",
    )
    cached = "crop a picture always at the same place and keep the latents of the sharp crop"
    add("--cache_latents", action="store_true", help=cached)
    add("--precomputed_dir", metavar="DIR", help="for text embeddings and latents (default: OUTPUT_DIR/precomputed)")
    add("--dataloader_num_workers", type=number(int, 0), default=4, metavar="N", help="per process (default: 4)")

    group = parser.add_argument_group("conditioning: share of the samples that")
    add = partial(group.add_argument, type=number(float, 0, 1), metavar="P")
    add("--dino_dropout", default=0.1, help="have no DINO tokens (default: 0.1)")
    add("--token_dropout", default=0.1, help="have only some of them (default: 0.1)")
    add("--strength_jitter", default=0.3, help="have them at a random strength (default: 0.3)")
    add("--proportion_empty_prompts", default=0.5, help="lose their caption (default: 0.5)")

    add = parser.add_argument_group("loss").add_argument
    add("--sigma_min", type=number(float, 0, 1), default=0.02, metavar="SIGMA", help="least noise (default: 0.02)")
    add(
        "--sigma_max",
        type=number(float, 0, 1),
        default=0.6,
        metavar="SIGMA",
        help="most noise, above the start_sigma of inference (default: 0.6)",
    )
    add("--weighting_scheme", choices=["none", "logit_normal"], default="none", help="none is even (default: none)")
    add("--logit_mean", type=float, default=0.0, metavar="X", help="of logit_normal (default: 0)")
    add("--logit_std", type=number(float, 0), default=1.0, metavar="X", help="of logit_normal (default: 1)")
    add(
        "--restoration_share",
        type=number(float, 0, 1),
        default=0.0,
        metavar="P",
        help="share of the samples that start where an enlargement does, at their noisy degraded latents, from"
        " --sigma_min to --sigma_max (default: 0)",
    )
    add(
        "--pixel_loss_weight",
        type=number(float, 0),
        default=0.0,
        metavar="X",
        help="weight of the loss of these samples' pictures, denoised in one step and decoded: L1 of pixels, edges and"
        " local edge energy (default: 0)",
    )
    add(
        "--guidance_scale",
        type=number(float, 0, 1000),
        default=1.0,
        metavar="X",
        help="what FLUX.1-dev is told while training; with more the projector would learn to undo it (default: 1)",
    )

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=number(int, 1), default=4, metavar="N", help="per process (default: 4)")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, metavar="N", help="(default: 1)")
    add("--max_train_steps", type=number(int, 1), default=20000, metavar="N", help="(default: 20000)")
    add(
        "--max_train_seconds",
        type=number(float, 0),
        metavar="SECONDS",
        help="stop with a checkpoint after this time of training (default: train to the last step)",
    )
    add("--learning_rate", type=number(float, 0), default=1e-4, metavar="RATE", help="(default: 1e-4)")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="cosine", help="(default: cosine)")
    add("--lr_warmup_steps", type=number(int, 0), default=500, metavar="N", help="(default: 500)")
    add("--lr_num_cycles", type=number(int, 1), default=1, metavar="N", help="of cosine_with_restarts (default: 1)")
    add("--lr_power", type=number(float, 0), default=1.0, metavar="X", help="of polynomial (default: 1)")
    add("--adam_beta1", type=number(float, 0, 1), default=0.9, metavar="X", help="(default: 0.9)")
    add("--adam_beta2", type=number(float, 0, 1), default=0.999, metavar="X", help="(default: 0.999)")
    add("--adam_weight_decay", type=number(float, 0), default=0.0, metavar="X", help="(default: 0)")
    add("--adam_epsilon", type=number(float, 0), default=1e-8, metavar="X", help="(default: 1e-8)")
    add("--max_grad_norm", type=number(float, 0), default=1.0, metavar="X", help="(default: 1)")
    add("--ema_decay", type=number(float, 0, 1), default=0.999, metavar="X", help="(default: 0.999)")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=nonempty, required=True, metavar="DIR", help="checkpoints, logs, pictures, final/")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="(default: 0)")
    add("--checkpointing_steps", type=number(int, 1), default=500, metavar="N", help="(default: 500)")
    add("--checkpoints_total_limit", type=number(int, 1), metavar="N", help="delete older ones (default: keep all)")
    add("--resume_from_checkpoint", type=nonempty, metavar="DIR", help='a checkpoint, or "latest"')
    add("--validation_data_dir", type=nonempty, metavar="DIR", help="pictures that are not trained on")
    add("--num_validation_images", type=number(int, 2), default=8, metavar="N", help="at least 2 (default: 8)")
    add("--validation_steps", type=number(int, 1), default=500, metavar="N", help="(default: 500)")
    add("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="(default: tensorboard)")
    add("--logging_dir", metavar="DIR", help="(default: OUTPUT_DIR/logs)")
    add("--tracker_project_name", default="dino_projector", metavar="NAME", help="(default: dino_projector)")
    add("--cpu", action="store_true", help="leave GPUs alone")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    if not argv:
        raise UsageError("no arguments are given (--help lists them)")
    args = build_parser().parse_args(argv)
    check_data(args)
    check_repository("--pretrained_model_name_or_path", args.pretrained_model_name_or_path, *MODEL_FILES)
    check_repository("--dino_model", args.dino_model, "config.json")
    if args.init_from_redux is not None:
        check_repository("--init_from_redux", args.init_from_redux, "model_index.json", "image_embedder/config.json")
    if args.resolution % 16:
        raise UsageError(f"argument --resolution: must be a multiple of 16 px, not {args.resolution}")
    for low, high in (("sigma_min", "sigma_max"), ("lr_warmup_steps", "max_train_steps")):
        if getattr(args, low) >= getattr(args, high):
            raise UsageError(f"--{low} {getattr(args, low):g} must be below --{high} {getattr(args, high):g}")
    if args.pixel_loss_weight and not args.restoration_share:
        raise UsageError(f"--pixel_loss_weight {args.pixel_loss_weight:g} needs a --restoration_share above 0")
    if args.scale_factor[0] > args.scale_factor[1]:
        raise UsageError(f"argument --scale_factor: {args.scale_factor[0]:g} is above {args.scale_factor[1]:g}")
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise UsageError(f"--output_dir {args.output_dir}: is a file")
    args.logging_dir = args.logging_dir or os.path.join(args.output_dir, "logs")
    args.precomputed_dir = args.precomputed_dir or os.path.join(args.output_dir, "precomputed")
    return args


def check_data(args: argparse.Namespace) -> None:
    sources = ("train_data_dir", "dataset_name", "train_shards")
    given = [f"--{name}" for name in sources if getattr(args, name) is not None]
    if len(given) != 1:
        raise UsageError(f"one of --{', --'.join(sources)} is needed, not {' and '.join(given) or 'none'}")
    for name in ("train_data_dir", "validation_data_dir"):
        folder = getattr(args, name)
        if folder is not None and not os.path.isdir(folder):
            raise UsageError(f"--{name} {folder}: no such folder")
    if args.streaming and args.dataset_name is None:
        raise UsageError("--streaming needs --dataset_name")
    if args.caption_column is None:
        args.caption_column = {"--train_data_dir": "text", "--train_shards": "txt"}.get(given[0], "none")


def fill_in_defaults(args: argparse.Namespace) -> None:
    """The options whose defaults depend on machine and run."""
    import torch

    from dino_projector.training.checkpoints import list_checkpoints
    from dino_projector.training.flow_matching import LEAST_START

    check_package("torchdata", "training")
    on_cpu = args.cpu or not torch.cuda.is_available()
    args.mixed_precision = args.mixed_precision or ("no" if on_cpu else "bf16")
    if args.quantization == "nf4" and on_cpu:
        raise UsageError("--quantization nf4 needs a CUDA device")
    if args.restoration_share and args.sigma_max <= LEAST_START:
        raise UsageError(f"--sigma_max {args.sigma_max:g} must be above {LEAST_START} with --restoration_share")
    if args.report_to != "none":
        check_package(args.report_to, f"--report_to {args.report_to}")
    if args.train_shards is not None:
        check_package("webdataset", "--train_shards")
    if args.dataset_name is not None:
        check_package("datasets", "--dataset_name")
    if args.resume_from_checkpoint is None and (checkpoints := list_checkpoints(args.output_dir)):
        raise UsageError(
            f"--output_dir {args.output_dir}: holds {checkpoints[-1].name} of another run; pass"
            " --resume_from_checkpoint latest or another folder"
        )


def training_quantization(kind: str, dtype) -> Any:
    """How diffusers quantizes the transformer while it loads it; `dtype` is what it computes in."""
    if kind == "none":
        return None
    from flux_dino_tile.loading import quantization_config, torchao_config

    if kind == "nf4":
        return quantization_config(kind, dtype)
    try:
        from torchao.quantization import Float8WeightOnlyConfig
    except ImportError as error:
        raise UsageError(f"--quantization fp8: {first_line(error)}; the extra `quant` brings it") from None
    # The weights alone: the fast products of `upscale.py`, with activations in 8 bits, are for inference.
    return torchao_config(Float8WeightOnlyConfig(set_inductor_config=False))


def check_package(name: str, option: str) -> None:
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise UsageError(f'{option} needs the package {name}: pip install "{name}"')


def main(argv: list[str] | None = None) -> int:
    def script() -> None:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        fill_in_defaults(args)
        quantization = training_quantization(args.quantization, "bfloat16")

        from dino_projector.training.checkpoints import WRITE_ERRORS, error_line
        from dino_projector.training.run import train
        from dino_projector.training.trainer import TrainingError

        hide_loading_bars()
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's, on newer PyTorch
        try:
            train(args, quantization)
        except (TrainingError, FloatingPointError, ValueError, *WRITE_ERRORS) as error:
            raise RuntimeError(error_line(error)) from error

    return run_script("train_projector.py", script)


if __name__ == "__main__":
    sys.exit(main())
