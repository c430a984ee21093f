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

"""A training run from its start, or a checkpoint, to the projector that inference loads."""

from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from pipeline_flux_dino_tile import FluxDinoTilePipeline

from ..folders import PROJECTOR_FOLDER, replace_folder
from ..pictures import to_bytes
from .cache import EmptyPrompt, TensorCache, TextEmbeddings, cache_key, model_fingerprint, text_fingerprint
from .checkpoints import checkpoint_step, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .dropout import Dropout
from .flow_matching import InputMaker, NoiseLevels
from .models import (
    ReduxTeacher,
    distillation_loss,
    library_versions,
    load_default_text_tokens,
    load_pipeline,
    load_stored_prompt,
    load_text_pipeline,
    match_token_rms,
    save_result,
)
from .samples import SampleStream, Sampling, first_pairs
from .signals import StopSignal, ignore_stop_signals
from .sources import ImageFolder, ListedSource, Shards, Source, check_shards, open_dataset
from .trainer import ProjectorTrainer, average_gradients
from .validation import Validator


# Their tokens set the scale of the first DINO tokens where the data has no captions.
SAMPLE_CAPTIONS = (
    "a photo of two dogs on wooden planks",
    "mountains behind a lake at sunrise",
    "a street in the rain",
)
NUM_SCALE_PICTURES = 16
NUM_SCALE_CAPTIONS = 32
# What may differ between the parts of a run without changing its result.
FREE_OPTIONS = {
    "output_dir",
    "logging_dir",
    "precomputed_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "max_train_seconds",
    "checkpoints_total_limit",
    "validation_steps",
    "validation_data_dir",
    "num_validation_images",
    "report_to",
    "tracker_project_name",
}
# Left out of the facts that are published with the weights.
DATA_FOLDERS = {"train_data_dir", "train_shards"}


def make_accelerator(args) -> Accelerator:
    trackers = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=trackers,
        project_dir=args.logging_dir,
        cpu=args.cpu,
        # The other processes wait while the first embeds all captions, or validates.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    set_seed(args.seed)
    return accelerator


def open_source(args, accelerator: Accelerator) -> Source:
    caption_column = None if args.caption_column == "none" else args.caption_column
    if args.train_data_dir is not None:
        return ImageFolder(args.train_data_dir, args.seed, caption_column)
    if args.train_shards is not None:
        return Shards(args.train_shards, args.seed, caption_column)
    return open_dataset(
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.streaming,
        args.image_column,
        caption_column,
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )


def uses_captions(args) -> bool:
    return args.caption_column != "none" and args.proportion_empty_prompts < 1


def compute_text_embeddings(args, device, source: Source, cache: TensorCache, options: tuple):
    """Embeds all captions that are known beforehand; returns the embedder and the root mean square of text tokens."""
    pipe = load_text_pipeline(args, device, options[1])
    embed_captions = TextEmbeddings(pipe, cache, text_fingerprint(pipe), *options)
    captions: list[str] = []
    if isinstance(source, ListedSource) and uses_captions(args):
        captions = list(dict.fromkeys(filter(None, source.captions())))
    for caption in tqdm(["", *captions], desc="text embeddings", disable=None if captions else True):
        embed_captions([caption])
    return embed_captions, embed_captions.token_rms(captions[:NUM_SCALE_CAPTIONS] or SAMPLE_CAPTIONS)


def load_text_embeddings(args, accelerator: Accelerator, source: Source, dtype: torch.dtype):
    """
    An embedder of captions, and the root mean square of text tokens. The text encoders stay in memory only where the
    captions are not known beforehand, in a stream. A base without them brings the empty prompt's embeddings.
    """
    if (stored := load_stored_prompt(args)) is not None:
        if uses_captions(args):
            raise ValueError(
                f"{args.pretrained_model_name_or_path} has no text encoders for captions: pass --caption_column none"
            )
        empty_prompt = EmptyPrompt(*stored)
        return empty_prompt, empty_prompt.token_rms()
    keeps_encoders = not isinstance(source, ListedSource) and uses_captions(args)
    cache, options = TensorCache(Path(args.precomputed_dir) / "text"), (args.max_sequence_length, dtype)
    embed_captions, rms = None, None
    if accelerator.is_main_process or keeps_encoders:
        embed_captions, rms = compute_text_embeddings(args, accelerator.device, source, cache, options)
    if not keeps_encoders:
        fingerprint = embed_captions and embed_captions.fingerprint
        fingerprint, rms = broadcast_object_list([fingerprint, rms])
        embed_captions = TextEmbeddings(None, cache, fingerprint, *options)
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    return embed_captions, rms


def make_loader(args, accelerator: Accelerator, source, image_processor) -> StatefulDataLoader:
    sampling = Sampling(
        args.resolution, tuple(args.scale_factor), tuple(args.degradation), args.random_flip, args.cache_latents
    )
    process, processes = accelerator.process_index, accelerator.num_processes
    stream = SampleStream(source, sampling, image_processor, args.seed, process, processes)
    return StatefulDataLoader(
        stream,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )


def make_input_maker(args, pipe: FluxDinoTilePipeline, embed_captions) -> InputMaker:
    dropout = Dropout(args.dino_dropout, args.token_dropout, args.strength_jitter, args.proportion_empty_prompts)
    levels = NoiseLevels(
        args.sigma_min,
        args.sigma_max,
        args.weighting_scheme,
        args.logit_mean,
        args.logit_std,
        args.restoration_share,
    )
    plan = pipe.plan_tiles(args.resolution, args.resolution, args.resolution)
    options: dict = {"keeps_pixels": args.pixel_loss_weight > 0}
    if args.cache_latents:
        options |= {
            "latent_cache": TensorCache(Path(args.precomputed_dir) / "latents"),
            "vae_fingerprint": cache_key(
                model_fingerprint(pipe.vae), pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
            ),
        }
    return InputMaker(pipe, plan, embed_captions, levels, dropout, args.guidance_scale, args.seed, **options)


def scale_tokens(make_inputs: InputMaker, accelerator: Accelerator, stream: SampleStream, rms: float) -> None:
    """Brings the tokens of the first pictures to the scale of text."""
    pipe, plan = make_inputs.pipe, make_inputs.plan
    pairs = first_pairs(stream.source, NUM_SCALE_PICTURES, stream.sampling, stream.image_processor, stream.seed)
    with torch.no_grad():
        features = torch.cat([pipe.encode_dino_tiles(to_bytes(pair.degraded)[None], plan) for pair in pairs])
    match_token_rms(pipe.dino_projector, features, rms)
    # A stream has other first pictures in every process.
    pipe.dino_projector.gain.data = accelerator.reduce(pipe.dino_projector.gain.data, "mean")


def distill_redux(make_inputs: InputMaker, accelerator: Accelerator, batches: Iterator, args) -> None:
    """Teaches the projector FLUX Redux's tokens of the sharp picture, from the degraded one."""
    pipe = make_inputs.pipe
    projector = pipe.dino_projector
    teacher = ReduxTeacher(args.init_from_redux, accelerator.device, pipe.transformer.dtype)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.redux_learning_rate)
    is_hidden = None if accelerator.is_main_process else True
    bar = tqdm(islice(batches, args.redux_steps), total=args.redux_steps, desc="redux", disable=is_hidden)
    for batch in bar:
        with torch.no_grad():
            features = pipe.encode_dino_tiles(batch["degraded"], make_inputs.plan)[0]
        target = teacher.tokens(pipe.crop_pixels(batch["sharp"], make_inputs.plan[0]), features.shape[1:3])
        loss = distillation_loss(projector, features, target)
        loss.backward()
        average_gradients(projector.parameters())
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(relative_error=f"{float(loss):.4f}")


def start_run(
    args, accelerator: Accelerator, quantization_config: Any = None
) -> tuple[ProjectorTrainer, StatefulDataLoader]:
    """Loads everything; at the place of the checkpoint that the arguments name, if there is one."""
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    args.max_sequence_length = args.max_sequence_length or load_default_text_tokens(args)
    state = None if checkpoint is None else load_checkpoint(checkpoint)
    if state is not None:
        check_readers(checkpoint, state, args, accelerator)
        check_is_latest(checkpoint, state["trainer"]["step"], args.output_dir)
        report_changes(state["arguments"], vars(args), accelerator)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    source = open_source(args, accelerator)
    check_shards(source, accelerator.num_processes, args.dataloader_num_workers)
    embed_captions, rms = load_text_embeddings(args, accelerator, source, dtype)
    pipe = load_pipeline(args, accelerator.device, dtype, quantization_config, embed_captions([""]))
    make_inputs = make_input_maker(args, pipe, embed_captions)
    if state is None:
        first_loader = make_loader(args, accelerator, source, pipe.image_processor)
        scale_tokens(make_inputs, accelerator, first_loader.dataset, rms)
        if args.init_from_redux is not None:
            distill_redux(make_inputs, accelerator, iter(first_loader), args)
    trainer = ProjectorTrainer(pipe, make_inputs, accelerator, args)
    loader = make_loader(args, accelerator, source, pipe.image_processor)
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        loader.load_state_dict(state["loaders"][accelerator.process_index])
        accelerator.print(f"going on from {checkpoint}, step {trainer.step}")
    return trainer, loader


def check_readers(checkpoint: Path | None, state: dict, args, accelerator: Accelerator) -> None:
    """Raises a `ValueError` unless as many processes and workers share the data as before."""
    old = (len(state["loaders"]), state["arguments"]["dataloader_num_workers"])
    new = (accelerator.num_processes, args.dataloader_num_workers)
    if old != new:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: it was made with {old[0]} processes and --dataloader_num_workers"
            f" {old[1]}, not {new[0]} and {new[1]}. Use the same."
        )


def check_is_latest(checkpoint: Path | None, step: int, output_dir: str) -> None:
    """Raises a `ValueError` if there are later checkpoints, beside which the new ones would count as old."""
    later = [path.name for path in list_checkpoints(output_dir) if checkpoint_step(path) > step]
    if later:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: {output_dir} holds {', '.join(later)}, which are later. Move them"
            " away, or use another --output_dir."
        )


def report_changes(old: dict, new: dict, accelerator: Accelerator) -> None:
    for name in sorted(old.keys() & new.keys() - FREE_OPTIONS):
        if old[name] != new[name]:
            accelerator.print(f"--{name} was {old[name]} and is now {new[name]}")


def save_run(trainer: ProjectorTrainer, loader: StatefulDataLoader, args) -> None:
    accelerator = trainer.accelerator
    loaders = gather_object([loader.state_dict()])
    if accelerator.is_main_process:
        state = {"trainer": trainer.state_dict(), "loaders": loaders, "arguments": vars(args)}

        def write_projector(folder: Path) -> None:
            with trainer.ema_weights():
                trainer.projector.save_pretrained(folder / PROJECTOR_FOLDER)

        save_checkpoint(args.output_dir, trainer.step, state, write_projector, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def training_facts(trainer: ProjectorTrainer, args, validation: dict[str, float]) -> dict:
    """How the weights came about, without the folders that the data came from."""
    facts = {
        name: Path(value).name if isinstance(value, str) and Path(value).is_dir() else value
        for name, value in vars(args).items()
        if name not in FREE_OPTIONS | DATA_FOLDERS and value is not None
    }
    return {
        "steps": trainer.step,
        "samples": trainer.step * samples_per_step(trainer.accelerator, args),
        "options": facts,
        "versions": library_versions(),
        "validation": validation,
        "validation_is_held_out": args.validation_data_dir is not None,
    }


def samples_per_step(accelerator: Accelerator, args) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def describe_run(trainer: ProjectorTrainer, source, num_examples: int, args) -> str:
    """What will happen, in a few lines."""
    samples = samples_per_step(trainer.accelerator, args)
    grid = f"{args.token_grid}x{args.token_grid}"
    amount = f"{len(source)} pictures" if isinstance(source, ListedSource) else "a stream of pictures"
    num_weights = sum(parameter.numel() for parameter in trainer.projector.parameters())
    is_held_out = args.validation_data_dir is not None
    return "\n".join(
        [
            f"projector     {num_weights / 1e6:.1f} M weights, {args.dino_model} to {grid} tokens,"
            f" for {args.pretrained_model_name_or_path}",
            f"data          {amount}, crops of {args.resolution} px,"
            f" {args.scale_factor[0]:g} to {args.scale_factor[1]:g} times enlarged, {' or '.join(args.degradation)}",
            f"steps         {args.max_train_steps - trainer.step} to go, of {samples} samples"
            f" ({args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x"
            f" {trainer.accelerator.num_processes} processes), sigma {args.sigma_min:g} to {args.sigma_max:g}",
            f"paths         {args.restoration_share:.0%} from noisy degraded latents, as an enlargement starts",
            f"validation    every {args.validation_steps} steps on {num_examples}"
            f" {'held-out' if is_held_out else 'TRAINING'} pictures"
            + ("" if is_held_out else " (--validation_data_dir names others)"),
            f"checkpoints   every {args.checkpointing_steps} steps in {args.output_dir}",
        ]
    )


def train(args, quantization_config: Any = None) -> bool:
    """Trains, from the arguments of `scripts/train_projector.py`; whether it came to its end."""
    accelerator = make_accelerator(args)
    trainer, loader = start_run(args, accelerator, quantization_config)
    source = loader.dataset.source
    validator = None
    if accelerator.is_main_process:
        held_out = args.validation_data_dir
        validator = Validator(trainer, source if held_out is None else ImageFolder(held_out, args.seed, None), args)
        print(describe_run(trainer, source, len(validator.examples), args), flush=True)
    accelerator.init_trackers(args.tracker_project_name, {name: str(value) for name, value in vars(args).items()})
    stop = StopSignal(args.max_train_seconds)
    with stop.installed():
        is_finished, validation = run_steps(trainer, loader, validator, stop, args)
    if is_finished and validator is not None:
        facts = training_facts(trainer, args, validation)

        def write(folder: Path) -> None:
            with trainer.ema_weights():
                save_result(folder, trainer.pipe, facts)

        replace_folder(Path(args.output_dir) / "final", write)
        print(f"done: pipe.load_dino_projector({str(Path(args.output_dir) / 'final')!r})")
    accelerator.end_training()
    return is_finished


def run_steps(
    trainer: ProjectorTrainer, loader: StatefulDataLoader, validator: Validator | None, stop: StopSignal, args
) -> tuple[bool, dict[str, float]]:
    """Trains until the last step or a signal; whether it came to the last step, and the last validation."""
    accelerator = trainer.accelerator
    validation: dict[str, float] = {}
    # Before the first step; or after the last, if a finished run is resumed.
    if validator is not None and trainer.step in (0, args.max_train_steps):
        validation = validator.validate()
    bar = tqdm(
        total=args.max_train_steps,
        initial=trainer.step,
        desc="training",
        disable=None if accelerator.is_main_process else True,
    )
    batches = iter(loader)
    while trainer.step < args.max_train_steps:
        values = trainer.train_step(list(islice(batches, args.gradient_accumulation_steps)))
        accelerator.log({f"train/{name}": value for name, value in values.items()}, step=trainer.step)
        bar.set_postfix(loss=f"{values['loss']:.4f}")
        bar.update()
        is_last, is_stopped = trainer.step == args.max_train_steps, stop.reached_any(accelerator)
        if is_last or is_stopped or trainer.step % args.checkpointing_steps == 0:
            save_run(trainer, loader, args)
        if validator is not None and not is_stopped and (is_last or trainer.step % args.validation_steps == 0):
            validation = validator.validate()
        if is_stopped and not is_last:
            accelerator.print(f"stopped at step {trainer.step}; --resume_from_checkpoint latest goes on from here")
            return False, validation
    bar.close()
    return True, validation
