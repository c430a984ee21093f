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

"""Fetches the freely licensed photographs that the embedded checkpoint is trained and judged on."""

import argparse
import math
import sys
from pathlib import Path

from flux_dino_tile.messages import Parser, UsageError, nonempty, number, print_line, run_script


def build_parser() -> Parser:
    parser = Parser(
        prog="fetch_photos.py",
        description="Fetch the freely licensed photographs of the embedded checkpoint out of Debian packages\n"
        "(on Debian or Ubuntu) and public git repositories into OUT/train, OUT/validation and OUT/held_out.",
        epilog="Exit status: 0 done; 1 a photo is missing, has changed or shows what a kept one shows; 2 wrong usage.",
    )
    parser.add_argument("out", type=nonempty, metavar="OUT", help="folder for the photos")
    parser.add_argument(
        "--max-megapixels",
        type=number(float, 0.01),
        default=math.inf,
        metavar="MP",
        help="shrink larger photos to this (default: only those that are soft at full size)",
    )
    parser.add_argument(
        "--mirrors",
        type=nonempty,
        metavar="DIR",
        help="with git directories DIR/OWNER+NAME/repo, as git clone --mirror makes them, instead of the repositories",
    )
    parser.add_argument("--table", type=nonempty, metavar="FILE", help="for the licence table (default: print it)")
    return parser


def fetch(args: argparse.Namespace) -> int:
    from dino_projector.demo_training.photos import ROLES, fetch_photos, license_table, read_manifest

    mirrors = None if args.mirrors is None else Path(args.mirrors)
    if mirrors is not None and not mirrors.is_dir():
        raise UsageError(f"--mirrors {mirrors}: is not a folder")
    photos = read_manifest()
    missing = fetch_photos(photos, Path(args.out), args.max_megapixels, mirrors)
    if args.table is None:
        print(license_table(photos), end="")
    else:
        Path(args.table).write_text(license_table(photos), encoding="utf-8")
    for reason, lost in missing.items():
        print_line(f"{reason}; missing: {', '.join(photo.name for photo in lost)}", sys.stderr)
    all_lost = [photo for lost in missing.values() for photo in lost]
    counts = ", ".join(
        f"{sum(photo.role == role and photo not in all_lost for photo in photos)} in {role}" for role in ROLES
    )
    print_line(f"{args.out}: {counts}; {len(all_lost)} of {len(photos)} photos are missing", sys.stderr)
    return 1 if missing else 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_script("fetch_photos.py", lambda: fetch(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
