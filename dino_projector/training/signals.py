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

"""Signals that stop a training after the step at hand."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


class StopSignal:
    """
    Notes SIGTERM and Ctrl-C, so that the step at hand can be finished; a second Ctrl-C interrupts at once. The end of
    the time counts as a signal.

    Args:
        seconds (`float`, *optional*): From now on.
    """

    def __init__(self, seconds: float | None = None):
        self.name: str | None = None
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds

    def handle(self, number: int, frame) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def reached_any(self, accelerator: Accelerator) -> bool:
        """Whether some process got a signal, or the time is up."""
        is_stopped = self.name is not None or time.monotonic() >= self.deadline
        flag = torch.tensor(float(is_stopped), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """In a data worker: a signal that the whole group gets is the main process's to act on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
