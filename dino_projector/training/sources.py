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

"""Sharp pictures from a folder, a data set or shards, and the samples that are cut from them."""

import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers.utils import load_image
from PIL import Image, UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from .degradation import degrade


Image.init()
READ_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
# Room around a crop for what degradation does at borders, which inside a picture is not there.
MARGIN = 32
MAX_UNREADABLE = 100


class Record(NamedTuple):
    """A picture that is not opened yet."""

    name: str  # that a message shows and that is the picture's own
    file: Any  # a path or bytes
    caption: str  # "" if there is none


class Source(Protocol):
    """Pictures in an order of their own in every epoch, dealt out to `parts` readers."""

    def epoch_records(self, epoch: int, part: int, parts: int, start: int) -> Iterator[Record]: ...


class ListedSource:
    """
    Pictures that are listed beforehand. The epochs follow on each other in one sequence, of which a reader takes every
    `parts`-th, so that the samples do not depend on the number of readers.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def record(self, index: int) -> Record:
        raise NotImplementedError

    def captions(self) -> list[str]:
        raise NotImplementedError

    def epoch_records(self, epoch: int, part: int, parts: int, start: int) -> Iterator[Record]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        for index in order[(part - epoch * len(self)) % parts :: parts][start:]:
            yield self.record(int(index))


class ImageFolder(ListedSource):
    """
    The pictures in a folder and below. A caption is the text in `photo.txt` beside `photo.jpg`, or the caption column
    in a `metadata.jsonl` whose `file_name` is relative to its own folder.
    """

    def __init__(self, root: str | Path, seed: int, caption_column: str | None = "text"):
        super().__init__(seed)
        self.root = Path(root)
        self.paths = find_pictures(self.root)
        if not self.paths:
            raise ValueError(f"{root}: no pictures in this folder")
        self.metadata_captions = read_metadata(self.root, caption_column) if caption_column else {}
        self.has_captions = caption_column is not None

    def __len__(self) -> int:
        return len(self.paths)

    def record(self, index: int) -> Record:
        path = self.paths[index]
        return Record(str(path), path, self.caption(path))

    def captions(self) -> list[str]:
        return [self.caption(path) for path in self.paths]

    def caption(self, path: Path) -> str:
        sidecar = path.with_suffix(".txt")
        if self.has_captions and sidecar.is_file():
            return sidecar.read_text(encoding="utf-8", errors="replace").strip()
        return self.metadata_captions.get(path, "")


def find_pictures(root: Path) -> list[Path]:
    paths = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in READ_SUFFIXES)


def read_metadata(root: Path, caption_column: str) -> dict[Path, str]:
    captions = {}
    for file in root.rglob("metadata.jsonl"):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                captions[file.parent / row["file_name"]] = str(row.get(caption_column) or "")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: no JSON object with a `file_name` ({error})") from error
    return captions


class ListedDataset(ListedSource):
    """A `datasets.Dataset` with an image column and, optionally, a caption column."""

    def __init__(self, dataset, seed: int, image_column: str, caption_column: str | None):
        super().__init__(seed)
        self.dataset, self.image_column, self.caption_column = dataset, image_column, caption_column

    def __len__(self) -> int:
        return len(self.dataset)

    def record(self, index: int) -> Record:
        return row_record(self.dataset[index], str(index), self.image_column, self.caption_column)

    def captions(self) -> list[str]:
        if self.caption_column is None:
            return []
        return [str(caption or "") for caption in self.dataset[self.caption_column]]


class StreamedDataset:
    """A `datasets.IterableDataset`, which deals its shards out to processes and workers itself."""

    def __init__(self, dataset, seed: int, image_column: str, caption_column: str | None):
        self.dataset, self.seed = dataset, seed
        self.image_column, self.caption_column = image_column, caption_column

    def epoch_records(self, epoch: int, part: int, parts: int, start: int) -> Iterator[Record]:
        dataset = self.dataset.shuffle(seed=self.seed + epoch, buffer_size=1000)
        for place, row in enumerate(islice(dataset, start, None), start):
            name = f"part {part}, epoch {epoch}, row {place}"
            yield row_record(row, name, self.image_column, self.caption_column)


class Shards:
    """Webdataset shards: tar files in which the files of a sample share their name up to the first dot."""

    def __init__(self, urls: str, seed: int, caption_column: str | None = "txt"):
        from webdataset.shardlists import expand_urls

        self.urls, self.seed, self.caption_column = sorted(expand_urls(urls)), seed, caption_column

    def epoch_records(self, epoch: int, part: int, parts: int, start: int) -> Iterator[Record]:
        import random

        import webdataset

        urls = list(np.random.default_rng([self.seed, epoch]).permutation(self.urls)[part::parts])
        options = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None, "empty_check": False}
        samples = webdataset.WebDataset(urls, handler=skip_broken_shard, **options)
        samples = samples.shuffle(1000, initial=1000, rng=random.Random(f"{self.seed} {epoch} {part}"))
        is_empty = start == 0
        for sample in islice(samples, start, None):
            is_empty = False
            pictures = [name for name in sample if f".{name.rsplit('.')[-1].lower()}" in READ_SUFFIXES]
            caption = sample.get(self.caption_column, b"").decode("utf-8", "replace").strip()
            name = f"{sample['__url__']}: {sample['__key__']}"
            yield Record(name, sample[pictures[0]] if pictures else b"", caption)
        if is_empty:
            raise ValueError(f"{', '.join(urls)}: no samples in these shards")


def skip_broken_shard(error: Exception) -> bool:
    """Has webdataset go on after a shard that ends too early or is no tar file; other errors end the run."""
    if not isinstance(error, tarfile.TarError):
        raise error
    # Last come the shard's name or a message with it, depending on where the error is noticed.
    print(f"the rest of a broken shard is skipped: {error.args[-1]}", file=sys.stderr, flush=True)
    return True


def row_record(row: dict, name: str, image_column: str, caption_column: str | None) -> Record:
    file = row[image_column]  # as it is stored: {"bytes": ..., "path": ...}
    caption = "" if caption_column is None else str(row[caption_column] or "")
    return Record(f"{file['path'] or 'picture'} ({name})", file["bytes"] or file["path"], caption)


def open_dataset(
    name: str,
    config: str | None,
    split: str,
    is_streamed: bool,
    image_column: str,
    caption_column: str | None,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> ListedDataset | StreamedDataset:
    """A data set of the Hub, or of a folder of Parquet files, saved data or pictures."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    dataset = datasets.load_dataset(name, config, split=split, streaming=is_streamed)
    features = dataset.features or {}
    for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column is not None and column not in features:
            raise ValueError(f"{option} {column}: the data set has the columns {', '.join(features)}")
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(f"--image_column {image_column}: holds {features[image_column]}, not pictures")
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if is_streamed:
        dataset = split_dataset_by_node(dataset, process, processes)
        return StreamedDataset(dataset, seed, image_column, caption_column)
    return ListedDataset(dataset, seed, image_column, caption_column)


def check_shards(source: Source, processes: int, workers: int) -> None:
    """Raises a `ValueError` if a reader of a stream would get no shard."""
    readers = processes * max(1, workers)
    if isinstance(source, Shards):
        shards = len(source.urls)
    elif isinstance(source, StreamedDataset):
        shards, readers = source.dataset.num_shards, max(1, workers)
    else:
        return
    if shards < readers:
        raise ValueError(
            f"{shards} shards cannot be shared by {readers} readers (processes times --dataloader_num_workers). Lower"
            " --dataloader_num_workers or make more shards."
        )


# ---- Samples -------------------------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """A square cut out of a picture that was shrunk first, in pixels."""

    shrink: float  # at most 1
    left: int
    top: int
    is_flipped: bool


class Sampling(NamedTuple):
    """How samples are cut and worn."""

    resolution: int  # px, side of a crop
    scale_factor: tuple[float, float]  # enlargement from the small to the sharp picture
    degradations: tuple[str, ...]  # of which each sample draws one
    random_flip: bool = False
    fixed_crops: bool = False  # a picture is always cut at the same place
    margin: int = MARGIN  # px


def read_picture(record: Record) -> Image.Image:
    """The picture upright, in RGB."""
    file = BytesIO(record.file) if isinstance(record.file, bytes) else record.file
    try:
        picture = Image.open(file)
    except UnidentifiedImageError:
        raise OSError("is not a picture that Pillow can read") from None
    with picture:
        if picture.mode.startswith(("I", "F")):
            raise OSError("has 16 or 32 bits per channel")
        return load_image(picture)


def draw_crop(size: tuple[int, int], sampling: Sampling, rng: np.random.Generator) -> Crop:
    """A crop of a picture of `size` (width, height), at any scale from its full size to its shortest side."""
    resolution = sampling.resolution
    if min(size) < resolution:
        raise OSError(f"has {size[0]}x{size[1]} px, less than --resolution {resolution}")
    shrink = np.exp(rng.uniform(np.log(resolution / min(size)), 0))
    left, top = (int(rng.integers(max(resolution, round(length * shrink)) - resolution + 1)) for length in size)
    return Crop(float(shrink), left, top, bool(sampling.random_flip and rng.random() < 0.5))


def cut(picture: Image.Image, crop: Crop, resolution: int, margin: int) -> tuple[Image.Image, tuple[int, int]]:
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
    Cuts a crop and wears it.

    The small picture is enlarged by `image_processor`, the pipeline's own, and then cut: inference, too, enlarges the
    whole picture and then cuts tiles.
    """
    picture = read_picture(record)
    crop = draw_crop(picture.size, sampling, crop_rng)
    region, (left, top) = cut(picture, crop, sampling.resolution, sampling.margin)
    low, high = np.log(sampling.scale_factor)
    factor = float(np.exp(rng.uniform(low, high)))
    size = (max(1, round(region.width / factor)), max(1, round(region.height / factor)))
    small = degrade(region, size, str(rng.choice(sampling.degradations)), rng)
    enlarged = image_processor.resize(small, region.height, region.width)
    box = (left, top, left + sampling.resolution, top + sampling.resolution)
    return Pair(region.crop(box), enlarged.crop(box), small)


def to_bytes(picture: Image.Image) -> torch.Tensor:
    """`(3, height, width)`, 0 to 255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def sample_rng(seed: int, number: int, purpose: int = 0) -> np.random.Generator:
    """All that is random about sample `number`, whichever process or worker makes it."""
    return np.random.default_rng([seed, number, purpose])


def content_number(record: Record) -> int:
    """The same for a picture wherever it stands in a stream."""
    return zlib.crc32(record.file if isinstance(record.file, bytes) else str(record.file).encode())


def report_skipped(record: Record, error: Exception) -> None:
    print(f"{record.name}: skipped, {error}", file=sys.stderr, flush=True)


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
