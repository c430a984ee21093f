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

"""Loads an assembled folder in a fresh process, as its users will, and runs it."""

import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers import FluxImg2ImgPipeline, FluxTransformer2DModel

from pipeline_flux_dino_tile import DinoProjector

from ..demo_training.flux import make_pipeline
from ..demo_training.sizes import POOLED_DIM, SIZES, make_transformer, make_vae
from ..folders import PROJECTOR_FOLDER
from .assemble import is_complete


# Nothing of this project is imported: what is tried is the code in the folder.
SCRIPT = """
import json, sys
import numpy, torch
from PIL import Image
from diffusers import DiffusionPipeline

folder, base, has_prompt = json.loads(sys.argv[1])
code = {} if base == folder else {"custom_pipeline": folder}
on_gpu = base != folder and "/" in base and torch.cuda.is_available()
dtype = torch.bfloat16 if on_gpu else torch.float32
without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")) if has_prompt else {}
pipe = DiffusionPipeline.from_pretrained(base, trust_remote_code=True, dtype=dtype, **code, **without)
pipe.load_dino_projector(folder)
if on_gpu:
    pipe.enable_model_cpu_offload()
pipe.set_progress_bar_config(disable=True)
small = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=numpy.uint8))
call = {"image": small, "upscale_factor": 2, "num_inference_steps": 1, "output_type": "np"}
if not has_prompt and pipe.text_encoder is None:
    config = pipe.transformer.config
    call["prompt_embeds"] = torch.zeros(1, 8, config.joint_attention_dim)
    call["pooled_prompt_embeds"] = torch.zeros(1, config.pooled_projection_dim)
results = [
    pipe(dino_conditioning_scale=scale, generator=torch.Generator().manual_seed(0), **call).images[0]
    for scale in (0.0, 1.0)
]
if not all(numpy.isfinite(result).all() for result in results):
    sys.exit("the pictures are not finite numbers")
if (results[0] == results[1]).all():
    sys.exit("the picture with the projector is the picture without it")
"""


def save_stand_in(folder: Path, source: Path) -> None:
    """A FLUX.1 of the smallest size with random weights that takes the projector's tokens and stored prompt."""
    projector = DinoProjector.load_config(source / PROJECTOR_FOLDER)
    sizes = SIZES["tiny"]._replace(text_dim=projector["out_dim"])
    config = {**make_transformer(sizes).config, "pooled_projection_dim": projector["pooled_dim"] or POOLED_DIM}
    # A stock pipeline, as FLUX.1 is: one of this project's would bring its own code and run that.
    parts = make_pipeline(make_vae(sizes), FluxTransformer2DModel.from_config(config)).components
    names = inspect.signature(FluxImg2ImgPipeline.__init__).parameters
    FluxImg2ImgPipeline(**{name: part for name, part in parts.items() if name in names}).save_pretrained(folder)


def try_out(folder: Path, base_model: str | None = None) -> None:
    """
    Enlarges a small picture with and without the projector, with the code of the folder.

    Args:
        folder (`Path`): From [`~dino_projector.publishing.assemble.assemble`].
        base_model (`str`, *optional*): FLUX.1 to run it with; by default a small one with random weights, or the
            folder's own.

    Raises:
        `RuntimeError`: If it does not load, or does not run, or the projector changes nothing.
    """
    with tempfile.TemporaryDirectory() as temporary:
        base = base_model or str(folder)
        if base_model is None and not is_complete(folder):
            base = temporary
            save_stand_in(Path(temporary), folder)
        has_prompt = DinoProjector.load_config(folder / PROJECTOR_FOLDER)["num_prompt_tokens"] > 0
        arguments = json.dumps([str(folder), base, has_prompt])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, arguments], cwd=temporary, capture_output=True, text=True, check=False
        )
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"it ended with status {done.returncode}")
        raise RuntimeError(f"the assembled repository does not run: {reason}")
