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

"""The folders that a training leaves and that others read: their names, and how one is replaced as a whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


PROJECTOR_FOLDER = "dino_projector"
ENCODER_FOLDER = "dino_encoder"
FACTS_NAME = "training.json"
INDEX_NAME = "model_index.json"
PIPELINE_NAME = "pipeline.py"  # where `custom_pipeline` looks for the code


def forget_origin(path: Path) -> None:
    """Takes the folder that a model was loaded from out of its config; it means nothing elsewhere."""
    config = json.loads(path.read_text())
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def add_pipeline_file(folder: Path, source: Path) -> None:
    """
    Copies the file `source` to `pipeline.py` beside `model_index.json`, which is to name it, so that
    `DiffusionPipeline.from_pretrained` finds the pipeline's class by itself.
    """
    shutil.copyfile(source, folder / PIPELINE_NAME)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["_class_name"] = [Path(PIPELINE_NAME).stem, "FluxDinoTilePipeline"]
    index.pop("_name_or_path", None)
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """
    Lets `write` fill a folder beside `target` and gives it the target's name; if that fails, `target` is as it was.

    The old folder is moved aside and deleted last. After a kill between the two renames the next call moves it back.
    """
    target = Path(os.path.realpath(target))
    new, old = (target.with_name(f".{target.name}.{ending}") for ending in ("tmp", "old"))

    def settle() -> None:
        if old.is_dir() and not target.exists():
            os.replace(old, target)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)

    settle()
    try:
        new.mkdir(parents=True)
        write(new)
        if target.is_dir():
            os.replace(target, old)
        os.replace(new, target)
    finally:
        settle()
