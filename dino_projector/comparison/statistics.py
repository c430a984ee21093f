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

"""Means over pictures with their intervals, and paired tests of one setting against another."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..metrics import Interval, bootstrap_mean
from .measure import METRICS
from .sweep import Setting


NUM_PERMUTATIONS = 10_000
SIGNIFICANCE = 0.05
FIELD_LABELS = {
    "model": "model",
    "projector": "projector",
    "start_sigma": "start sigma",
    "steps": "steps",
    "tile_size": "tile",
    "tile_overlap": "overlap",
    "color_fix": "colour fix",
    "vae_residual": "VAE residual",
    "window": "window",
}


class Comparison(NamedTuple):
    """A paired test: by how much `setting` has more of a metric than `other` on the same pictures."""

    setting: str
    other: str
    metric: str
    difference: Interval
    p_value: float
    num_images: int
    verdict: str  # "better", "worse" or "not shown"


def label_settings(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Short names: the method, the strength and what else differs between the settings, without the seed."""
    flux = [setting for setting in settings if setting.method == "flux"]
    varying = [name for name in FIELD_LABELS if len({getattr(setting, name) for setting in flux}) > 1]
    labels = {}
    for setting in settings:
        if setting.method != "flux":
            labels[setting] = {"realesrgan": "Real-ESRGAN"}.get(setting.method, setting.method)
            continue
        text = f"DINO {setting.strength:g}" if setting.strength > 0 else "FLUX without DINO"
        text += ", another picture's" if setting.tokens == "other" else ""
        for name in varying:
            value = getattr(setting, name)
            text += f", {FIELD_LABELS[name]} {'default' if value is None else value}"
        labels[setting] = text
    return labels


def group_scores(records: Iterable[dict], labels: dict[Setting, str]) -> dict[str, dict[str, dict[str, float]]]:
    """By label and metric the value of each picture, the mean over its seeds."""
    values: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        label = labels[Setting(**record["setting"])]
        for metric, value in record["scores"].items():
            values[label][metric][record["image"]].append(value)
    return {
        label: {
            metric: {image: float(np.mean(seeds)) for image, seeds in metrics[metric].items()}
            for metric in METRICS
            if metric in metrics
        }
        for label, metrics in values.items()
    }


def summarize(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Interval]]:
    """By label and metric the mean over the pictures, each of which counts once."""
    return {
        label: {metric: bootstrap_mean(list(images.values())) for metric, images in metrics.items()}
        for label, metrics in scores.items()
    }


def sign_flip_test(differences: Sequence[float] | np.ndarray) -> float:
    """
    Two-sided p-value of the mean difference: the share of sign patterns whose mean is at least as far from 0; of all
    patterns up to 13 differences, of `NUM_PERMUTATIONS` drawn ones beyond.
    """
    from scipy.stats import permutation_test

    samples = (np.asarray(differences, dtype=np.float64),)
    options = {"permutation_type": "samples", "n_resamples": NUM_PERMUTATIONS, "rng": np.random.default_rng(0)}
    return float(permutation_test(samples, np.mean, vectorized=True, **options).pvalue)


def penalty(metric: str, value: float) -> float:
    """The value turned so that less is better."""
    better = METRICS[metric].better
    return abs(value - 1) if better == "1" else value if better == "lower" else -value


def compare(
    scores: dict[str, dict[str, dict[str, float]]], setting: str, other: str, metric: str
) -> Comparison | None:
    """The paired test on the pictures that both have; `None` for less than two, or where the metric is missing."""
    first, second = (scores[label].get(metric, {}) for label in (setting, other))
    images = [image for image in first if image in second]
    differences = np.array([first[image] - second[image] for image in images])
    if len(images) < 2 or not np.isfinite(differences).all():
        return None
    gains = np.array([penalty(metric, second[image]) - penalty(metric, first[image]) for image in images])
    gain = bootstrap_mean(gains)
    p_value = sign_flip_test(gains)
    # Both, for the interval of a few pictures is too narrow.
    is_shown = p_value < SIGNIFICANCE and not gain.low <= 0 <= gain.high
    verdict = "not shown" if not is_shown else "better" if gain.mean > 0 else "worse"
    return Comparison(setting, other, metric, bootstrap_mean(differences), p_value, len(images), verdict)


def choose_pairs(labels: dict[Setting, str]) -> list[tuple[str, str]]:
    """Each setting of FLUX against no DINO, another picture's tokens, the ablations' base and the baselines."""
    plain = Setting("flux")._asdict()
    ablated = ("color_fix", "vae_residual", "window")
    baselines = [setting for setting in labels if setting.method != "flux"]
    overlaps = [setting.tile_overlap for setting in labels]
    pairs = []
    for setting in labels:
        if setting.method != "flux":
            continue
        rivals = [setting._replace(**{name: plain[name] for name in ablated}, tile_overlap=overlaps[0])]
        if setting.strength > 0 and setting.tokens == "own":
            rivals += [setting._replace(strength=0.0), setting._replace(tokens="other")]
        pairs += [(labels[setting], labels[rival]) for rival in [*rivals, *baselines] if rival in labels]
    return [(setting, other) for setting, other in dict.fromkeys(pairs) if setting != other]


def compare_all(scores: dict, labels: dict[Setting, str]) -> list[Comparison]:
    found = [
        compare(scores, setting, other, metric)
        for setting, other in choose_pairs(labels)
        for metric in METRICS
        if metric != "seconds"
    ]
    return [comparison for comparison in found if comparison is not None]
