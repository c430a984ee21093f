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

"""
Conditioning drop-out, which makes the strength at inference mean something.

DINO keys are dropped by a logit of minus infinity, as absent, not by zeros, which would be tokens of another kind. A
jittered strength is the pipeline's own: `log(scale)` on the logits of the DINO keys.
"""

import math
from typing import NamedTuple

import numpy as np
import torch


LOWEST_SCALE = 0.1
LOWEST_KEPT_SHARE = 0.25


class Dropout(NamedTuple):
    """Probabilities for a sample."""

    dino: float = 0.0  # to have no DINO tokens
    token: float = 0.0  # to have only a random share of them
    strength: float = 0.0  # to have them at a random strength
    caption: float = 0.0  # to have the empty prompt


def draw_log_scale(num_tokens: int, dropout: Dropout, rng: np.random.Generator) -> torch.Tensor:
    """A sample's `log(scale)` for each DINO token `(num_tokens,)`, in float32, minus infinity where it is dropped."""
    log_scale = torch.zeros(num_tokens)
    if rng.random() < dropout.strength:
        log_scale += math.log(rng.uniform(LOWEST_SCALE, 1))
    if rng.random() < dropout.token:
        num_kept = math.ceil(rng.uniform(LOWEST_KEPT_SHARE, 1) * num_tokens)
        log_scale[torch.from_numpy(rng.permutation(num_tokens)[num_kept:])] = -math.inf
    if rng.random() < dropout.dino:
        log_scale[:] = -math.inf
    return log_scale


def draw_caption(caption: str, dropout: Dropout, rng: np.random.Generator) -> str:
    return "" if rng.random() < dropout.caption else caption
