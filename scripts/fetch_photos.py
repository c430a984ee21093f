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
import sys
from pathlib import Path

from flux_dino_tile.messages import Parser, nonempty, number, run_script


def build_parser() -> Parser:
    parser = Parser(
        prog="fetch_photos.py",
        description="Fetch the freely licensed photographs of the embedded checkpoint out of Debian packages\n"
        "(on Debian or Ubuntu, with a network) into OUT/train and OUT/held_out.",
        epilog="Exit status: 0 done; 1 a package or photo is missing or changed; 2 wrong usage.",
    )
    parser.add_argument("out", type=nonempty, metavar="OUT", help="folder for the photos")
    parser.add_argument(
        "--max-side",
        type=number(int, 64),
        metavar="PX",
        help="shrink longer sides to this (default: do not)",
    )
    parser.add_argument("--table", type=nonempty, metavar="FILE", help="for the licence table (default: print it)")
    return parser


def fetch(args: argparse.Namespace) -> None:
    from dino_projector.demo_training.photos import fetch_photos, license_table, read_manifest

    photos = read_manifest()
    fetch_photos(photos, Path(args.out), args.max_side)
    if args.table is None:
        print(license_table(photos), end="")
    else:
        Path(args.table).write_text(license_table(photos), encoding="utf-8")
    held_out = sum(photo.held_out for photo in photos)
    print(f"{len(photos) - held_out} training photos and {held_out} held-out ones are in {args.out}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_script("fetch_photos.py", lambda: fetch(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
