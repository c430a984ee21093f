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

"""Enlarging pictures with a pipeline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline_flux_dino_tile import FluxDinoTilePipeline

from .color_fix import match_color
from .enlargers import BicubicEnlarger, as_source, has_alpha
from .flat_tiles import find_flat_tiles
from .image_files import opaque_colors, resize_rows
from .messages import first_line, print_line
from .options import PICTURE_SETTINGS, Settings
from .processes import REMEDY, ProcessError
from .regions import call_prompt
from .resume import Checkpoint
from .sharing import is_first_process, sharing_tiles


# What the pipeline raises in all processes that share an image, or in none.
COMMON_ERRORS = (ValueError, FloatingPointError)
# What it may raise at all, for programs that call it by these functions.
EXPECTED_ERRORS = (*COMMON_ERRORS, OSError, RuntimeError, MemoryError)


class FluxEnlarger:
    """
    Enlarges images with a pipeline, by settings that [`load_flux`] has filled in; forms as in [`BicubicEnlarger`].

    With a `process_group`, whose processes make the same calls, they share the tiles of each image. Then all of them
    have to take all strips, and only the first `writes`.
    """

    def __init__(self, pipe: FluxDinoTilePipeline, settings: Settings, process_group=None):
        self.pipe = pipe
        self.settings = settings
        self.process_group = process_group
        self.writes = is_first_process(process_group)
        self.tile_batch_size = settings.tile_batch_size

    @property
    def description(self) -> dict[str, Any]:
        """The settings that decide what the picture looks like, without the folders of this machine."""
        values = {name: getattr(self.settings, name) for name in PICTURE_SETTINGS}
        for name in ("model", "projector"):
            if values[name] is not None and Path(values[name]).is_dir():
                values[name] = Path(values[name]).resolve().name
        return {"method": "flux", **{name: value for name, value in values.items() if value is not None}}

    def whole(self, image: Image.Image, size: tuple[int, int], checkpoint_dir: Path | None = None) -> Image.Image:
        with self.sharing(checkpoint_dir) as call:
            results = self.retry(call, image, size, "pil").images
        return self.like_source(results[0], image)

    def like_source(self, result: Image.Image, image: Image.Image) -> Image.Image:
        """A result in RGB with the colours that the settings ask for, and as grey or transparent as its image."""
        if self.settings.color_fix is not None:
            result = match_color(self.pipe, [result], opaque_colors(image), self.settings.color_fix)[0]
        alpha = BicubicEnlarger().whole(image.getchannel("A"), result.size) if has_alpha(image) else None
        return as_source(result, image, alpha)

    def strips(
        self, image: Image.Image, size: tuple[int, int], checkpoint_dir: Path | None = None
    ) -> Iterator[Image.Image]:
        width, height = size
        wide_alpha = None
        if has_alpha(image):
            wide_alpha = BicubicEnlarger().whole(image.getchannel("A"), (width, image.height))
        top = 0
        with self.sharing(checkpoint_dir) as call:
            for pixels in self.retry(call, image, size, "strips").images:
                bottom = top + pixels.shape[1]
                alpha = wide_alpha and resize_rows(wide_alpha, height, top, bottom)
                yield as_source(Image.fromarray(pixels[0]), image, alpha)
                top = bottom

    @contextmanager
    def sharing(self, checkpoint_dir: Path | None) -> Iterator[Callable]:
        """
        What is called in place of the pipeline, to go on from a checkpoint and to share the tiles. An error ends the
        run if other processes share them, because they wait for this one.
        """
        try:
            with sharing_tiles(self.pipe, self.process_group) as call:
                if checkpoint_dir is not None:
                    call = partial(Checkpoint(checkpoint_dir, self.settings.checkpoint_steps).run, self.pipe)
                yield call
        except COMMON_ERRORS:
            raise
        except Exception as error:
            if self.process_group is None:
                raise
            raise ProcessError(
                f"a process that shares the tiles failed or is gone ({first_line(error)}); {REMEDY}"
            ) from error

    def retry(self, call: Callable, image: Image.Image, size: tuple[int, int], output_type: str) -> Any:
        """
        The output of `call`; after an out-of-memory on the GPU tried again with half as many tiles at once, unless
        other processes share the image: they would have to do the same.
        """
        while True:
            try:
                return call(**self.arguments(image, size), output_type=output_type)
            except torch.OutOfMemoryError as error:
                if self.process_group is not None:
                    raise
                if self.tile_batch_size == 1:
                    raise RuntimeError(
                        "out of GPU memory with one tile at a time: try --memory 8, or a smaller --tile-size"
                    ) from error
            # Here, where the error does not hold the tensors of the call any more.
            self.tile_batch_size //= 2
            print_line(f"out of GPU memory: trying again with --tile-batch-size {self.tile_batch_size}")
            self.pipe.maybe_free_model_hooks()
            torch.cuda.empty_cache()

    def arguments(self, image: Image.Image, size: tuple[int, int]) -> dict[str, Any]:
        """What the pipeline is called with for one image."""
        settings = self.settings
        place: dict[str, Any] = {
            "image": opaque_colors(image),
            "width": size[0],
            "height": size[1],
            "tile_size": settings.tile_size,
            "tile_overlap": settings.tile_overlap,
        }
        features, frozen_tiles = None, []
        if settings.skip_flat_tiles is not None:
            if settings.dino_strength:
                features = self.pipe.encode_dino(**place)
            frozen_tiles = find_flat_tiles(
                self.pipe, **place, dino_embeds=features, max_contrast=settings.skip_flat_tiles
            )
        return {
            **place,
            "prompt": call_prompt(settings.prompt, settings.region_prompts),
            "start_sigma": settings.start_sigma,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "tile_batch_size": self.tile_batch_size,
            "dino_conditioning_scale": settings.dino_strength or 0.0,
            "dino_embeds": features,
            "max_sequence_length": settings.text_tokens,
            "frozen_tiles": frozen_tiles,
            "vae_residual": bool(settings.vae_residual),
            # On the CPU, so that a seed means the same noise on every machine.
            "generator": torch.Generator("cpu").manual_seed(settings.seed),
        }
