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

"""Measures the speed of the pipeline on models with random weights, beside a stock diffusers loop on one device."""

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import cache, partial
from itertools import pairwise, product
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
)
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.attention import AttentionModuleMixin
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from flux_dino_tile.embedded import DEMO_FOLDER
from flux_dino_tile.loading import choose_device, compile_models, is_quantized_layer, quantization_config
from flux_dino_tile.messages import Parser, UsageError, number, run_script
from flux_dino_tile.plans import transformer_flops
from pipeline_flux_dino_tile import (
    DinoProjector,
    FluxDinoTilePipeline,
    PromptBranch,
    tile_starts,
)


class Preset(NamedTuple):
    """The models, FLUX.1's by default, and how the pipeline and the stock loop cut an image; lengths in px."""

    transformer: dict = {}
    vae: dict = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
    }
    dino: dict = {"image_size": 518}
    projector: dict = {}
    num_text_tokens: int = 256  # as for schnell; twice as many, as for dev, are a second row
    matmul_side: int = 8192
    size: int = 4096
    tile_size: int | None = None
    tile_overlap: int = 64
    stock_tile_size: int = 1024
    stock_tile_overlap: int = 128
    tile_sides: tuple[int, ...] = (768, 896, 1024, 1136)
    # Text tokens, side of the grid of DINO tokens, DINO strength: first the defaults, without DINO.
    step_conditions: tuple[tuple[int, int, float], ...] = (
        (256, 16, 0),
        (256, 16, 1),
        (128, 16, 1),
        (256, 32, 1),
        (512, 16, 1),
    )


PRESETS = {
    "full": Preset(),
    # 4 px a token, and at 256 px the very tiles that FLUX.1 has at 4096 px, divided by 16.
    "small": Preset(
        transformer={"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
        vae={
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 64,
        },
        dino={"image_size": 56, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        projector={"in_dim": 32, "out_dim": 64, "hidden_dim": 64, "token_grid": 4},
        num_text_tokens=32,
        matmul_side=512,
        size=256,
        tile_size=68,
        tile_overlap=4,
        stock_tile_size=64,
        stock_tile_overlap=8,
        tile_sides=(32, 64),
        step_conditions=((32, 4, 0), (32, 4, 1), (16, 4, 1), (64, 4, 1)),
    ),
}
PHOTO = Path(__file__).resolve().parents[1] / "samples" / "photo.jpg"
STOCK = "stock loop"
VARIANTS = ("eager", "cudnn", "compiled", "compiled-cudnn", "fp8", "caches")
# diffusers' caches that go tile by tile, by the number of steps.
CACHES: dict[str, Callable[[int], Any]] = {
    "FirstBlockCache": lambda steps: FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda steps: MagCacheConfig(num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS),
    "TaylorSeer": lambda steps: TaylorSeerCacheConfig(),
}
# By phase the component, or "" for the pipeline itself, and its method.
PHASE_METHODS = {
    "DINO": ("", "encode_dino_tiles"),
    "VAE encode": ("vae", "encode"),
    "denoise": ("", "predict_canvas_velocity"),
    "VAE decode": ("vae", "decode"),
}
# The heading and number format of every column, in the tables' order; without a format floats get three digits.
COLUMNS = {
    "recipe": ("recipe", ""),
    "model": ("model", ""),
    "num_steps": ("steps", ""),
    "cache": ("cache", ""),
    "phase": ("phase", ""),
    "variant": ("variant", ""),
    "size": ("output px", ""),
    "limit_gib": ("allowed GiB", ".0f"),
    "tile_batch_size": ("tiles at once", ""),
    "dino_strength": ("DINO", "g"),
    "num_tokens": ("tokens", ""),
    "num_text_tokens": ("text tokens", ""),
    "num_dino_tokens": ("DINO tokens", ""),
    "num_tiles": ("tiles", ""),
    "seconds": ("s", ".3f"),
    "ms": ("ms", ""),
    "stock_to_run": ("stock loop / run", ""),
    "peak_gib": ("peak GiB", ""),
    "reserved_gib": ("reserved GiB", ""),
    "host_gib": ("main memory GiB", ".1f"),
    "share": ("share", ".1%"),
    "tflop": ("TFLOP", ""),
    "tflops": ("TFLOP/s", ""),
    "share_of_ceiling": ("of ceiling", ".1%"),
    "seconds_per_mp": ("s per MP", ".3f"),
    "encode_seconds": ("encode s", ".3f"),
    "decode_seconds": ("decode s", ".3f"),
    "tiling_to_run": ("diffusers / run", ".2f"),
    "tile_side": ("tile px", ""),
    "step_ms": ("step ms", ".1f"),
    "vae_ms": ("VAE ms", ".1f"),
    "us_per_token": ("all steps + VAE, us per token", ".1f"),
    "step_to_no_dino": ("step / without DINO", ".3f"),
    "warm_up_seconds": ("first tile, s", ""),
    "first_call_extra_s": ("first call, extra s", ""),
    "uncached_to_run": ("without / run", ".2f"),
    "psnr": ("PSNR to without, dB", ".1f"),
    "warm_cache_seconds": ("with a warm cache, s", ""),
    "pays_after": ("pays after images", ""),
    "warm_pays_after": ("with a warm cache", ""),
}
HEAD = """# Benchmark of flux-dino-tile

- {device}, {date}
- {versions}
- random weights, preset {preset}, {dtype}; a {matmul_side}^3 matrix product runs at {ceiling} TFLOP/s, \
the ceiling below
- {input_size} -> {size} px, {steps} steps, {num_text_tokens} text tokens, DINO strength {dino_strength:g}; \
{tiles} tiles of {tile_size} px, stock loop (eager, no DINO) {stock_tiles} of {stock_tile_size} px \
with {stock_tile_overlap} px overlap
- medians after a warm-up of one tile: {image_repeats} of an image, {step_repeats} of a step; the first tile and a \
first call take the time of compilation, where there is any; the first of all starts with an empty cache"""


def build_parser() -> Parser:
    description = "Measure the pipeline's speed on models with random weights, beside a stock diffusers loop."
    parser = Parser(prog="benchmark.py", description=description)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full", help="FLUX.1's architecture, or a small one (default: full)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of them that is there)")
    dtype_help = "number format of the models (default: bfloat16, on the CPU float32)"
    add("--dtype", choices=["bfloat16", "float16", "float32"], help=dtype_help)
    add("--input-size", metavar="PX", type=number(int, 16), help="side of the input (default: a quarter of --size)")
    add("--size", metavar="PX", type=number(int, 64), help="side of the output (default: 4096, small: 256)")
    add("--steps", metavar="N", type=number(int, 1), default=4, help="denoising steps (default: 4)")
    add("--dino-strength", metavar="FACTOR", type=number(float, 0, 100), default=0.6, help="0 to 100 (default: 0.6)")
    variants_help = f"of {', '.join(VARIANTS)}, with commas (default: the first three on CUDA, else eager)"
    add("--variants", metavar="LIST", help=variants_help)
    budget_help = "leave out what would end later than this, by an estimate (default: 520, so under 9 minutes in all)"
    add("--budget", metavar="SECONDS", type=number(float, 0), default=520, help=budget_help)
    second_help = "side of a second, larger output, for the first compiled variant, or the last (default: none)"
    add("--second-size", metavar="PX", type=number(int, 64), help=second_help)
    add("--repeats", metavar="N", type=number(int, 1), help="timed runs (default: 1 of an image, 5 of a step)")
    add("--json", metavar="FILE", type=Path, help="write the results here, after every measurement")
    add("--markdown", metavar="FILE", type=Path, help="write the tables here, likewise")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    args.size = args.size or PRESETS[args.preset].size
    for option, size in (("--size", args.size), ("--second-size", args.second_size)):
        if size is not None and size % 16:
            raise UsageError(f"argument {option}: must be a multiple of 16 px, not {size}")
    args.input_size = args.input_size or args.size // 4
    args.device = torch.empty(0, device=choose_device(args.device)).device  # with its index
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16"))
    args.variants = parse_variants(args.variants, args.device)
    models = [variant for variant in args.variants if variant != "caches"]
    args.main_variant = next(filter(is_compiled, models), models[-1] if models else None)
    args.image_repeats = args.repeats or 1
    args.step_repeats = args.repeats or 5
    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        if path is not None and not path.resolve().parent.is_dir():
            raise UsageError(f"{option} {path}: there is no such folder")
    return args


def parse_variants(text: str | None, device: torch.device) -> list[str]:
    if text is None:
        return list(VARIANTS[:3]) if device.type == "cuda" else ["eager"]
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"--variants: must be of {', '.join(VARIANTS)}, not {name!r}")
        if ("cudnn" in name or name == "fp8") and device.type != "cuda":
            raise UsageError(f"--variants: {name} needs a CUDA device, not {device.type}")
    return names


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def build_pipeline(kind: type[FluxImg2ImgPipeline], preset: Preset, device: torch.device, dtype: torch.dtype):
    """A stock or a DINO pipeline, with FLUX.1-schnell's scheduler and without text encoders."""
    free_memory()  # of the last pipeline, before this one takes its place
    torch.manual_seed(0)
    depth = len(preset.vae["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    torch.set_default_dtype(dtype)
    with torch.device(device):
        vae = AutoencoderKL(**blocks, **preset.vae, **plain, scaling_factor=0.3611, shift_factor=0.1159)
        transformer = FluxTransformer2DModel(in_channels=4 * vae.config.latent_channels, **preset.transformer)
        models = {"transformer": transformer, "vae": vae}
        if kind is FluxDinoTilePipeline:
            models["dino_encoder"] = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, **preset.dino))
            sizes = {
                "num_prompt_tokens": preset.num_text_tokens,
                "pooled_dim": transformer.config.pooled_projection_dim,
            }
            models["dino_projector"] = projector = DinoProjector(**preset.projector, **sizes)
            for buffer in (projector.prompt_embeds, projector.pooled_prompt_embeds):
                torch.nn.init.normal_(buffer)
    torch.set_default_dtype(torch.float32)
    for model in models.values():
        model.eval().requires_grad_(False)
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = kind(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), **texts, **models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def is_compiled(variant: str) -> bool:
    return "compiled" in variant or variant == "fp8"


def apply_variant(pipe: FluxDinoTilePipeline, variant: str) -> None:
    if variant == "fp8":
        from torchao.quantization import quantize_

        config = quantization_config("fp8", pipe.transformer.dtype)
        quantize_(
            pipe.transformer,
            config.quant_type,
            filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and is_quantized_layer(name),
        )
    if "cudnn" in variant or variant == "fp8":
        # `transformer.set_attention_backend` would set it for the whole process.
        for module in pipe.transformer.modules():
            if isinstance(module, AttentionModuleMixin):
                module.set_attention_backend("_native_cudnn")
    if is_compiled(variant):
        compile_models(pipe)


def stock_places(preset: Preset, size: int) -> list[tuple[int, int]]:
    """Top left corners of the stock loop's tiles, in px."""
    starts = tile_starts(size, preset.stock_tile_size, preset.stock_tile_overlap)
    step = 2 ** len(preset.vae["block_out_channels"])
    return list(product([start // step * step for start in starts], repeat=2))


def synchronized_time(device: torch.device) -> float:
    """The wall clock once the device has done all its work, in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def time_calls(call: Callable, repeats: int, device: torch.device) -> float:
    """Median seconds of calls one after the other, on CUDA by the device's own clock."""
    if device.type != "cuda":
        times = [synchronized_time(device)]
        for _ in range(repeats):
            call()
            times.append(synchronized_time(device))
        return median(end - start for start, end in pairwise(times))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) / 1e3 for start, end in pairwise(events))


def time_methods(pipe: Any, methods: dict[str, tuple[str, str]], device: torch.device) -> dict[str, float]:
    """From now on adds the seconds spent in the methods to the dictionary that it returns."""
    seconds = dict.fromkeys(methods, 0.0)

    def call(phase: str, method: Callable, *args, **kwargs):
        start = synchronized_time(device)
        result = method(*args, **kwargs)
        seconds[phase] += synchronized_time(device) - start
        return result

    for phase, (component, name) in methods.items():
        target = getattr(pipe, component) if component else pipe
        setattr(target, name, partial(call, phase, getattr(target, name)))
    return seconds


def count_flops(call: Callable) -> float:
    """Operations of matrix products, convolutions and attention, a multiply-add as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def count_step(pipe, plan, dino_strength: float) -> tuple[int, float]:
    """Tokens (text, DINO and image) and operations of a transformer call for one tile."""
    rows, columns = pipe.dino_projector.grid(plan.tile_tokens)
    num_dino_tokens = rows * columns if dino_strength > 0 else 0
    num_tokens = pipe.default_prompt_embeds[0].shape[1] + num_dino_tokens + plan.tokens_per_tile
    config = pipe.transformer.config
    num_layers = config.num_layers + config.num_single_layers
    return num_tokens, transformer_flops(num_tokens, pipe.transformer.inner_dim, num_layers)


def count_phase_flops(pipe: FluxDinoTilePipeline, plan, steps: int, dino_strength: float) -> dict[str, float]:
    """Operations for a whole image by phase, from a pipeline without data."""
    rows, columns = plan.tile_tokens
    with torch.device("meta"):
        pixels = torch.empty(1, 3, plan.tile_height, plan.tile_width)
        latents = torch.empty(1, pipe.latent_channels, 2 * rows, 2 * columns)
    return {
        "VAE encode": len(plan) * count_flops(lambda: pipe.vae.encode(pixels)),
        "denoise": len(plan) * steps * count_step(pipe, plan, dino_strength)[1],
        "VAE decode": len(plan) * count_flops(lambda: pipe.vae.decode(latents)),
    }


def rates(flops: float, seconds: float, ceiling: float) -> dict[str, float]:
    """TFLOP/s, and their share of the ceiling, which is in TFLOP/s too."""
    tflops = flops / seconds / 1e12
    return {"tflops": tflops, "share_of_ceiling": tflops / ceiling}


def measure_ceiling(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product of random numbers."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_of_both = partial(torch.matmul, left, right)
    time_calls(product_of_both, 20, device)
    return 2 * side**3 / time_calls(product_of_both, 200, device) / 1e12


@torch.no_grad()
def measure_step(pipe, plan, dino_strength: float, repeats: int, ceiling: float) -> dict:
    """Times the transformer for one tile. It is compiled anew, so that no shape of an earlier step counts."""
    torch.compiler.reset()
    device = pipe._execution_device
    rows, columns = plan.tile_tokens
    embeds, pooled_embeds = pipe.default_prompt_embeds
    branch = PromptBranch(embeds, pooled_embeds, None)
    latents = torch.randn(1, pipe.latent_channels, 2 * rows, 2 * columns, device=device)
    timestep = torch.tensor(350.0, device=device)
    dino = None
    if dino_strength > 0:
        features = pipe.dino_projector.pool(torch.randn(1, rows, columns, pipe.dino_projector.config.in_dim))
        dino = pipe.prepare_dino_tokens(features[None], plan, dino_strength)
    with pipe.dino_attention(dino):
        step = partial(pipe.predict_velocity, latents, timestep, branch, None, dino)
        first = time_calls(step, 1, device)
        time_calls(step, 1, device)
        seconds = time_calls(step, repeats, device)
    num_tokens, flops = count_step(pipe, plan, dino_strength)
    num_dino_tokens = num_tokens - embeds.shape[1] - plan.tokens_per_tile
    counts = {"num_tokens": num_tokens, "num_text_tokens": embeds.shape[1], "num_dino_tokens": num_dino_tokens}
    times = {"ms": seconds * 1e3, "first_call_extra_s": max(0.0, first - seconds)}
    return {"dino_strength": dino_strength, **counts, **times, **rates(flops, seconds, ceiling)}


def measure_image(
    variant: str, warm_up: Callable, run: Callable, num_tiles: int, repeats: int, device: torch.device
) -> tuple[dict, Any]:
    """A whole image's record and what `run` returns, for the median run, after a warm-up."""
    start = synchronized_time(device)
    warm_up()
    warm_up_seconds = synchronized_time(device) - start
    runs = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = synchronized_time(device)
        result = run()
        seconds = synchronized_time(device) - start
        peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        runs.append((seconds, peak_gib, result))
    seconds, peak_gib, result = sorted(runs, key=itemgetter(0))[(repeats - 1) // 2]
    record = {"variant": variant, "seconds": seconds, "num_tiles": num_tiles, "peak_gib": peak_gib}
    return {**record, "warm_up_seconds": warm_up_seconds, "phases": []}, result


def phase_records(total: float, phase_seconds: dict, phase_flops: dict, ceiling: float) -> list[dict]:
    """Shares of the total seconds, what no phase accounts for included."""
    records = []
    for phase, seconds in {**phase_seconds, "host and rest": total - sum(phase_seconds.values())}.items():
        work: dict[str, float | None] = {"tflop": None, "tflops": None, "share_of_ceiling": None}
        if phase in phase_flops:
            work |= {"tflop": phase_flops[phase] / 1e12, **rates(phase_flops[phase], seconds, ceiling)}
        records.append({"phase": phase, "seconds": seconds, "share": seconds / total, **work})
    return records


def seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def random_picture(side: int) -> Image.Image:
    return Image.effect_noise((side, side), 64).convert("RGB")


def measure_pipeline_image(
    pipe: FluxDinoTilePipeline, variant: str, size: int, preset: Preset, args: argparse.Namespace
) -> tuple[dict, dict]:
    """Enlarges to `size` px. One tile is the warm-up."""
    picture = random_picture(args.input_size)
    tiles: dict[str, Any] = {"tile_size": preset.tile_size, "tile_overlap": preset.tile_overlap}
    plan = pipe.plan_tiles(size, size, **tiles)
    seconds = time_methods(pipe, PHASE_METHODS, args.device)

    def run(height: int, width: int) -> dict[str, float]:
        seconds.update(dict.fromkeys(seconds, 0.0))
        pipe(
            image=picture,
            height=height,
            width=width,
            dino_conditioning_scale=args.dino_strength,
            num_inference_steps=args.steps,
            start_sigma=0.35,
            generator=seeded(),
            **tiles,
        )
        return dict(seconds)

    warm_up, whole = partial(run, plan.tile_height, plan.tile_width), partial(run, size, size)
    record, phase_seconds = measure_image(variant, warm_up, whole, len(plan), args.image_repeats, args.device)
    return {**record, **describe_image(record, size, preset)}, phase_seconds


def describe_image(record: dict, size: int, preset: Preset) -> dict:
    counts = {"size": size, "num_text_tokens": preset.num_text_tokens}
    return {**counts, "seconds_per_mp": record["seconds"] / size**2 * 1e6}


def measure_stock_image(preset: Preset, args: argparse.Namespace) -> dict:
    """What a user would write today: image-to-image on every tile, each pasted over the last."""
    pipe = build_pipeline(FluxImg2ImgPipeline, preset, args.device, args.dtype)
    config, placed = pipe.transformer.config, {"device": args.device, "dtype": args.dtype}
    prompt = {
        "prompt_embeds": torch.randn(1, preset.num_text_tokens, config.joint_attention_dim, **placed),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **placed),
    }
    picture = random_picture(args.input_size)
    places = stock_places(preset, args.size)
    side = min(preset.stock_tile_size, args.size)
    options = {"height": side, "width": side, "strength": 1.0, "num_inference_steps": args.steps}

    def run(places: list[tuple[int, int]]) -> dict[str, float]:
        canvas = picture.resize((args.size, args.size), Image.Resampling.LANCZOS)
        for top, left in places:
            tile = canvas.crop((left, top, left + side, top + side))
            canvas.paste(pipe(image=tile, generator=seeded(), **prompt, **options).images[0], (left, top))
        return {}

    warm_up, whole = partial(run, places[:1]), partial(run, places)
    record = measure_image(STOCK, warm_up, whole, len(places), args.image_repeats, args.device)[0]
    return {**record, **describe_image(record, args.size, preset), "stock_to_run": 1.0}


@torch.no_grad()
def measure_diffusers_tiling(preset: Preset, args: argparse.Namespace) -> dict:
    """What diffusers' own `vae.enable_tiling` takes for the whole image, on a VAE that is not compiled."""
    pipe = build_variant("eager", preset, args)
    pipe.vae.enable_tiling()
    pixels = torch.rand(1, 3, args.size, args.size, device=args.device, dtype=args.dtype) * 2 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean
    seconds = {
        f"{name}_seconds": time_calls(partial(getattr(pipe.vae, name), values), args.image_repeats, args.device)
        for name, values in (("encode", pixels), ("decode", latents))
    }
    return {"variant": "diffusers' tiling, eager", **seconds}


@torch.no_grad()
def measure_tile_side(build: Callable, side: int, args: argparse.Namespace) -> dict:
    """Time of a step and of the VAE for a tile."""
    pipe = build()
    plan = pipe.plan_tiles(side, side, side, 0)
    step = measure_step(pipe, plan, 1.0, args.step_repeats, 1.0)
    pixels = torch.rand(1, 3, side, side, device=args.device, dtype=args.dtype) * 2 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean
    vae_ms = sum(
        1e3 * time_calls(partial(method, values), args.step_repeats, args.device)
        for method, values in ((pipe.vae.encode, pixels), (pipe.vae.decode, latents))
    )
    us_per_token = 1e3 * (args.steps * step["ms"] + vae_ms) / plan.tokens_per_tile
    times = {"step_ms": step["ms"], "vae_ms": vae_ms, "us_per_token": us_per_token}
    return {"tile_side": side, "num_tokens": step["num_tokens"], **times}


class Run(NamedTuple):
    """One run of the benchmark: its settings, what is measured so far, and when it should end."""

    args: argparse.Namespace
    preset: Preset
    plan: Any
    report: dict
    deadline: float  # of `time.perf_counter`


def measure(run: Run, key: str, name: str, num_tiles: float, variant: str, call: Callable[[], dict]) -> None:
    """Adds a record to the report and saves it at once, or says that it would end after the deadline."""
    needed = estimate_seconds(run.report["images"], num_tiles, variant)
    left = max(0.0, run.deadline - time.perf_counter())
    if needed < left:
        log(name)
        run.report[key].append(call())
    else:
        run.report["skipped"].append(f"{name}: takes about {needed:.0f} s, {left:.0f} s are left")
        log(f"skipped: {run.report['skipped'][-1]}")
    save(run)


def estimate_seconds(images: list[dict], num_tiles: float, variant: str) -> float:
    """For tiles with all their steps: the slowest image's pace, and to compile as long as the longest first tile."""
    pace = max((image["seconds"] / image["num_tiles"] for image in images), default=0.0)
    first_tiles = [image["warm_up_seconds"] for image in images if is_compiled(variant)]
    return num_tiles * pace + max(first_tiles, default=0.0)


def save(run: Run) -> None:
    save_json(run.report, run.args.json)
    if run.args.markdown is not None:
        run.args.markdown.write_text(format_report(run.report))


def build_variant(variant: str, preset: Preset, args: argparse.Namespace) -> FluxDinoTilePipeline:
    torch.compiler.reset()
    pipe = build_pipeline(FluxDinoTilePipeline, preset, args.device, args.dtype)
    apply_variant(pipe, variant)
    return pipe


def build_skeleton(preset: Preset, size: int) -> tuple[FluxDinoTilePipeline, Any]:
    """A pipeline without data, and its plan of a whole image."""
    pipe = build_pipeline(FluxDinoTilePipeline, preset, torch.device("meta"), torch.float32)
    return pipe, pipe.plan_tiles(size, size, preset.tile_size, preset.tile_overlap)


def measure_stock(run: Run, preset: Preset) -> None:
    name = f"{STOCK}: {preset.num_text_tokens} text tokens"
    num_tiles = len(stock_places(preset, run.args.size)) + 1
    measure(run, "images", name, num_tiles, "eager", partial(measure_stock_image, preset, run.args))


def measure_whole(run: Run, variant: str, size: int, preset: Preset, build: Callable) -> None:
    """The whole image and its phases."""
    args = run.args
    skeleton, plan = build_skeleton(preset, size)

    def call() -> dict:
        flops = count_phase_flops(skeleton, plan, args.steps, args.dino_strength)
        image, phase_seconds = measure_pipeline_image(build(), variant, size, preset, args)
        phases = phase_records(image["seconds"], phase_seconds, flops, run.report["ceiling_tflops"])
        keys = {"variant": STOCK, "size": size, "num_text_tokens": preset.num_text_tokens}
        stock = [x["seconds"] for x in run.report["images"] if keys.items() <= x.items()]
        return {**image, "stock_to_run": stock[0] / image["seconds"] if stock else None, "phases": phases}

    name = f"{variant}: {size} px, {preset.num_text_tokens} text tokens"
    measure(run, "images", name, len(plan) + 1, variant, call)


def measure_steps(run: Run, variant: str, build: Callable, conditions: list[tuple[int, int, float]]) -> None:
    """A step for one tile by its text tokens, the side of its grid of DINO tokens, and their strength."""
    args, steps = run.args, run.report["steps"]

    def call(num_text_tokens: int, grid: int, strength: float) -> dict:
        pipe = build()
        embeds = pipe.dino_projector.prompt_embeds
        pipe.dino_projector.prompt_embeds = embeds.new_zeros(1, num_text_tokens, embeds.shape[-1]).normal_()
        pipe.dino_projector.register_to_config(token_grid=grid)
        ceiling = run.report["ceiling_tflops"]
        step = {"variant": variant, **measure_step(pipe, run.plan, strength, args.step_repeats, ceiling)}
        without = [x["ms"] for x in [*steps, step] if x["variant"] == variant and x["dino_strength"] == 0]
        return {**step, "step_to_no_dino": step["ms"] / without[0] if without else None}

    for condition in dict.fromkeys(conditions):
        name = "{}: one step, {} text tokens, {}^2 of DINO at strength {:g}".format(variant, *condition)
        measure(run, "steps", name, count_step_tiles(args), variant, partial(call, *condition))


def measure_variant(run: Run, variant: str) -> None:
    """The whole image first, so that its compilation finds nothing that the steps left."""
    args, preset = run.args, run.preset
    build = cache(partial(build_variant, variant, preset, args))
    measure_whole(run, variant, args.size, preset, build)
    # The plain steps with other strengths come last.
    strengths = (0.0, 1.0) if variant == args.main_variant != "eager" else ()
    defaults = preset.step_conditions[0][:2]
    measure_steps(run, variant, build, [(*defaults, strength) for strength in (*strengths, args.dino_strength)])


def measure_caches(run: Run) -> None:
    """diffusers' caches on two tiles, dev's architecture for the speed and trained weights for the picture."""
    args, preset = run.args, run.preset
    dev = preset._replace(
        num_text_tokens=2 * preset.num_text_tokens, transformer={**preset.transformer, "guidance_embeds": True}
    )
    models = {
        "dev, random weights": (partial(build_variant, "eager", dev, args), run.plan.tile_height, preset.tile_overlap),
        "embedded": (partial(load_embedded, args.device), 256, 64),
    }
    for model, (build, tile_size, overlap) in models.items():
        pipe = cache(build)
        plain: dict = {}
        for num_steps, name in product((12, 28), ("none", *CACHES)):
            call = partial(measure_cache, pipe, model, num_steps, name, plain, tile_size, overlap, args)
            label = f"{model}: {num_steps} steps, cache {name}"
            measure(run, "caches", label, 2 * num_steps / args.steps, "caches", call)


def load_embedded(device: torch.device) -> FluxDinoTilePipeline:
    pipe = FluxDinoTilePipeline.from_pretrained(DEMO_FOLDER).to(device)
    pipe.load_dino_projector(DEMO_FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_cache(
    build: Callable, model: str, num_steps: int, name: str, plain: dict, tile_size: int, overlap: int, args
) -> dict:
    """Seconds and picture of two tiles; `plain` takes both without a cache, for what follows."""
    pipe = build()
    height, width = tile_size, 2 * tile_size - overlap
    options: dict[str, Any] = {"height": height, "width": width, "tile_size": tile_size, "tile_overlap": overlap}
    options |= {"dino_conditioning_scale": args.dino_strength, "start_sigma": 0.35, "output_type": "pt"}
    picture = Image.open(PHOTO).convert("RGB").resize((width // 4, height // 4))

    def enlarge(num_steps: int) -> torch.Tensor:
        return pipe(image=picture, num_inference_steps=num_steps, generator=seeded(), **options).images

    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()
    if name in CACHES:
        pipe.transformer.enable_cache(CACHES[name](num_steps))
    calls = partial(enlarge, 1), partial(enlarge, num_steps)
    record, images = measure_image(name, *calls, 2, args.image_repeats, args.device)
    seconds, uncached = plain.setdefault(num_steps, (record["seconds"], images))
    error = F.mse_loss(images.float(), uncached.float()).item()
    return {
        "model": model,
        "num_steps": num_steps,
        "cache": name,
        "seconds": record["seconds"],
        "peak_gib": record["peak_gib"],
        "uncached_to_run": seconds / record["seconds"],
        "psnr": -10 * math.log10(error) if error else None,
    }


def count_step_tiles(args: argparse.Namespace) -> float:
    """How many tiles with all their steps the calls of `measure_step` are worth."""
    return (args.step_repeats + 2) / args.steps


def measure_rest(run: Run) -> None:
    """What belongs to the first compiled variant, or the last one, and to the plain pipeline."""
    args, preset, variant = run.args, run.preset, run.args.main_variant
    double = preset._replace(num_text_tokens=2 * preset.num_text_tokens)
    if "eager" in args.variants:
        # The VAE takes about a quarter of a tile's time, and all tiles are encoded twice.
        num_tiles = len(stock_places(preset, args.size)) / 2
        measure(
            run, "tiling", "diffusers' tiling", num_tiles, "eager", partial(measure_diffusers_tiling, preset, args)
        )
    if is_compiled(variant):
        name = f"{variant}: first tile in a new process"
        measure(run, "warm_start", name, 2, variant, partial(measure_warm_start, run))
    if args.second_size is not None:
        measure_whole(run, variant, args.second_size, preset, partial(build_variant, variant, preset, args))
    measure_stock(run, double)
    measure_whole(run, variant, args.size, double, partial(build_variant, variant, double, args))
    if "eager" in args.variants:
        build = cache(partial(build_variant, "eager", preset, args))
        for side in preset.tile_sides:
            call = partial(measure_tile_side, build, side, args)
            measure(run, "tile_sides", f"eager: tiles of {side} px", 2 * count_step_tiles(args), "eager", call)
        measure_steps(run, "eager", build, [*preset.step_conditions])  # last, as it changes the tokens


def measure_warm_start(run: Run) -> dict:
    """A new process finds the code that this one compiled on the disk, and must load it."""
    free_memory()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds = pool.submit(time_first_tile, run.args, run.plan.tile_height).result()
    return {"variant": run.args.main_variant, "warm_cache_seconds": seconds}


def time_first_tile(args: argparse.Namespace, side: int) -> float:
    preset, variant = PRESETS[args.preset], args.main_variant
    prepare_device(args)
    pipe = build_variant(variant, preset, args)
    return measure_pipeline_image(pipe, variant, side, preset, args)[0]["warm_up_seconds"]


def prepare_device(args: argparse.Namespace) -> None:
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.device.type == "cpu" and args.preset == "small":
        # Threads cost more than they give, above all beside other programs.
        torch.set_num_threads(1)


def run_benchmark(args: argparse.Namespace) -> dict:
    deadline, preset = time.perf_counter() + args.budget, PRESETS[args.preset]
    prepare_device(args)
    _, plan = build_skeleton(preset, args.size)
    report: dict = {"machine": describe_machine(args.device), "settings": describe_settings(preset, plan, args)}
    log("matrix product")
    report["ceiling_tflops"] = measure_ceiling(preset.matmul_side, args.device, args.dtype)
    report |= {key: [] for key in ("images", "steps", "warm_start", "tiling", "tile_sides", "caches", "skipped")}
    run = Run(args, preset, plan, report, deadline)
    # An empty cache, so that the first tile shows what compiling takes.
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        measure_stock(run, preset)
        for variant in args.variants:
            if variant == "caches":
                measure_caches(run)
            else:
                measure_variant(run, variant)
        if args.main_variant is not None:
            measure_rest(run)
    return report


def describe_machine(device: torch.device) -> dict:
    cpu = f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def describe_settings(preset: Preset, plan, args: argparse.Namespace) -> dict:
    options = ("preset", "input_size", "size", "steps", "dino_strength", "variants", "main_variant", "budget")
    constants = ("num_text_tokens", "matmul_side", "tile_overlap", "stock_tile_size", "stock_tile_overlap")
    return {
        **{name: getattr(args, name) for name in (*options, "image_repeats", "step_repeats")},
        **{name: getattr(preset, name) for name in constants},
        "dtype": str(args.dtype).removeprefix("torch."),
        "tiles": len(plan),
        "tile_size": plan.tile_height,
        "stock_tiles": len(stock_places(preset, args.size)),
    }


def save_json(report: dict, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def format_cell(value: Any, number_format: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and not number_format:
        number_format = ".0f" if value >= 100 else ".3g"
    return format(value, number_format).replace("%", " %")


def format_table(title: str, records: list[dict]) -> str:
    """A Markdown table with aligned columns, which reads well in a terminal too."""
    columns = {key: column for key, column in COLUMNS.items() if key in records[0]}
    lines = [[heading for heading, _ in columns.values()]]
    lines += [[format_cell(record[key], form) for key, (_, form) in columns.items()] for record in records]
    first, *others = (max(map(len, cells)) for cells in zip(*lines))
    texts = [" | ".join([cells[0].ljust(first), *map(str.rjust, cells[1:], others)]) for cells in lines]
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    header, *rows = (f"| {text} |" for text in texts)
    return "\n".join([f"## {title}", "", header, f"|{rule}|", *rows])


def compile_records(report: dict) -> list[dict]:
    """Seconds until the first tile, and after how many images compiling pays, without and with a warm cache."""
    images = {image["variant"]: image for image in reversed(report["images"])}  # the first of each
    image, eager = images.get(report["settings"]["main_variant"]), images.get("eager")
    if image is None or not is_compiled(image["variant"]):
        return []
    cold, warm = image["warm_up_seconds"], None
    if report["warm_start"]:
        warm = report["warm_start"][0]["warm_cache_seconds"]
    pays = {
        "pays_after": count_until_paid(cold, image, eager),
        "warm_pays_after": count_until_paid(warm, image, eager),
    }
    return [{"variant": image["variant"], "warm_up_seconds": cold, "warm_cache_seconds": warm, **pays}]


def count_until_paid(first_seconds: float | None, image: dict, eager: dict | None) -> int | None:
    """Images after which compiling has saved what its first tile takes longer, if it ever does."""
    if first_seconds is None or eager is None or eager["seconds"] <= image["seconds"]:
        return None
    return max(1, math.ceil((first_seconds - eager["warm_up_seconds"]) / (eager["seconds"] - image["seconds"])))


def vae_records(report: dict) -> list[dict]:
    """Seconds in the VAE for a whole image, and how many times as long diffusers' tiling takes."""
    records = list(report["tiling"])
    headline = itemgetter("size", "num_text_tokens")
    for image in report["images"]:
        seconds = {phase["phase"]: phase["seconds"] for phase in image["phases"]}
        if seconds and headline(image) == headline(report["settings"]):
            times = {f"{name}_seconds": seconds[f"VAE {name}"] for name in ("encode", "decode")}
            records.append({"variant": image["variant"], **times})
    totals = [record["encode_seconds"] + record["decode_seconds"] for record in records]
    tiling = totals[0] if report["tiling"] else None
    return [{**record, "tiling_to_run": tiling and tiling / total} for record, total in zip(records, totals)]


def format_report(report: dict) -> str:
    machine, settings = report["machine"], report["settings"]
    ceiling = format_cell(report["ceiling_tflops"], "")
    versions = ", ".join(f"{name} {machine[name]}" for name in list(machine)[2:] if machine[name] is not None)
    skipped = [f"- skipped: {line}" for line in report["skipped"]]
    tables = {
        "Whole image": report["images"],
        "Compiling": compile_records(report),
        **{
            "Phases of the whole image: {variant}, {size} px, {num_text_tokens} text tokens".format(**image): image[
                "phases"
            ]
            for image in report["images"]
        },
        "One transformer step for one tile": report["steps"],
        "VAE of the whole image": vae_records(report),
        "Tiles of several sides: eager": report["tile_sides"],
        "diffusers' caches, eager, two tiles": report["caches"],
    }
    parts = ["\n".join([HEAD.format(**machine, **settings, versions=versions, ceiling=ceiling), *skipped])]
    parts += [format_table(title, records) for title, records in tables.items() if records]
    return "\n\n".join(parts) + "\n"


def log(text: str) -> None:
    print(f"benchmark.py: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    def script() -> None:
        args = parse_arguments(argv)
        print(format_report(run_benchmark(args)), end="")

    return run_script("benchmark.py", script)


if __name__ == "__main__":
    sys.exit(main())
