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

"""Loads the frozen models, makes the projector that is trained, and saves the result."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import AutoModel, PreTrainedModel, SiglipVisionModel
from transformers.image_processing_utils import BaseImageProcessor

from pipeline_flux_dino_tile import DinoProjector, FluxDinoTilePipeline

from ..folders import ENCODER_FOLDER, FACTS_NAME, PROJECTOR_FOLDER


def load_transformer(name: str, dtype: torch.dtype, quantization_config: Any, **options) -> FluxTransformer2DModel:
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return FluxTransformer2DModel.from_pretrained(name, subfolder="transformer", torch_dtype=dtype, **options)


def load_default_text_tokens(args) -> int:
    """As many T5 tokens as the pipeline takes by default, see [`~FluxDinoTilePipeline.default_text_tokens`]."""
    config = FluxTransformer2DModel.load_config(
        args.pretrained_model_name_or_path, subfolder="transformer", revision=args.revision
    )
    return 512 if config["guidance_embeds"] else 256


def load_text_pipeline(args, device: torch.device, dtype: torch.dtype) -> FluxDinoTilePipeline:
    """The text encoders and nothing else."""
    left_out = dict.fromkeys(("transformer", "vae", "dino_encoder", "dino_projector"))
    pipe = FluxDinoTilePipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype, **left_out
    )
    return pipe.to(device)


def load_stored_prompt(args) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The empty prompt's embeddings of a base without text encoders, whose projector brings them; else `None`."""
    name, source = args.pretrained_model_name_or_path, {"revision": args.revision}
    library, _ = FluxDinoTilePipeline.load_config(name, **source)["text_encoder_2"]
    if library is not None:
        return None
    projector = DinoProjector.from_pretrained(name, subfolder=PROJECTOR_FOLDER, **source)
    if projector.config.num_prompt_tokens == 0:
        raise ValueError(f"{name} has neither text encoders nor a projector with the empty prompt's embeddings")
    return projector.prompt_embeds, projector.pooled_prompt_embeds


def load_pipeline(
    args,
    device: torch.device,
    dtype: torch.dtype,
    quantization_config: Any,
    empty_prompt: tuple[torch.Tensor, torch.Tensor],
) -> FluxDinoTilePipeline:
    """Everything but the text encoders: frozen models, and a new projector in float32 with the empty prompt."""
    source = {"revision": args.revision, "variant": args.variant}
    name = args.pretrained_model_name_or_path
    transformer = load_transformer(name, dtype, quantization_config, **source)
    encoder = AutoModel.from_pretrained(args.dino_model, use_safetensors=True, trust_remote_code=False, dtype=dtype)
    torch.manual_seed(args.seed)
    projector = make_projector(args, encoder, *empty_prompt)
    left_out = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxDinoTilePipeline.from_pretrained(
        name,
        transformer=transformer,
        dino_encoder=encoder,
        dino_projector=projector,
        dtype=dtype,
        **source,
        **left_out,
    )
    pipe.check_dino_components(encoder.config, projector)
    pipe.to(device)
    freeze(pipe)
    return pipe


def freeze(pipe: FluxDinoTilePipeline) -> None:
    """Leaves only the projector to be trained."""
    for model in (pipe.transformer, pipe.vae, pipe.dino_encoder):
        model.eval().requires_grad_(False)
    pipe.dino_projector.train().requires_grad_(True)
    pipe.set_progress_bar_config(disable=True)


def make_projector(
    args, encoder: PreTrainedModel, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor
) -> DinoProjector:
    """With random weights; calls without a prompt take the given embeddings of the empty one."""
    statistics = {}
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(args.dino_model)
        statistics = {name: settings[name] for name in ("image_mean", "image_std")}
    except OSError:  # a folder with the model alone: ImageNet's
        pass
    projector = DinoProjector(
        in_dim=encoder.config.hidden_size * len(args.dino_layers),
        out_dim=prompt_embeds.shape[2],
        hidden_dim=args.hidden_dim,
        token_grid=args.token_grid,
        layers=args.dino_layers,
        position_mode=args.position_mode,
        # A folder of this machine means nothing elsewhere: the encoder is saved beside the projector.
        dino_model=None if Path(args.dino_model).is_dir() else args.dino_model,
        sigma_min=args.sigma_min,
        sigma_max=args.sigma_max,
        num_prompt_tokens=prompt_embeds.shape[1],
        pooled_dim=pooled_prompt_embeds.shape[1],
        **statistics,
    )
    projector.prompt_embeds.copy_(prompt_embeds)
    projector.pooled_prompt_embeds.copy_(pooled_prompt_embeds)
    return projector


# ---- Initial weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def match_token_rms(projector: DinoProjector, features: torch.Tensor, rms: float) -> None:
    """Sets the gain so that the tokens of `features` `(..., in_dim)` have the root mean square of text tokens."""
    tokens = projector(features.to(projector.dtype))
    projector.gain.mul_(rms / tokens.square().mean().sqrt())


class ReduxTeacher:
    """
    Tokens that FLUX Redux, the makers' own image-to-token adapter, gives to a picture.

    Args:
        name (`str`): Repo or folder with `image_encoder` and `image_embedder`.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        self.encoder = SiglipVisionModel.from_pretrained(name, subfolder="image_encoder", dtype=dtype).to(device)
        self.embedder = ReduxImageEncoder.from_pretrained(name, subfolder="image_embedder", torch_dtype=dtype)
        self.embedder = self.embedder.to(device)

    @torch.no_grad()
    def tokens(self, images: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Images `(batch, 3, height, width)` in [-1, 1], as SigLIP takes them, to tokens `(batch, *grid, dim)`."""
        side = self.encoder.config.image_size
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).to(self.encoder.dtype)
        tokens = self.embedder(self.encoder(images).last_hidden_state).image_embeds.float()
        patches = side // self.encoder.config.patch_size
        squares = tokens.transpose(1, 2).unflatten(2, (patches, patches))
        return F.interpolate(squares, tuple(grid), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def distillation_loss(projector: DinoProjector, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of the tokens `(batch, rows, columns, dim)`, of the target's mean square."""
    return (projector(features.to(projector.dtype)) - target).square().mean() / target.square().mean()


# ---- The result ----------------------------------------------------------------------------------------------------


def save_result(folder: str | Path, pipe: FluxDinoTilePipeline, facts: dict) -> None:
    """Writes what [`~FluxDinoTilePipeline.load_dino_projector`] loads, and `training.json`."""
    folder = Path(folder)
    pipe.dino_projector.save_pretrained(folder / PROJECTOR_FOLDER)
    if pipe.dino_projector.config.dino_model is None:
        pipe.dino_encoder.save_pretrained(folder / ENCODER_FOLDER)
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n")


def library_versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
