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

"""Enlarges many images of random sizes with one pipeline, and reports how main memory grows.

    python scripts/soak.py --images 200

A dino_projector/ in the model's folder is used. Each image goes the way of `upscale.py`: read
from a file, enlarged twice, written to a file. Exit status: 0, or 1 if memory grew by more than `--max-growth`.
"""

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
from PIL import Image

from flux_dino_tile.embedded import EMBEDDED
from flux_dino_tile.flux_enlarger import FluxEnlarger
from flux_dino_tile.jobs import Job, run_step
from flux_dino_tile.loading import load_flux
from flux_dino_tile.options import parse_arguments
from flux_dino_tile.upscale import upscale_file


def save_photo(path: Path, rng: np.random.Generator) -> None:
    """An image of 32 to 96 px a side of smooth random colours, grey or transparent now and then."""
    width, height = (int(side) for side in rng.integers(32, 97, 2))
    colors = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = colors.resize((width, height), Image.Resampling.BICUBIC)
    image.convert(str(rng.choice(["RGB", "RGB", "RGB", "L", "RGBA"]))).save(path)


def resident_mib() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def soak(model: str, count: int, warm_up: int, folder: Path) -> list[float]:
    """Resident main memory in MiB after each image."""
    arguments = ["--use-flux", "--model", model, "--scale", "2", "--device", "cpu", "--tile-size", "64"]
    arguments += ["--tile-overlap", "16"]
    options = parse_arguments([str(folder), *arguments])
    pipe, settings = load_flux(options)
    pipe.set_progress_bar_config(disable=True)
    rng, measured = np.random.default_rng(0), []
    start = time.monotonic()
    for index in range(count):
        suffix = (".png", ".jpg", ".webp", ".tif")[index % 4]
        job = Job(folder / f"{index}.png", folder / f"{index}_x2{suffix}")
        save_photo(job.source, rng)
        enlarger = FluxEnlarger(pipe, replace(settings, seed=index))
        run_step(upscale_file, job, lambda enlarger=enlarger: enlarger, options)
        if job.outcome != "done":
            sys.exit(f"soak.py: error: image {index}: {job.error}")
        measured.append(resident_mib())
        if (index + 1) % warm_up == 0:
            seconds = time.monotonic() - start
            print(f"{index + 1} images, {seconds:.0f} s: {measured[-1]:.1f} MiB", file=sys.stderr, flush=True)
        job.source.unlink()
        job.target.unlink()
    return measured


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="folder of a FLUX.1 pipeline (default: the embedded one)")
    parser.add_argument("--images", type=int, default=200, help="images to enlarge (default: 200)")
    parser.add_argument("--warm-up", type=int, default=20, help="images before memory is compared (default: 20)")
    parser.add_argument("--max-growth", type=float, default=64, help="growth in MiB that is allowed (default: 64)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        measured = soak(args.model, args.images, args.warm_up, Path(folder))
    before = measured[args.warm_up - 1]
    slope = np.polyfit(range(len(measured) - args.warm_up), measured[args.warm_up :], 1)[0]
    growth = max(measured[args.warm_up :]) - before
    print(
        f"{len(measured)} images: {before:.1f} MiB after {args.warm_up}, {measured[-1]:.1f} MiB at the end, at most"
        f" {growth:.1f} MiB more in between; {1024 * slope:.0f} KiB an image"
    )
    return int(growth > args.max_growth)


if __name__ == "__main__":
    sys.exit(main())
