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

"""The options of the command line: what may be given, what goes together, and what it is without being given."""

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from .architecture import Architecture, read_architecture
from .embedded import EMBEDDED, locate_model
from .image_files import READ_SUFFIXES, limiting_pixels
from .messages import COMMAND, Parser, UsageError, nonempty, number, several, whole_pixels
from .records import read_record
from .regions import check_region_list, region_file


# `--memory`: one recipe for cards of so many GiB, group offloading with so many tiles at once to hide its traffic. It
# took 3.4 GiB for 8192 px (docs/memory.md).
CARDS_GIB = ("24", "16", "12", "8")
TILES_AT_ONCE = 4
FLAT_CONTRAST = 0.01

# The files that the folder of a FLUX.1 pipeline must have: what `--plan` reads, and what every such pipeline has.
PLAN_FILES = ("model_index.json", "transformer/config.json", "vae/config.json")
MODEL_FILES = (*PLAN_FILES, "scheduler/scheduler_config.json")

# The options for FLUX that `--plan` takes without `--use-flux`.
PLAN_OPTIONS = ("model", "projector", "tile_size", "tile_overlap", "text_tokens")


@dataclass(frozen=True)
class Settings:
    """How FLUX enlarges. `None` leaves a value to the model or the machine; [`load_flux`] fills them in."""

    model: str | None = None
    projector: str | None = None
    prompt: str | None = None
    region_prompts: list[dict[str, Any]] | None = None  # as the file has them
    dino_strength: float | None = None
    start_sigma: float | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    color_fix: str | None = None
    vae_residual: bool | None = None
    tile_size: int | tuple[int, int] | None = None
    tile_overlap: int = 64
    tile_batch_size: int = 1
    text_tokens: int | None = None
    skip_flat_tiles: float | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str = "none"
    memory: str | None = None
    quantize: str | None = None
    compile: bool = False
    resume: bool = False
    checkpoint_steps: int = 1
    worker_timeout: float = 600.0

    @property
    def has_prompt(self) -> bool:
        return self.prompt is not None or self.region_prompts is not None


# The settings that do not decide what the picture looks like.
MACHINE_SETTINGS = (
    *("tile_batch_size", "device", "offload", "memory", "compile"),
    *("resume", "checkpoint_steps", "worker_timeout"),
)
PICTURE_SETTINGS = [field.name for field in fields(Settings) if field.name not in MACHINE_SETTINGS]


@dataclass(frozen=True)
class Options(Settings):
    """A whole command."""

    inputs: tuple[str, ...] = ()
    output: str | None = None
    scale: float = 4.0
    overwrite: bool = False
    plan: bool = False
    summary: str | None = None
    allow_large_input: bool = False
    use_flux: bool = False
    preview: bool = False
    at: list[tuple[int, int]] | None = None
    dino_strengths: tuple[float, ...] | None = None  # of a preview, as are the next
    start_sigmas: tuple[float, ...] | None = None
    redo: tuple[int, int, int, int] | None = None
    photo: str | None = None
    record: dict[str, Any] | None = None  # what the picture to redo says of how it was made

    @property
    def trial(self) -> str | None:
        """The option by which a command works on a part of one picture."""
        return "--preview" if self.preview else None if self.redo is None else "--redo"


FLUX_OPTIONS = [field.name for field in fields(Settings)]


def build_parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s [options] input [output]\n       %(prog)s [options] input ... -o folder",
        description="Enlarge a photo, or every photo in a folder, 1 to 8 times. Bicubic by default; with --use-flux,\n"
        "FLUX.1 invents the detail, tile by tile, told by DINO features what each tile shows.",
        epilog="examples:\n"
        "  %(prog)s photo.jpg --scale 4\n"
        "  %(prog)s photos/ enlarged/ --scale 2\n"
        "  %(prog)s *.jpg -o enlarged/\n"
        "  %(prog)s photo.jpg --use-flux --model black-forest-labs/FLUX.1-schnell --offload model\n"
        "  %(prog)s photo.jpg --preview --start-sigma 0.1,0.2,0.4 --dino-strength 0,1\n"
        "  %(prog)s photo_x4_flux.png --redo 240,100,200,180 --seed 1\n\n"
        "EXIF, ICC profile, transparency and 16-bit grey are kept; the settings go to the EXIF tag Software.\n"
        "Exit status: 0 all done, 1 an image failed, 2 wrong usage.",
    )
    parser.add_argument(
        "paths",
        metavar="input",
        nargs="*",
        type=nonempty,
        help="image file, or folder that is searched with its subfolders; several with -o; without it the second is"
        " the output",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=nonempty,
        help="output file (.png, .jpg, .webp or .tif) or folder; what ends in / is a folder, made where it is missing "
        "(default: photo_x4.jpg beside photo.jpg, and photos_x4/ beside photos/, with FLUX photo_x4_flux.jpg and "
        "photos_x4_flux/; formats that cannot be written become .png)",
    )
    parser.add_argument(
        "--scale",
        type=number(float, 1, 8),
        default=argparse.SUPPRESS,
        help="enlargement of both sides, 1 to 8 (default: 4)",
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
    parser.add_argument(
        "--use-flux", action="store_true", help="enlarge with FLUX.1 instead of bicubic; the options below need it"
    )
    add_flux_options(parser)
    add_run_options(parser)
    add_trial_options(parser)
    return parser


def add_group(parser: Parser, title: str) -> Callable:
    """The function that adds options to a new group. Those that are not given are not in the result."""
    return partial(parser.add_argument_group(title).add_argument, default=argparse.SUPPRESS)


def add_flux_options(parser: Parser) -> None:
    """What a program can set that enlarges with FLUX."""
    add = add_group(parser, "FLUX: model")
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

    add = add_group(parser, "FLUX: picture")
    add("--prompt", metavar="TEXT", help="what the image shows (default: no prompt)")
    add(
        "--dino-strength",
        metavar="FACTOR",
        type=several(number(float, 0, 100)),
        help="weight of the DINO features, 0 to 100; 0 is off (default: 1); several, such as 0,0.5,1, with --preview",
    )
    add(
        "--start-sigma",
        metavar="SIGMA",
        type=several(number(float, 0.01, 1)),
        help="share of noise at the start, 0.01 to 1: the more, the more is invented (default: 0.35, or the model's); "
        "several with --preview",
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

    add = add_group(parser, "FLUX: tiles")
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
        const=FLAT_CONTRAST,
        type=number(float, 0, 1),
        help="leave tiles as they are, such as clear sky, in which no detail has more contrast than this, 0 to 1 "
        "(default: not; 0.01 if no number is given)",
    )

    add = add_group(parser, "FLUX: machine")
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
        "is planned for the largest",
    )


def add_run_options(parser: Parser) -> None:
    """What belongs to a run over files only."""
    add = add_group(parser, "FLUX: regions")
    add(
        "--region-prompts",
        metavar="FILE",
        type=region_file,
        help='JSON file with prompts for parts of the image: [{"prompt": TEXT, "box": [LEFT, TOP, RIGHT, BOTTOM]}, '
        "...], in pixels of the output or in fractions of it, 0 to 1; a tile gets --prompt and those of all boxes "
        "that it touches (default: none)",
    )

    add = add_group(parser, "FLUX: long runs")
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


def add_trial_options(parser: Parser) -> None:
    """What paints a part of one picture."""
    add = add_group(parser, "FLUX: a part of one picture (these need no --use-flux)")
    add(
        "--preview",
        action="store_true",
        help="before the whole picture is made, paint one tile of it with several --dino-strength (default: 0,0.5,1) "
        "and --start-sigma (default: half, once and twice the usual), and write a sheet of them, "
        "photo_x4_flux_preview.png",
    )
    add(
        "--at",
        metavar="X,Y",
        type=whole_pixels("X,Y"),
        action="append",
        help="preview the tile at this place, in pixels of the photo; may be repeated (default: the most detailed)",
    )
    add(
        "--redo",
        metavar="X,Y,W,H",
        type=whole_pixels("X,Y,W,H"),
        help="the input is a picture made with FLUX: paint this region of it, in its pixels, again from its photo, "
        "with its own settings but for those that are given, and write photo_x4_flux_redo.png; the rest stays as it "
        "is",
    )
    add(
        "--photo",
        metavar="FILE",
        type=nonempty,
        help="the photo from which the picture to --redo was made (default: the file of its name beside the picture)",
    )


def parse_arguments(argv: list[str]) -> Options:
    if not argv:
        raise UsageError("no input is given (--help lists the arguments)")
    parser = build_parser()
    given = vars(parser.parse_intermixed_args(argv))
    check_trial(given)
    if "redo" in given:
        given = take_up_settings(parser, given, argv)
    if "redo" in given or "preview" in given:
        given["use_flux"] = True
    for name in FLUX_OPTIONS:
        if name in given and not (given["use_flux"] or (given["plan"] and name in PLAN_OPTIONS)):
            raise UsageError(f"--{name.replace('_', '-')} needs --use-flux")
    inputs, output = split_paths(given.pop("paths"), given.pop("output"))
    return make_options(given | {"inputs": tuple(inputs), "output": output})


def check_trial(given: dict[str, Any]) -> None:
    """Raises if options do not go together that paint a part of one picture, or there are several pictures."""
    for name, needed in (("at", "preview"), ("photo", "redo")):
        if name in given and needed not in given:
            raise UsageError(f"--{name} needs --{needed}")
    trials = [name for name in ("preview", "redo") if name in given]
    for trial in trials:
        for other in (*trials, "plan", "resume"):
            if other != trial and given.get(other):
                raise UsageError(f"--{other} does not work with --{trial}")
        inputs, _ = split_paths(given["paths"], given["output"])
        if len(inputs) > 1 or os.path.isdir(inputs[0]):
            raise UsageError(f"--{trial} takes one picture")


def take_up_settings(parser: Parser, given: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """What is given for a picture to redo, and the picture's own settings where nothing else is given."""
    path = Path(given["paths"][0])
    with limiting_pixels(given["allow_large_input"]):
        record = read_record(path)
    unknown = sorted(record.keys() - {*PICTURE_SETTINGS, "method", "scale", "photo", "redone"})
    if unknown:
        raise UsageError(f"--redo {path}: has settings that this version does not know: {', '.join(unknown)}")
    for name in ("model", "projector"):
        # Of a folder, only its name is noted.
        if name not in given and name in record and record[name] != EMBEDDED and "/" not in str(record[name]):
            raise UsageError(f"--redo {path}: was made with the folder {record[name]}: --{name} says where it is")
    try:
        own = vars(parser.parse_intermixed_args([*recorded_arguments(record), str(path)]))
    except UsageError as error:
        raise UsageError(f"--redo {path}: has a setting that cannot be: {error}") from None
    if given.get("scale", own["scale"]) != own["scale"]:
        raise UsageError(f"--scale {given['scale']:g}: {path} was enlarged {own['scale']:g} times: leave it out")
    # Not an option's form: what a file says of regions, for which a prompt that is given stands in,
    if "region_prompts" in record and "prompt" not in given:
        try:
            own["region_prompts"] = check_region_list(record["region_prompts"])
        except ValueError as error:
            raise UsageError(f"--redo {path}: has regions that cannot be: {error}") from None
    # and the two sides of a tile, which a compiled run notes.
    if isinstance(record.get("tile_size"), list):
        own["tile_size"] = tuple(record["tile_size"])
    return {**own, **given, "record": record}


def recorded_arguments(record: dict[str, Any]) -> list[str]:
    """The settings of a picture as options of the command line."""
    arguments = [f"--scale={record.get('scale')}"]
    for name in PICTURE_SETTINGS:
        value, option = record.get(name), name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None and not isinstance(value, list):
            arguments.append(f"--{option}={value}")
    return arguments


def split_paths(paths: list[str], output: str | None) -> tuple[list[str], str | None]:
    """Inputs and output: the second of two paths is the output, if it is not given as an option."""
    if not paths:
        raise UsageError("no input is given (--help lists the arguments)")
    if output is not None or len(paths) == 1:
        return paths, output
    if len(paths) > 2:
        raise UsageError("several inputs need a folder for the results: -o FOLDER")
    source, target = paths
    is_picture = os.path.isfile(target) and Path(target).suffix.lower() in READ_SUFFIXES
    if is_picture and os.path.isfile(source) and not os.path.samefile(source, target):
        raise UsageError(
            f"{target}: a picture that is already there is no output without -o: give -o FOLDER to enlarge both, or"
            f" -o {target} to have the result there"
        )
    return [source], target


def make_options(given: dict[str, Any]) -> Options:
    """The options from those that are given. Checks what can be known to be wrong before torch is imported."""
    given = dict(given)
    for name in ("dino_strength", "start_sigma"):
        if name in given:
            # One value as a number: what is not previewed has one.
            values = given[name]
            given[name] = values[0]
            if given.get("preview"):
                given[f"{name}s"] = values
            elif len(values) > 1:
                raise UsageError(f"--{name.replace('_', '-')}: several values need --preview")
    if given.get("color_fix") == "none":
        del given["color_fix"]
    if "memory" in given:
        if "offload" in given:
            raise UsageError(f"--memory {given['memory']} sets --offload: give one of them")
        given = {"tile_batch_size": TILES_AT_ONCE, **given, "offload": "group"}
    if given.get("use_flux"):
        given.setdefault("model", EMBEDDED)
    options = Options(**given)
    check_tile_options(options)
    check_models(options)
    check_architecture(options, read_architecture(options.model, options.projector))
    if options.use_flux and not options.plan:
        check_modes(options)
    return options


def check_tile_options(options: Settings) -> None:
    if not isinstance(options.tile_size, int):
        return
    if options.tile_size % 16:
        raise UsageError(f"argument --tile-size: must be a multiple of 16 px, not {options.tile_size}")
    overlap = math.ceil(options.tile_overlap / 16) * 16
    if overlap >= options.tile_size:
        raise UsageError(
            f"argument --tile-overlap: must be below the {options.tile_size} px of --tile-size,"
            f" but {options.tile_overlap} is {overlap} px in whole tokens of 16 px"
        )


def check_models(options: Options) -> None:
    if options.model is not None:
        for file in PLAN_FILES if options.plan else MODEL_FILES:
            check_repository("--model", locate_model(options.model), file)
    if options.projector is not None:
        check_repository("--projector", options.projector, "dino_projector/config.json", "config.json")


def check_repository(option: str, name: str, *files: str) -> None:
    """Raises unless `name` is a folder with one of `files`, or could be a Hub repository."""
    if Path(name).is_dir():
        if not any(Path(name, file).is_file() for file in files):
            raise UsageError(f"{option} {name}: the folder has no {files[0]}")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UsageError(f"{option} {name}: no such folder, and no name of a Hub repository (owner/name)")


def check_architecture(settings: Settings, architecture: Architecture) -> None:
    """Raises if the models cannot take a setting."""
    carried = architecture.prompt_tokens
    if not architecture.has_text_encoders:
        if settings.has_prompt:
            option = "--region-prompts" if settings.prompt is None else "--prompt"
            raise UsageError(f"{option} needs text encoders, and --model {settings.model} has none: leave it out")
        if carried == 0:
            raise UsageError(
                f"--model {settings.model}: has no text encoders, so that it needs a projector that carries the empty"
                " prompt (--projector)"
            )
    if not settings.has_prompt and carried and settings.text_tokens not in (None, carried):
        raise UsageError(
            f"--text-tokens {settings.text_tokens}: without a prompt there are {carried}, those of the empty prompt"
            " that the projector carries: leave it out"
        )
    if settings.dino_strength is not None and architecture.dino_tokens == 0:
        raise UsageError("--dino-strength needs --projector: the model has no DINO projector")


def check_modes(options: Settings) -> None:
    for option, value in (("--compile", options.compile), ("--quantize", options.quantize)):
        if value and options.offload in ("group", "sequential"):
            raise UsageError(f"{option} does not work with --offload {options.offload}")
