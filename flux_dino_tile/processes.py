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

"""The processes of one run of `upscale.py`, as `accelerate launch` or `torchrun` start them.

They talk through the launcher's key-value store: the first process says which images there are, every process takes
the next one and reports what became of it, and all show that they are alive. Only shared tiles go through collectives
(gloo, NCCL on GPUs).
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any


START_SECONDS = 300.0  # for all processes to start
BEAT_SECONDS = 1.0
POLL_SECONDS = 0.1
REMEDY = "what is finished is kept: run the same command again"


class ProcessError(RuntimeError):
    """A process of this run is gone or went its own way, so that the run cannot go on."""


class Processes:
    """
    This process among those of its run; alone unless a launcher started several.

    Args:
        timeout (`float`): Seconds without a sign of life, or in one exchange of tiles, after which the run ends.
        tell (`Callable`): Gets the line that says why this process is ended at once.
    """

    def __init__(self, timeout: float, tell: Callable[[str], None]):
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", 1))
        self.timeout, self.tell = timeout, tell
        self.needed = {0}  # the processes without which this one cannot go on
        self.calls: Counter = Counter()  # of each method that all processes call
        if self.count == 1:
            return
        from torch.distributed import rendezvous

        start_timeout = timedelta(seconds=max(timeout, START_SECONDS))
        self.store, self.rank, self.count = next(rendezvous("env://", timeout=start_timeout))
        self.store.set_timeout(timedelta(seconds=timeout))
        self.heard = {rank: (0, time.monotonic()) for rank in range(self.count)}
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def watch(self) -> None:
        """Shows that this process is alive, and ends it when one that it needs is not; runs in a thread."""
        try:
            while not self.is_over.wait(BEAT_SECONDS):
                self.ask_store("add", f"beats/{self.rank}", 1)
                for rank in range(self.count):
                    beats = self.ask_store("add", f"beats/{rank}", 0)
                    if beats != self.heard[rank][0]:
                        self.heard[rank] = beats, time.monotonic()
                if lost := [rank for rank in sorted(self.needed) if self.is_lost(rank) and not self.has_ended(rank)]:
                    self.end(f"process {lost[0]} gave no sign of life for {self.timeout:g} s; {REMEDY}")
        except ProcessError as error:
            self.end(str(error))

    def ask_store(self, operation: str, *arguments) -> Any:
        try:
            return getattr(self.store, operation)(*arguments)
        except RuntimeError as error:
            raise ProcessError(f"the first process is gone; {REMEDY}") from error

    def is_lost(self, rank: int) -> bool:
        return time.monotonic() - self.heard[rank][1] > self.timeout

    def has_ended(self, rank: int) -> bool:
        """Whether the process has nothing left to do, unlike one that is lost."""
        return self.ask_store("check", [f"ended/{rank}"])

    def end(self, reason: str) -> None:
        """Ends this process at once, also if it waits in a collective, from which nothing else frees it."""
        try:
            self.tell(reason)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(1)

    def from_first(self, value: Any) -> Any:
        """The first process's `value`, which must fit into JSON."""
        if self.count == 1:
            return value
        key = self.next_key("value")
        if self.is_first:
            self.ask_store("set", key, json.dumps(value))
        while not self.ask_store("check", [key]):
            time.sleep(POLL_SECONDS)
        return json.loads(self.ask_store("get", key))

    def next_key(self, name: str) -> str:
        """A key of its own for each call that all processes make in the same order."""
        self.calls[name] += 1
        return f"{name}/{self.calls[name]}"

    def take(self, count: int) -> Iterator[int]:
        """Yields the items, numbers below `count`, that no other process takes, so that a fast process gets more."""
        if self.count == 1:
            yield from range(count)
            return
        key = self.next_key("taken")
        while (index := self.ask_store("add", key, 1) - 1) < count:
            yield index

    def report(self, index: int, result: Any) -> None:
        """Tells the first process what became of an item, in what fits into JSON."""
        if not self.is_first:
            self.ask_store("set", f"results/{index}", json.dumps(result))

    def join_group(self) -> Any:
        """The `torch.distributed` group in which all processes share tiles; from now on each needs all others."""
        import torch
        from torch import distributed

        self.needed = set(range(self.count))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=self.timeout)
        distributed.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.count, timeout=timeout
        )
        return distributed.group.WORLD

    def collect(self, items: Sequence[int]) -> dict[int, Any]:
        """
        In the first process, which waits for the others, what they reported about `items`, `None` where the process
        that took one is lost. Empty in the others. Nothing can be exchanged after it.
        """
        if self.count == 1:
            return {}
        if not self.is_first:
            # The store lives in the first process, which may end as soon as it has this.
            self.is_over.set()
            self.thread.join()
            self.ask_store("set", f"ended/{self.rank}", "")
            return {}
        for rank in range(1, self.count):
            while not self.has_ended(rank) and not self.is_lost(rank):
                time.sleep(POLL_SECONDS)
        self.is_over.set()
        keys = {index: f"results/{index}" for index in items}
        return {
            index: json.loads(self.ask_store("get", key)) if self.ask_store("check", [key]) else None
            for index, key in keys.items()
        }
