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

"""Fetching photos from Debian packages, with a stand-in for apt-get that copies packages built here."""

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
from dino_projector.demo_training.photos import Photo, difference_hash, license_table, near_duplicates, read_manifest


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
FAKE_APT = """#!/bin/sh
[ "$1" = download ] || exit 9
cp "{archives}/$2.deb" . 2>/dev/null || { echo "E: Unable to locate package $2" >&2; exit 100; }
"""


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest of six small pictures in a package that the stand-in for apt-get knows."""
    root, archives, programs = tmp_path / "root", tmp_path / "archives", tmp_path / "bin"
    (root / "DEBIAN").mkdir(parents=True)
    control = (
        "Package: pictures\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: pictures\n"
    )
    (root / "DEBIAN" / "control").write_text(control)
    save_photos(root / "share", 96)
    archives.mkdir()
    programs.mkdir()
    subprocess.run(["dpkg-deb", "--build", root, archives / "pictures.deb"], check=True, capture_output=True)
    (programs / "apt-get").write_text(FAKE_APT.replace("{archives}", str(archives)))
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    entries = [
        {
            "name": path.stem,
            "package": "pictures",
            "path": f"share/{path.name}",
            "author": "Ann",
            "license": "CC0-1.0",
            "held_out": path.stem in ("chelsea", "coffee"),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted((root / "share").iterdir())
    ]
    path = tmp_path / "photos.json"
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(photos, "MANIFEST", path)
    return path


def change_first(manifest, **values):
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([entries[0] | values, *entries[1:]]))


@needs_dpkg
def test_photos_are_copied_by_their_use(manifest, tmp_path, capsys):
    assert fetch_photos.main([str(tmp_path / "out"), "--table", str(tmp_path / "table.md")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "held_out").iterdir()) == ["chelsea.png", "coffee.png"]
    assert len(list((tmp_path / "out" / "train").iterdir())) == 4
    copied = (tmp_path / "out" / "train" / "dogs.png").read_bytes()
    assert copied == (tmp_path / "root" / "share" / "dogs.png").read_bytes()
    assert (tmp_path / "table.md").read_text() == license_table(read_manifest())
    assert "| chelsea | held out | Ann | CC0-1.0 | `pictures`: `share/chelsea.png` |" in license_table(read_manifest())


@needs_dpkg
def test_large_photos_are_shrunk(manifest, tmp_path, capsys):
    assert fetch_photos.main([str(tmp_path / "out"), "--max-side", "64"]) == 0
    with Image.open(tmp_path / "out" / "train" / "dogs.jpg") as picture:
        assert picture.size == (64, 64)
    assert "| photo |" in capsys.readouterr().out


@needs_dpkg
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "share/astronaut.png of package pictures has the SHA-256"),
        ({"package": "nowhere"}, "package nowhere cannot be downloaded (Unable to locate package nowhere)"),
        ({"path": "share/none.png"}, "package pictures has no share/none.png"),
    ],
)
def test_what_is_missing_or_changed_is_named_in_one_line(manifest, tmp_path, capsys, change, message):
    change_first(manifest, **change)
    assert fetch_photos.main([str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@needs_dpkg
def test_no_apt_is_said(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_photos.main([str(tmp_path / "out")]) == 1
    assert "apt-get is missing" in capsys.readouterr().err


@needs_dpkg
def test_a_near_duplicate_of_a_held_out_photo_is_refused(manifest, tmp_path, capsys):
    entries = json.loads(manifest.read_text())
    again = next(entry for entry in entries if entry["held_out"]) | {"name": "again", "held_out": False}
    manifest.write_text(json.dumps([*entries, again]))
    assert fetch_photos.main([str(tmp_path / "out")]) == 1
    assert "again.png shows what the held-out chelsea.png shows" in capsys.readouterr().err


def test_wrong_usage(capsys):
    assert fetch_photos.main(["--max-side", "0", "out"]) == 2
    assert "--max-side" in capsys.readouterr().err


def test_near_duplicates_are_found_shrunk_cropped_and_mirrored(tmp_path):
    save_photos(tmp_path / "held_out", 256)
    (tmp_path / "train").mkdir()
    original = Image.open(tmp_path / "held_out" / "chelsea.png")
    original.crop((2, 2, 254, 254)).resize((100, 100)).save(tmp_path / "train" / "shrunk.jpg", quality=60)
    ImageOps.mirror(original).save(tmp_path / "train" / "mirrored.png")
    Image.open(tmp_path / "held_out" / "coffee.png").rotate(180).save(tmp_path / "train" / "other.png")
    found = near_duplicates((tmp_path / "train").iterdir(), (tmp_path / "held_out").iterdir())
    assert found == [("mirrored.png", "chelsea.png"), ("shrunk.jpg", "chelsea.png")]


def test_the_hash_says_where_brightness_falls():
    falling = np.tile(np.arange(255, 0, -15, dtype=np.uint8), (16, 1))
    assert difference_hash(Image.fromarray(falling)).all()
    assert not difference_hash(Image.fromarray(falling[:, ::-1].copy())).any()


def test_the_manifest_is_complete():
    entries = read_manifest()
    assert len({entry.name for entry in entries}) == len(entries)
    assert sum(entry.held_out for entry in entries) >= 8
    for entry in entries:
        assert all(entry[:5])
        assert len(entry.sha256) == 64


def test_the_table_has_a_row_for_each_photo():
    photo = Photo("a", "p", "share/a.png", "Ann", "CC0-1.0", False, "0" * 64)
    assert license_table([photo, photo]).count("| a | training |") == 2
