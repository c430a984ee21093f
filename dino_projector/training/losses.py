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

"""The loss of decoded pictures against sharp ones, without a network that was trained elsewhere."""

import torch
import torch.nn.functional as F


EDGE_WEIGHT = 1.0
ENERGY_WEIGHT = 1.0
ENERGY_WINDOW = 8  # px


def edges(images: torch.Tensor) -> torch.Tensor:
    """Differences `(batch, 6, height - 1, width - 1)` to the next pixel down and to the right."""
    corner = images[..., :-1, :-1]
    return torch.cat([images[..., 1:, :-1] - corner, images[..., :-1, 1:] - corner], dim=1)


def local_edge_energy(images: torch.Tensor) -> torch.Tensor:
    """Root mean square of the edges `(batch, 6, rows, columns)` in windows that overlap by half."""
    squares = F.avg_pool2d(edges(images).square(), ENERGY_WINDOW, ENERGY_WINDOW // 2)
    return (squares + 1e-6).sqrt()


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Of `(batch, 3, height, width)` images in [-1, 1]. The energy term makes a blurred texture dear."""
    return (
        F.l1_loss(decoded, images)
        + EDGE_WEIGHT * F.l1_loss(edges(decoded), edges(images))
        + ENERGY_WEIGHT * F.l1_loss(local_edge_energy(decoded), local_edge_energy(images))
    )
