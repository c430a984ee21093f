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

"""What the config files in a pipeline's folder say about its models, read without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .embedded import locate_model
from .messages import UsageError, first_line


@dataclass(frozen=True)
class Architecture:
    """FLUX.1-dev's with a projector as [`DinoProjector`] makes them, unless a folder says otherwise."""

    inner_dim: int = 3072
    num_layers: int = 57
    pixels_per_token: int = 16
    text_tokens: int = 512
    dino_tokens: int = 256
    tile_size: int | None = None  # the checkpoint's own
    has_text_encoders: bool = True
    prompt_tokens: int | None = None  # of the empty prompt that the projector carries; 0 if it does not


def read_architecture(model: str | None, projector: str | None = None) -> Architecture:
    """What the folders `model` and `projector` say; Hub repositories are not asked."""
    found: dict[str, Any] = {}
    folder = None if model is None else Path(locate_model(model))
    if folder is not None and folder.is_dir():
        try:
            found |= read_model(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"--model {model}: not the folder of a FLUX.1 pipeline ({first_line(error)})") from error
        if projector is None:
            found |= read_projector("--model", folder) or {"dino_tokens": 0, "prompt_tokens": 0}
    if projector is not None and Path(projector).is_dir():
        found |= read_projector("--projector", Path(projector))
    return Architecture(**found)


def read_model(folder: Path) -> dict[str, Any]:
    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    index = read_json(folder / "model_index.json")
    return {
        "inner_dim": transformer.get("num_attention_heads", 24) * transformer.get("attention_head_dim", 128),
        "num_layers": transformer.get("num_layers", 19) + transformer.get("num_single_layers", 38),
        "pixels_per_token": 2 ** len(vae["block_out_channels"]),
        # The distilled FLUX.1-schnell was trained with 256.
        "text_tokens": 512 if transformer.get("guidance_embeds") else 256,
        "tile_size": index.get("default_tile_size"),
        "has_text_encoders": all((index.get(name) or [None])[0] for name in ("text_encoder", "text_encoder_2")),
    }


def read_projector(option: str, folder: Path) -> dict[str, Any]:
    """What the projector says that is in the folder or is the folder; empty if there is none."""
    file = folder / "dino_projector" / "config.json"
    if option == "--projector" and not file.is_file():
        file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = read_json(file)
        return {
            "dino_tokens": config.get("token_grid", 16) ** 2,
            "prompt_tokens": config.get("num_prompt_tokens", 0),
        }
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{option} {folder}: not the folder of a projector ({first_line(error)})") from error


def read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return content
