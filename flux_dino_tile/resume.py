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

"""Going on with a picture after a crash: a call that saves the canvas after its steps."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from flux_dino_tile.calls import check_scheduler, describe_call, differences, observe_steps, settle_prompt
from flux_dino_tile.sharing import check_same_call, is_first_process, sharing_group
from pipeline_flux_dino_tile import FluxDinoTilePipeline, check


logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.safetensors"


class Checkpoint:
    """
    The folder of a picture whose call goes on, after a crash, from the last step that was saved. Delete it once the
    picture is written.

    Args:
        folder (`str` or `Path`): Made if it is missing; one for each picture.
        every (`int`, defaults to 1): Steps from one save to the next. The last step is always saved.
    """

    def __init__(self, folder: str | Path, every: int = 1):
        check("folder", folder, isinstance(folder, (str, Path)) and folder != "", "the path of a folder")
        check("every", every, type(every) is int and every >= 1, "a whole number of steps of at least 1")
        self.path = Path(folder) / CHECKPOINT_NAME
        self.every = every

    def run(self, pipe: FluxDinoTilePipeline, **arguments) -> Any:
        """
        `pipe(**arguments)`, from the step that the folder holds: repeated after a crash, it gives the same picture bit
        for bit. What a callback keeps for itself is not saved.

        What does not decide the canvas may differ from the call that crashed: `output_type`, `vae_residual`,
        `tile_batch_size` (but for rounding), callbacks, offloading and the VAE's dtype. In
        [`~flux_dino_tile.sharing.sharing_tiles`] all processes must see the same folder; the first one writes, and
        their number may change.

        Raises:
            `ValueError`: If the folder holds a checkpoint of other settings or a broken one, or the scheduler has a
                state of its own; before any model runs.
            `OSError`: If the folder cannot be written. Later, on a full disk, it only warns.
        """
        check_scheduler(pipe)
        is_cached = pipe.transformer.is_cache_enabled
        check("transformer", "one with a cache", not is_cached, "without diffusers' caches, whose state is not saved")
        arguments = settle_prompt(pipe, arguments)
        settings = describe_call(pipe, arguments)
        saved_settings, state = self.read()
        step = int(state.get("step", 0))
        check_same_call(pipe, {**settings, "step saved": step, "settings saved": saved_settings})
        if saved_settings not in (None, settings):
            raise ValueError(
                f"{self.path} was saved by a call of other settings:"
                f" {differences(settings, saved_settings, 'in the checkpoint')}. Repeat that call, or delete the file."
            )

        generator = arguments.get("generator")
        generators = [item for item in (generator if isinstance(generator, list) else [generator]) if item is not None]
        changed = {"prompt_embeds": state["prompt_embeds"]} if "prompt_embeds" in state else {}

        def save(pipeline, index, latents, changes):
            if "prompt_embeds" in changes:
                changed["prompt_embeds"] = changes["prompt_embeds"]
            is_due = (index + 1) % self.every == 0 or index + 1 == pipeline.num_timesteps or pipeline.interrupt
            # The pipeline refuses latents that a callback has spoilt.
            if is_due and is_first_process(sharing_group(pipe)) and latents.isfinite().all():
                states = {f"generator_{number}": item.get_state() for number, item in enumerate(generators)}
                tensors = {"step": torch.tensor(index + 1), "latents": latents.float()}
                self.write(settings, {**tensors, **changed, **states})

        arguments = observe_steps(arguments, save)
        if state:
            for number, item in enumerate(generators):
                item.set_state(state[f"generator_{number}"])
            arguments |= {"first_step": step, "latents": state["latents"]}
        with keeping_prompt_embeds(pipe, state.get("prompt_embeds")):
            return pipe(**arguments)

    def read(self) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
        """Settings and tensors of the checkpoint, `None` and empty if there is none yet; makes the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".tmp").touch()
        self.path.with_suffix(".tmp").unlink(missing_ok=True)
        if not self.path.exists():
            return None, {}
        try:
            with safe_open(self.path, "pt") as file:
                settings = json.loads((file.metadata() or {}).get("settings", "{}"))
                names = file.keys()
                # Copies, because the file is replaced under the tensors that are read from it.
                return settings, {name: file.get_tensor(name).clone() for name in names}
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a checkpoint ({error}). Delete it.") from error

    def write(self, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the checkpoint at once; if it cannot be written, warns and leaves the old one."""
        temporary = self.path.with_suffix(".tmp")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"settings": json.dumps(settings)})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:
            logger.warning(f"The checkpoint {self.path} cannot be written, and the picture goes on without: {error}")


@contextmanager
def keeping_prompt_embeds(pipe: FluxDinoTilePipeline, prompt_embeds: torch.Tensor | None) -> Iterator[None]:
    """
    Puts embeddings that a callback changed in the place of the first that `pipe` encodes, the prompt's. No argument of
    a call can say them.
    """
    if prompt_embeds is None:
        yield
        return
    encode_branch, kept = pipe.encode_branch, [prompt_embeds]

    def encode_once(*arguments):
        branch = encode_branch(*arguments)
        return branch._replace(prompt_embeds=kept.pop().to(branch.prompt_embeds)) if kept else branch

    pipe.encode_branch = encode_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipe.encode_branch
