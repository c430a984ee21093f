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

"""What the file of a result says of how it was made: written, read again and checked. Needs no torch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from . import __version__
from .image_files import read_software
from .messages import UsageError, first_line


PROGRAM = "flux-dino-tile"


def digest(buffer: Any) -> str:
    return hashlib.sha256(buffer).hexdigest()[:16]


def software_text(scale: float, description: dict[str, Any]) -> str:
    """What the EXIF tag Software says of a result."""
    return f"{PROGRAM} {__version__} {json.dumps({'scale': scale, **description})}"


def describe_photo(path: Path, image: Image.Image) -> dict[str, str]:
    """By what a result knows its photo again: the file's name, without this machine's folders, and its pixels."""
    return {"name": path.name, "digest": digest(image.tobytes())}


def read_record(path: Path) -> dict[str, Any]:
    """The settings in a picture that this program made with FLUX; a `UsageError` says what is missing."""
    try:
        software = read_software(path) or ""
    except OSError as error:
        raise UsageError(f"--redo {path}: {first_line(error)}") from error
    name, _, settings = software.partition(" ")
    try:
        record = json.loads(settings.partition(" ")[2]) if name == PROGRAM else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UsageError(
            f"--redo {path}: does not say how it was made, as pictures of this program do while their EXIF is kept"
        )
    if not isinstance(record.get("redone", []), list):
        raise UsageError(f"--redo {path}: does not say in a list which regions were painted again")
    if record.get("method") != "flux":
        raise UsageError(f"--redo {path}: was not enlarged with FLUX")
    photo = record.get("photo")
    if not isinstance(photo, dict) or not all(isinstance(photo.get(key), str) for key in ("name", "digest")):
        raise UsageError(f"--redo {path}: does not name its photo, as pictures of an older version: make it again")
    return record


def find_photo(result: Path, record: dict[str, Any], given: str | None) -> Path:
    """The photo that a result was made from: the one that is `given`, or the file of its name beside the result."""
    # Whoever made the picture may have written a path.
    name = Path(record["photo"]["name"]).name
    photo = Path(given) if given is not None else result.parent / name
    if not os.path.isfile(photo) or os.path.samefile(photo, result):
        place: Any = photo if given is not None else f"{name}, from which it was made,"
        hint = "" if given is not None else " beside it: --photo FILE says where it is"
        raise UsageError(f"--redo {result}: there is no {place}{hint}")
    return photo


def check_photo(record: dict[str, Any], file: Path, photo: Image.Image) -> None:
    """Raises a `ValueError` unless a picture with this record was made from the photo in this file."""
    if digest(photo.tobytes()) != record["photo"]["digest"]:
        raise ValueError(f"{file} is not the photo from which it was made, or was changed since")
