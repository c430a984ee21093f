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

"""The settings that are compared, and their enlargements of every picture, kept so that another call goes on."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from PIL import Image, ImageOps
from tqdm import tqdm  # type: ignore[import-untyped]

import pipeline_flux_dino_tile
from flux_dino_tile.color_fix import match_color
from flux_dino_tile.embedded import locate_model
from pipeline_flux_dino_tile import DEFAULT_TILE_OVERLAP, axis_windows

from ..folders import replace_folder
from ..metrics import overlap_disagreement
from ..pictures import Record, find_pictures, read_picture, report_skipped
from ..training.degradation import degrade
from ..training.samples import sample_rng
from . import ABLATIONS
from .baselines import enlarge
from .measure import METRICS, measure


MIN_SIDE = 16  # px of the small picture, as much as SSIM's window and a token of FLUX need
RECORD_NAME = "record.json"
PICTURE_NAME = "picture.png"
# What becomes of the pipeline's windows, which are raised cosines, before they are made to sum to one again.
WINDOWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cosine": lambda window: window,
    "linear": lambda window: window.sqrt().asin(),
    "box": lambda window: window**64,  # the larger of two weights takes all
}


class Sample(NamedTuple):
    """A small picture, and the sharp one that it was made of, if there is one."""

    name: str
    small: Image.Image
    reference: Image.Image | None
    size: tuple[int, int]  # px of the enlargement, width and height


class Setting(NamedTuple):
    """How a picture is enlarged. A baseline has a model too: the one whose DINO and tiles judge it."""

    method: str
    model: str | None = None
    projector: str | None = None
    strength: float = 1.0
    tokens: str = "own"  # or "other": those of another picture
    start_sigma: float | None = None  # `None` is the pipeline's default, also of the others
    steps: int | None = None
    seed: int = 0
    tile_size: int | None = None
    tile_overlap: int = DEFAULT_TILE_OVERLAP
    color_fix: str | None = None
    vae_residual: bool | None = None
    window: str = "cosine"

    @property
    def folder(self) -> str:
        """A name for the file system that no other setting has."""
        digest = hashlib.sha256(json.dumps(self).encode()).hexdigest()[:10]
        return f"{self.method}-{digest}" if self.method != "flux" else f"flux-{self.strength:g}-{self.tokens}-{digest}"


def make_settings(
    baselines: Sequence[str],
    models: Sequence[str],
    projectors: Sequence[str | None],
    strengths: Sequence[float],
    start_sigmas: Sequence[float | None],
    steps: Sequence[int | None],
    seeds: Sequence[int],
    ablations: Sequence[str] = (),
    has_control: bool = True,
    **tiles: Any,
) -> list[Setting]:
    """
    Every combination of the arguments, the control with another picture's tokens at the greatest strength, and for
    each of `ablations`, see `ABLATIONS`, the first combination at that strength with one thing changed.

    Args:
        tiles: `tile_size` and `tile_overlap` in pixels, for all.
    """
    base = Setting("flux", strength=max(strengths), start_sigma=start_sigmas[0], steps=steps[0], **tiles)
    if models:
        base = base._replace(model=models[0], projector=projectors[0])
    settings = [Setting(method, base.model, base.projector, 0.0, **tiles) for method in baselines]
    for model, projector, sigma, count, seed in product(models, projectors, start_sigmas, steps, seeds):
        drawn = base._replace(model=model, projector=projector, start_sigma=sigma, steps=count, seed=seed)
        settings += [drawn._replace(strength=strength) for strength in strengths]
        if has_control and drawn.strength > 0:
            settings.append(drawn._replace(tokens="other"))
    for name, seed in product(ablations, seeds):
        field, values = ABLATIONS[name]
        settings += [base._replace(seed=seed, **{field: value}) for value in values]
    # Pipelines are loaded as seldom as can be.
    order = [(None, None), *product(models, projectors)]
    return sorted(dict.fromkeys(settings), key=lambda item: order.index((item.model, item.projector)))


def load_samples(
    folder: Path, scale: float, degradation: str | None, side: int | None, seed: int, limit: int | None = None
) -> list[Sample]:
    """
    The pictures of a folder, by name; unreadable and too small ones are named and left out.

    Args:
        scale (`float`): Of the enlargement.
        degradation (`str`, *optional*):
            Makes a small picture of each, see [`~dino_projector.training.degradation.degrade`]. `None` takes them as
            small pictures.
        side (`int`, *optional*): Cuts a square out of the middle and shrinks it to this side in pixels first.
        seed (`int`): Of the degradation.
        limit (`int`, *optional*): At most so many.
    """
    samples: list[Sample] = []
    for number, path in enumerate(find_pictures(folder)):
        if len(samples) == limit:
            break
        record = Record(path.relative_to(folder).as_posix(), path, "")
        try:
            picture = read_picture(record)
            if side is not None:
                picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
            factor = 1.0 if degradation is None else scale
            small_size = (int(picture.width / factor), int(picture.height / factor))
            if min(small_size) < MIN_SIDE:
                raise OSError(f"leaves {small_size[0]}x{small_size[1]} px to enlarge, less than {MIN_SIDE} on a side")
            size = (round(small_size[0] * scale), round(small_size[1] * scale))
            reference, small = None, picture
            if degradation is not None:
                left, top = ((length - kept) // 2 for length, kept in zip(picture.size, size))
                reference = picture.crop((left, top, left + size[0], top + size[1]))
                small = degrade(reference, small_size, degradation, sample_rng(seed, number))
        except Exception as error:  # Pillow's decoders raise anything on broken bytes
            report_skipped(record, error)
            continue
        samples.append(Sample(record.name, small, reference, size))
    if not samples:
        raise ValueError(f"{folder}: no picture in this folder can be used")
    return samples


# ---- Enlarging -----------------------------------------------------------------------------------------------------


@contextmanager
def watch_velocities(pipe) -> Iterator[list[torch.Tensor]]:
    """While the context lasts, the list holds the velocities that the latest step has predicted, tile by tile."""
    map_tiles = pipe.map_tiles
    velocities: list[torch.Tensor] = []

    def watch(compute, items):
        # The transformer's items are batches of tile numbers, those of VAE and DINO single tiles.
        is_step = isinstance(items[0], list)
        if is_step:
            velocities.clear()
        for result in map_tiles(compute, items):
            if is_step:
                velocities.extend(result.split(1))
            yield result

    pipe.map_tiles = watch
    try:
        yield velocities
    finally:
        pipe.map_tiles = map_tiles


def shape_windows(window: str, starts: Sequence[int], size: int) -> torch.Tensor:
    """[`~pipeline_flux_dino_tile.axis_windows`] of another shape, see `WINDOWS`."""
    shaped = WINDOWS[window](axis_windows(starts, size).double())
    total = torch.zeros(starts[-1] + size, dtype=torch.float64)
    for start, weights in zip(starts, shaped):
        total[start : start + size] += weights
    return torch.stack([weights / total[start : start + size] for start, weights in zip(starts, shaped)]).float()


def blend_by(window: str) -> AbstractContextManager:
    """The pipeline has one window; within this context it blends by another."""
    return mock.patch.object(pipeline_flux_dino_tile, "axis_windows", partial(shape_windows, window))


def tile_arguments(setting: Setting) -> dict[str, Any]:
    return {"tile_size": setting.tile_size, "tile_overlap": setting.tile_overlap}


def enlarge_flux(pipe, sample: Sample, setting: Setting, plan: Any, features) -> tuple[Image.Image, dict]:
    """The enlargement, and what only the run knows."""
    width, height = sample.size
    with watch_velocities(pipe) as velocities, blend_by(setting.window):
        picture = pipe(
            image=sample.small,
            height=height,
            width=width,
            start_sigma=setting.start_sigma,
            num_inference_steps=setting.steps,
            vae_residual=setting.vae_residual,
            dino_conditioning_scale=setting.strength,
            dino_embeds=features,
            # On the CPU, so that a seed means the same noise on every machine.
            generator=torch.Generator("cpu").manual_seed(setting.seed),
            **tile_arguments(setting),
        ).images[0]
    if setting.color_fix is not None:
        (picture,) = match_color(pipe, [picture], sample.small, setting.color_fix)
    # Neighbours start a step at the same latents: their clean ones differ by as much as sigma times their velocities.
    disagreement = overlap_disagreement(torch.stack(velocities), plan, pipe.vae_scale_factor)
    return picture, {"overlap_disagreement": float(pipe.scheduler.sigmas[-2]) * disagreement}


class Features:
    """DINO's features of the samples, one after the other, each encoded once for a way to cut tiles."""

    def __init__(self, pipe, samples: Sequence[Sample]):
        self.pipe, self.samples = pipe, samples
        self.number, self.known = -1, {}  # type: tuple[int, dict[tuple, torch.Tensor]]

    def __call__(self, number: int, setting: Setting, tokens: str = "own") -> torch.Tensor | None:
        if self.pipe is None or self.pipe.dino_encoder is None or self.pipe.dino_projector is None:
            return None
        if number != self.number:
            self.number, self.known = number, {}
        key = (tokens, setting.tile_size, setting.tile_overlap)
        if key not in self.known:
            sample = self.samples[number]
            width, height = sample.size
            # Another picture, cut and scaled so that it has as many tiles.
            other = self.samples[(number + 1) % len(self.samples)].small
            picture = sample.small if tokens == "own" else ImageOps.fit(other, sample.small.size)
            self.known[key] = self.pipe.encode_dino(picture, height, width, **tile_arguments(setting)).cpu()
        return self.known[key]


# ---- The sweep -----------------------------------------------------------------------------------------------------


def fingerprint(source: str | None) -> list:
    """What changes when the weights in a folder do; a Hub repository is known by its name."""
    files = sorted(Path(source).rglob("*.safetensors")) if source is not None and Path(source).is_dir() else []
    return [source, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


def picture_key(sample: Sample, setting: Setting, other: Sample) -> str:
    """The same for two runs that give the same enlargement."""
    digest = hashlib.sha256(json.dumps([setting, sample.size, sample.name]).encode())
    for picture in (sample.small, sample.reference, other.small if setting.tokens == "other" else None):
        digest.update(b"" if picture is None else picture.tobytes())
    for source in (setting.model, setting.projector):
        digest.update(json.dumps(fingerprint(source and locate_model(source))).encode())
    return digest.hexdigest()


def read_record(folder: Path, key: str) -> dict | None:
    """The record of an enlargement that is already there, if it was made in the same way."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
    except (OSError, ValueError):
        return None
    return record if record["key"] == key else None


def list_measures(judges: dict[str, Callable]) -> list[str]:
    """What a record is measured by: a picture that was measured by other metrics or judges is measured anew."""
    return [*METRICS, *sorted(judges)]


def save_result(folder: Path, record: dict, picture: Image.Image) -> None:
    def write(temporary: Path) -> None:
        picture.save(temporary / PICTURE_NAME)
        (temporary / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")

    replace_folder(folder, write)


def result_folder(output: Path, sample: Sample, setting: Setting) -> Path:
    # Under its path and with its suffix, for "a/b.png", "a__b.png" and "a__b.jpg" may all be there.
    return output / "pictures" / sample.name / setting.folder


def run_sweep(
    samples: Sequence[Sample],
    settings: Sequence[Setting],
    output: Path,
    load_pipeline: Callable[[str, str | None], Any],
    judges: dict[str, Callable],
) -> list[dict]:
    """
    Enlarges and measures what is not in `output` yet.

    Args:
        load_pipeline (`Callable`): From model and projector to a pipeline on its device.
        judges (`dict[str, Callable]`): From [`~dino_projector.metrics.load_judges`].

    Returns:
        `list[dict]`: A record for each sample and setting, in this order.
    """
    keys = {
        (number, setting): picture_key(sample, setting, samples[(number + 1) % len(samples)])
        for (number, sample), setting in product(enumerate(samples), settings)
    }
    records = {}
    for (number, setting), key in keys.items():
        record = read_record(result_folder(output, samples[number], setting), key)
        if record is not None and record.get("measured_by") == list_measures(judges):
            records[number, setting] = record
    with tqdm(total=len(keys), initial=len(records), unit="picture") as bar:
        for (model, projector), group in groupby(settings, key=lambda setting: (setting.model, setting.projector)):
            jobs = [job for job in product(range(len(samples)), list(group)) if job not in records]
            if not jobs:
                continue
            pipe = None if model is None else load_pipeline(model, projector)
            features = Features(pipe, samples)
            for number, setting in jobs:
                folder = result_folder(output, samples[number], setting)
                key = keys[number, setting]
                records[number, setting] = run_job(pipe, number, setting, key, folder, features, judges)
                bar.update()
    return [records[job] for job in keys]


def run_job(pipe, number: int, setting: Setting, key: str, folder: Path, features: Features, judges) -> dict:
    """Enlarges one picture by one setting, unless that is done, measures it, and saves both."""
    sample = features.samples[number]
    width, height = sample.size
    plan = None if pipe is None else pipe.plan_tiles(height, width, **tile_arguments(setting))
    record = read_record(folder, key)
    if record is None:
        start = time.monotonic()
        run: dict[str, Any] = {}
        if setting.method == "flux":
            embeds = features(number, setting, setting.tokens) if setting.strength > 0 else None
            start = time.monotonic()
            picture, run = enlarge_flux(pipe, sample, setting, plan, embeds)
        else:
            picture = enlarge(setting.method, sample.small, sample.size)
        record = {"key": key, "image": sample.name, "setting": setting._asdict(), "size": sample.size, "run": run}
        run["seconds"] = time.monotonic() - start
    else:
        picture = Image.open(folder / PICTURE_NAME).convert("RGB")
    scores, tiles = measure(pipe, sample, picture, plan, features(number, setting), judges)
    record |= {"measured_by": list_measures(judges), "scores": {**scores, **record["run"]}, "tiles": tiles}
    save_result(folder, record, picture)
    return record
