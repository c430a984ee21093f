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

"""Sharing the tiles of a picture among the processes of a `torch.distributed` group."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from flux_dino_tile.calls import check_scheduler, describe_call, differences, settle_prompt
from pipeline_flux_dino_tile import FluxDinoTilePipeline, check


class SharedMap:
    """
    A `map` for [`~FluxDinoTilePipeline.map_tiles`] whose calls the processes of a group share.

    They take an item each, round by round, and send each other the results as they are: every process yields all of
    them, bit for bit what one process yields, to add them up in the same order. Only the last result may have a
    smaller first dimension than the others.
    """

    def __init__(self, group: Any):
        self.group = group

    def __call__(self, compute: Callable[[Any], torch.Tensor], items: Sequence) -> Iterator[torch.Tensor]:
        rank, size = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        for start in range(0, len(items), size):
            # In the last round, processes without an item repeat the last one: all have to take part.
            value = compute(items[min(start + rank, len(items) - 1)]).contiguous()
            lengths = [len(value)] * size
            if start + size >= len(items):
                lengths = torch.cat(self.gather(torch.tensor([len(value)], device=value.device))).tolist()
                value = torch.cat([value, value.new_zeros(max(lengths) - len(value), *value.shape[1:])])
            results = self.gather(value)
            yield from (result[:length] for result, length in zip(results[: len(items) - start], lengths))

    def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The values of all processes, which have one shape."""
        values = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(values, value, group=self.group)
        return values


@contextmanager
def sharing_tiles(pipe: FluxDinoTilePipeline, group: Any) -> Iterator[Callable]:
    """
    A context in which the processes of `group` share all that `pipe` computes tile by tile; all get the whole picture,
    the same as from one process.

    It gives a function to be called in place of `pipe`, which first checks that all processes make the same call, with
    generators of the same seed. Every process must make it, with the same models. With `output_type="strips"` the
    models run while the strips are read: read all of them, in every process, before the context ends.

    Args:
        pipe ([`FluxDinoTilePipeline`]): The pipeline of this process.
        group (`torch.distributed.ProcessGroup`, *optional*):
            For example `torch.distributed.group.WORLD`. With `None` this process works alone.
    """
    if group is None:
        yield pipe
        return
    alone, pipe.map_tiles = pipe.map_tiles, SharedMap(group)
    try:
        yield partial(call_shared, pipe)
    finally:
        pipe.map_tiles = alone


def call_shared(pipe: FluxDinoTilePipeline, **arguments) -> Any:
    """`pipe(**arguments)` once all processes that share its tiles are seen to make the same call."""
    arguments = settle_prompt(pipe, arguments)
    check_same_call(pipe, describe_call(pipe, arguments))
    return pipe(**arguments)


def check_same_call(pipe: FluxDinoTilePipeline, settings: dict[str, Any]) -> None:
    """
    Raises a `ValueError`, in all processes that share the tiles of `pipe`, unless their `settings`, from
    [`~flux_dino_tile.calls.describe_call`], are the same and would give each of them the same noise.
    """
    group = sharing_group(pipe)
    if group is None:
        return
    calls: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(calls, settings, group=group)
    for rank, other in enumerate(calls):
        how = differences(calls[0], other, f"in process {rank}")
        if how:
            raise ValueError(f"The processes that share a picture must make the same call: {how}.")
    check(
        "generator", None, settings["generator"] is not None, "given, of one seed, in processes that share a picture"
    )
    check_scheduler(pipe)


def sharing_group(pipe: FluxDinoTilePipeline) -> Any:
    """The group that shares the tiles of `pipe`, or `None`."""
    return pipe.map_tiles.group if isinstance(pipe.map_tiles, SharedMap) else None


def is_first_process(group: Any) -> bool:
    """Whether this process, of those that share a picture, is the one that writes; so it is without a group."""
    return group is None or torch.distributed.get_rank(group) == 0
