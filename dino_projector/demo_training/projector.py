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

"""The projector stage: the project's own training, as a user runs it on FLUX.1, on the assembled base."""

from pathlib import Path

from ..folders import ENCODER_FOLDER
from .assemble import PROJECTOR_RUN_FOLDER
from .captions import EMPTY_PROMPT_TOKENS
from .sizes import TOKEN_GRID, Sizes


# Where enlargements start in the training: beyond the default start of inference too, for more noise leaves more to be
# told.
SIGMA_MIN = 0.03
SIGMA_MAX = 0.5
RESTORATION_SHARE = 1.0
PIXEL_LOSS_WEIGHT = 20.0
DEGRADATIONS = ("bicubic", "bicubic", "bicubic", "mild")  # of which each sample draws one
# A stage ends by its time, not by its steps.
ENDLESS_STEPS = 10_000_000


def projector_arguments(
    checkpoint: Path,
    photos: Path,
    validation: Path,
    work: Path,
    sizes: Sizes,
    seed: int,
    seconds: float | None,
    max_steps: int | None,
    workers: int,
    compiles: bool,
) -> list[str]:
    """Of `scripts/train_projector.py`; the same again goes on from the last checkpoint."""
    options: dict[str, object] = {
        "pretrained_model_name_or_path": checkpoint,
        "dino_model": checkpoint / ENCODER_FOLDER,
        "train_data_dir": photos,
        "validation_data_dir": validation,
        "output_dir": work / PROJECTOR_RUN_FOLDER,
        "resume_from_checkpoint": "latest",
        "caption_column": "none",
        "max_sequence_length": EMPTY_PROMPT_TOKENS,
        "resolution": sizes.crop,
        "token_grid": TOKEN_GRID,
        "hidden_dim": sizes.projector_dim,
        "position_mode": "tile",
        "sigma_min": SIGMA_MIN,
        "sigma_max": SIGMA_MAX,
        "restoration_share": RESTORATION_SHARE,
        "pixel_loss_weight": PIXEL_LOSS_WEIGHT,
        "train_batch_size": sizes.batch // 2,
        "dataloader_num_workers": workers,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "ema_decay": 0.99,
        "max_train_steps": ENDLESS_STEPS if max_steps is None else max_steps,
        "checkpointing_steps": ENDLESS_STEPS,
        "checkpoints_total_limit": 1,
        "validation_steps": 250,
        "seed": seed,
    }
    if seconds is not None:
        options["max_train_seconds"] = seconds
    flat = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    lists = ["--degradation", *DEGRADATIONS, "--dino_layers", *map(str, sizes.projector_layers)]
    return [*flat, *lists, "--random_flip", "--no-gradient_checkpointing", *["--compile"] * compiles]
