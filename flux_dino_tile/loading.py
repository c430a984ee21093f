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

"""Loading a pipeline as the options say: device, number format, offloading, quantization."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from pipeline_flux_dino_tile import FluxDinoTilePipeline

from .architecture import Architecture
from .embedded import locate_model
from .messages import UsageError, first_line, hide_loading_bars, print_line
from .options import Settings, check_architecture


# Small layers, and those that steer the big ones, which `--quantize` leaves as they are.
UNQUANTIZED_LAYERS = [
    "x_embedder",
    "context_embedder",
    "time_text_embed",
    "norm",
    "norm1",
    "norm1_context",
    "norm_out",
]


def load_flux(settings: Settings) -> tuple[FluxDinoTilePipeline, Settings]:
    """The pipeline on its device, and the settings with its and the machine's own where none were given."""
    name = choose_device(settings.device)
    device = torch.device(name)
    if device.type == "cpu" and settings.offload != "none":
        raise UsageError(f"--offload {settings.offload} needs an accelerator, and the device is the CPU")
    dtype = settings.dtype or ("float32" if device.type == "cpu" else "bfloat16")

    pipe = load_models(settings, getattr(torch, dtype))
    check_architecture(settings, describe_models(pipe))
    strength = settings.dino_strength
    if pipe.dino_projector is None:
        print_line("no DINO projector: the tiles are not told what they show (--projector gives one)")
    elif strength is None:
        strength = 1.0
    if dtype == "float16" and pipe.vae.config.get("force_upcast"):
        # The VAE's own word that it overflows in float16.
        pipe.vae.to(torch.float32)
    residual = settings.vae_residual
    if residual is None:
        residual = pipe.config.default_vae_residual or None
    steps, guidance, start_sigma = pipe.get_default_settings(
        start_sigma=settings.start_sigma, num_inference_steps=settings.steps, guidance_scale=settings.guidance
    )
    place(pipe, device, settings.offload)
    if settings.compile:
        compile_models(pipe)
    return pipe, replace(
        settings,
        device=name,
        dtype=dtype,
        dino_strength=strength,
        vae_residual=residual,
        steps=steps,
        guidance=guidance,
        start_sigma=start_sigma,
    )


def describe_models(pipe: FluxDinoTilePipeline) -> Architecture:
    """What decides which settings fit, also of models that came from the Hub."""
    has_text_encoders = pipe.text_encoder is not None and pipe.text_encoder_2 is not None
    if pipe.dino_projector is None:
        return Architecture(has_text_encoders=has_text_encoders, dino_tokens=0, prompt_tokens=0)
    prompt_tokens = pipe.dino_projector.config.num_prompt_tokens
    return Architecture(has_text_encoders=has_text_encoders, prompt_tokens=prompt_tokens)


def load_models(settings: Settings, dtype: torch.dtype) -> FluxDinoTilePipeline:
    hide_loading_bars()
    options: dict = {"dtype": dtype, "use_safetensors": True}
    if settings.quantize is not None:
        options["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={"transformer": quantization_config(settings.quantize, dtype)}
        )
    model, projector = locate_model(settings.model or ""), settings.projector
    pipe = load("--model", model, partial(FluxDinoTilePipeline.from_pretrained, **options))
    if projector is None and load("--model", model, has_projector):
        projector = model
    if projector is not None:
        load("--projector", projector, pipe.load_dino_projector)
    return pipe


def has_projector(model: str) -> bool:
    """Whether the folder or Hub repository of a pipeline has a projector beside the models of its index."""
    file = "dino_projector/config.json"
    if Path(model).is_dir():
        return Path(model, file).is_file()
    try:
        return file_exists(model, file)
    except Exception:  # no network, which every version of the client says in its own way
        return isinstance(try_to_load_from_cache(model, file), str)


def load(option: str, name: str, loader: Callable):
    try:
        return loader(name)
    except Exception as error:  # on a broken folder the loaders raise anything
        reason = first_line(error)
        if not Path(name).is_dir() and is_unreachable(error):
            reason = "not in the local cache, and the Hub cannot be reached"
        raise UsageError(f"{option} {name}: {reason}") from error


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the error comes from a Hub that does not answer, or may not be asked."""
    if error is None:
        return False
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        return True
    return is_unreachable(error.__cause__) or is_unreachable(error.__context__)


# ---- Device --------------------------------------------------------------------------------------------------------


def choose_device(name: str | None) -> str:
    """The name of a device that works: `name`, or the best there is; of several processes each has its own GPU."""
    name = name or default_device()
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(name)
    return name


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> None:
    unknown = UsageError(f"--device {name}: not a device of this PyTorch: use cuda, mps or cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown from None
    try:
        torch.empty(0, device=device)
    except (NotImplementedError, ImportError):
        raise unknown from None
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {first_line(error)}") from None


def place(pipe: FluxDinoTilePipeline, device: torch.device, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)
    if device.type == "cpu":
        # Else each convolution copies its input and output to a layout like this one.
        pipe.vae.to(memory_format=torch.channels_last)


def compile_models(pipe: FluxDinoTilePipeline) -> None:
    """Compiles what takes the time, for the first shape of tiles and every further one."""
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    for coder in (pipe.vae.encoder, pipe.vae.decoder):
        coder.compile(fullgraph=True)


# ---- Quantization --------------------------------------------------------------------------------------------------


def is_quantized_layer(name: str) -> bool:
    """Whether `--quantize` takes the linear layer of this name in a FLUX.1 transformer."""
    return name != "proj_out" and not any(f"{part}." in f"{name}." for part in UNQUANTIZED_LAYERS)


def torchao_config(config) -> TorchAoConfig:
    """A torchao config for all layers but those that stay as they are, which diffusers knows by their weights."""
    return TorchAoConfig(config, modules_to_not_convert=[*UNQUANTIZED_LAYERS, "proj_out.weight"])


def quantization_config(kind: str, dtype: torch.dtype | str) -> TorchAoConfig | BitsAndBytesConfig:
    """How diffusers quantizes a FLUX.1 transformer while it loads it; `dtype` is what it computes in."""
    try:
        if kind == "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[*UNQUANTIZED_LAYERS, "proj_out"],
            )
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

        # torchao would tune the compiler for the whole process, so that compiling takes many minutes.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        return torchao_config(config)
    except ImportError as error:
        raise UsageError(f"--quantize {kind}: {first_line(error)}; the extra `quant` brings it") from None
