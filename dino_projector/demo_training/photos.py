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

"""The photographs of the embedded checkpoint, out of Debian packages, by the manifest `photos.json`."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..pictures import Record, read_picture


MANIFEST = Path(__file__).with_name("photos.json")
TRAIN_FOLDER = "train"
HELD_OUT_FOLDER = "held_out"
JPEG_QUALITY = 92
# Of the 256 bits of a difference hash, the most in which two versions of a photo differ. Among the photos of the
# manifest a training photo and a held-out one differ in 61 bits or more.
NEAR_BITS = 40


class Photo(NamedTuple):
    """A file in a Debian package."""

    name: str
    package: str
    path: str  # in the package
    author: str
    license: str
    held_out: bool
    sha256: str


def read_manifest() -> list[Photo]:
    return [Photo(**entry) for entry in json.loads(MANIFEST.read_text(encoding="utf-8"))]


def unpack_package(package: str, folder: Path) -> None:
    """Downloads a Debian package and unpacks it into `folder`, without installing it."""
    try:
        run = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(
            "apt-get is missing: the photos are in Debian packages, so run this on Debian or Ubuntu"
        ) from None
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("E: ")
        raise OSError(f"package {package} cannot be downloaded ({reason}): check the network and run apt-get update")
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


def check_hash(photo: Photo, file: Path) -> None:
    """Raises an `OSError` unless the file is the photo that the manifest means."""
    if not file.is_file():
        raise OSError(
            f"package {photo.package} has no {photo.path}: use the release of Debian that the manifest names"
        )
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != photo.sha256:
        raise OSError(
            f"{photo.path} of package {photo.package} has the SHA-256 {found[:12]}…, not {photo.sha256[:12]}…: it is"
            " another picture now, so look at it and change photos.json"
        )


def write_photo(file: Path, photo: Photo, folder: Path, max_side: int | None) -> None:
    """Copies the file as it is, or writes a JPEG shrunk to `max_side` px on its longer side if that is more."""
    with Image.open(file) as opened:
        longer_side = max(opened.size)
    if max_side is None or longer_side <= max_side:
        shutil.copyfile(file, folder / f"{photo.name}{file.suffix.lower()}")
        return
    picture = read_picture(Record(photo.name, file, ""))
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    picture.save(folder / f"{photo.name}.jpg", quality=JPEG_QUALITY)


def fetch_photos(photos: Sequence[Photo], out: Path, max_side: int | None = None) -> None:
    """Writes `out/train` and `out/held_out`, and checks that no training photo shows what a held-out one shows."""
    folders = {False: out / TRAIN_FOLDER, True: out / HELD_OUT_FOLDER}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    by_package = sorted(photos, key=lambda photo: photo.package)
    for package, members in groupby(by_package, key=lambda photo: photo.package):
        with TemporaryDirectory() as name:
            unpack_package(package, Path(name))
            for photo in members:
                check_hash(photo, Path(name) / photo.path)
                write_photo(Path(name) / photo.path, photo, folders[photo.held_out], max_side)
    pairs = near_duplicates(folders[False].iterdir(), folders[True].iterdir())
    if pairs:
        train, held_out = pairs[0]
        raise ValueError(f"{train} shows what the held-out {held_out} shows: leave it out of the training photos")


# ---- Near duplicates -----------------------------------------------------------------------------------------------


def difference_hash(picture: Image.Image) -> np.ndarray:
    """256 booleans: whether the brightness falls from each cell of a 16 x 17 grid to its right neighbour."""
    cells = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    return (cells[:, 1:] < cells[:, :-1]).flatten()


def near_duplicates(train: Iterable[Path], held_out: Iterable[Path]) -> list[tuple[str, str]]:
    """Names of training and held-out pictures that are alike, also if one is mirrored."""
    held_out_hashes = []
    for file in sorted(held_out):
        picture = read_picture(Record(file.name, file, ""))
        held_out_hashes += [(file.name, difference_hash(version)) for version in (picture, ImageOps.mirror(picture))]
    pairs = []
    for file in sorted(train):
        found = difference_hash(read_picture(Record(file.name, file, "")))
        pairs += [(file.name, name) for name, bits in held_out_hashes if (found != bits).sum() <= NEAR_BITS]
    return pairs


# ---- Licences ------------------------------------------------------------------------------------------------------


def license_table(photos: Sequence[Photo]) -> str:
    """A Markdown table with a row for each photo."""
    rows = [
        f"| {photo.name} | {'held out' if photo.held_out else 'training'} | {photo.author} | {photo.license} |"
        f" `{photo.package}`: `{photo.path}` |"
        for photo in photos
    ]
    return (
        "\n".join(["| photo | used for | author | licence | package and file |", "|---|---|---|---|---|", *rows])
        + "\n"
    )
