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

"""The images of a run: which files go in, where the results go, and what became of each. Needs no torch."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .image_files import READ_SUFFIXES, WRITE_FORMATS, check_place, check_writable, upright_size, write_text
from .messages import UsageError, first_line, print_error, print_line, usage_errors
from .options import Options
from .processes import REMEDY, ProcessError


HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
# Pictures by their names, which are not read from folders.
OTHER_SUFFIXES = {
    *HEIF_SUFFIXES,
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
    *(".cur", ".dds", ".eps", ".exr", ".hdr", ".icns", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".jxr", ".pbm"),
    *(".pcx", ".pfm", ".pgm", ".pnm", ".ppm", ".psb", ".psd", ".qoi", ".ras", ".sgi", ".svg", ".tga", ".wdp", ".xcf"),
    *(".apng", ".dib", ".heics", ".jpg2", ".jxs", ".mpo", ".xbm", ".xpm"),
}
LOSSLESS_SUFFIXES = (".png", ".tif", ".tiff")
MOST_NAMES = 20  # in one line


@dataclass
class Job:
    """An image to enlarge, and what became of it: "waiting", "ready", "done", "skipped", "failed" or "planned"."""

    source: Path
    target: Path
    outcome: str = "waiting"
    size: tuple[int, int] | None = None  # of the result, width and height in pixels
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def result(self) -> dict:
        return {"outcome": self.outcome, "size": self.size, "notes": self.notes, "error": self.error}

    def as_json(self) -> dict:
        return {"input": str(self.source), "output": str(self.target), **self.result()}


# ---- Files in ------------------------------------------------------------------------------------------------------


def find_jobs(options: Options) -> tuple[list[Job], list[Path]]:
    """The images to enlarge, each with an output of its own, and the pictures in folders that cannot be read."""
    if options.trial is not None:
        return [find_trial(Path(options.inputs[0]), options)], []
    ending = f"_x{options.scale:g}_flux" if options.use_flux else f"_x{options.scale:g}"
    sources = list({os.path.abspath(name): Path(name) for name in options.inputs}.values())
    output = options.output
    if len(sources) > 1 and output is not None:
        if Path(output).suffix.lower() in WRITE_FORMATS and not is_folder_name(output):
            raise UsageError(f"{output}: several inputs need a folder for the results (a new one ends in /)")
        output = os.path.join(output, "")
    jobs: list[Job] = []
    left_out: list[Path] = []
    for source in sources:
        # Not `Path.is_dir` and `Path.exists`, which raise on names that are too long.
        if os.path.isdir(source):
            # "." and ".." have no name of their own.
            named = source if source.name.strip(".") else source.resolve()
            default = named.with_name(f"{named.name}{ending}")
            folder = Path(output or default) if len(sources) == 1 else Path(output or "", default.name)
            found, others = find_folder_jobs(source, folder)
            jobs, left_out = jobs + found, left_out + others
        elif os.path.exists(source):
            jobs.append(Job(source, choose_target(source, output, ending)))
        else:
            raise UsageError(f"{source}: no such file or folder")
    jobs = separate_targets(jobs)
    check_overwriting(jobs)
    return jobs, left_out


def is_folder_name(output: str) -> bool:
    return os.path.isdir(output) or output.endswith(("/", os.sep))


def choose_target(source: Path, output: str | None, ending: str) -> Path:
    register_heif([source])
    suffix = source.suffix if source.suffix.lower() in WRITE_FORMATS else ".png"
    default = source.with_name(f"{source.stem}{ending}{suffix}")
    target = Path(output or default)
    if output is not None and is_folder_name(output):
        target = target / default.name
    if target.suffix.lower() not in WRITE_FORMATS:
        raise UsageError(
            f"{target}: the output must be a folder or end in {', '.join(WRITE_FORMATS)}; a new folder ends in /"
        )
    return target


def find_trial(source: Path, options: Options) -> Job:
    """
    The one picture of a preview or of which a region is painted again; without a name of its own, its output gets one
    that is free, so that tries stand side by side. A region is not written to a format that would change the rest.
    """
    if not os.path.exists(source):
        raise UsageError(f"{source}: no such file or folder")
    register_heif([source])
    stem, suffix, ending = source.stem, ".png", f"_x{options.scale:g}_flux_preview"
    if options.redo is not None:
        stem, ending = re.sub(r"_redo(_\d+)?$", "", stem), "_redo"
        suffix = source.suffix if source.suffix.lower() in LOSSLESS_SUFFIXES else suffix
    target = choose_target(source.with_name(f"{stem}{suffix}"), options.output, ending)
    if (options.output is None or is_folder_name(options.output)) and not options.overwrite:
        names = itertools.chain([target], (target.with_stem(f"{target.stem}_{i}") for i in itertools.count(2)))
        target = next(name for name in names if not os.path.lexists(name))
    job = Job(source, target)
    check_overwriting([job])
    return job


def find_folder_jobs(source: Path, output: Path) -> tuple[list[Job], list[Path]]:
    if os.path.exists(output) and not os.path.isdir(output):
        raise UsageError(f"{output}: the input is a folder, so the output must be one too")
    if output.resolve() == source.resolve():
        raise UsageError(f"{output}: the output would overwrite the input")
    images, left_out = find_images(source, output)
    if not images:
        others = f"; it has {describe_left_out(left_out)}" if left_out else ""
        raise UsageError(f"{source}: no images in this folder ({', '.join(sorted(READ_SUFFIXES))}){others}")
    return [Job(path, output / folder_target(path.relative_to(source))) for path in images], left_out


def folder_target(path: Path) -> Path:
    # "a.gif.png", because "a.png" may be in the folder too.
    return path if path.suffix.lower() in WRITE_FORMATS else path.with_name(f"{path.name}.png")


def find_images(folder: Path, excluded: Path) -> tuple[list[Path], list[Path]]:
    """
    The image files in `folder` and below, without hidden ones and without those in the folder `excluded`, and the
    pictures that cannot be read.
    """
    paths: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name for name in folders if name[0] != "." and Path(parent, name).resolve() != excluded.resolve()
        ]
        paths += [Path(parent, name) for name in files if name[0] != "."]
    suffixes = READ_SUFFIXES | register_heif(paths)
    images = [path for path in paths if path.suffix.lower() in suffixes]
    return sorted(images), sorted(path for path in paths if path.suffix.lower() in OTHER_SUFFIXES - suffixes)


def register_heif(paths: list[Path]) -> set[str]:
    """Has Pillow read HEIC if one of the files is that, and pillow-heif is installed; the suffixes it reads."""
    if not any(path.suffix.lower() in HEIF_SUFFIXES for path in paths):
        return set()
    if importlib.util.find_spec("pillow_heif") is None:
        return set()
    import pillow_heif

    pillow_heif.register_heif_opener()
    return HEIF_SUFFIXES


def describe_left_out(paths: list[Path]) -> str:
    names = ", ".join(str(path) for path in paths[:MOST_NAMES])
    more = f" and {len(paths) - MOST_NAMES} more" if len(paths) > MOST_NAMES else ""
    hint = " (pip install pillow-heif for HEIC)" if any(path.suffix.lower() in HEIF_SUFFIXES for path in paths) else ""
    return f"pictures of kinds that are not read: {names}{more}{hint}"


def separate_targets(jobs: list[Job]) -> list[Job]:
    """Gives longer names to outputs that would be one file, be it only on disks that take "A" and "a" for the same."""
    taken: set[str] = set()
    # An output that is called like its input keeps that name.
    for job in sorted(jobs, key=lambda job: job.target.name != job.source.name):
        while (key := unicodedata.normalize("NFC", str(job.target)).casefold()) in taken:
            job.target = job.target.with_name(f"{job.target.name}{job.target.suffix}")
        taken.add(key)
    return jobs


def check_overwriting(jobs: list[Job]) -> None:
    """Raises if an output is the file of an input, of the same job or another."""
    inputs = {file_identity(job.source) for job in jobs}
    for job in jobs:
        if os.path.exists(job.target) and file_identity(job.target) in inputs:
            raise UsageError(f"{job.target}: the output would overwrite the input")


def file_identity(path: Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:  # a broken link, which fails in its turn
        return None
    return state.st_dev, state.st_ino


def target_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


# ---- What becomes of them ------------------------------------------------------------------------------------------


def run_step(step: Callable[..., str], job: Job, *arguments) -> None:
    """Does one step for one image, which sets its outcome; an error becomes one line and the outcome "failed"."""
    try:
        job.outcome = step(job, *arguments)
    except (ProcessError, UsageError):
        raise
    except Exception as error:  # whatever it is, the other images have to be done
        job.outcome, job.error = "failed", "out of memory" if is_out_of_memory(error) else first_line(error)
        print_error(f"{job.source}: {job.error}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether main memory was not enough; PyTorch raises a `RuntimeError` for it."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def check_job(job: Job, options: Options) -> str:
    """Whether there is something to do, and nothing in the way of the result; reads only the image's header."""
    if os.path.exists(job.target) and not options.overwrite:
        print_line(
            f"{job.source}: skipped, {job.target} is already there, whatever settings made it"
            " (--overwrite makes it anew)"
        )
        checkpoint = checkpoint_folder(job.target)
        # Killed between the output and the deletion of its checkpoint.
        if os.path.isdir(checkpoint) and checkpoint.stat().st_mtime <= job.target.stat().st_mtime:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return "skipped"
    scale = 1 if options.redo is not None else options.scale
    check_writable(job.target, target_size(upright_size(job.source), scale))
    return "ready"


def checkpoint_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.checkpoint")


def take_result(job: Job, result: dict | None) -> str:
    """Takes over what another process reported about an image, `None` if it did not live to tell."""
    if result is None:
        raise RuntimeError(f"the process that worked on it is gone; {REMEDY}")
    job.size, job.notes, job.error = result["size"], result["notes"], result["error"]
    return result["outcome"]


def count_outcomes(jobs: list[Job]) -> Counter:
    return Counter(job.outcome for job in jobs)


@contextmanager
def summarizing(jobs: list[Job], path: str | None) -> Iterator[None]:
    """Writes what became of the jobs as JSON to the file `path`, if it is given, however the context ends."""
    if path is None:
        yield
        return
    with usage_errors("--summary"):
        check_place(Path(path))
    try:
        yield
    finally:
        write_summary(jobs, path)


def write_summary(jobs: list[Job], path: str | None) -> None:
    if path is not None:
        summary = {"outcomes": count_outcomes(jobs), "images": [job.as_json() for job in jobs]}
        with usage_errors("--summary"):
            write_text(Path(path), json.dumps(summary, indent=2) + "\n")
