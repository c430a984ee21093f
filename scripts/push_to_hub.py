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

"""Publishes a trained projector as a repository of the Hugging Face Hub."""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from flux_dino_tile.embedded import DEMO_FOLDER
from flux_dino_tile.messages import Parser, UsageError, hide_loading_bars, nonempty, number, run_script


EPILOG = """examples:
  push_to_hub.py runs/first/final user/flux-dino-tile --dry-run
  push_to_hub.py runs/first/final user/flux-dino-tile --private

Log in with `hf auth login`, or set HF_TOKEN. docs/publishing.md says what is written and checked.
Exit status: 0 published, or nothing to change; 1 it failed; 2 wrong usage."""


def build_parser() -> Parser:
    parser = Parser(
        prog="push_to_hub.py",
        usage="%(prog)s [options] (folder | --demo) owner/name",
        description="Publish a trained projector, or a whole small pipeline, on the Hugging Face Hub.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    folder_help = "`final` of a finished training, or a whole pipeline with dino_projector/"
    add("folder", nargs="?", type=nonempty, help=folder_help)
    add("--demo", action="store_true", help="publish the small checkpoint that this program comes with")
    add("repository", metavar="owner/name", type=nonempty, help="on the Hub; made if it is not there")

    add = parser.add_argument_group("contents").add_argument
    add("--base-model", metavar="NAME", type=nonempty, help="FLUX.1 on the Hub (default: as training.json says)")
    add("--license", metavar="ID", type=nonempty, help="where the models leave the choice (default: apache-2.0)")
    add(
        "--dataset",
        metavar="NAME",
        action="append",
        default=[],
        help="data set of the training, on the Hub; repeatable",
    )
    add(
        "--report",
        metavar="FILE",
        type=nonempty,
        help="results.json of compare.py, or JSON of names and numbers or [mean, low, high]",
    )
    add("--report-data", metavar="TEXT", type=nonempty, help="the pictures that the report was measured on")
    add("--samples", metavar="DIR", type=nonempty, help="folder of pictures for the model card")
    credits_help = "Markdown with authors and licences of what it was trained on, as fetch_photos.py --table writes"
    add("--credits", metavar="FILE", type=nonempty, help=credits_help)
    add("--gpu-hours", metavar="N", type=number(float, 0), help="what the training took, for the model card")
    add("--gpu", metavar="NAME", type=nonempty, help="on which hardware")

    add = parser.add_argument_group("publishing").add_argument
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="is_private", action="store_true", default=None, help="for you only")
    visibility.add_argument("--public", dest="is_private", action="store_false", help="for all (default)")
    add("--revision", metavar="BRANCH", default="main", help="branch; made if it is not there (default: main)")
    add("--create-pr", action="store_true", help="propose the change as a pull request")
    add("--message", metavar="TEXT", type=nonempty, default="Upload a DINO projector for FLUX.1", help="of the commit")
    add("--card", metavar="FILE", type=nonempty, help="write the model card to this file too")
    add("--dry-run", action="store_true", help="show files and model card, try them out, and send nothing")
    add(
        "--try-with-base",
        action="store_true",
        help="try the files out with the base model itself, on a GPU if there is one, instead of a small FLUX with"
        " random weights",
    )
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.demo == (args.folder is not None):
        raise UsageError("give either a folder or --demo, and the repository owner/name")
    if args.demo:
        args.folder = DEMO_FOLDER
    if not Path(args.folder).is_dir():
        raise UsageError(f"{args.folder}: no such folder")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", args.repository):
        raise UsageError(f"{args.repository}: the repository must be owner/name")
    if (args.report is None) != (args.report_data is None):
        raise UsageError("--report and --report-data go together: numbers, and the pictures they were measured on")
    for option, path in (("--report", args.report), ("--credits", args.credits)):
        if path is not None and not Path(path).is_file():
            raise UsageError(f"{option} {path}: no such file")
    if args.samples is not None and not Path(args.samples).is_dir():
        raise UsageError(f"--samples {args.samples}: no such folder")
    return args


def run(args: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    from dino_projector.publishing.assemble import CARD_NAME, Contents, assemble, is_complete, list_tree
    from dino_projector.publishing.hub import Target, publish
    from dino_projector.publishing.trial import try_out

    contents = Contents(
        base_model=args.base_model,
        licence=args.license,
        datasets=args.dataset,
        report=args.report and Path(args.report),
        report_data=args.report_data,
        samples=args.samples and Path(args.samples),
        credits=args.credits and Path(args.credits),
        gpu_hours=args.gpu_hours,
        gpu=args.gpu,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder, source = Path(temporary), Path(args.folder)
        base_model = assemble(source, folder, args.repository, contents)
        print("\n".join(list_tree(folder)))
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        if args.card is not None:
            Path(args.card).write_text(card, encoding="utf-8")
        if args.dry_run:
            print(f"\n{card}")
        try_out(folder, base_model if args.try_with_base and not is_complete(source) else None)
        print("the files load and run in a fresh process")
        if args.dry_run:
            print("nothing was sent (--dry-run)")
            return
        target = Target(args.repository, args.revision, args.is_private, args.create_pr)
        published = publish(HfApi(), target, folder, args.message)
    change = "published and compared" if published.is_new else "nothing has changed, no commit was made"
    print(f"{change}: {published.url}")


def main(argv: list[str] | None = None) -> int:
    def script() -> None:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        hide_loading_bars()

        from huggingface_hub import get_token

        from dino_projector.publishing.hub import EXPECTED_ERRORS, PublishError, explain

        try:
            run(args)
        except EXPECTED_ERRORS as error:
            raise PublishError(explain(error, get_token())) from error

    return run_script("push_to_hub.py", script)


if __name__ == "__main__":
    sys.exit(main())
