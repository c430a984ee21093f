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

"""The architectures of the small models: the embedded checkpoint's own, and tiny ones for tests and trials."""

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel


LATENT_CHANNELS = 16
POOLED_DIM = 16
PATCH_SIZE = 14
PIXELS_PER_TOKEN = 16
# Rows and columns of DINO tokens of a tile at most: one for each image token of the default tiles.
TOKEN_GRID = 34


class Sizes(NamedTuple):
    """Widths and depths, and the crops of a step."""

    vae_widths: tuple[int, ...]
    flux_layers: tuple[int, int]  # double and single blocks
    flux_heads: int
    flux_head_dim: int
    flux_axes: tuple[int, int, int]  # rotary dimensions of a head
    text_dim: int  # of the text stream
    dino_dim: int
    dino_layers: int
    dino_heads: int
    projector_dim: int  # hidden
    projector_layers: tuple[int, ...]  # of DINO: deep ones do not mind degradation, shallow ones keep detail
    crop: int  # px, side of a crop
    batch: int  # crops of that side in a step; of others as many pixels
    flux_crops: tuple[int, ...]  # px, sides that FLUX's steps draw from
    flux_batch: int  # crops in a step of the FLUX stage
    paint_batch: tuple[int, int]  # crops in a step of the paint stage: by flow matching, and as pictures
    pool_crops: int  # cut at once, for `pool_steps` steps
    pool_steps: int


SIZES = {
    "demo": Sizes(
        vae_widths=(32, 64, 128, 128),
        flux_layers=(2, 6),
        flux_heads=5,
        flux_head_dim=64,
        flux_axes=(16, 24, 24),
        text_dim=128,
        dino_dim=192,
        dino_layers=6,
        dino_heads=3,
        projector_dim=512,
        projector_layers=(2, 4, -1),
        crop=256,
        batch=64,
        flux_crops=(256, 256, 256, 512),
        flux_batch=192,
        paint_batch=(96, 64),
        pool_crops=24576,
        pool_steps=6000,
    ),
    "tiny": Sizes(
        vae_widths=(8, 16, 16, 32),
        flux_layers=(1, 2),
        flux_heads=4,
        flux_head_dim=32,
        flux_axes=(8, 12, 12),
        text_dim=64,
        dino_dim=48,
        dino_layers=2,
        dino_heads=2,
        projector_dim=64,
        projector_layers=(1, -1),
        crop=64,
        batch=8,
        flux_crops=(64,),
        flux_batch=8,
        paint_batch=(4, 4),
        pool_crops=32,
        pool_steps=100,
    ),
}


def make_vae(sizes: Sizes) -> AutoencoderKL:
    """Without attention in its middle, so that it treats a large tile as it treats a small crop."""
    num_blocks = len(sizes.vae_widths)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
        block_out_channels=list(sizes.vae_widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def make_transformer(sizes: Sizes) -> FluxTransformer2DModel:
    """FLUX.1-schnell's architecture: no guidance embeddings."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=sizes.flux_layers[0],
        num_single_layers=sizes.flux_layers[1],
        attention_head_dim=sizes.flux_head_dim,
        num_attention_heads=sizes.flux_heads,
        joint_attention_dim=sizes.text_dim,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=False,
        axes_dims_rope=sizes.flux_axes,
    )


def make_dino(sizes: Sizes) -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            patch_size=PATCH_SIZE,
            image_size=sizes.crop // PIXELS_PER_TOKEN * PATCH_SIZE,
            num_register_tokens=4,
            hidden_size=sizes.dino_dim,
            num_hidden_layers=sizes.dino_layers,
            num_attention_heads=sizes.dino_heads,
            mlp_ratio=4,
        )
    )


def count_weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
