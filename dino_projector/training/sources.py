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

"""Where sharp pictures and their captions come from: a folder, a data set or shards."""

import json
import os
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from ..pictures import READ_SUFFIXES, Record, find_pictures, walk_files


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
    in a `metadata.jsonl` whose `file_name` is relative to its own folder; both in UTF-8.
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
            return sidecar.read_text(encoding="utf-8-sig", errors="replace").strip()
        return self.metadata_captions.get(os.path.realpath(path), "")


def read_metadata(root: Path, caption_column: str) -> dict[str, str]:
    """The captions of the `metadata.jsonl` in a folder and below, by the real paths of their pictures."""
    captions = {}
    for file in walk_files(root):
        if file.name != "metadata.jsonl":
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: must be UTF-8 ({error})") from error
        # Not `splitlines`, for a JSON text may hold the line separators that only Unicode knows.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                captions[os.path.realpath(file.parent / row["file_name"])] = str(row.get(caption_column) or "")
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
            caption = sample.get(self.caption_column, b"").decode("utf-8-sig", "replace").strip()
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
