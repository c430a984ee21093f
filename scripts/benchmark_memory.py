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

"""Shows in how much GPU memory the recipes of `upscale.py --memory` run, on models with random weights."""

import argparse
import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    PRESETS,
    Preset,
    build_pipeline,
    describe_machine,
    format_table,
    log,
    random_picture,
    seeded,
    synchronized_time,
)
from diffusers import FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from flux_dino_tile.loading import choose_device, is_quantized_layer, place
from flux_dino_tile.messages import Parser, UsageError, number, run_script
from pipeline_flux_dino_tile import FluxDinoTilePipeline


# FLUX.1's text encoders, and small ones with the dimensions of the small preset.
T5_CONFIGS = {
    "full": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "small": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}
CLIP_CONFIGS = {
    "full": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "small": {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def build_parser() -> Parser:
    parser = Parser(prog="benchmark_memory.py", description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full", help="FLUX.1's architecture, or a small one (default: full)")
    add("--device", help="cuda, cuda:1 or cpu (default: the first of them that is there)")
    add("--input-size", metavar="PX", type=number(int, 16), default=1024, help="side of the input (default: 1024)")
    add(
        "--runs",
        metavar="LIST",
        default="4096:24:4,4096:16:4,4096:12:4,4096:8:4,8192:12:4",
        help="side of the output in px, allowed GiB and tiles at once, with colons; several with commas (default: "
        "%(default)s)",
    )
    add(
        "--nf4", metavar="LIST", default="", help="the same with the transformer in 4 bits, on the GPU (default: none)"
    )
    add("--json", metavar="FILE", type=Path, help="write the results here, after every run")
    return parser


def parse_runs(text: str) -> list[tuple[int, float, int]]:
    try:
        runs = [tuple(map(float, run.split(":"))) for run in text.split(",") if run]
        return [(int(size), limit, int(batch)) for size, limit, batch in runs]
    except ValueError:
        raise UsageError(f"runs must be size:GiB:tiles, with commas between them, not {text!r}") from None


def character_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """In place of CLIP's and T5's, which need downloaded vocabularies; prompts are padded to `max_length` anyway."""
    model = WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), model_max_length=max_length, **tokens)


def add_text_encoders(pipe: FluxDinoTilePipeline, preset: str, device: torch.device, dtype: torch.dtype) -> None:
    """T5 and CLIP with random weights, and tokenizers that know no word."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5_CONFIGS[preset]))
        clip = CLIPTextModel(CLIPTextConfig(eos_token_id=1, **CLIP_CONFIGS[preset]))
    torch.set_default_dtype(torch.float32)
    tokenizers = {"tokenizer": character_tokenizer(77), "tokenizer_2": character_tokenizer(512)}
    pipe.register_modules(text_encoder=clip.eval(), text_encoder_2=t5.eval(), **tokenizers)


def quantize_nf4(transformer: FluxTransformer2DModel) -> None:
    """What loading with `--quantize nf4` does, for a transformer that was never saved."""
    import bitsandbytes as bnb

    layers = [(name, module) for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for name, layer in layers:
        if not is_quantized_layer(name):
            continue
        settings: dict[str, Any] = {"compute_dtype": transformer.dtype, "quant_type": "nf4", "device": "meta"}
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **settings)
        weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        packed.weight, packed.bias = weight.to(layer.weight.device), layer.bias
        transformer.set_submodule(name, packed)


def measure_run(pipe: FluxDinoTilePipeline, run: tuple, preset: Preset, input_size: int, device: torch.device) -> dict:
    """Enlarges with no more GPU memory than the run allows; PyTorch raises an error where that is not enough."""
    size, limit_gib, tile_batch_size = run
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * 2**30 / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    start = synchronized_time(device)
    pipe(
        image=random_picture(input_size),
        prompt=None if pipe.text_encoder is None else "",
        height=size,
        width=size,
        dino_conditioning_scale=0.6,
        num_inference_steps=4,
        tile_size=preset.tile_size,
        tile_overlap=preset.tile_overlap,
        tile_batch_size=tile_batch_size,
        generator=seeded(),
    )
    seconds = synchronized_time(device) - start
    return {
        "size": size,
        "limit_gib": limit_gib,
        "tile_batch_size": tile_batch_size,
        "seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if on_gpu else None,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def measure_recipes(args: argparse.Namespace, device: torch.device, report: dict) -> None:
    preset, dtype = PRESETS[args.preset], torch.bfloat16 if device.type == "cuda" else torch.float32
    # Built on the device, where random numbers are fast, and then moved to main memory.
    for recipe, runs in (("group", args.runs), ("nf4", args.nf4)):
        if not runs:
            continue
        log(f"{recipe}: models")
        pipe = build_pipeline(FluxDinoTilePipeline, preset, device, dtype)
        if recipe == "group":
            add_text_encoders(pipe, args.preset, device, dtype)
            pipe.to("cpu")
            place(pipe, device, "group")
        else:
            quantize_nf4(pipe.transformer)
        measure_run(pipe, (preset.tile_size or 1024, 80, 1), preset, args.input_size, device)
        for run in runs:
            log(f"{recipe}: {run[0]} px within {run[1]:g} GiB, {run[2]} tiles at once")
            record = measure_run(pipe, run, preset, args.input_size, device)
            report["runs"].append({"recipe": recipe, **record})
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    def script() -> None:
        args = build_parser().parse_args(argv)
        args.runs, args.nf4 = parse_runs(args.runs), parse_runs(args.nf4)
        device = torch.empty(0, device=choose_device(args.device)).device
        report: dict = {"machine": describe_machine(device), "runs": []}
        measure_recipes(args, device, report)
        print(format_table("Runs within a limit of GPU memory", report["runs"]))

    return run_script("benchmark_memory.py", script)


if __name__ == "__main__":
    sys.exit(main())
