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

"""The samples that are cropped from sharp pictures and degraded, as an endless stream."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..pictures import Record, read_picture, report_skipped, to_bytes
from .degradation import degrade
from .sources import Source


# Room around a crop for what degradation does at borders, which inside a picture is not there.
MARGIN = 32
MAX_UNREADABLE = 100


class Crop(NamedTuple):
    """A square of a picture that was shrunk first, in pixels."""

    shrink: float  # at most 1
    left: int
    top: int
    is_flipped: bool


class Sampling(NamedTuple):
    """How samples are cropped and degraded."""

    resolution: int  # px, side of a crop
    scale_factor: tuple[float, float]  # enlargement from the small to the sharp picture
    degradations: tuple[str, ...]  # of which each sample draws one
    random_flip: bool = False
    fixed_crops: bool = False  # a picture is always cropped at the same place
    margin: int = MARGIN  # px


def draw_crop(size: tuple[int, int], sampling: Sampling, rng: np.random.Generator) -> Crop:
    """A crop of a picture of `size` (width, height), at any scale from its full size to its shortest side."""
    resolution = sampling.resolution
    if min(size) < resolution:
        raise OSError(f"has {size[0]}x{size[1]} px, less than --resolution {resolution}")
    shrink = np.exp(rng.uniform(np.log(resolution / min(size)), 0))
    left, top = (int(rng.integers(max(resolution, round(length * shrink)) - resolution + 1)) for length in size)
    return Crop(float(shrink), left, top, bool(sampling.random_flip and rng.random() < 0.5))


def crop_with_margin(
    picture: Image.Image, crop: Crop, resolution: int, margin: int
) -> tuple[Image.Image, tuple[int, int]]:
    """The crop with up to `margin` px around it, and the left and top border of the crop in it."""
    size = [max(resolution, round(length * crop.shrink)) for length in picture.size]
    starts = [max(0, start - margin) for start in (crop.left, crop.top)]
    ends = [min(length, start + resolution + margin) for length, start in zip(size, (crop.left, crop.top))]
    factors = [length / shrunk for length, shrunk in zip(picture.size, size)]
    left, top, right, bottom = (border * factor for border, factor in zip([*starts, *ends], factors * 2))
    region_size = (ends[0] - starts[0], ends[1] - starts[1])
    region = picture.resize(region_size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    place = (crop.left - starts[0], crop.top - starts[1])
    if crop.is_flipped:
        return region.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (region.width - resolution - place[0], place[1])
    return region, place


class Pair(NamedTuple):
    """A sharp crop, the same place as inference would see it, and the small picture that this came from."""

    sharp: Image.Image
    degraded: Image.Image  # resized to the sharp picture's size
    small: Image.Image  # of the crop with its margin


def make_pair(record: Record, sampling: Sampling, image_processor, rng, crop_rng) -> Pair:
    """
    Crops a picture and degrades the crop.

    The small picture is enlarged by `image_processor`, the pipeline's own, and then cropped: inference, too, enlarges
    the whole picture and then crops tiles.
    """
    picture = read_picture(record)
    crop = draw_crop(picture.size, sampling, crop_rng)
    region, (left, top) = crop_with_margin(picture, crop, sampling.resolution, sampling.margin)
    low, high = np.log(sampling.scale_factor)
    factor = float(np.exp(rng.uniform(low, high)))
    size = (max(1, round(region.width / factor)), max(1, round(region.height / factor)))
    small = degrade(region, size, str(rng.choice(sampling.degradations)), rng)
    enlarged = image_processor.resize(small, region.height, region.width)
    box = (left, top, left + sampling.resolution, top + sampling.resolution)
    return Pair(region.crop(box), enlarged.crop(box), small)


def sample_rng(seed: int, number: int, purpose: int = 0) -> np.random.Generator:
    """All that is random about sample `number`, whichever process or worker makes it."""
    return np.random.default_rng([seed, number, purpose])


def content_number(record: Record) -> int:
    """The same for a picture wherever it stands in a stream."""
    return zlib.crc32(record.file if isinstance(record.file, bytes) else str(record.file).encode())


class SampleStream(IterableDataset):
    """
    Endless samples: dictionaries with `sharp` and `degraded` `(3, resolution, resolution)` in 0 to 255, `caption`,
    `name` and `number`. Its state is a place in the source, so that a loader can go on from there.
    """

    def __init__(
        self, source: Source, sampling: Sampling, image_processor, seed: int, process: int = 0, processes: int = 1
    ):
        self.source, self.sampling, self.image_processor, self.seed = source, sampling, image_processor, seed
        self.process, self.processes = process, processes
        self.epoch = self.place = self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place, "count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place, self.count = state["epoch"], state["place"], state["count"]

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        # Process by process within a worker, so that a batch of all processes is a run of the source.
        part, parts = index * self.processes + self.process, self.processes * workers
        unreadable = 0
        reported: set[str] = set()
        while True:
            for record in self.source.epoch_records(self.epoch, part, parts, self.place):
                number = part + parts * self.count
                self.place += 1
                self.count += 1
                try:
                    sample = self.make_sample(record, number)
                except Exception as error:  # Pillow's decoders raise anything on broken bytes
                    unreadable += 1
                    if record.name not in reported:
                        report_skipped(record, error)
                    reported.add(record.name)
                    if unreadable == MAX_UNREADABLE:
                        message = f"{MAX_UNREADABLE} pictures in a row cannot be used, the last is {record.name}"
                        raise ValueError(message) from error
                    continue
                unreadable = 0
                yield sample
            self.epoch += 1
            self.place = 0

    def make_sample(self, record: Record, number: int) -> dict:
        rng = sample_rng(self.seed, number)
        crop_rng = sample_rng(self.seed, content_number(record)) if self.sampling.fixed_crops else rng
        pair = make_pair(record, self.sampling, self.image_processor, rng, crop_rng)
        return {
            "sharp": to_bytes(pair.sharp),
            "degraded": to_bytes(pair.degraded),
            "caption": record.caption,
            "name": record.name,
            "number": number,
        }


def first_pairs(source: Source, count: int, sampling: Sampling, image_processor, seed: int) -> list[Pair]:
    """Pairs of the source's first usable pictures, fewer if an epoch has no more, always the same."""
    pairs: list[Pair] = []
    for number, record in enumerate(source.epoch_records(0, 0, 1, 0)):
        if len(pairs) == count:
            break
        rng = sample_rng(seed, number)
        try:
            pairs.append(make_pair(record, sampling._replace(margin=0), image_processor, rng, rng))
        except Exception as error:  # as in `SampleStream`
            report_skipped(record, error)
    if not pairs:
        raise ValueError("none of the pictures can be used")
    return pairs
