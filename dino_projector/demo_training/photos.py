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

"""
The photographs of the embedded checkpoint, out of Debian packages and git repositories, by the manifest `photos.json`.
"""

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..pictures import Record, read_picture


MANIFEST = Path(__file__).with_name("photos.json")
# What a photo is used for, which is the folder that it is written to, and the table's words for it.
ROLES = {"train": "training", "validation": "validation", "held_out": "held out"}
JPEG_QUALITY = 92
# Of the 256 bits of a difference hash, the most in which two versions of a photo differ. Among the photos of the
# manifest a training photo and one that is kept from training differ in 57 bits or more.
NEAR_BITS = 40


class Photo(NamedTuple):
    """A file in a Debian package, or in a commit of a git repository."""

    name: str
    source: str  # the package, or the repository's URL
    path: str  # in the package or commit
    author: str
    license: str
    role: str
    sha256: str
    commit: str | None = None
    max_megapixels: float = math.inf  # of a photo that is soft at full size


def read_manifest() -> list[Photo]:
    return [Photo(**entry) for entry in json.loads(MANIFEST.read_text(encoding="utf-8"))]


# ---- Sources -------------------------------------------------------------------------------------------------------


def run_program(*command: str | Path, folder: Path | None = None) -> bytes:
    """What the program prints. If it fails, an `OSError` has the last line of what it says."""
    # git must not ask for a name: that is how it meets a repository that is gone.
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        run = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is missing") from None
    if run.returncode:
        lines = run.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise OSError(lines[-1].removeprefix("E: ").removeprefix("fatal: "))
    return run.stdout


def unpack_package(package: str, folder: Path) -> None:
    """Downloads a Debian package and unpacks it into `folder`, without installing it."""
    try:
        run_program("apt-get", "download", package, folder=folder)
        (archive,) = folder.glob("*.deb")
        run_program("dpkg-deb", "-x", archive, folder)
    except OSError as error:
        raise OSError(
            f"package {package} cannot be had ({error}): on Debian or Ubuntu, check the network and run apt-get update"
        ) from None


def fetch_commits(url: str, commits: set[str], folder: Path) -> None:
    """Makes `folder` a git directory with these commits alone; git gets their files when they are read."""
    git = ("git", "--git-dir", folder)
    try:
        run_program(*git, "init", "--quiet", "--bare")
        run_program(*git, "remote", "add", "origin", url)
        # By commit: some are in pull requests alone, which a clone does not have.
        run_program(
            *git, "fetch", "--quiet", "--no-tags", "--depth=1", "--filter=blob:none", "origin", *sorted(commits)
        )
    except OSError as error:
        raise OSError(f"{url} cannot be fetched ({error}): check the network, or use --mirrors") from None


def open_source(photos: Sequence[Photo], folder: Path, mirrors: Path | None) -> Path:
    """The unpacked package or git directory with these photos of one source: `folder`, or one of the mirrors."""
    source = photos[0].source
    commits = {photo.commit for photo in photos if photo.commit is not None}
    if not commits:
        unpack_package(source, folder)
    elif mirrors is None:
        fetch_commits(source, commits, folder)
    else:
        folder = mirrors / "+".join(source.split("/")[-2:]) / "repo"
        if not folder.is_dir():
            raise OSError(f"{source} is not in --mirrors: make {folder} by git clone --mirror")
    return folder


def read_photo(photo: Photo, place: Path) -> bytes:
    """The file out of what [`open_source`] gave, or an `OSError` if it is not the one that the manifest means."""
    if photo.commit is None:
        if not (place / photo.path).is_file():
            raise OSError(f"package {photo.source} has no {photo.path}: use the package of Debian 12")
        data = (place / photo.path).read_bytes()
    else:
        try:
            data = run_program("git", "--git-dir", place, "cat-file", "blob", f"{photo.commit}:{photo.path}")
        except OSError as error:
            raise OSError(
                f"{photo.path} in commit {photo.commit[:12]} of {photo.source} cannot be read ({error}): check the"
                " network, or the copy in --mirrors"
            ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != photo.sha256:
        raise OSError(
            f"{photo.path} of {photo.source} has the SHA-256 {found[:12]}…, not {photo.sha256[:12]}…: it is another"
            " picture now, so look at it and change photos.json"
        )
    return data


def read_photos(photos: Sequence[Photo], mirrors: Path | None) -> Iterator[tuple[Photo, bytes | OSError]]:
    """Photos of one source with their files, or with the error that says why one cannot be had."""
    with TemporaryDirectory() as name:
        try:
            place = open_source(photos, Path(name), mirrors)
        except OSError as error:
            yield from ((photo, error) for photo in photos)
            return
        for photo in photos:
            found: bytes | OSError
            try:
                found = read_photo(photo, place)
            except OSError as error:
                found = error
            yield photo, found


# ---- Fetching ------------------------------------------------------------------------------------------------------


def write_photo(photo: Photo, data: bytes, folder: Path, max_megapixels: float) -> None:
    """Writes the file as it is, or a JPEG shrunk to `max_megapixels` or the photo's own limit if it has more."""
    with Image.open(BytesIO(data)) as opened:
        megapixels = opened.width * opened.height / 1e6
    limit = min(max_megapixels, photo.max_megapixels)
    if megapixels <= limit:
        (folder / f"{photo.name}{Path(photo.path).suffix.lower()}").write_bytes(data)
        return
    picture = read_picture(Record(photo.name, data, ""))
    factor = math.sqrt(limit / megapixels)
    size = (round(picture.width * factor), round(picture.height * factor))
    # Without subsampling: a model learns fine colour too.
    picture.resize(size, Image.Resampling.LANCZOS).save(
        folder / f"{photo.name}.jpg", quality=JPEG_QUALITY, subsampling=0
    )


def fetch_photos(
    photos: Sequence[Photo], out: Path, max_megapixels: float = math.inf, mirrors: Path | None = None
) -> dict[str, list[Photo]]:
    """
    Writes the photos into folders of `out` by their roles, and checks that no training photo shows what one of the
    others shows.

    Args:
        mirrors (`Path`, *optional*): Folder with git directories `OWNER+NAME/repo`, instead of the network.

    Returns:
        `dict[str, list[Photo]]`: The photos that cannot be had, by the reason.
    """
    for role in ROLES:
        (out / role).mkdir(parents=True, exist_ok=True)
    missing: dict[str, list[Photo]] = {}
    for _, members in groupby(sorted(photos, key=lambda photo: photo.source), key=lambda photo: photo.source):
        for photo, found in read_photos(list(members), mirrors):
            if isinstance(found, OSError):
                missing.setdefault(str(found), []).append(photo)
            else:
                write_photo(photo, found, out / photo.role, max_megapixels)
    kept = [file for role in ROLES if role != "train" for file in (out / role).iterdir()]
    pairs = near_duplicates((out / "train").iterdir(), kept)
    if pairs:
        train, other = pairs[0]
        raise ValueError(f"{train} shows what {other} shows: leave it out of the training photos")
    return missing


# ---- Near duplicates -----------------------------------------------------------------------------------------------


def difference_hash(picture: Image.Image) -> np.ndarray:
    """256 booleans: whether the brightness falls from each cell of a 16 x 17 grid to its right neighbour."""
    cells = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    return (cells[:, 1:] < cells[:, :-1]).flatten()


def near_duplicates(train: Iterable[Path], kept: Iterable[Path]) -> list[tuple[Path, Path]]:
    """The training pictures that are like one that is kept from training, also if it is mirrored, and that one."""
    kept_hashes = []
    for file in sorted(kept):
        picture = read_picture(Record(file.name, file, ""))
        kept_hashes += [(file, difference_hash(version)) for version in (picture, ImageOps.mirror(picture))]
    pairs = []
    for file in sorted(train):
        found = difference_hash(read_picture(Record(file.name, file, "")))
        pairs += [(file, other) for other, bits in kept_hashes if (found != bits).sum() <= NEAR_BITS]
    return pairs


# ---- Licences ------------------------------------------------------------------------------------------------------


def license_table(photos: Sequence[Photo]) -> str:
    """A Markdown table with a row for each photo."""
    rows = [
        f"| {photo.name} | {ROLES[photo.role]} | {photo.author} | {photo.license} | `{photo.source}`: `{photo.path}`"
        + (" |" if photo.commit is None else f" in commit `{photo.commit[:12]}` |")
        for photo in photos
    ]
    return (
        "\n".join(["| photo | used for | author | licence | source and file |", "|---|---|---|---|---|", *rows]) + "\n"
    )
