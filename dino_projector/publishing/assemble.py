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

"""Puts the files of a repository together in a folder."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download

import pipeline_flux_dino_tile
from pipeline_flux_dino_tile import DinoProjector

from ..folders import (
    ENCODER_FOLDER,
    FACTS_NAME,
    INDEX_NAME,
    PIPELINE_NAME,
    PROJECTOR_FOLDER,
    add_pipeline_file,
    forget_origin,
)
from .card import make_card, read_report, validation_table
from .licences import APACHE, DINOV3, FLUX_DEV, FLUX_DEV_NOTICE, Licence, choose_licence, model_licence


CARD_NAME = "README.md"
LICENCE_NAME = "LICENSE.md"
NOTICE_NAME = "NOTICE"
SAMPLES_FOLDER = "samples"
SAMPLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Configs, weights, and the vocabularies of tokenizers.
COPIED_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Contents(NamedTuple):
    """
    What a repository is made of, beside the folder with the projector.

    Args:
        base_model (`str`, *optional*): Hub name of the FLUX.1 that the projector was trained with; by default what
            `training.json` says.
        licence (`str`, *optional*): The Hub's name of the licence, where the base model leaves the choice.
        datasets (`Sequence[str]`): Hub names of the data sets of the training.
        report (`Path`, *optional*): Numbers of an evaluation, see [`~dino_projector.publishing.card.read_report`].
        report_data (`str`, *optional*): On which pictures the report's numbers were measured.
        samples (`Path`, *optional*): Folder of pictures to show.
        credits (`Path`, *optional*): Markdown with authors and licences of what it was trained on.
        gpu_hours (`float`, *optional*): What the training took.
        gpu (`str`, *optional*): On which hardware.
    """

    base_model: str | None = None
    licence: str | None = None
    datasets: Sequence[str] = ()
    report: Path | None = None
    report_data: str | None = None
    samples: Path | None = None
    credits: Path | None = None
    gpu_hours: float | None = None
    gpu: str | None = None


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a whole pipeline, not only a projector for one."""
    return (folder / INDEX_NAME).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """What the training wrote down, see `training_facts`; empty if there is nothing."""
    path = folder / FACTS_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def find_base_model(source: Path, contents: Contents, facts: dict) -> str | None:
    """The base model's name on the Hub; `None` for a complete pipeline."""
    name = contents.base_model or facts.get("options", {}).get("pretrained_model_name_or_path")
    if name is not None and "/" in name:
        return name
    if is_complete(source):
        return None
    raise ValueError(
        f"{source} does not say which FLUX.1 it was trained with (its {FACTS_NAME} names {name}): give --base-model,"
        " such as black-forest-labs/FLUX.1-schnell"
    )


def dino_name(source: Path, config: dict) -> str:
    """The encoder's name on the Hub, or its architecture where it lies in the repository."""
    if config["dino_model"] is not None:
        return config["dino_model"]
    return json.loads((source / ENCODER_FOLDER / "config.json").read_text())["model_type"]


def dino_licence(name: str) -> Licence | None:
    return DINOV3 if name.startswith("dinov3") else model_licence(name)


def find_licence(base_model: str | None, dino: str, facts: dict, given: str | None) -> Licence:
    """
    The licence of the weights.

    Raises:
        `ValueError`: If it does not follow from the models and none is given, or if another one is given than follows.
    """
    redux = facts.get("options", {}).get("init_from_redux")
    names = [name for name in (base_model, redux) if name is not None]
    # The encoder of a complete pipeline, if it is not DINOv3, is of the pipeline's own licence.
    encoder = dino_licence(dino) if "/" in dino or dino.startswith("dinov3") else APACHE
    # A pipeline of its own is under what its maker chooses.
    follows = choose_licence([*map(model_licence, names), encoder] if names else [None, encoder])
    if follows in (FLUX_DEV, DINOV3):
        if given not in (None, follows.name):
            raise ValueError(f"--license {given}: the models that it was trained with ask for {follows.name}")
        return follows
    if given is not None:
        return Licence(given, given)
    if follows is None:
        raise ValueError(f"the licence of {base_model or 'a pipeline of its own'} is not known here: give --license")
    return follows


def check_source(source: Path) -> None:
    """Raises a `ValueError` unless the folder holds a projector in safetensors and nothing pickled."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (source / PROJECTOR_FOLDER / name).is_file():
            raise ValueError(
                f"{source} has no {PROJECTOR_FOLDER}/{name}: give the folder `final` of a finished training"
            )
    pickled = [path for path in source.rglob("*") if path.suffix in PICKLED_SUFFIXES]
    if pickled:
        raise ValueError(f"{pickled[0]} is pickled, and only safetensors are published: remove or convert it")


def copy_file(source: Path, target: Path) -> None:
    """Copies a file; a config without the folder that its model was loaded from."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if target.name == "config.json":
        forget_origin(target)


def copy_models(source: Path, folder: Path) -> None:
    """The models' folders and the files beside them, without what else lies there."""
    parts = [PROJECTOR_FOLDER, ENCODER_FOLDER]
    if is_complete(source):
        shutil.copyfile(source / INDEX_NAME, folder / INDEX_NAME)
        add_pipeline_file(folder, Path(pipeline_flux_dino_tile.__file__))
        index = json.loads((folder / INDEX_NAME).read_text())
        parts += [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    else:
        shutil.copyfile(pipeline_flux_dino_tile.__file__, folder / PIPELINE_NAME)
    for part in dict.fromkeys(parts):
        for path in sorted((source / part).rglob("*")):
            if path.suffix in COPIED_SUFFIXES:
                copy_file(path, folder / path.relative_to(source))
    if (source / FACTS_NAME).is_file():
        copy_file(source / FACTS_NAME, folder / FACTS_NAME)


def fetch_licence(models: Sequence[str | None], folder: Path) -> None:
    """A copy of FLUX.1-dev's licence, which it asks for, from the repository of the model that it holds for."""
    name = next(name for name in models if name is not None and model_licence(name) == FLUX_DEV)
    shutil.copyfile(hf_hub_download(name, LICENCE_NAME), folder / LICENCE_NAME)
    (folder / NOTICE_NAME).write_text(FLUX_DEV_NOTICE)


def copy_samples(source: Path, folder: Path) -> list[str]:
    """Copies the pictures; returns their names."""
    paths = sorted(path for path in source.iterdir() if path.suffix.lower() in SAMPLE_SUFFIXES)
    if not paths:
        raise ValueError(f"{source} holds no pictures ({', '.join(SAMPLE_SUFFIXES)})")
    for path in paths:
        copy_file(path, folder / SAMPLES_FOLDER / path.name)
    return [path.name for path in paths]


def card_context(source: Path, contents: Contents) -> dict[str, Any]:
    """What the model card tells, without the samples."""
    facts, config = read_facts(source), DinoProjector.load_config(source / PROJECTOR_FOLDER)
    base_model = find_base_model(source, contents, facts)
    dino = dino_name(source, config)
    options = facts.get("options", {})
    datasets = list(contents.datasets)
    if not datasets and "/" in (options.get("dataset_name") or ""):
        datasets = [options["dataset_name"]]
    return {
        "is_complete": is_complete(source),
        "base_model": base_model,
        "base_licence": base_model and model_licence(base_model),
        "licence": find_licence(base_model, dino, facts, contents.licence),
        "notice": FLUX_DEV_NOTICE,
        "dino": dino,
        "dino_licence": dino_licence(dino),
        "config": config,
        "facts": facts,
        "options": options,
        "datasets": datasets,
        "evaluation": read_report(contents.report) if contents.report else [],
        "evaluation_data": contents.report_data,
        "validation": validation_table(facts.get("validation", {})),
        "credits": contents.credits and contents.credits.read_text(encoding="utf-8-sig").strip(),
        "gpu_hours": contents.gpu_hours,
        "gpu": contents.gpu,
        "samples": [],
    }


def assemble(source: Path, folder: Path, repo_id: str, contents: Contents) -> str | None:
    """
    Writes all files of the repository; returns the base model's name, if there is one.

    Args:
        source (`Path`): `final` of a training, or a whole pipeline with `dino_projector/`.
        folder (`Path`): Empty folder to write to.
        repo_id (`str`): The repository's name, for its model card.
        contents ([`Contents`]): What else to write.

    Raises:
        `ValueError`: If something is missing, or the licence is not clear.
        `OSError`: If a file cannot be read or fetched.
    """
    check_source(source)
    context = card_context(source, contents)
    copy_models(source, folder)
    if context["licence"] == FLUX_DEV:
        fetch_licence([context["base_model"], context["options"].get("init_from_redux")], folder)
    if contents.samples is not None:
        context["samples"] = copy_samples(contents.samples, folder)
    (folder / CARD_NAME).write_text(make_card(repo_id, context), encoding="utf-8")
    return context["base_model"]


def list_tree(folder: Path) -> list[str]:
    """A line for each file: its size and path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.stat().st_size:>13,}  {path.relative_to(folder).as_posix()}" for path in paths]
