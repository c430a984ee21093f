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

"""Text embeddings and latents on disk, under keys that hold all that they depend on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline_flux_dino_tile import FluxDinoTilePipeline


def cache_key(*parts) -> str:
    """A file name for everything that a result depends on; bytes and what JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(str(len(data)).encode() + b":" + data)
    return digest.hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """Changes with the weights' names, shapes, dtypes and values, of which up to 1024 of each tensor are read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 1024)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TensorCache:
    """Dictionaries of tensors in safetensors files, which appear whole or not at all."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The stored tensors, on the CPU; computes and stores them first if there are none."""
        path = self.path(key)
        if not path.is_file():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                save_file(tensors, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            return tensors
        return load_file(path)


class TextEmbeddings:
    """
    T5 and CLIP embeddings of captions, computed once each.

    Args:
        pipe ([`FluxDinoTilePipeline`] or `None`): Has the text encoders; `None` if all is stored already.
        cache ([`TensorCache`]): Where they are stored.
        fingerprint (`str`): Of the text encoders, from [`text_fingerprint`].
        max_sequence_length (`int`): T5 tokens.
        dtype (`torch.dtype`): In which they are stored.
    """

    def __init__(self, pipe, cache: TensorCache, fingerprint: str, max_sequence_length: int, dtype: torch.dtype):
        self.pipe, self.cache, self.fingerprint = pipe, cache, fingerprint
        self.max_sequence_length, self.dtype = max_sequence_length, dtype

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, tokens, joint_attention_dim)` and `(batch, pooled_projection_dim)`, on the CPU."""
        entries = [self.cache.get(self.key(caption), partial(self.encode, caption)) for caption in captions]
        return (
            torch.cat([entry["prompt_embeds"] for entry in entries]),
            torch.cat([entry["pooled_prompt_embeds"] for entry in entries]),
        )

    def key(self, caption: str) -> str:
        return cache_key("text", self.fingerprint, caption, self.max_sequence_length, str(self.dtype))

    @torch.no_grad()
    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        embeds, pooled_embeds, _ = self.pipe.encode_prompt(
            caption, None, device=self.pipe.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds.to(self.dtype), "pooled_prompt_embeds": pooled_embeds.to(self.dtype)}

    def token_rms(self, captions: Sequence[str]) -> float:
        """Root mean square of the T5 embeddings of the captions' own tokens, without padding."""
        squares = []
        for caption in captions:
            ids = self.pipe.tokenizer_2(caption, truncation=True, max_length=self.max_sequence_length).input_ids
            squares.append(self([caption])[0][0, : len(ids)].float().square())
        return float(torch.cat(squares).mean().sqrt())


class EmptyPrompt:
    """
    The stored embeddings of the empty prompt for every caption, in place of [`TextEmbeddings`], for a base without
    text encoders.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(1, tokens, joint_attention_dim)`): T5's.
        pooled_prompt_embeds (`torch.Tensor` of shape `(1, pooled_projection_dim)`): CLIP's.
    """

    def __init__(self, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor):
        self.prompt_embeds, self.pooled_prompt_embeds = prompt_embeds, pooled_prompt_embeds

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prompt_embeds.repeat(len(captions), 1, 1), self.pooled_prompt_embeds.repeat(len(captions), 1)

    def token_rms(self) -> float:
        return float(self.prompt_embeds.float().square().mean().sqrt())


def text_fingerprint(pipe: FluxDinoTilePipeline) -> str:
    vocabularies = [tokenizer.get_vocab() for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
    encoders = [model_fingerprint(encoder) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    return cache_key(vocabularies, encoders)
