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

"""The model card of a projector: its metadata and the tables that its text is filled with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..training.validation import CONDITIONS


TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ["flux", "dino", "super-resolution", "upscaling", "image-to-image", "flux-dino-tile"]


class Measurement(NamedTuple):
    """
    A row of the evaluation: a mean with its interval of 95 %, or a number without; `setting` is the way of enlarging,
    where several are compared.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    setting: str = ""

    @property
    def interval(self) -> str:
        return "" if self.low is None else f"{self.low:.4g} to {self.high:.4g}"

    @property
    def title(self) -> str:
        return f"{self.setting}: {self.name}" if self.setting else self.name

    @property
    def shows_no_difference(self) -> bool:
        """Whether it is a difference, `a minus b` by its name, and its interval holds 0."""
        if self.low is None or self.high is None:
            return False
        return " minus " in self.name and self.low <= 0 <= self.high

    @property
    def metric(self) -> str:
        return self.name.replace(" ", "_")


def read_report(path: Path) -> list[Measurement]:
    """
    The numbers of a report, a JSON object: `[mean, low, high]` is a mean with its interval, a number stands alone, and
    all else (lists of other lengths, truth values) is left out. Of `results.json` of a comparison, its `means`.
    """
    try:
        numbers = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(numbers, dict):
        raise ValueError(f"{path} must be a JSON object of names and numbers")
    settings = numbers["means"] if isinstance(numbers.get("means"), dict) else {"": numbers}
    rows = [row for setting, values in settings.items() for row in read_numbers(values, setting)]
    if not rows:
        raise ValueError(f"{path} holds no numbers: names with [mean, low, high] or a number are needed")
    return rows


def read_numbers(numbers: dict[str, Any], setting: str) -> list[Measurement]:
    rows = []
    for name, value in numbers.items():
        mean, low, high = value if isinstance(value, list) and len(value) == 3 else [value, None, None]
        if isinstance(mean, (int, float)) and not isinstance(mean, bool):
            rows.append(Measurement(name.replace("_", " "), mean, low, high, setting))
    return rows


def evaluation_results(rows: Sequence[Measurement], data: str) -> list[EvalResult]:
    """For the card's `model-index`; interval and setting go into the metric's arguments."""
    results = []
    for row in rows:
        arguments: dict[str, Any] = {} if row.low is None else {"interval_95": [row.low, row.high]}
        arguments |= {"setting": row.setting} if row.setting else {}
        results.append(
            EvalResult(
                task_type="image-to-image",
                task_name="Super-resolution",
                dataset_type=data,
                dataset_name=data,
                metric_type=row.metric,
                metric_name=row.title,
                metric_value=row.value,
                metric_args=arguments or None,
            )
        )
    return results


def validation_table(validation: dict[str, float]) -> list[tuple[str, float, float | None]]:
    """Rows of name, mean loss, and percent above the loss with tokens, of a training's last validation."""
    if not validation:
        return []
    return [
        (name.replace("_", " "), validation[f"validation/{name}"], validation.get(f"validation/gap_{name}_percent"))
        for name in CONDITIONS
    ]


def make_card(repo_id: str, context: dict[str, Any]) -> str:
    """
    The text of `README.md`.

    Args:
        repo_id (`str`): Repository that the card is for.
        context (`dict`): From [`~dino_projector.publishing.assemble.card_context`].
    """
    licence, rows = context["licence"], context["evaluation"]
    data = ModelCardData(
        base_model=context["base_model"] and [context["base_model"]],
        base_model_relation=context["base_model"] and "adapter",
        datasets=context["datasets"] or None,
        library_name="diffusers",
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        pipeline_tag="image-to-image",
        tags=TAGS,
        metrics=list(dict.fromkeys(row.metric for row in rows)) or None,
        model_name=repo_id.split("/")[1] if rows else None,
        eval_results=evaluation_results(rows, context["evaluation_data"]) if rows else None,
        ignore_metadata_errors=False,
    )
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), repo_id=repo_id, **context))
