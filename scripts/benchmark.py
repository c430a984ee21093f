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
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise, product
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxTransformer2DModel
from diffusers.models.attention import AttentionModuleMixin
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from flux_dino_tile.loading import choose_device, compile_models, is_quantized_layer, quantization_config
from flux_dino_tile.messages import Parser, UsageError, number, run_script
from flux_dino_tile.plans import transformer_flops
from pipeline_flux_dino_tile import (
    TOKENS_BESIDE_IMAGE,
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
    num_text_tokens: int = 512
    matmul_side: int = 8192
    size: int = 4096
    tile_size: int | None = None
    tile_overlap: int = 64
    stock_tile_size: int = 1024
    stock_tile_overlap: int = 128
    tile_sides: tuple[int, ...] = (768, 896, 1024, 1136)
    # Text tokens, and the side of the grid of DINO tokens.
    token_budgets: tuple[tuple[int, int], ...] = ((128, 16), (256, 16), (512, 0), (512, 16), (512, 32))


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
        token_budgets=((16, 4), (32, 0), (32, 4)),
    ),
}
VARIANTS = ("eager", "cudnn", "compiled", "compiled-cudnn", "fp8")
# By phase the component, or "" for the pipeline itself, and its method.
PHASE_METHODS = {
    "DINO": ("", "encode_dino_tiles"),
    "VAE encode": ("vae", "encode"),
    "denoise": ("", "predict_canvas_velocity"),
    "VAE decode": ("vae", "decode"),
}
# The heading and number format of every column, in the tables' order; without a format floats get three digits.
COLUMNS = {
    "name": ("run", ""),
    "recipe": ("recipe", ""),
    "size": ("output px", ""),
    "limit_gib": ("allowed GiB", ".0f"),
    "tile_batch_size": ("tiles at once", ""),
    "phase": ("phase", ""),
    "variant": ("variant", ""),
    "dino_strength": ("DINO", ""),
    "num_tokens": ("tokens", ""),
    "num_text_tokens": ("of text", ""),
    "num_dino_tokens": ("of DINO", ""),
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
    "us_per_token": ("4 steps + VAE, us per token", ".1f"),
    "model_to_measured": ("planner's model / measured", ".3f"),
    "step_to_no_dino": ("step / without DINO", ".3f"),
    "warm_up_seconds": ("first tile, s", ""),
    "first_call_extra_s": ("first call, extra s", ""),
    "given_strength_to_full": ("strength {dino_strength:g} / 1", ".3f"),
    "full_strength_to_none": ("strength 1 / none", ".3f"),
}
HEAD = """# Benchmark of flux-dino-tile

- {device}, {date}
- {versions}
- random weights, preset {preset}, {dtype}; a {matmul_side}^3 matrix product runs at {ceiling} TFLOP/s, \
the ceiling below
- {input_size} -> {size} px, {steps} steps, DINO strength {dino_strength:g}; {tiles} tiles of {tile_size} px, \
stock loop (eager, no DINO) {stock_tiles} of {stock_tile_size} px with {stock_tile_overlap} px overlap
- medians after a warm-up of one tile: {image_repeats} of an image, {step_repeats} of a step; \
the first tile and a first call take the time of compilation, where there is any"""


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
    second_help = "side of a second, larger output, for the first compiled variant, or the last (default: none)"
    add("--second-size", metavar="PX", type=number(int, 64), help=second_help)
    add("--repeats", metavar="N", type=number(int, 1), help="timed runs (default: 1 of an image, 5 of a step)")
    add("--json", metavar="FILE", type=Path, help="write the results here, after every measurement")
    add("--markdown", metavar="FILE", type=Path, help="write the tables here")
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


def build_pipeline(kind: type[FluxImg2ImgPipeline], preset: Preset, device: torch.device, dtype: torch.dtype):
    """A stock or a DINO pipeline, with FLUX.1-schnell's scheduler and without text encoders."""
    gc.collect()  # the last pipeline, before this one takes its place
    torch.cuda.empty_cache()
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
    if "compiled" in variant or variant == "fp8":
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
    record = {"dino_strength": dino_strength, "num_tokens": num_tokens, "ms": seconds * 1e3}
    return {**record, **rates(flops, seconds, ceiling), "first_call_extra_s": max(0.0, first - seconds)}


def step_ratios(variant: str, steps: list[dict], dino_strength: float) -> dict:
    ms = {step["dino_strength"]: step["ms"] for step in steps if step["variant"] == variant}
    ratios = {"given_strength_to_full": ms[dino_strength] / ms[1.0], "full_strength_to_none": ms[1.0] / ms[0.0]}
    return {"variant": variant, **ratios}


def measure_image(
    name: str, warm_up: Callable, run: Callable, num_tiles: int, repeats: int, device: torch.device
) -> tuple[dict, dict]:
    """A whole image's record and the seconds by phase that `run` returns, for the median run, after a warm-up."""
    start = synchronized_time(device)
    warm_up()
    warm_up_seconds = synchronized_time(device) - start
    runs = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = synchronized_time(device)
        phase_seconds = run()
        seconds = synchronized_time(device) - start
        peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        runs.append((seconds, peak_gib, phase_seconds))
    seconds, peak_gib, phase_seconds = sorted(runs, key=itemgetter(0))[(repeats - 1) // 2]
    record = {"name": name, "seconds": seconds, "num_tiles": num_tiles, "peak_gib": peak_gib}
    return {**record, "warm_up_seconds": warm_up_seconds, "phases": []}, phase_seconds


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
    pipe: FluxDinoTilePipeline, name: str, size: int, seconds: dict[str, float], preset: Preset, args
) -> tuple[dict, dict]:
    """Enlarges to `size` px; `seconds` is what `time_methods` gave for this pipeline. One tile is the warm-up."""
    picture = random_picture(args.input_size)
    tiles: dict[str, Any] = {"tile_size": preset.tile_size, "tile_overlap": preset.tile_overlap}
    plan = pipe.plan_tiles(size, size, **tiles)

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
    record, phase_seconds = measure_image(name, warm_up, whole, len(plan), args.image_repeats, args.device)
    return {**record, "seconds_per_mp": record["seconds"] / size**2 * 1e6}, phase_seconds


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
    record = measure_image("stock loop", warm_up, whole, len(places), args.image_repeats, args.device)[0]
    return {**record, "seconds_per_mp": record["seconds"] / args.size**2 * 1e6}


@torch.no_grad()
def measure_diffusers_tiling(pipe: FluxImg2ImgPipeline, args: argparse.Namespace) -> dict:
    """What diffusers' own `vae.enable_tiling` takes for the whole image."""
    pipe.vae.enable_tiling()
    pixels = torch.rand(1, 3, args.size, args.size, device=args.device, dtype=args.dtype) * 2 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean
    seconds = {
        f"{name}_seconds": time_calls(partial(getattr(pipe.vae, name), values), args.image_repeats, args.device)
        for name, values in (("encode", pixels), ("decode", latents))
    }
    pipe.vae.disable_tiling()
    return {"name": "diffusers' tiling, eager", **seconds}


def vae_records(report: dict) -> list[dict]:
    """Seconds in the VAE for a whole image, by run, and how many times as long diffusers' tiling takes."""
    records = [report["diffusers_tiling"]]
    for image in report["images"]:
        phases = {phase["phase"]: phase["seconds"] for phase in image["phases"]}
        seconds = {f"{name}_seconds": phases.get(f"VAE {name}") for name in ("encode", "decode")}
        if image["side"] == report["settings"]["size"]:
            records.append({"name": image["name"], **seconds})
    totals = [record["encode_seconds"] + record["decode_seconds"] for record in records]
    return [{**record, "tiling_to_run": totals[0] / total} for record, total in zip(records, totals)]


@torch.no_grad()
def measure_tile_sides(pipe: FluxDinoTilePipeline, preset: Preset, args: argparse.Namespace) -> list[dict]:
    """Time of a step and of the VAE by the side of a tile, and how far the planner's cost model is from them."""
    records = []
    for side in preset.tile_sides:
        plan = pipe.plan_tiles(side, side, side, 0)
        step = measure_step(pipe, plan, 1.0, args.step_repeats, 1.0)
        pixels = torch.rand(1, 3, side, side, device=args.device, dtype=args.dtype) * 2 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mean
        vae_ms = sum(
            1e3 * time_calls(partial(method, values), args.step_repeats, args.device)
            for method, values in ((pipe.vae.encode, pixels), (pipe.vae.decode, latents))
        )
        total_ms = args.steps * step["ms"] + vae_ms
        cost = plan.tokens_per_tile + TOKENS_BESIDE_IMAGE
        record = {"tile_side": side, "num_tokens": step["num_tokens"], "step_ms": step["ms"], "vae_ms": vae_ms}
        records.append(
            {**record, "us_per_token": 1e3 * total_ms / plan.tokens_per_tile, "cost_per_ms": cost / total_ms}
        )
    typical = median(record["cost_per_ms"] for record in records)
    return [{**record, "model_to_measured": record.pop("cost_per_ms") / typical} for record in records]


def measure_token_budgets(pipe, plan, preset: Preset, args: argparse.Namespace) -> list[dict]:
    """Time of a step for one tile by the number of text and DINO tokens."""
    embeds, _ = pipe.default_prompt_embeds
    token_grid = pipe.dino_projector.config.token_grid
    records = []
    for num_text_tokens, grid in preset.token_budgets:
        pipe.dino_projector.prompt_embeds = embeds[:, :num_text_tokens]
        pipe.dino_projector.register_to_config(token_grid=grid)
        step = measure_step(pipe, plan, 1.0 if grid else 0.0, args.step_repeats, 1.0)
        counts = {"num_tokens": step["num_tokens"], "num_text_tokens": num_text_tokens, "num_dino_tokens": grid**2}
        records.append({**counts, "step_ms": step["ms"]})
    pipe.dino_projector.prompt_embeds = embeds
    pipe.dino_projector.register_to_config(token_grid=token_grid)
    without = next(record["step_ms"] for record in records if record["num_dino_tokens"] == 0)
    return [{**record, "step_to_no_dino": record["step_ms"] / without} for record in records]


def measure_variant(report: dict, preset: Preset, plan, phase_flops: dict, variant: str, args) -> None:
    """Measures new models, with the whole image first, so that its compilation finds nothing that the steps left."""
    ceiling = report["ceiling_tflops"]
    pipe = build_pipeline(FluxDinoTilePipeline, preset, args.device, args.dtype)
    apply_variant(pipe, variant)
    torch.compiler.reset()
    if variant == args.variants[0]:
        report["diffusers_tiling"] = measure_diffusers_tiling(pipe, args)
    seconds = time_methods(pipe, PHASE_METHODS, args.device)
    sizes = [args.size]
    compiled = [name for name in args.variants if "compiled" in name]
    if args.second_size is not None and variant == [*compiled, args.variants[-1]][0]:
        sizes.append(args.second_size)
    for size in sizes:
        name = variant if size == args.size else f"{variant}, {size} px"
        image, phase_seconds = measure_pipeline_image(pipe, name, size, seconds, preset, args)
        scale = image["num_tiles"] / len(plan)
        flops = {phase: scale * value for phase, value in phase_flops.items()}
        phases = phase_records(image["seconds"], phase_seconds, flops, ceiling)
        report["images"].append({**image, "side": size, "phases": phases})
        save_json(report, args.json)
    report["stock_to_variant"][variant] = report["stock"]["seconds"] / report["images"][-len(sizes)]["seconds"]
    for dino_strength in dict.fromkeys((0.0, 1.0, args.dino_strength)):
        log(f"{variant}: one step, DINO strength {dino_strength:g}")
        step = measure_step(pipe, plan, dino_strength, args.step_repeats, ceiling)
        report["steps"].append({"variant": variant, **step})
        save_json(report, args.json)
    report["step_ratios"].append(step_ratios(variant, report["steps"], args.dino_strength))
    if variant == args.variants[0]:
        log(f"{variant}: tiles of several sides, and several numbers of tokens")
        report["tile_sides"] = measure_tile_sides(pipe, preset, args)
        report["token_budgets"] = measure_token_budgets(pipe, plan, preset, args)
    save_json(report, args.json)


def run_benchmark(args: argparse.Namespace) -> dict:
    preset = PRESETS[args.preset]
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.device.type == "cpu" and args.preset == "small":
        # Threads cost more than they give, above all beside other programs.
        torch.set_num_threads(1)
    skeleton = build_pipeline(FluxDinoTilePipeline, preset, torch.device("meta"), torch.float32)
    plan = skeleton.plan_tiles(args.size, args.size, preset.tile_size, preset.tile_overlap)
    phase_flops = count_phase_flops(skeleton, plan, args.steps, args.dino_strength)
    report: dict = {"machine": describe_machine(args.device), "settings": describe_settings(preset, plan, args)}
    log("matrix product")
    report["ceiling_tflops"] = measure_ceiling(preset.matmul_side, args.device, args.dtype)
    log("stock loop: whole image")
    report["stock"] = measure_stock_image(preset, args)
    report |= {"images": [], "stock_to_variant": {}, "steps": [], "step_ratios": []}
    save_json(report, args.json)
    for variant in args.variants:
        log(f"{variant}: whole image")
        measure_variant(report, preset, plan, phase_flops, variant, args)
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
    options = ("preset", "input_size", "size", "steps", "dino_strength", "variants", "image_repeats", "step_repeats")
    constants = ("matmul_side", "tile_overlap", "stock_tile_size", "stock_tile_overlap")
    return {
        **{name: getattr(args, name) for name in options},
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


def format_table(title: str, records: list[dict], settings: dict) -> str:
    """A Markdown table with aligned columns, which reads well in a terminal too."""
    columns = {key: column for key, column in COLUMNS.items() if key in records[0]}
    lines = [[heading.format(**settings) for heading, _ in columns.values()]]
    lines += [[format_cell(record[key], form) for key, (_, form) in columns.items()] for record in records]
    first, *others = (max(map(len, cells)) for cells in zip(*lines))
    texts = [" | ".join([cells[0].ljust(first), *map(str.rjust, cells[1:], others)]) for cells in lines]
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    header, *rows = (f"| {text} |" for text in texts)
    return "\n".join([f"## {title}", "", header, f"|{rule}|", *rows])


def format_report(report: dict) -> str:
    machine, settings = report["machine"], report["settings"]
    table = partial(format_table, settings=settings)
    ceiling = format_cell(report["ceiling_tflops"], "")
    versions = ", ".join(f"{name} {machine[name]}" for name in list(machine)[2:] if machine[name] is not None)
    stock_to_run = {"stock loop": 1.0, **report["stock_to_variant"]}
    images = [
        {**image, "stock_to_run": stock_to_run.get(image["name"])} for image in (report["stock"], *report["images"])
    ]
    steps = [{**step, "dino_strength": step["dino_strength"] or "none"} for step in report["steps"]]
    parts = [
        HEAD.format(**machine, **settings, versions=versions, ceiling=ceiling),
        table("Whole image", images),
        *(table(f"Phases of the whole image: {image['name']}", image["phases"]) for image in report["images"]),
        table("One transformer step for one tile", steps),
        table("Cost of DINO in a step", report["step_ratios"]),
        table("VAE of the whole image", vae_records(report)),
        table(f"Tiles of several sides: {settings['variants'][0]}", report["tile_sides"]),
        table(f"A step by its tokens: {settings['variants'][0]}", report["token_budgets"]),
    ]
    return "\n\n".join(parts) + "\n"


def log(text: str) -> None:
    print(f"benchmark.py: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    def script() -> None:
        args = parse_arguments(argv)
        text = format_report(run_benchmark(args))
        if args.markdown is not None:
            args.markdown.write_text(text)
        print(text, end="")

    return run_script("benchmark.py", script)


if __name__ == "__main__":
    sys.exit(main())
