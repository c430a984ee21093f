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

"""What the command lines of this project share: usage errors, types of arguments, printing, and exit statuses."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]


COMMAND = "flux-dino-tile" if Path(sys.argv[0]).stem == "flux-dino-tile" else "upscale.py"


class UsageError(Exception):
    """The command cannot be carried out as given; the message is one line."""


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UsageError(message)


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


def several(parse: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """An argparse type: values with commas between them."""
    return lambda text: tuple(parse(part) for part in text.split(","))


def whole_pixels(form: str) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers of at least 0 with commas between them, as many as the form "X,Y" names."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if len(parts) != len(form.split(",")) or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) for part in parts):
            raise argparse.ArgumentTypeError(f"must be {form} in whole pixels, not {text!r}")
        return tuple(map(int, parts))

    return parse


def nonempty(text: str) -> str:
    """An argparse type: `Path("")` would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


@contextmanager
def usage_errors(option: str) -> Iterator[None]:
    """Turns an `OSError` into the usage error of an option."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{option}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The error in one line, without the number and path that an `OSError` adds."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    if isinstance(error, (OSError, ValueError, RuntimeError, AssertionError)) and lines:
        return lines[0].strip()
    return ": ".join([type(error).__name__, *lines[:1]])


def print_line(text: str, file=None) -> None:
    """Prints a line above the progress bars."""
    # In one write, so that lines of several processes do not run into each other.
    tqdm.write(f"{printable(text)}\n", file=file or sys.stdout, end="")


def print_error(text: str, program: str = COMMAND) -> None:
    print_line(f"{program}: error: {text}", file=sys.stderr)


def printable(text: str) -> str:
    """The text with escapes in place of control characters but "\\n", and of what the terminal cannot show."""
    # File names may hold them: they could move the cursor, or could not be encoded.
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


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


def run_script(name: str, script: Callable[[], int | None], farewell: str = "interrupted") -> int:
    """The exit status of a command: what `script` returns, 1 if it failed, 2 for wrong usage, 130 after Ctrl-C."""
    # transformers reads it when it is imported, and says then that torchvision, which nothing here needs, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return script() or 0
    except UsageError as error:
        print_error(str(error), name)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print_error(first_line(error), name)
        return 1
    except KeyboardInterrupt:
        print_error(farewell, name)
        return 130
