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

"""Enlarges a photo, or a folder of photos: bicubic, or with FLUX.1 and DINO (`--use-flux`)."""

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from . import __version__
from .embedded import EMBEDDED, locate_model
from .image_files import (
    READ_SUFFIXES,
    WRITE_FORMATS,
    can_be_written_in_strips,
    check_place,
    check_writable,
    first_line,
    grey_integers,
    opaque_colors,
    read_picture,
    resize_rows,
    resize_strips,
    upright_size,
    write_picture,
    write_text,
)
from .processes import REMEDY, ProcessError, Processes


# torch and the pipeline take seconds to import, so only the functions that need them do it.

PROGRAM = "flux-dino-tile" if Path(sys.argv[0]).stem == "flux-dino-tile" else "upscale.py"

DINO_TOKENS = 256

# The options that mean something to FLUX only; the ones in PICTURE_OPTIONS decide what the picture looks like.
FLUX_DEFAULTS = {
    "model": None,
    "projector": None,
    "prompt": None,
    "dino_strength": None,
    "start_sigma": None,
    "steps": None,
    "guidance": None,
    "tile_size": None,
    "tile_overlap": 64,
    "tile_batch_size": 1,
    "text_tokens": None,
    "skip_flat_tiles": None,
    "seed": 0,
    "device": None,
    "dtype": None,
    "quantize": None,
    "offload": "none",
    "memory": None,
    "color_fix": None,
    "vae_residual": None,
    "compile": False,
    "resume": False,
    "checkpoint_steps": 1,
    "worker_timeout": 600.0,
}
MACHINE_OPTIONS = (
    *("tile_batch_size", "device", "offload", "memory", "compile"),
    *("resume", "checkpoint_steps", "worker_timeout"),
)
PICTURE_OPTIONS = [name for name in FLUX_DEFAULTS if name not in MACHINE_OPTIONS]
PLAN_OPTIONS = ("model", "tile_size", "tile_overlap", "text_tokens")

# `--memory`: one recipe for cards of so many GiB, group offloading with so many tiles at once to hide its traffic. It
# took 3.4 GiB for 8192 px (README.md).
CARDS_GIB = ("24", "16", "12", "8")
TILES_AT_ONCE = 4

# Small layers, and those that steer the big ones, which `--quantize` leaves as they are.
UNQUANTIZED_LAYERS = [
    "x_embedder",
    "context_embedder",
    "time_text_embed",
    "norm",
    "norm1",
    "norm1_context",
    "norm_out",
]

# The files that the folder of a FLUX.1 pipeline must have: what `--plan` reads, and what every such pipeline has.
PLAN_FILES = ("model_index.json", "transformer/config.json", "vae/config.json")
MODEL_FILES = (*PLAN_FILES, "scheduler/scheduler_config.json")

# What the pipeline raises in all processes that share an image, or in none.
COMMON_ERRORS = (ValueError, FloatingPointError)
# What it may raise at all, for programs that call it by these functions.
EXPECTED_ERRORS = (*COMMON_ERRORS, OSError, RuntimeError, MemoryError)


class UsageError(Exception):
    """The command cannot be carried out as given; the message is one line."""


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UsageError(message)


@dataclass
class Job:
    """An image to enlarge, and what became of it: "waiting", "ready", "done", "skipped", "failed" or "planned"."""

    source: Path
    target: Path
    outcome: str = "waiting"
    size: tuple[int, int] | None = None  # of the result, width and height in pixels
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def result(self) -> dict:
        return {"outcome": self.outcome, "size": self.size, "notes": self.notes, "error": self.error}

    def as_json(self) -> dict:
        return {"input": str(self.source), "output": str(self.target), **self.result()}


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or float from `low` to `high`."""
    noun, form = ("a whole number", "d") if kind is int else ("a number", "g")
    limits = f"of at least {low:{form}}" if high == math.inf else f"from {low:{form}} to {high:{form}}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {noun} {limits}, not {text!r}")
        return value

    return parse


def nonempty(text: str) -> str:
    """An argparse type: `Path("")` would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [options] input [output]",
        description="Enlarge a photo, or every photo in a folder, 1 to 8 times. Bicubic by default; with --use-flux,\n"
        "FLUX.1 invents the detail, tile by tile, told by DINO features what each tile shows.",
        epilog="examples:\n"
        "  %(prog)s photo.jpg --scale 4\n"
        "  %(prog)s photos/ enlarged/ --scale 2\n"
        "  %(prog)s photo.jpg --use-flux --model black-forest-labs/FLUX.1-schnell --offload model\n\n"
        "EXIF, ICC profile, transparency and 16-bit grey are kept; the settings go to the EXIF tag Software.\n"
        "Exit status: 0 all done, 1 an image failed, 2 wrong usage.",
    )
    parser.add_argument("input", type=nonempty, help="image file, or folder that is searched with its subfolders")
    parser.add_argument(
        "output_argument",
        metavar="output",
        nargs="?",
        type=nonempty,
        help="output file (.png, .jpg, .webp or .tif) or folder; what ends in / is a folder, made where it is missing "
        "(default: photo_x4.jpg beside photo.jpg, and photos_x4/ beside photos/, with FLUX photo_x4_flux.jpg and "
        "photos_x4_flux/; formats that cannot be written become .png)",
    )
    parser.add_argument("-o", "--output", type=nonempty, help="the same as the second argument")
    parser.add_argument(
        "--scale", type=number(float, 1, 8), default=4.0, help="enlargement of both sides, 1 to 8 (default: 4)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="make outputs that are already there anew; without it they are skipped, whatever settings made them",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print each image's FLUX tiles and their cost and stop; reads only the headers of the images, so that a "
        "damaged one may pass; needs no model, but reads the architecture from --model if that is a folder (default: "
        "that of FLUX.1; with --use-flux that of the small model)",
    )
    parser.add_argument(
        "--summary",
        metavar="FILE",
        type=nonempty,
        help="write what became of each image to this file, as JSON, also after Ctrl-C",
    )
    parser.add_argument(
        "--allow-large-input",
        action="store_true",
        help="read images of any size; without it, what has more than 179 megapixels is refused, because a small file "
        "can be made that fills the memory",
    )
    parser.add_argument("--use-flux", action="store_true", help="enlarge with FLUX.1 instead of bicubic")

    def group(title: str) -> Callable:
        add = parser.add_argument_group(title).add_argument
        return partial(add, default=argparse.SUPPRESS)

    add = group("model (with --use-flux)")
    add(
        "--model",
        type=nonempty,
        help="folder or Hub repository of a FLUX.1 pipeline (default: the small one that comes with this program)",
    )
    add(
        "--projector",
        type=nonempty,
        help="folder or Hub repository with a dino_projector/ (default: the model's own, if it has one)",
    )

    add = group("picture (with --use-flux)")
    add("--prompt", metavar="TEXT", help="what the image shows (default: no prompt)")
    add(
        "--dino-strength",
        metavar="FACTOR",
        type=number(float, 0, 100),
        help="weight of the DINO features, 0 to 100; 0 is off (default: 1)",
    )
    add(
        "--start-sigma",
        metavar="SIGMA",
        type=number(float, 0.01, 1),
        help="share of noise at the start, 0.01 to 1: the more, the more is invented (default: 0.35, or the model's)",
    )
    add(
        "--steps",
        metavar="N",
        type=number(int, 1),
        help="denoising steps (default: 4 with schnell, 12 with dev)",
    )
    add(
        "--guidance",
        metavar="FACTOR",
        type=number(float, 0, 1000),
        help="guidance scale, 0 to 1000; FLUX.1-schnell ignores it (default: 3.5)",
    )
    add("--seed", metavar="N", type=number(int, 0, 2**64 - 1), help="seed of the noise (default: 0)")
    add(
        "--color-fix",
        choices=["none", "wavelet", "adain"],
        help="match the colours to the input: its low frequencies, or its mean and spread (default: none)",
    )
    add(
        "--vae-residual",
        action=argparse.BooleanOptionalAction,
        help="add what the VAE loses of the input, such as grain; costs time (default: the model's, for FLUX.1 no)",
    )

    add = group("tiles (with --use-flux or --plan)")
    add(
        "--tile-size",
        metavar="PX",
        type=number(int, 16),
        help="side of a tile in pixels of the output, a multiple of 16 (default: what costs least, or the model's)",
    )
    add(
        "--tile-overlap",
        metavar="PX",
        type=number(int, 0),
        help="least overlap of two tiles in pixels of the output (default: 64)",
    )
    add("--tile-batch-size", metavar="N", type=number(int, 1), help="tiles that run at once (default: 1)")
    add(
        "--text-tokens",
        metavar="N",
        type=number(int, 1, 512),
        help="tokens that a prompt is padded to, for example 128, 256 or 512; fewer are faster (default: 256 with "
        "schnell, 512 with dev, as they were trained)",
    )
    add(
        "--skip-flat-tiles",
        metavar="CONTRAST",
        nargs="?",
        const=True,
        type=number(float, 0, 1),
        help="leave tiles as they are, such as clear sky, in which no detail has more contrast than this, 0 to 1 "
        "(default: not; 0.01 if no number is given)",
    )

    add = group("machine (with --use-flux)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of them that is there)")
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="number format of the models (default: bfloat16, on the CPU float32)",
    )
    add(
        "--offload",
        choices=["none", "model", "group", "sequential"],
        help="keep the models in main memory and move to the device, when they are needed, whole models, blocks "
        "ahead of time, or layers one by one: from fast to small (default: none)",
    )
    add(
        "--memory",
        choices=CARDS_GIB,
        help="fit into a GPU with so many GiB: --offload group --tile-batch-size 4; main memory holds a copy of the "
        "models",
    )
    add(
        "--quantize",
        choices=["fp8", "nf4"],
        help="store the transformer in 8 bits with torchao (GPUs since Ada and Hopper; with --compile also faster) or "
        'in 4 bits with bitsandbytes; pip install "flux-dino-tile[quant]" brings both',
    )
    add(
        "--compile",
        action="store_true",
        help="compile the transformer and the VAE: minutes at first, faster after; all images get the tile size that "
        "is planned for the first",
    )
    add(
        "--resume",
        action="store_true",
        help="keep a checkpoint of the image in work, in a hidden folder beside the output, and go on from it: the "
        "same command after a crash gives the same image, and with other settings the image fails",
    )
    add(
        "--checkpoint-steps",
        metavar="N",
        type=number(int, 1),
        help="steps from one checkpoint to the next, with --resume (default: 1)",
    )
    add(
        "--worker-timeout",
        metavar="SECONDS",
        type=number(float, 1),
        help="with several processes (accelerate launch): end when one gives no sign of life for so long (default: "
        "600)",
    )
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    if not argv:
        raise UsageError("no input is given (--help lists the arguments)")
    args = build_parser().parse_args(argv)
    given = [name for name in FLUX_DEFAULTS if name in args]
    for name in given:
        if not (args.use_flux or (args.plan and name in PLAN_OPTIONS)):
            raise UsageError(f"--{name.replace('_', '-')} needs --use-flux")
    for name, default in FLUX_DEFAULTS.items():
        if name not in given:
            setattr(args, name, default)
    if args.color_fix == "none":
        args.color_fix = None
    if args.memory is not None:
        if "offload" in given:
            raise UsageError(f"--memory {args.memory} sets --offload: give one of them")
        args.offload = "group"
        if "tile_batch_size" not in given:
            args.tile_batch_size = TILES_AT_ONCE

    if args.output and args.output_argument:
        raise UsageError("the output is given twice")
    args.output = args.output or args.output_argument
    if args.tile_size and args.tile_size % 16:
        raise UsageError(f"argument --tile-size: must be a multiple of 16 px, not {args.tile_size}")
    overlap = math.ceil(args.tile_overlap / 16) * 16
    if args.tile_size and overlap >= args.tile_size:
        raise UsageError(
            f"argument --tile-overlap: must be below the {args.tile_size} px of --tile-size,"
            f" but {args.tile_overlap} is {overlap} px in whole tokens of 16 px"
        )
    if args.use_flux and args.model is None:
        args.model = EMBEDDED
    if args.model is not None:
        for file in PLAN_FILES if args.plan else MODEL_FILES:
            check_repository("--model", locate_model(args.model), file)
    if args.use_flux and not args.plan:
        check_flux_arguments(args)
    return args


def check_flux_arguments(args: argparse.Namespace) -> None:
    """What can be known to be wrong before torch is imported."""
    for option, value in (("--compile", args.compile), ("--quantize", args.quantize)):
        if value and args.offload in ("group", "sequential"):
            raise UsageError(f"{option} does not work with --offload {args.offload}")
    if args.projector is not None:
        check_repository("--projector", args.projector, "dino_projector/config.json", "config.json")


def check_repository(option: str, name: str, *files: str) -> None:
    """Raises unless `name` is a folder with one of `files`, or could be a Hub repository."""
    if Path(name).is_dir():
        if not any(Path(name, file).is_file() for file in files):
            raise UsageError(f"{option} {name}: the folder has no {files[0]}")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UsageError(f"{option} {name}: no such folder, and no name of a Hub repository (owner/name)")


def find_jobs(args: argparse.Namespace) -> list[Job]:
    source = Path(args.input)
    ending = f"_x{args.scale:g}_flux" if args.use_flux else f"_x{args.scale:g}"
    # Not `Path.is_dir` and `Path.exists`, which raise on names that are too long.
    if os.path.isdir(source):
        # "." and ".." have no name of their own.
        named = source if source.name.strip(".") else source.resolve()
        return folder_jobs(source, Path(args.output or named.with_name(f"{named.name}{ending}")))
    if not os.path.exists(source):
        raise UsageError(f"{source}: no such file or folder")
    suffix = source.suffix if source.suffix.lower() in WRITE_FORMATS else ".png"
    default = source.with_name(f"{source.stem}{ending}{suffix}")
    target = Path(args.output or default)
    if os.path.isdir(target) or (args.output or "").endswith(("/", os.sep)):
        target = target / default.name
    if target.suffix.lower() not in WRITE_FORMATS:
        raise UsageError(
            f"{target}: the output must be a folder or end in {', '.join(WRITE_FORMATS)}; a new folder ends in /"
        )
    if os.path.exists(target) and target.samefile(source):
        raise UsageError(f"{target}: the output would overwrite the input")
    return [Job(source, target)]


def folder_jobs(source: Path, output: Path) -> list[Job]:
    if os.path.exists(output) and not os.path.isdir(output):
        raise UsageError(f"{output}: the input is a folder, so the output must be one too")
    if output.resolve() == source.resolve():
        raise UsageError(f"{output}: the output would overwrite the input")
    jobs = [Job(path, output / folder_target(path.relative_to(source))) for path in find_images(source, output)]
    if not jobs:
        raise UsageError(f"{source}: no images in this folder ({', '.join(sorted(READ_SUFFIXES))})")
    return jobs


def folder_target(path: Path) -> Path:
    # "a.gif.png", because "a.png" may be in the folder too.
    return path if path.suffix.lower() in WRITE_FORMATS else path.with_name(f"{path.name}.png")


def find_images(folder: Path, left_out: Path) -> list[Path]:
    """The image files in `folder` and below, without hidden ones and without those in the folder `left_out`."""
    images = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if name[0] != "." and Path(parent, name).resolve() != left_out.resolve()
        ]
        paths = [Path(parent, name) for name in files if name[0] != "."]
        images += [path for path in paths if path.suffix.lower() in READ_SUFFIXES]
    return sorted(images)


def target_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


def say(text: str, file=None) -> None:
    """Prints a line above the progress bars."""
    # In one write, so that lines of several processes do not run into each other.
    tqdm.write(f"{printable(text)}\n", file=file or sys.stdout, end="")


def printable(text: str) -> str:
    """The text with escapes in place of control characters but "\\n", and of what the terminal cannot show."""
    # File names may hold them: they could move the cursor, or could not be encoded.
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say_error(text: str) -> None:
    say(f"{PROGRAM}: error: {text}", file=sys.stderr)


def attempt(step: Callable[..., str], job: Job, *args) -> None:
    """Does one step for one image, which sets its outcome; an error becomes one line and the outcome "failed"."""
    try:
        job.outcome = step(job, *args)
    except ProcessError:
        raise
    except Exception as error:  # whatever it is, the other images have to be done
        job.outcome, job.error = "failed", "out of memory" if is_out_of_memory(error) else first_line(error)
        say_error(f"{job.source}: {job.error}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether main memory was not enough; PyTorch raises a `RuntimeError` for it."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def check_job(job: Job, args: argparse.Namespace) -> str:
    if os.path.exists(job.target) and not args.overwrite:
        say(
            f"{job.source}: skipped, {job.target} is already there, whatever settings made it"
            " (--overwrite makes it anew)"
        )
        checkpoint = checkpoint_folder(job.target)
        # Killed between the output and the deletion of its checkpoint.
        if os.path.isdir(checkpoint) and checkpoint.stat().st_mtime <= job.target.stat().st_mtime:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return "skipped"
    size = target_size(upright_size(job.source), args.scale)
    check_writable(job.target, size)
    if args.use_flux:
        from pipeline_flux_dino_tile import plan_tiles

        plan_tiles(size[1], size[0], args.tile_size, args.tile_overlap)
        # Before minutes are spent on loading the model for a picture that is damaged.
        read_picture(job.source)
    return "ready"


def take_result(job: Job, result: dict | None) -> str:
    """Takes over what another process reported about an image, `None` if it did not live to tell."""
    if result is None:
        raise RuntimeError(f"the process that worked on it is gone; {REMEDY}")
    job.size, job.notes, job.error = result["size"], result["notes"], result["error"]
    return result["outcome"]


def checkpoint_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.checkpoint")


def upscale_file(job: Job, enlarger, args: argparse.Namespace) -> str:
    picture = read_picture(job.source)
    if args.use_flux and picture.image.mode == "F":
        picture.image = grey_integers(picture.image, 255)
        picture.notes.append("16 bits become 8 with FLUX")
    source, job.size = picture.image, target_size(picture.image.size, args.scale)
    options = {"checkpoint_dir": checkpoint_folder(job.target)} if args.resume else {}
    strips = None
    # Matching the colours takes the whole picture.
    if can_be_written_in_strips(job.target, job.size) and args.color_fix is None:
        strips = enlarger.strips(source, job.size, **options)
    else:
        picture.image = enlarger.whole(source, job.size, **options)
    if not enlarger.writes:
        exhaust(strips)
        return "done"
    try:
        lost = write_picture(picture, job.target, software_text(args), strips, job.size)
    except Exception:
        if enlarger.process_group is not None:
            exhaust(strips)  # the other processes need this one's tiles
        raise
    if args.resume:
        shutil.rmtree(checkpoint_folder(job.target), ignore_errors=True)
    job.notes += picture.notes + lost
    for note in job.notes:
        say(f"{job.source}: {note}")
    say(f"{job.source} -> {job.target} ({job.size[0]}x{job.size[1]} px)")
    return "done"


def software_text(args: argparse.Namespace) -> str:
    settings = {"method": "flux" if args.use_flux else "bicubic", "scale": args.scale}
    if args.use_flux:
        options = vars(args)
        settings |= {name: options[name] for name in PICTURE_OPTIONS if options[name] is not None}
    return f"flux-dino-tile {__version__} {json.dumps(settings)}"


class BicubicEnlarger:
    """Enlarges images to a size (width, height) in pixels, as a whole or in strips from top to bottom."""

    process_group = None
    writes = True

    def whole(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size, Image.Resampling.BICUBIC)

    def strips(self, image: Image.Image, size: tuple[int, int]) -> Iterator[Image.Image]:
        return resize_strips(image, size)


class FluxEnlarger:
    """
    Enlarges images with a pipeline, by the options in `args`; forms as in [`BicubicEnlarger`].

    With a `process_group`, whose processes make the same calls, they share the tiles of each image. Then all of them
    have to take all strips, and only the first `writes`.
    """

    def __init__(self, pipe, args: argparse.Namespace, process_group=None):
        from pipeline_flux_dino_tile import is_first_process

        self.pipe = pipe
        self.args = args
        self.process_group = process_group
        self.writes = is_first_process(process_group)

    def whole(self, image: Image.Image, size: tuple[int, int], checkpoint_dir: Path | None = None) -> Image.Image:
        result = self.call(image, size, "pil", checkpoint_dir).images[0]
        alpha = BicubicEnlarger().whole(image.getchannel("A"), size) if has_alpha(image) else None
        return as_source(result, image, alpha)

    def strips(
        self, image: Image.Image, size: tuple[int, int], checkpoint_dir: Path | None = None
    ) -> Iterator[Image.Image]:
        width, height = size
        latents = self.call(image, size, "latent", checkpoint_dir).images
        plan = self.pipe.plan_tiles(height, width, self.args.tile_size, self.args.tile_overlap)
        wide_alpha = None
        if has_alpha(image):
            wide_alpha = BicubicEnlarger().whole(image.getchannel("A"), (width, image.height))
        top = 0
        with self.ending_all():
            residual_image = None
            if self.args.vae_residual:
                residual_image = self.pipe.prepare_image(opaque_colors(image), height, width)
            for pixels in self.pipe.decode_pixels(latents, plan, height, width, self.process_group, residual_image):
                bottom = top + pixels.shape[1]
                alpha = wide_alpha and resize_rows(wide_alpha, height, top, bottom)
                yield as_source(Image.fromarray(pixels[0]), image, alpha)
                top = bottom

    def call(
        self,
        image: Image.Image,
        size: tuple[int, int],
        output_type: str,
        checkpoint_dir: Path | None = None,
        **options,
    ):
        """
        The pipeline's output; after an out-of-memory on the GPU tried again with half as many tiles at once, unless
        other processes share the image: they would have to do the same.
        """
        import torch

        args = self.args
        while True:
            try:
                with self.ending_all():
                    return self.pipe(
                        image=opaque_colors(image),
                        width=size[0],
                        height=size[1],
                        prompt=args.prompt,
                        start_sigma=args.start_sigma,
                        num_inference_steps=args.steps,
                        guidance_scale=args.guidance,
                        tile_size=args.tile_size,
                        tile_overlap=args.tile_overlap,
                        tile_batch_size=args.tile_batch_size,
                        dino_conditioning_scale=args.dino_strength or 0.0,
                        max_sequence_length=args.text_tokens,
                        skip_flat_tiles=args.skip_flat_tiles or False,
                        color_fix=args.color_fix,
                        vae_residual=args.vae_residual and output_type != "latent",
                        # On the CPU, so that a seed means the same noise on every machine.
                        generator=torch.Generator("cpu").manual_seed(args.seed),
                        output_type=output_type,
                        checkpoint_dir=checkpoint_dir,
                        checkpoint_steps=args.checkpoint_steps,
                        process_group=self.process_group,
                        **options,
                    )
            except torch.OutOfMemoryError as error:
                if args.tile_batch_size == 1:
                    raise RuntimeError(
                        "out of GPU memory with one tile at a time: try --memory 8, or a smaller --tile-size"
                    ) from error
            # Here, where the error does not hold the tensors of the call any more.
            args.tile_batch_size //= 2
            say(f"out of GPU memory: trying again with --tile-batch-size {args.tile_batch_size}")
            self.pipe.maybe_free_model_hooks()
            torch.cuda.empty_cache()

    @contextmanager
    def ending_all(self) -> Iterator[None]:
        """Makes an error end the run if other processes share the image and wait for this one."""
        try:
            yield
        except COMMON_ERRORS:
            raise
        except Exception as error:
            if self.process_group is None:
                raise
            raise ProcessError(
                f"a process that shares the tiles failed or is gone ({first_line(error)}); {REMEDY}"
            ) from error


def exhaust(strips: Iterator[Image.Image] | None) -> None:
    """Takes the strips that are left, if there are any, and drops them."""
    for _ in strips or ():
        pass


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "RGBA")


def as_source(result: Image.Image, source: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """An RGB result in the mode of its source: grey where that is grey, and with the transparency `alpha`."""
    if source.mode in ("L", "LA"):
        result = result.convert("L")
    if alpha is not None:
        result.putalpha(alpha)
    return result


def load_flux(args: argparse.Namespace):
    """The pipeline on its device. Fills in the options in `args` whose defaults depend on machine and model."""
    import torch

    from pipeline_flux_dino_tile import FluxDinoTilePipeline

    args.device = args.device or default_device(torch)
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(torch, args.device)
    on_cpu = torch.device(args.device).type == "cpu"
    if on_cpu and args.offload != "none":
        raise UsageError(f"--offload {args.offload} needs an accelerator, and the device is the CPU")
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")

    hide_loading_bars()
    options = {"dtype": getattr(torch, args.dtype), "use_safetensors": True}
    if args.quantize is not None:
        from diffusers import PipelineQuantizationConfig

        options["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={"transformer": quantization_config(args.quantize, options["dtype"])}
        )
    model, projector = locate_model(args.model), args.projector
    pipe = load("--model", model, partial(FluxDinoTilePipeline.from_pretrained, **options))
    # The folder may have one beside the models of its index.
    if projector is None and pipe.dino_projector is None and Path(model, "dino_projector", "config.json").is_file():
        projector = model
    if projector is not None:
        load("--projector", projector, pipe.load_dino_projector)
    if pipe.dino_projector is None:
        if args.dino_strength is not None:
            raise UsageError("--dino-strength needs --projector: the model has no DINO projector")
        say("no DINO projector: the tiles are not told what they show (--projector gives one)")
    elif args.dino_strength is None:
        args.dino_strength = 1.0
    if args.dtype == "float16" and pipe.vae.config.get("force_upcast"):
        # The VAE's own word that it overflows in float16.
        pipe.vae.to(torch.float32)
    if args.vae_residual is None:
        args.vae_residual = pipe.config.default_vae_residual or None
    args.steps, args.guidance, args.start_sigma = pipe.get_default_settings(
        None, None, args.start_sigma, args.steps, args.guidance
    )

    place(pipe, torch.device(args.device), args.offload)
    if args.compile:
        pipe.compile_for_upscaling()
    return pipe


def is_quantized_layer(name: str) -> bool:
    """Whether `--quantize` takes the linear layer of this name in a FLUX.1 transformer."""
    return name != "proj_out" and not any(f"{part}." in f"{name}." for part in UNQUANTIZED_LAYERS)


def torchao_config(config):
    """A torchao config for all layers but those that stay as they are, which diffusers knows by their weights."""
    from diffusers import TorchAoConfig

    return TorchAoConfig(config, modules_to_not_convert=[*UNQUANTIZED_LAYERS, "proj_out.weight"])


def quantization_config(kind: str, dtype):
    """How diffusers quantizes a FLUX.1 transformer while it loads it; `dtype` is what it computes in."""
    from diffusers import BitsAndBytesConfig

    try:
        if kind == "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[*UNQUANTIZED_LAYERS, "proj_out"],
            )
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        # torchao would tune the compiler for the whole process, so that compiling takes many minutes.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        return torchao_config(config)
    except ImportError as error:
        raise UsageError(f"--quantize {kind}: {first_line(error)}; the extra `quant` brings it") from None


def hide_loading_bars() -> None:
    """Leaves the bars of tiles, and of downloads from the Hub."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hides_downloads = are_progress_bars_disabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # the Hub's too
    if not hides_downloads:
        enable_progress_bars()


def load(option: str, name: str, loader: Callable):
    try:
        return loader(name)
    except Exception as error:  # on a broken folder the loaders raise anything
        reason = first_line(error)
        if not Path(name).is_dir() and is_unreachable(error):
            reason = "not in the local cache, and the Hub cannot be reached"
        raise UsageError(f"{option} {name}: {reason}") from error


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the error comes from a Hub that does not answer, or may not be asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if error is None:
        return False
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        return True
    return is_unreachable(error.__cause__) or is_unreachable(error.__context__)


def check_device(torch, name: str) -> None:
    unknown = UsageError(f"--device {name}: not a device of this PyTorch: use cuda, mps or cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown from None
    try:
        torch.empty(0, device=device)
    except (NotImplementedError, ImportError):
        raise unknown from None
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {first_line(error)}") from None


def default_device(torch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def place(pipe, device, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)


def read_architecture(model: str | None) -> dict:
    """Keyword arguments for the plan and the cost, from the configs in a pipeline's folder; empty for FLUX.1's own."""
    if model is None or not Path(model).is_dir():
        return {}
    from pipeline_flux_dino_tile import default_text_tokens

    try:
        transformer, vae = (
            json.loads(Path(model, part, "config.json").read_text()) for part in ("transformer", "vae")
        )
        return {
            "inner_dim": transformer["num_attention_heads"] * transformer["attention_head_dim"],
            "num_layers": transformer["num_layers"] + transformer["num_single_layers"],
            "pixels_per_token": 2 ** len(vae["block_out_channels"]),
            "text_tokens": default_text_tokens(transformer),
            "tile_size": json.loads(Path(model, "model_index.json").read_text()).get("default_tile_size"),
        }
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--model {model}: not the folder of a FLUX.1 pipeline ({first_line(error)})") from error


def plan_file(job: Job, args: argparse.Namespace, architecture: dict, totals: dict[str, float]) -> str:
    from pipeline_flux_dino_tile import plan_tiles, transformer_flops

    architecture = dict(architecture)
    num_layers = architecture.pop("num_layers", 57)
    text_tokens = architecture.pop("text_tokens", 512)
    text_tokens = args.text_tokens or text_tokens
    tile_size = architecture.pop("tile_size", None)
    size = upright_size(job.source)
    width, height = target_size(size, args.scale)
    plan = plan_tiles(height, width, args.tile_size or tile_size, args.tile_overlap, **architecture)
    num_tokens = plan.tokens_per_tile + text_tokens + DINO_TOKENS
    tflop = transformer_flops(num_tokens, architecture.get("inner_dim", 3072), num_layers) / 1e12
    overlaps = sorted(
        {
            start + length - following
            for starts, length in ((plan.tops, plan.tile_height), (plan.lefts, plan.tile_width))
            for start, following in pairwise(starts)
        }
    )
    widths = " to ".join(map(str, overlaps[:1] + overlaps[1:][-1:]))
    overlap = f", overlapping {widths} px" if overlaps else ""
    say(
        f"{job.source}: {size[0]}x{size[1]} -> {width}x{height} px\n"
        f"  tiles: {len(plan)} ({len(plan.lefts)} across, {len(plan.tops)} down) of"
        f" {plan.tile_width}x{plan.tile_height} px{overlap}\n"
        f"  tokens per tile: {plan.tokens_per_tile} image + {text_tokens} text + {DINO_TOKENS} DINO\n"
        f"  TFLOP per step: {len(plan) * tflop:.4g} ({tflop:.4g} per tile)"
    )
    totals["tiles"] += len(plan)
    totals["tflop"] += len(plan) * tflop
    return "planned"


def print_plans(jobs: list[Job], args: argparse.Namespace) -> None:
    architecture = read_architecture(args.model and locate_model(args.model))
    totals: dict[str, float] = {"tiles": 0, "tflop": 0}
    for job in jobs:
        attempt(plan_file, job, args, architecture, totals)
    if len(jobs) > 1:
        planned = count_outcomes(jobs)["planned"]
        say(f"{planned} images: {totals['tiles']} tiles, {totals['tflop']:.4g} TFLOP per step")


def upscale(jobs: list[Job], args: argparse.Namespace) -> None:
    """Enlarges what can be; of several processes, the first one's `jobs` get to know what became of all."""

    def tell_end(reason: str) -> None:
        say_error(reason)
        if processes.is_first:
            write_summary(jobs, args.summary)

    processes = Processes(args.worker_timeout, tell_end)
    if processes.is_first:
        for job in jobs:
            attempt(check_job, job, args)
    ready = [job for job in jobs if job.outcome == "ready"]
    names = processes.from_first([[str(job.source), str(job.target)] for job in ready])
    if not processes.is_first:
        ready = [Job(Path(source), Path(target)) for source, target in names]

    # With fewer images than processes, all work on the tiles of one image.
    shares_tiles = args.use_flux and 0 < len(ready) < processes.count
    enlarger: BicubicEnlarger | FluxEnlarger = BicubicEnlarger()
    if args.use_flux and ready:
        pipe = load_flux(args)
        if not processes.is_first:
            pipe.set_progress_bar_config(disable=True)
        enlarger = FluxEnlarger(pipe, args, processes.join_group() if shares_tiles else None)
    # `None` shows the bar on terminals only.
    is_hidden = None if len(ready) > 1 and processes.is_first else True
    share = range(len(ready)) if shares_tiles else processes.take(len(ready))
    for index in tqdm(share, total=len(ready), unit="image", disable=is_hidden):
        attempt(upscale_file, ready[index], enlarger, args)
        processes.report(index, ready[index].result())
    others = [index for index, job in enumerate(ready) if job.outcome == "ready"]
    for index, result in processes.collect(others).items():
        attempt(take_result, ready[index], result)
    if len(jobs) > 1 and processes.is_first:
        outcomes = count_outcomes(jobs)
        say(", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("done", "skipped", "failed")))


def count_outcomes(jobs: list[Job]) -> Counter:
    return Counter(job.outcome for job in jobs)


@contextmanager
def summarizing(jobs: list[Job], path: str | None) -> Iterator[None]:
    """Writes what became of the jobs as JSON to the file `path`, if it is given, however the context ends."""
    if path is None:
        yield
        return
    with usage_errors("--summary"):
        check_place(Path(path))
    try:
        yield
    finally:
        write_summary(jobs, path)


def write_summary(jobs: list[Job], path: str | None) -> None:
    if path is not None:
        summary = {"outcomes": count_outcomes(jobs), "images": [job.as_json() for job in jobs]}
        with usage_errors("--summary"):
            write_text(Path(path), json.dumps(summary, indent=2) + "\n")


@contextmanager
def usage_errors(option: str) -> Iterator[None]:
    """Turns an `OSError` into the usage error of an option."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{option}: {first_line(error)}") from error


def run_script(name: str, script: Callable[[], None], farewell: str = "interrupted") -> int:
    """The exit status of a script of this project: 0, 1 if it failed, 2 for wrong usage, 130 after Ctrl-C."""

    def say_why(text: str) -> None:
        print(f"{name}: error: {text}", file=sys.stderr, flush=True)

    # transformers reads it when it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        script()
    except UsageError as error:
        say_why(str(error))
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        say_why(first_line(error))
        return 1
    except KeyboardInterrupt:
        say_why(farewell)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    # transformers reads it when it is imported, and says then that torchvision, which nothing here needs, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Likewise torch, which shows where in its code it was when another process went away.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    is_first = int(os.environ.get("RANK", 0)) == 0
    max_input_pixels = Image.MAX_IMAGE_PIXELS
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        jobs = find_jobs(args)
        if args.plan and not is_first:
            return 0
        Image.MAX_IMAGE_PIXELS = None if args.allow_large_input else max_input_pixels
        with summarizing(jobs, args.summary if is_first else None):
            print_plans(jobs, args) if args.plan else upscale(jobs, args)
    except UsageError as error:
        say_error(str(error))
        return 2
    except ProcessError as error:
        say_error(str(error))
        return 1
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130
    finally:
        Image.MAX_IMAGE_PIXELS = max_input_pixels
    return 1 if count_outcomes(jobs)["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
