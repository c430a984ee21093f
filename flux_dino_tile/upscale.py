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

"""Enlarges a photo, or a folder of photos: bicubic, or with FLUX.1 and DINO (`--use-flux`)."""

# torch and the pipeline take seconds to import, so only the functions that need them import the modules that do.

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from .enlargers import BicubicEnlarger
from .image_files import (
    can_be_written_in_strips,
    limiting_pixels,
    read_for_flux,
    read_picture,
    upright_size,
    write_picture,
)
from .jobs import (
    Job,
    check_job,
    checkpoint_folder,
    count_outcomes,
    describe_left_out,
    find_jobs,
    run_step,
    summarizing,
    take_result,
    target_size,
    write_summary,
)
from .messages import COMMAND, print_error, print_line, run_script
from .options import Options, parse_arguments
from .plans import check_tiles, print_plans
from .processes import Processes
from .records import describe_photo, software_text


def main(argv: list[str] | None = None) -> int:
    # torch reads it when it is imported, and would show where in its code it was when another process went away.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Read at the first tensor on the CPU: with huge pages, Linux takes a third less time to hand out memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return run_script(COMMAND, partial(run_command, sys.argv[1:] if argv is None else argv))


def run_command(argv: list[str]) -> int:
    options = parse_arguments(argv)
    jobs, left_out = find_jobs(options)
    is_first = int(os.environ.get("RANK", 0)) == 0
    if left_out and is_first:
        print_line(f"left out: {describe_left_out(left_out)}")
    if (options.plan or options.trial is not None) and not is_first:
        return 0
    with limiting_pixels(options.allow_large_input), summarizing(jobs, options.summary if is_first else None):
        work = print_plans if options.plan else upscale if options.trial is None else run_trial
        work(jobs, options)
    return 1 if count_outcomes(jobs)["failed"] else 0


def upscale(jobs: list[Job], options: Options) -> None:
    """Enlarges what can be; of several processes, the first one's `jobs` get to know what became of all."""

    def tell_end(reason: str) -> None:
        print_error(reason)
        if processes.is_first:
            write_summary(jobs, options.summary)

    processes = Processes(options.worker_timeout, tell_end)
    if processes.is_first:
        for job in jobs:
            run_step(check_job, job, options)
        if options.use_flux:
            check_tiles(jobs, options)
    ready = [job for job in jobs if job.outcome == "ready"]
    names = processes.from_first([[str(job.source), str(job.target)] for job in ready])
    if not processes.is_first:
        ready = [Job(Path(source), Path(target)) for source, target in names]

    # With fewer images than processes, all work on the tiles of one image.
    shares_tiles = options.use_flux and 0 < len(ready) < processes.count
    get_enlarger = cache(partial(make_enlarger, options, processes, shares_tiles, jobs))
    # `None` shows the bar on terminals only.
    is_hidden = None if len(ready) > 1 and processes.is_first else True
    indices = range(len(ready)) if shares_tiles else processes.take(len(ready))
    for index in tqdm(indices, total=len(ready), unit="image", disable=is_hidden):
        run_step(upscale_file, ready[index], get_enlarger, options)
        processes.report(index, ready[index].result())
    others = [index for index, job in enumerate(ready) if job.outcome == "ready"]
    for index, result in processes.collect(others).items():
        run_step(take_result, ready[index], result)
    if len(jobs) > 1 and processes.is_first:
        outcomes = count_outcomes(jobs)
        print_line(", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("done", "skipped", "failed")))


def run_trial(jobs: list[Job], options: Options) -> None:
    """Paints a part of one picture: a preview of it, or a region again."""
    (job,) = jobs
    run_step(check_job, job, options)
    if options.preview:
        check_tiles(jobs, options)
    if job.outcome == "ready":
        from .trials import preview_file, redo_file

        run_step(preview_file if options.preview else redo_file, job, options)


def make_enlarger(options: Options, processes: Processes, shares_tiles: bool, jobs: list[Job]):
    if not options.use_flux:
        return BicubicEnlarger()
    from .flux_enlarger import FluxEnlarger
    from .loading import load_flux

    pipe, settings = load_flux(options)
    if settings.compile and settings.tile_size is None:
        settings = replace(settings, tile_size=common_tile_size(pipe, jobs, options))
    if not processes.is_first:
        pipe.set_progress_bar_config(disable=True)
    return FluxEnlarger(pipe, settings, processes.join_group() if shares_tiles else None)


def common_tile_size(pipe, jobs: list[Job], options: Options) -> tuple[int, int]:
    """
    One tile size for all images of the run, so that compiled code serves all: that of the largest. Those that are
    done count too, so that the same command goes on with the same tiles.
    """
    sizes = []
    for job in jobs:
        with suppress(OSError):
            sizes.append(upright_size(job.source))
    width, height = target_size(max(sizes, key=math.prod), options.scale)
    plan = pipe.plan_tiles(height, width, None, options.tile_overlap)
    return plan.tile_height, plan.tile_width


def upscale_file(job: Job, get_enlarger: Callable, options: Options) -> str:
    picture = read_for_flux(job.source) if options.use_flux else read_picture(job.source)
    # Not before there is a picture, because loading a model takes minutes.
    enlarger = get_enlarger()
    source, job.size = picture.image, target_size(picture.image.size, options.scale)
    photo = {"photo": describe_photo(job.source, source)} if options.use_flux else {}
    more = {"checkpoint_dir": checkpoint_folder(job.target)} if options.resume else {}
    strips = None
    # Matching the colours takes the whole picture.
    if can_be_written_in_strips(job.target, job.size) and options.color_fix is None:
        strips = enlarger.strips(source, job.size, **more)
    else:
        picture.image = enlarger.whole(source, job.size, **more)
    if not enlarger.writes:
        exhaust(strips)
        return "done"
    try:
        software = software_text(options.scale, {**enlarger.description, **photo})
        lost = write_picture(picture, job.target, software, strips, job.size)
    except Exception:
        if enlarger.process_group is not None:
            exhaust(strips)  # the other processes need this one's tiles
        raise
    if options.resume:
        shutil.rmtree(checkpoint_folder(job.target), ignore_errors=True)
    job.notes += picture.notes + lost
    for note in job.notes:
        print_line(f"{job.source}: {note}")
    print_line(f"{job.source} -> {job.target} ({job.size[0]}x{job.size[1]} px)")
    return "done"


def exhaust(strips: Iterator[Image.Image] | None) -> None:
    """Takes the strips that are left, if there are any, and drops them."""
    for _ in strips or ():
        pass


if __name__ == "__main__":
    sys.exit(main())
