# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Enlarge photos with FLUX.1, told by DINO what they show
#
# 1. Install.
# 2. Enlarge the sample photo with a small model on the CPU.
# 3. With a GPU: enlarge it with FLUX.1-schnell, with the options that fit your GPU.
# 4. Compare several strengths of DINO.
# 5. Train a projector of your own.
#
# Without a GPU, the cells for FLUX.1 do nothing. They were not run on FLUX.1's own weights yet.

# %%
# On Colab, the address of the project's git repository. Elsewhere leave it empty and run `pip install -e .` first.
ADDRESS = ""

# %%
import os
import subprocess
import sys
from pathlib import Path


PROJECT = Path.cwd() / "flux-dino-tile" if ADDRESS else Path.cwd().parent
if ADDRESS:
    if not PROJECT.is_dir():
        subprocess.run(["git", "clone", "--depth", "1", ADDRESS, PROJECT], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{PROJECT}[flux,quant,train]"], check=True)

# %%
import psutil
import torch
from PIL import Image

from pipeline_flux_dino_tile import FluxDinoTilePipeline


HAS_GPU = torch.cuda.is_available()
photo = Image.open(PROJECT / "samples" / "photo.jpg").convert("RGB")
photo

# %% [markdown]
# ## A small model on the CPU
#
# A small pipeline with its projector comes with the project. It shows how everything works, not the quality of FLUX.1.

# %%
from flux_dino_tile.embedded import DEMO_FOLDER


small = FluxDinoTilePipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
small.load_dino_projector(DEMO_FOLDER)
plan = small.plan_tiles(4 * photo.height, 4 * photo.width)
print(f"{len(plan)} tiles of {plan.tile_width} x {plan.tile_height} px")
result = small(image=photo, upscale_factor=4, generator=torch.Generator().manual_seed(0)).images[0]

# %%
import base64
import html
from io import BytesIO

from IPython.display import HTML


def as_url(image):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def compare(before, after, width=720):
    """A slider between two pictures of the same shape: left the first, right the second."""
    before = before.resize(after.size, Image.Resampling.BICUBIC)
    layer = f"position:absolute;left:0;top:0;width:{width}px"
    clip = "this.parentNode.querySelectorAll('img')[1].style.clipPath=`inset(0 0 0 ${this.value}%)`"
    return HTML(
        f'<div style="position:relative;width:{width}px;height:{width * after.height // after.width + 30}px">'
        f'<img style="{layer}" src="{as_url(before)}">'
        f'<img style="{layer};clip-path:inset(0 0 0 50%)" src="{as_url(after)}">'
        f'<input type="range" value="50" oninput="{html.escape(clip)}"'
        f' style="position:absolute;bottom:0;width:{width}px"></div>'
    )


compare(photo, result)

# %% [markdown]
# ## FLUX.1-schnell
#
# In bfloat16 the transformer takes 24 GB and the text encoders 10 GB. An A100 holds all of it. An L4 gets one block
# after the other from main memory. A T4 on a machine with little main memory needs the transformer in 4 bits.

# %%
GIB = 2**30


def choose_recipe(gpu_gib, main_gib):
    """How to fit FLUX.1 into so many GiB of GPU memory and main memory: "gpu", "group" or "nf4"."""
    if gpu_gib >= 38:
        return "gpu"
    return "group" if main_gib >= 40 else "nf4"


def load_flux(name, recipe):
    options = {}
    # The T4 has no bfloat16.
    dtype = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if recipe == "nf4":
        from diffusers import PipelineQuantizationConfig

        from flux_dino_tile.loading import quantization_config

        config = quantization_config("nf4", dtype)
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = FluxDinoTilePipeline.from_pretrained(name, dtype=dtype, **options)
    if recipe == "gpu":
        return pipe.to("cuda")
    if recipe == "group":
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    else:
        pipe.enable_model_cpu_offload()
    return pipe


main_gib = psutil.virtual_memory().total / GIB
if HAS_GPU:
    properties = torch.cuda.get_device_properties(0)
    recipe = choose_recipe(properties.total_memory / GIB, main_gib)
    print(f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, main memory {main_gib:.0f} GiB: {recipe}")
else:
    print("no GPU: the cells for FLUX.1 do nothing")

# %%
PROJECTOR = os.environ.get("PROJECTOR", "")  # folder or repository of a trained projector for FLUX.1-schnell
if HAS_GPU:
    pipe = load_flux("black-forest-labs/FLUX.1-schnell", recipe)
    if PROJECTOR:
        pipe.load_dino_projector(PROJECTOR)
    batch = 4 if recipe == "group" else 1
    call = {"upscale_factor": 4, "tile_batch_size": batch}
    result = pipe(image=photo, generator=torch.Generator().manual_seed(0), **call).images[0]
compare(photo, result)

# %% [markdown]
# ## Strengths of DINO
#
# 0 is off, 1 is full. Here they are tried on a detail, and DINO looks at it only once. The more noise an enlargement
# starts from, the more the strengths differ.

# %%
upscaler, size = (pipe, call) if HAS_GPU else (small, {"upscale_factor": 4})
if upscaler.dino_projector is not None:
    detail = photo.crop((0, 0, photo.width // 2, photo.width // 2))
    features = upscaler.encode_dino(detail, upscale_factor=4)
    strengths = (0.0, 0.5, 1.0)
    sweep = [
        upscaler(
            image=detail,
            dino_embeds=features,
            dino_conditioning_scale=strength,
            start_sigma=0.35,
            generator=torch.Generator().manual_seed(0),
            **size,
        ).images[0]
        for strength in strengths
    ]
    strip = Image.new("RGB", (sum(image.width for image in sweep), sweep[0].height))
    for index, image in enumerate(sweep):
        strip.paste(image, (index * image.width, 0))
    strip.thumbnail((1400, 1400))
    display(strip)  # noqa: F821

# %% [markdown]
# ## Train your own
#
# A folder of sharp photos is enough; `docs/training.md` is the guide. An hour on a small GPU is a start, no projector
# to publish.

# %%
PHOTOS = ""  # a folder
if HAS_GPU and PHOTOS:
    program = [sys.executable, "-m", "accelerate.commands.launch", PROJECT / "scripts" / "train_projector.py"]
    options = ["--pretrained_model_name_or_path", "black-forest-labs/FLUX.1-schnell", "--train_data_dir", PHOTOS]
    options += ["--output_dir", "runs/first", "--max_train_seconds", "3600"]
    options += ["--quantization", "nf4"] if recipe == "nf4" else []
    subprocess.run([*program, *options], check=True)
    pipe.load_dino_projector("runs/first/final")
