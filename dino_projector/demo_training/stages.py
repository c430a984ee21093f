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

"""A stage of the training: steps within a time, and checkpoints from which another call goes on exactly."""

import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from ..folders import replace_folder
from ..training.samples import sample_rng
from ..training.trainer import average_gradients, avoid_cudnn_attention
from .crops import draw_pairs, make_pyramid
from .sizes import Sizes


STATE_FOLDER = "state"
MODEL_FOLDER = "model"
MAX_SHARD_SIZE = "14MB"  # checkpoints travel in files below 16 MiB
REPORT_STEPS = 100
CLOCK_STEPS = 10  # of several processes between two looks at the first one's clock; one looks at its own at every step
AVERAGE_DECAY = 0.999
# The learning rate rises, then stays, for nobody knows beforehand when a stage ends; the averaged weights bring most
# of what a falling rate would bring. The last call of a stage can be told to let it fall.
WARMUP_STEPS = 200
COOL_DOWN_SHARE = 0.3  # of the last call
SHARED_PURPOSE = 999  # of random numbers; processes have those below


class Stage:
    """
    Models in training, with all that is needed to go on.

    Subclasses fill `modules`, `optimizers` and `copies` (the modules that the saved model fits), and define
    [`~Stage.train_step`], [`~Stage.save_model`] and [`~Stage.measure`].

    Args:
        sizes ([`Sizes`]): Of the models.
        photos (`list[torch.Tensor]`): Bytes `(3, height, width)` to train on.
        work (`Path`): Folder of all stages.
        seed (`int`): Of the run.
        device (`torch.device`): To train on.

    Several processes each draw crops of their own, and average their gradients.
    """

    name: str
    learning_rate: float

    def __init__(self, sizes: Sizes, photos: list[torch.Tensor], work: Path, seed: int, device: torch.device):
        self.sizes, self.seed, self.device = sizes, seed, device
        self.stream_seed = zlib.crc32(f"{self.name} {seed}".encode())  # no two stages draw the same crops
        self.photos = [make_pyramid(photo, sizes.crop // 2) for photo in photos]
        self.folder = work / self.name
        self.step = 0
        self.stretch = -1
        self.crops: dict[int, Any] = {}
        self.rate_factor = 1.0  # of the learning rate, below 1 while it falls
        self.processes = PartialState()
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.copies: list[Any] = []
        torch.manual_seed(seed)

    def train_step(self) -> dict[str, torch.Tensor]:
        """One update; returns what there is to print."""
        raise NotImplementedError

    def save_model(self, folder: Path) -> None:
        """Writes what the later stages read, in half precision."""
        raise NotImplementedError

    def measure(self, validation: list[torch.Tensor]) -> dict[str, float]:
        """Numbers of the averaged weights on photos that were not trained on."""
        raise NotImplementedError

    def crops_of(self, side: int) -> Any:
        """The crops from which this stretch of steps draws, as [`~Stage.prepare_crops`] gives them."""
        stretch = self.step // self.sizes.pool_steps
        if stretch != self.stretch:
            self.crops, self.stretch = {}, stretch
        if side not in self.crops:
            # The side and the process choose the stream of random numbers, beside those of single steps.
            rng = sample_rng(self.stream_seed, stretch, 1000 * side + self.processes.process_index)
            count = max(1, self.sizes.pool_crops * self.sizes.crop**2 // side**2)
            self.crops[side] = self.prepare_crops(side, count, rng)
        return self.crops[side]

    def prepare_crops(self, side: int, count: int, rng: np.random.Generator) -> Any:
        return draw_pairs(self.photos, count, side, rng)

    def step_rng(self) -> np.random.Generator:
        """All that is random about a step of this process."""
        return sample_rng(self.stream_seed, self.step, self.processes.process_index)

    def shared_rng(self) -> np.random.Generator:
        """What is the same for all processes of a step: what decides how long it takes, so that none waits."""
        return sample_rng(self.stream_seed, self.step, SHARED_PURPOSE)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def make_optimizer(self, module: torch.nn.Module, **options) -> torch.optim.AdamW:
        return torch.optim.AdamW(module.parameters(), fused=self.device.type == "cuda", **options)

    def update(self, name: str, loss: torch.Tensor, working: torch.nn.Module | None = None) -> None:
        """
        One step of an optimizer along the gradient of `loss`, which may be that of a working copy of the module in
        half precision.
        """
        optimizer = self.optimizers[name]
        parameters = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["lr"] = (
            self.learning_rate * min(1, (self.step + 1) / WARMUP_STEPS) * self.rate_factor
        )
        inputs = parameters if working is None else list(working.parameters())
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.to(parameter.dtype)
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, module in self.modules.items():
            yield from ((f"{name}.{key}", tensor) for key, tensor in module.state_dict().items())
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                yield from ((f"{name}.optimizer.{index}.{key}", value) for key, value in values.items())

    def save(self) -> None:
        """Writes state and model; each folder appears whole or not at all."""

        def write_state(folder: Path) -> None:
            tensors = dict(self.state_tensors())
            save_torch_state_dict(
                tensors, folder, filename_pattern="state{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
            )
            (folder / "step.json").write_text(json.dumps({"step": self.step, "seed": self.seed}))

        replace_folder(self.folder / STATE_FOLDER, write_state)
        replace_folder(self.folder / MODEL_FOLDER, self.save_model)

    def load_copies(self, model_folder: Path) -> None:
        for model in self.copies:
            model.load_state_dict(type(model).from_pretrained(model_folder).state_dict())

    def load_module(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        module = self.modules[name]
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})

    def resume(self) -> None:
        """Goes on from the saved state; where only the saved model is, from its weights, with a new optimizer."""
        folder, model_folder = self.folder / STATE_FOLDER, self.folder / MODEL_FOLDER
        if not folder.is_dir():
            if model_folder.is_dir():
                print(f"{self.name}: starts from {model_folder}, which has no state beside it", flush=True)
                self.load_copies(model_folder)
            return
        saved = json.loads((folder / "step.json").read_text())
        if saved["seed"] != self.seed:
            raise ValueError(
                f"--seed {self.seed}: {folder} was made with {saved['seed']}; use that, or another --work"
            )
        self.step = saved["step"]
        tensors = load_shards(folder)
        for name in self.modules:
            self.load_module(name, tensors)
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            prefix = f"{name}.optimizer."
            for key in (key for key in tensors if key.startswith(prefix)):
                index, field = key.removeprefix(prefix).split(".")
                state.setdefault(int(index), {})[field] = tensors[key]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("state*.safetensors")):
        tensors |= load_file(path)
    return tensors


def find_trained(work: Path, *stages: str) -> Path:
    """The folder of the model that an earlier stage has saved: the first of `stages` that has one."""
    folders = [work / stage / MODEL_FOLDER for stage in stages]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ValueError(f"--work {work}: there is no {stages[-1]} yet; run the stage {stages[-1]} first")


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Into a module of the same kind, whose precision may be another."""
    for kept, new in zip(target.parameters(), source.parameters()):
        kept.copy_(new)


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float = AVERAGE_DECAY) -> None:
    """Moves the averaged weights towards the model's; by more in the first steps, when these change the most."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters()):
        kept.lerp_(new, 1 - decay)


class Clock:
    """
    How much of a call is over, from 0 to 1; the same for all processes, for the first one's clock counts.

    Args:
        stage ([`Stage`]): That trains.
        seconds (`float`, *optional*): Of the call at most.
        max_steps (`int`, *optional*): At which it ends, counted from the first call.
    """

    def __init__(self, stage: Stage, seconds: float | None, max_steps: int | None):
        self.stage, self.seconds, self.max_steps = stage, seconds, max_steps
        self.start, self.first_step = time.monotonic(), stage.step
        self.part_of_seconds = 0.0

    def spent(self) -> float:
        return time.monotonic() - self.start

    def progress(self) -> float:
        part_of_steps = 0.0
        if self.max_steps is not None:
            steps = self.max_steps - self.first_step
            part_of_steps = (self.stage.step - self.first_step) / steps if steps > 0 else 1.0
        is_alone = self.stage.processes.num_processes == 1
        if self.seconds is not None and (is_alone or self.stage.step % CLOCK_STEPS == 0):
            self.part_of_seconds = min(1.0, self.spent() / max(self.seconds, 1e-9))
            if not is_alone:
                part = torch.tensor(self.part_of_seconds, device=self.stage.device)
                self.part_of_seconds = float(broadcast(part))
        return max(part_of_steps, self.part_of_seconds)


def run_stage(
    stage: Stage,
    validation: list[torch.Tensor],
    seconds: float | None,
    max_steps: int | None,
    cools_down: bool = False,
) -> dict[str, float]:
    """
    Trains for at most `seconds`, or until `max_steps` in all; with `cools_down` the learning rate falls to 0 over the
    last part of the call. The first process saves, and returns the numbers; the others return none.
    """
    avoid_cudnn_attention()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    stage.resume()
    first, is_main = stage.step, stage.processes.is_main_process
    values: dict[str, torch.Tensor] = {}
    clock = Clock(stage, seconds, max_steps)
    while (progress := clock.progress()) < 1:
        stage.rate_factor = min(1.0, (1 - progress) / COOL_DOWN_SHARE) if cools_down else 1.0
        values = stage.train_step()
        stage.step += 1
        if is_main and (stage.step % REPORT_STEPS == 0 or stage.step == 1):
            text = " ".join(f"{name} {float(value):.4f}" for name, value in values.items())
            print(f"{stage.name} {stage.step} {clock.spent():.0f}s {text}", flush=True)
    spent = clock.spent()
    # Averaged, so that all processes raise when one has to.
    if not all(bool(torch.isfinite(reduce(value, "mean"))) for value in values.values()):
        raise ValueError(f"{stage.name}: the loss is not finite at step {stage.step}; the last checkpoint stays")
    numbers: dict[str, float] = {}
    if is_main:
        stage.save()
        numbers = {"steps": stage.step, "steps_per_second": (stage.step - first) / max(spent, 1e-9)}
        numbers |= stage.measure(validation)
    stage.processes.wait_for_everyone()
    return numbers
