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

"""What a command does with a part of one picture: a preview before it is enlarged, a region again after."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from .flux_enlarger import FluxEnlarger
from .image_files import Picture, read_for_flux, read_picture, upright_size, write_picture
from .jobs import LOSSLESS_SUFFIXES, Job, file_identity, target_size
from .loading import load_flux
from .messages import UsageError, print_line
from .options import PICTURE_SETTINGS, Options
from .preview import preview
from .records import check_photo, find_photo, software_text
from .redo import redo


def load_enlarger(options: Options) -> FluxEnlarger:
    """What calls the pipeline. A tile that is asked for is painted even if it is flat."""
    pipe, settings = load_flux(options)
    return FluxEnlarger(pipe, replace(settings, skip_flat_tiles=None))


def preview_file(job: Job, options: Options) -> str:
    """Writes the sheet of a preview."""
    width, height = upright_size(job.source)
    for x, y in options.at or ():
        if x >= width or y >= height:
            raise UsageError(f"--at {x},{y}: outside of {job.source}, which has {width}x{height} px")
    picture = read_for_flux(job.source)
    enlarger = load_enlarger(options)
    if options.color_fix is not None:
        job.notes.append("the preview shows the colours without --color-fix")

    def show(**arguments):
        shown = {"start_sigma": options.start_sigmas, "dino_conditioning_scale": options.dino_strengths}
        return preview(enlarger.pipe, **{**arguments, **shown}, at=options.at)

    shown = enlarger.retry(show, picture.image, target_size(picture.image.size, options.scale), "pil")
    values = {"start_sigma": shown.start_sigmas, "dino_strength": shown.dino_conditioning_scales}
    software = software_text(options.scale, {**enlarger.description, **values, "method": "preview"})
    sheet = Picture(shown.sheet, Image.Exif(), picture.icc_profile, color_chunks=picture.color_chunks)
    return write_trial(sheet, job, software)


def redo_file(job: Job, options: Options) -> str:
    """Writes the picture with one region painted again."""
    assert options.redo is not None and options.record is not None
    x, y, width, height = options.redo
    size = upright_size(job.source)
    if 0 in (width, height) or x + width > size[0] or y + height > size[1]:
        place = f"inside {job.source}, which has {size[0]}x{size[1]} px, and of at least 1x1 px"
        raise UsageError(f"--redo {x},{y},{width},{height}: the region must be {place}")
    photo_file = find_photo(job.source, options.record, options.photo)
    if file_identity(photo_file) == file_identity(job.target):
        raise UsageError(f"{job.target}: the output would overwrite the photo")
    photo = read_for_flux(photo_file).image
    check_photo(options.record, photo_file, photo)
    enlarged = target_size(photo.size, options.scale)
    if size != enlarged:
        raise ValueError(
            f"has {size[0]}x{size[1]} px, but {photo_file} enlarged {options.scale:g} times has"
            f" {enlarged[0]}x{enlarged[1]} px: it was cut or resized since"
        )
    picture = read_picture(job.source)
    if job.target.suffix.lower() not in LOSSLESS_SUFFIXES:
        job.notes.append(f"all pixels change a little in {job.target.name}: only .png and .tif keep them as they are")
    enlarger = load_enlarger(options)
    call = partial(redo, enlarger.pipe, picture.image, options.redo, color_fix=enlarger.settings.color_fix)
    picture.image = enlarger.retry(call, photo, size, "pil")
    return write_trial(picture, job, software_text(options.scale, add_to_record(options, enlarger.description)))


def add_to_record(options: Options, description: dict[str, Any]) -> dict[str, Any]:
    """The record of the whole picture, and beside it the region and what was not the same there."""
    record = dict(options.record or {})
    description = json.loads(json.dumps(description))
    changes = {name: value for name, value in description.items() if record.get(name) != value}
    changes |= {name: None for name in PICTURE_SETTINGS if name in record and name not in description}
    return {**record, "redone": [*record.get("redone", []), {"region": options.redo, **changes}]}


def write_trial(picture: Picture, job: Job, software: str) -> str:
    job.size = picture.image.size
    job.notes += picture.notes + write_picture(picture, job.target, software)
    for note in job.notes:
        print_line(f"{job.source}: {note}")
    print_line(f"{job.source} -> {job.target} ({job.size[0]}x{job.size[1]} px)")
    return "done"
