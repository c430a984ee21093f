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
Fetching photos from Debian packages, with a stand-in for apt-get that copies packages built here, and from a git
repository that is made here.
"""

import hashlib
import json
import os
import shutil
import subprocess

import fetch_photos
import numpy as np
import pytest
from PIL import Image, ImageOps
from training_runs import save_photos

from dino_projector.demo_training import photos
from dino_projector.demo_training.photos import (
    ROLES,
    Photo,
    difference_hash,
    license_table,
    near_duplicates,
    read_manifest,
)
from tiny_models import ROOT


needs_programs = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("dpkg-deb", "git")), reason="needs dpkg-deb and git"
)
FAKE_APT = """#!/bin/sh
[ "$1" = download ] || exit 9
cp "{archives}/$2.deb" . 2>/dev/null || { echo "E: Unable to locate package $2" >&2; exit 100; }
"""
IN_GIT = ("coffee", "dogs")
ALL = {"train": ["astronaut", "dogs", "retina", "rocket"], "validation": ["coffee"], "held_out": ["chelsea"]}


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=Ann", "-c", "user.email=ann@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(pictures, folder):
    """The commit of a repository with the pictures. As on GitHub, it may be in a pull request alone."""
    shutil.copytree(pictures, folder / "share")
    git(folder, "init", "--initial-branch=main")
    git(folder, "config", "uploadpack.allowFilter", "true")
    git(folder, "add", "share")
    git(folder, "commit", "--message=Pictures")
    commit = git(folder, "rev-parse", "HEAD")
    git(folder, "update-ref", "refs/pull/1/head", commit)
    git(folder, "update-ref", "-d", "refs/heads/main")
    return commit


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest of six small pictures, in a package that the stand-in for apt-get knows and in a git repository."""
    root, archives, programs = tmp_path / "root", tmp_path / "archives", tmp_path / "bin"
    (root / "DEBIAN").mkdir(parents=True)
    control = (
        "Package: pictures\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: pictures\n"
    )
    (root / "DEBIAN" / "control").write_text(control)
    save_photos(root / "share", 128)
    archives.mkdir()
    programs.mkdir()
    subprocess.run(["dpkg-deb", "--build", root, archives / "pictures.deb"], check=True, capture_output=True)
    (programs / "apt-get").write_text(FAKE_APT.replace("{archives}", str(archives)))
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    repository = tmp_path / "ann" / "drawings"
    in_git = {"source": repository.as_uri(), "commit": make_repository(root / "share", repository)}
    roles = {name: role for role, names in ALL.items() for name in names}
    entries = [
        {
            "name": path.stem,
            "source": "pictures",
            "path": f"share/{path.name}",
            "author": "Ann",
            "license": "CC0-1.0",
            "role": roles[path.stem],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        | (in_git if path.stem in IN_GIT else {})
        for path in sorted((root / "share").iterdir())
    ]
    path = tmp_path / "photos.json"
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(photos, "MANIFEST", path)
    return path


def change(manifest, name, **values):
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([entry | values if entry["name"] == name else entry for entry in entries]))


def fetched(out):
    return {role: sorted(path.stem for path in (out / role).iterdir()) for role in ROLES}


@needs_programs
def test_photos_are_copied_by_their_use(manifest, tmp_path, capsys):
    assert fetch_photos.main([str(tmp_path / "out"), "--table", str(tmp_path / "table.md")]) == 0
    assert fetched(tmp_path / "out") == ALL
    for name in ("dogs", "rocket"):
        copied = (tmp_path / "out" / "train" / f"{name}.png").read_bytes()
        assert copied == (tmp_path / "root" / "share" / f"{name}.png").read_bytes()
    assert "4 in train, 1 in validation, 1 in held_out; 0 of 6 photos are missing" in capsys.readouterr().err
    table = (tmp_path / "table.md").read_text()
    assert "| chelsea | held out | Ann | CC0-1.0 | `pictures`: `share/chelsea.png` |" in table
    repository = tmp_path / "ann" / "drawings"
    commit = git(repository, "rev-parse", "refs/pull/1/head")
    place = f"`{repository.as_uri()}`: `share/coffee.png` in commit `{commit[:12]}`"
    assert f"| coffee | validation | Ann | CC0-1.0 | {place} |" in table


@needs_programs
def test_large_photos_are_shrunk(manifest, tmp_path, capsys):
    change(manifest, "rocket", max_megapixels=0.004)
    assert fetch_photos.main([str(tmp_path / "out"), "--max-megapixels", "0.01"]) == 0
    for name, side in (("dogs", 100), ("rocket", 63)):
        with Image.open(tmp_path / "out" / "train" / f"{name}.jpg") as picture:
            assert picture.size == (side, side)
    assert "| photo |" in capsys.readouterr().out


@needs_programs
def test_a_photo_that_is_soft_at_full_size_is_always_shrunk(manifest, tmp_path):
    change(manifest, "rocket", max_megapixels=0.004)
    assert fetch_photos.main([str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "train" / "rocket.jpg") as picture:
        assert picture.size == (63, 63)


@needs_programs
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sha256": "0" * 64}, "share/astronaut.png of pictures has the SHA-256"),
        ({"source": "nowhere"}, "package nowhere cannot be had (Unable to locate package nowhere)"),
        ({"path": "share/none.png"}, "package pictures has no share/none.png"),
        ({"source": "file:///nowhere", "commit": "0" * 40}, "file:///nowhere cannot be fetched ("),
    ],
)
def test_what_is_missing_or_changed_is_named_and_the_rest_given(manifest, tmp_path, capsys, values, message):
    change(manifest, "astronaut", **values)
    assert fetch_photos.main([str(tmp_path / "out")]) == 1
    assert fetched(tmp_path / "out") == ALL | {"train": ["dogs", "retina", "rocket"]}
    first, last = capsys.readouterr().err.splitlines()
    assert message in first and first.endswith("; missing: astronaut")
    assert "3 in train, 1 in validation, 1 in held_out; 1 of 6 photos are missing" in last


@needs_programs
def test_mirrors_are_read_instead_of_repositories(manifest, tmp_path, capsys):
    mirror = tmp_path / "mirrors" / "ann+drawings" / "repo"
    git(tmp_path, "clone", "--mirror", tmp_path / "ann" / "drawings", mirror)
    shutil.rmtree(tmp_path / "ann")
    command = [str(tmp_path / "out"), "--mirrors", str(tmp_path / "mirrors")]
    assert fetch_photos.main(command) == 0
    assert fetched(tmp_path / "out") == ALL

    change(manifest, "dogs", commit="0" * 40)
    assert fetch_photos.main(command) == 1
    error = capsys.readouterr().err
    assert "share/dogs.png in commit 000000000000 of file://" in error and "; missing: dogs\n" in error

    shutil.rmtree(mirror)
    assert fetch_photos.main(command) == 1
    assert f"make {mirror} by git clone --mirror; missing: coffee, dogs\n" in capsys.readouterr().err


@needs_programs
def test_missing_programs_are_named(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_photos.main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "apt-get is missing" in error and "git is missing" in error
    assert "6 of 6 photos are missing" in error


@needs_programs
@pytest.mark.parametrize("name", ["chelsea", "coffee"])
def test_a_near_duplicate_of_a_kept_photo_is_refused(manifest, tmp_path, capsys, name):
    entries = json.loads(manifest.read_text())
    again = next(entry for entry in entries if entry["name"] == name) | {"name": "again", "role": "train"}
    manifest.write_text(json.dumps([*entries, again]))
    out = tmp_path / "out"
    assert fetch_photos.main([str(out)]) == 1
    kept = next(path for role in ("validation", "held_out") for path in (out / role).glob(f"{name}.png"))
    assert f"{out / 'train' / 'again.png'} shows what {kept} shows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-megapixels", "0"], "--max-megapixels"),
        (["--mirrors", "nowhere"], "--mirrors nowhere: is not a folder"),
    ],
)
def test_wrong_usage(options, message, tmp_path, capsys):
    assert fetch_photos.main([*options, str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_near_duplicates_are_found_shrunk_cropped_and_mirrored(tmp_path):
    save_photos(tmp_path / "held_out", 256)
    (tmp_path / "train").mkdir()
    original = Image.open(tmp_path / "held_out" / "chelsea.png")
    original.crop((2, 2, 254, 254)).resize((100, 100)).save(tmp_path / "train" / "shrunk.jpg", quality=60)
    ImageOps.mirror(original).save(tmp_path / "train" / "mirrored.png")
    Image.open(tmp_path / "held_out" / "coffee.png").rotate(180).save(tmp_path / "train" / "other.png")
    found = near_duplicates((tmp_path / "train").iterdir(), (tmp_path / "held_out").iterdir())
    kept = tmp_path / "held_out" / "chelsea.png"
    assert found == [(tmp_path / "train" / "mirrored.png", kept), (tmp_path / "train" / "shrunk.jpg", kept)]


def test_the_hash_says_where_brightness_falls():
    falling = np.tile(np.arange(255, 0, -15, dtype=np.uint8), (16, 1))
    assert difference_hash(Image.fromarray(falling)).all()
    assert not difference_hash(Image.fromarray(falling[:, ::-1].copy())).any()


def test_the_manifest_is_complete():
    entries = read_manifest()
    assert len({entry.name for entry in entries}) == len({entry.sha256 for entry in entries}) == len(entries)
    assert all(sum(entry.role == role for entry in entries) >= 8 for role in ROLES)
    for entry in entries:
        assert all(entry[:5]) and entry.role in ROLES
        assert len(entry.sha256) == 64
        assert len(entry.commit or "") == (40 if entry.source.startswith("https://") else 0)


def test_the_table_in_the_docs_is_that_of_the_manifest():
    assert (ROOT / "docs" / "photos.md").read_text(encoding="utf-8").endswith("\n" + license_table(read_manifest()))


def test_the_table_has_a_row_for_each_photo():
    photo = Photo("a", "p", "share/a.png", "Ann", "CC0-1.0", "train", "0" * 64)
    assert license_table([photo, photo]).count("| a | training |") == 2
