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

"""Puts the stages' models together to the checkpoint, a folder for `from_pretrained` and `load_dino_projector`."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import Dinov2WithRegistersConfig

from flux_dino_tile.embedded import DEMO_FOLDER
from pipeline_flux_dino_tile import DinoProjector

from ..folders import (
    ENCODER_FOLDER,
    PIPELINE_NAME,
    PROJECTOR_FOLDER,
    add_pipeline_file,
    forget_origin,
    replace_folder,
)
from ..training.checkpoints import list_checkpoints
from .captions import EMPTY_PROMPT_TOKENS, Language
from .flux import make_pipeline
from .sizes import POOLED_DIM, TOKEN_GRID
from .stages import MAX_SHARD_SIZE, find_trained


CHECKPOINT_FOLDER = "checkpoint"
PROJECTOR_RUN_FOLDER = "projector"
MAX_FILE_BYTES = 16 * 2**20
MAX_TOTAL_BYTES = 48 * 2**20
DEFAULTS = {
    # The most noise from which the pictures are nearer to the originals than bicubic's (docs/demo_training.md).
    "default_start_sigma": 0.03,
    # Pixels: two tiles for 1024, each as large as the largest crops of the training, and the overlap.
    "default_tile_size": 544,
    "default_vae_residual": True,
}


def assemble(work: Path) -> Path:
    """Writes the checkpoint of what is trained so far, at first with an untrained projector; returns its folder."""
    dtype = {"torch_dtype": torch.float16}
    vae = AutoencoderKL.from_pretrained(find_trained(work, "decoder", "vae"), **dtype)
    transformer = FluxTransformer2DModel.from_pretrained(find_trained(work, "paint", "flux"), **dtype)
    encoder = find_trained(work, "dino")
    projectors = list_checkpoints(work / PROJECTOR_RUN_FOLDER)
    projector = make_untrained_projector(encoder, transformer)
    if projectors:
        projector = DinoProjector.from_pretrained(projectors[-1] / PROJECTOR_FOLDER, **dtype)

    def write(folder: Path) -> None:
        pipe = make_pipeline(vae, transformer, **DEFAULTS)
        pipe.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        shutil.copytree(encoder, folder / ENCODER_FOLDER)
        projector.save_pretrained(folder / PROJECTOR_FOLDER)
        add_pipeline_file(folder, DEMO_FOLDER / PIPELINE_NAME)
        for config in folder.rglob("*.json"):
            forget_origin(config)
        check_sizes(folder)

    replace_folder(work / CHECKPOINT_FOLDER, write)
    return work / CHECKPOINT_FOLDER


def make_untrained_projector(encoder: Path, transformer: FluxTransformer2DModel) -> DinoProjector:
    """It brings the empty prompt, which the training of the projector takes from its base."""
    projector = DinoProjector(
        in_dim=Dinov2WithRegistersConfig.from_pretrained(encoder).hidden_size,
        out_dim=transformer.config.joint_attention_dim,
        hidden_dim=1,
        token_grid=TOKEN_GRID,
        dino_model=None,
        num_prompt_tokens=EMPTY_PROMPT_TOKENS,
        pooled_dim=POOLED_DIM,
    )
    language = Language(transformer.config.joint_attention_dim, torch.device("cpu"))
    branch = language.empty_branch(projector.dtype)
    projector.prompt_embeds.copy_(branch.prompt_embeds)
    projector.pooled_prompt_embeds.copy_(branch.pooled_prompt_embeds)
    return projector.half()


def check_sizes(folder: Path, max_file: int = MAX_FILE_BYTES, max_total: int = MAX_TOTAL_BYTES) -> int:
    """The bytes of all files; raises a `ValueError` if they, or one of them, are too many for a repository."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size >= max_file:
            raise ValueError(f"{path.name} has {size} bytes, not below {max_file}: lower MAX_SHARD_SIZE")
    total = sum(sizes.values())
    if total >= max_total:
        raise ValueError(f"the checkpoint has {total} bytes, not below {max_total}: choose smaller sizes")
    return total
