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

"""Checkpoints that appear whole or not at all, and of which only old ones are deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..folders import replace_folder


PREFIX = "checkpoint-"
STATE_NAME = "training_state.pt"
# Where the disk is full, torch.save raises one of the first two and safetensors the third.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders `checkpoint-N`, by step."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if (path / STATE_NAME).is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def find_checkpoint(output_dir: str | Path, wanted: str) -> Path | None:
    """The checkpoint to go on from: "latest", `None` if there is none yet, or a folder."""
    if wanted == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    if not (Path(wanted) / STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint {wanted}: the folder has no {STATE_NAME}")
    return Path(wanted)


def save_checkpoint(
    output_dir: str | Path, step: int, state: dict, write_projector: Callable[[Path], None], total_limit: int | None
) -> Path:
    """
    Writes `checkpoint-<step>`, then deletes the oldest beyond `total_limit`.

    Args:
        state (`dict`): All that the run needs to go on.
        write_projector (`Callable`): Adds what inference can load to the folder that it gets.
    """
    target = Path(output_dir) / f"{PREFIX}{step}"

    def write(folder: Path) -> None:
        torch.save(state, folder / STATE_NAME)
        write_projector(folder)

    try:
        replace_folder(target, write)
    except WRITE_ERRORS as error:
        kept = next(reversed(list_checkpoints(output_dir)), None)
        raise OSError(f"{target} cannot be written ({error_line(error)}). The last checkpoint is {kept}.") from error
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return target


def load_checkpoint(path: Path) -> dict:
    return torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)


def error_line(error: BaseException) -> str:
    """What an error says, in one line; of one that a worker process sends, the error after its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Caught ") else 0].strip()
