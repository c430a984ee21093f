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

"""Prompts for regions of a picture, as the command line reads them from a file. Needs no torch."""

import argparse
import json
from pathlib import Path
from typing import Any

from .messages import first_line


EXAMPLE = '{"prompt": "a red door", "box": [0, 0.2, 0.5, 1]}'
MAX_CHARACTERS = 30_000  # of all regions, which are written to the EXIF of the result: a JPEG has room for 65,533


def region_file(path: str) -> list[dict[str, Any]]:
    """An argparse type: the regions of a JSON file. That the boxes lie in a picture is checked with the picture."""
    try:
        regions = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {first_line(error)}") from error
    try:
        return check_region_list(regions)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error


def check_region_list(regions: Any) -> list[dict[str, Any]]:
    """What a file or a picture's record has as regions; raises a `ValueError` that says what is wrong."""
    is_list = isinstance(regions, list) and len(regions) > 0
    wrong = [entry for entry in regions if not is_region(entry)] if is_list else [regions]
    if wrong:
        raise ValueError(f"must be a list of entries like {EXAMPLE}, not {wrong[0]!r:.200}")
    length = len(json.dumps(regions))
    if length > MAX_CHARACTERS:
        raise ValueError(f"must have at most {MAX_CHARACTERS} characters, not {length}")
    return regions


def is_region(entry: Any) -> bool:
    """Whether an entry of the file has a prompt and, if it is for a part of the picture, a box of four numbers."""
    if not isinstance(entry, dict) or not {"prompt"} <= entry.keys() <= {"prompt", "box"}:
        return False
    box = entry.get("box")
    is_box = box is None or (isinstance(box, list) and [type(x) in (int, float) for x in box] == [True] * 4)
    return isinstance(entry["prompt"], str) and is_box


def call_prompt(prompt: str | None, regions: list[dict[str, Any]] | None) -> Any:
    """What the pipeline takes as `prompt`: with regions, the one for the whole picture stands before theirs."""
    if regions is None:
        return prompt
    whole = [] if prompt is None else [(prompt, None)]
    return [*whole, *((region["prompt"], region.get("box")) for region in regions)]
