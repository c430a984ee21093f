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

"""Colours of a result after those of its input."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput

from pipeline_flux_dino_tile import FluxDinoTilePipeline, check


def low_frequencies(image: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """
    The part of a `(batch, channels, height, width)` image that an a-trous wavelet transform leaves after `levels`.

    Each level blurs with (1, 2, 1)/4 along both axes at twice the spacing of the last, as in StableSR's
    `wavelet_reconstruction`.
    """
    for level in range(levels):
        spacing = 2**level
        for dim, pad in ((3, (spacing, spacing, 0, 0)), (2, (0, 0, spacing, spacing))):
            padded, length = F.pad(image, pad, mode="replicate"), image.shape[dim]
            image = (padded.narrow(dim, 0, length) + 2 * image + padded.narrow(dim, 2 * spacing, length)) / 4
    return image


def match_low_frequencies(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives `(batch, channels, height, width)` images the [`low_frequencies`] of the reference; keeps their detail."""
    return image + low_frequencies(reference - image)


def match_statistics(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives each channel of `(batch, channels, height, width)` images the mean and deviation of the reference's."""
    mean, std = image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True)
    reference_mean, reference_std = reference.mean((2, 3), keepdim=True), reference.std((2, 3), keepdim=True)
    return (image - mean) / (std + 1e-5) * reference_std + reference_mean


METHODS = {"wavelet": match_low_frequencies, "adain": match_statistics}


def match_color(
    pipe: FluxDinoTilePipeline, images: PipelineImageInput, reference: PipelineImageInput, method: str
) -> Any:
    """
    Gives results of a call the colours of its input.

    Args:
        pipe ([`FluxDinoTilePipeline`]): Resizes the input as a call does.
        images (`PipelineImageInput`): What the call returned: PIL images, an array or a tensor of pixels.
        reference (`PipelineImageInput`): The call's `image`: one for all, or one for each of `images`.
        method (`str`):
            "wavelet" takes the [`low_frequencies`] from the input and keeps the detail of the result; "adain" takes
            the mean and standard deviation of each channel (adaptive instance normalisation, arXiv 1703.06868).

    Returns:
        A list of PIL images, an array or a tensor, as `images` are.

    Raises:
        `ValueError`: If an argument is out of range or does not fit another.
    """
    check("method", method, method in list(METHODS), f"one of {', '.join(map(repr, METHODS))}")
    results, references = pipe.check_image(images), pipe.check_image(reference)
    for name, value in (("images", results), ("reference", references)):
        check(name, value, not pipe.is_latents(value), "pixels, not latents")
    fits = len(references) in (1, len(results))
    check("reference", len(references), fits, f"1 picture, or one for each of {len(results)}")
    height, width = pipe.get_output_size(results, upscale_factor=1)
    # On the CPU, since this takes the whole picture several times.
    pixels, target = (
        value if value.is_floating_point() else pipe.image_processor.normalize(value.float() / 255)
        for value in (pipe.resize_image(x, height, width)[..., :height, :width] for x in (results, references))
    )
    first = images[0] if isinstance(images, (list, tuple)) else images
    output_type = "pt" if isinstance(first, torch.Tensor) else "np" if hasattr(first, "shape") else "pil"
    return pipe.image_processor.postprocess(METHODS[method](pixels, target), output_type)
