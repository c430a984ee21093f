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

"""Trains the projector: its optimizer, and one step of it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, reduce
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from pipeline_flux_dino_tile import FluxDinoTilePipeline

from .flow_matching import InputMaker, pixel_loss, project_tokens, step_velocity, velocity_losses


class TrainingError(Exception):
    """The run cannot go on; the message says why."""


class ProjectorTrainer:
    """
    The projector with its optimizer, and the step that trains it.

    FLUX is not wrapped for several processes: each computes the gradients of its own samples, and only the projector's
    are averaged, once a step.
    """

    def __init__(self, pipe: FluxDinoTilePipeline, make_inputs: InputMaker, accelerator: Accelerator, args):
        self.pipe, self.make_inputs, self.accelerator = pipe, make_inputs, accelerator
        self.max_grad_norm, self.pixel_loss_weight = args.max_grad_norm, args.pixel_loss_weight
        self.projector = pipe.dino_projector
        self.optimizer = torch.optim.AdamW(
            self.projector.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.make_lr_scheduler = partial(
            get_scheduler,
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.lr_scheduler = self.make_lr_scheduler()
        self.ema = EMAModel(self.projector.parameters(), decay=args.ema_decay)
        self.step = 0
        prepare_models(pipe, args.gradient_checkpointing, args.compile)

    def backward(self, batch: dict, share: float) -> torch.Tensor:
        """Adds the gradient of `share` times a batch's mean loss; returns the loss."""
        inputs, plan = self.make_inputs(batch), self.make_inputs.plan
        with self.accelerator.autocast():
            dino = project_tokens(self.pipe, plan, inputs)
        # Around the backward pass too, which computes the blocks again.
        with self.pipe.dino_attention(dino):
            velocity = step_velocity(self.pipe, inputs, dino)
            pixels = pixel_loss(self.pipe, plan, inputs, velocity)
            loss = velocity_losses(inputs, velocity).mean() + self.pixel_loss_weight * pixels
            (share * loss).backward()
        return loss.detach()

    def train_step(self, batches: Sequence[dict]) -> dict[str, float]:
        """One update from batches whose gradients are averaged; returns what there is to log."""
        loss = torch.stack([self.backward(batch, 1 / len(batches)) for batch in batches]).mean()
        average_gradients(self.projector.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(self.projector.parameters(), self.max_grad_norm)
        loss = self.accelerator.reduce(loss, "mean")
        if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
            names = gather_object([name for batch in batches for name in batch["name"]])
            raise TrainingError(
                f"the loss is {float(loss)} and the gradient's norm {float(grad_norm)} at step {self.step + 1}, on"
                f" {', '.join(names)}. Look at these pictures, or lower --learning_rate."
            )
        values = {"loss": float(loss), "grad_norm": float(grad_norm), "lr": self.lr_scheduler.get_last_lr()[0]}
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.projector.parameters())
        self.step += 1
        return values

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Gives the projector its averaged weights for a while."""
        self.ema.store(self.projector.parameters())
        self.ema.copy_to(self.projector.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.projector.parameters())

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "projector": self.projector.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state. What the arguments set, such as the learning rate, stays as they say."""
        self.step = state["step"]
        self.projector.load_state_dict(state["projector"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        self.lr_scheduler = self.make_lr_scheduler(last_epoch=self.step - 1)
        self.ema.load_state_dict({**state["ema"], "decay": self.ema.decay})
        self.ema.to(self.accelerator.device)


def avoid_cudnn_attention() -> None:
    """For the whole process: its backward pass fails with an illegal memory access."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def prepare_models(pipe: FluxDinoTilePipeline, gradient_checkpointing: bool, compiles: bool) -> None:
    avoid_cudnn_attention()
    if gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()  # of the pixel loss
    if compiles:
        pipe.transformer.compile_repeated_blocks()
        pipe.vae.encoder.compile()
        pipe.vae.decoder.compile()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Over the processes, in one message."""
    if PartialState().num_processes == 1:
        return
    trained = list(parameters)
    gradients: list[Any] = [parameter.grad for parameter in trained]
    message = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for parameter, part in zip(trained, message.split([parameter.numel() for parameter in trained])):
        parameter.grad = part.view_as(parameter)
