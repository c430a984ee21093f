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

"""Measures the main memory that `upscale.py` takes at its peak for large pictures, each in a process of its own.

    python scripts/benchmark_large.py
    python scripts/benchmark_large.py --suffixes .tif -- --use-flux --model DIR --device cpu --steps 1

The pictures are square, four times enlarged, of smooth random colours. What follows `--` goes to `upscale.py`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


SCRIPT = Path(__file__).resolve().parent / "upscale.py"
SCALE = 4


def save_photo(path: Path, side: int) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC).save(path)


def measure(folder: Path, side: int, suffix: str, options: list[str]) -> str:
    """One row of the table: side and suffix of the output, peak GiB, seconds, and the size of the file."""
    source, target = folder / f"{side}.png", folder / f"out{suffix}"
    save_photo(source, side // SCALE)
    command = [sys.executable, str(SCRIPT), str(source), str(target), "--scale", str(SCALE), "--overwrite", *options]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status != 0:
        sys.exit(f"benchmark_large.py: error: {' '.join(command)} failed")
    # Linux counts KiB, macOS bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    written = target.stat().st_size
    target.unlink()
    return f"| {side} x {side} px | {suffix} | {peak / 2**30:.2f} GiB | {seconds:.0f} s | {written / 2**20:.0f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[8192, 16384], help="sides of the outputs in pixels")
    parser.add_argument("--suffixes", nargs="+", default=[".png", ".tif", ".jpg"], help="kinds of output")
    parser.add_argument("options", nargs="*", help="options for upscale.py, after --")
    args = parser.parse_args()
    print("| output | file | peak of main memory | time | size of the file |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for side in args.sides:
            for suffix in args.suffixes:
                print(measure(Path(folder), side, suffix, args.options), flush=True)


if __name__ == "__main__":
    main()
