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

"""What DINO changes where pictures with and without it are equally sharp, each from a start sigma of its own."""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from ..metrics import Interval
from .statistics import Comparison, compare, label_settings, summarize
from .sweep import Setting


# Means over the pictures of the gradient energy against the reference's.
TARGETS = (0.5, 0.65, 0.8)
COMPARED = ("feature_distance", "dss", "haarpsi", "psnr_y")


class EqualSharpness(NamedTuple):
    """What two settings have where they reach a mean sharpness; `comparisons` are empty where one does not."""

    setting: str
    other: str
    sharpness: float
    start_sigmas: dict[str, float]  # of those that reach it
    unreached: dict[str, str]  # why the others do not
    means: dict[str, dict[str, Interval]]
    comparisons: list[Comparison]


class Sweep:
    """One setting from several start sigmas: its pictures' metrics between these, linear in the sigma's logarithm."""

    def __init__(self, scores: dict[str, dict[str, dict[str, float]]], labels: dict[float, str]):
        self.sigmas = sorted(labels)
        self.scores = [scores[labels[sigma]] for sigma in self.sigmas]
        self.sharpness = [float(np.mean(list(score["sharpness"].values()))) for score in self.scores]

    def explain_unreached(self, sharpness: float) -> str:
        """Why the pictures never have this mean sharpness, or nothing."""
        if self.sharpness[0] > sharpness:
            return f"already {self.sharpness[0]:.3f} from the lowest start sigma, {self.sigmas[0]:g}"
        if max(self.sharpness) < sharpness:
            return f"at most {max(self.sharpness):.3f} up to start sigma {self.sigmas[-1]:g}"
        return ""

    def find_start_sigma(self, sharpness: float) -> float:
        """The lowest one with this mean sharpness, which is reached."""
        last = next(index for index, value in enumerate(self.sharpness) if value >= sharpness)
        first = max(0, last - 1)
        around = slice(first, last + 1)
        return math.exp(np.interp(sharpness, self.sharpness[around], np.log(self.sigmas[around])))

    def interpolate(self, metric: str, sigma: float) -> dict[str, float]:
        """By picture, of those that have the metric from all start sigmas."""
        columns = [score.get(metric, {}) for score in self.scores]
        return {
            image: float(np.interp(math.log(sigma), np.log(self.sigmas), [column[image] for column in columns]))
            for image in columns[0]
            if all(image in column for column in columns)
        }


def compare_sweeps(sweeps: dict[str, Sweep], sharpness: float) -> EqualSharpness:
    """Of two sweeps by their labels, the first against the second."""
    setting, other = sweeps
    reasons = {label: sweep.explain_unreached(sharpness) for label, sweep in sweeps.items()}
    reached = {label: sweep for label, sweep in sweeps.items() if not reasons[label]}
    sigmas = {label: sweep.find_start_sigma(sharpness) for label, sweep in reached.items()}
    scores = {
        label: {metric: values for metric in COMPARED if (values := sweep.interpolate(metric, sigmas[label]))}
        for label, sweep in reached.items()
    }
    unreached = {label: reason for label, reason in reasons.items() if reason}
    tests = [] if unreached else [compare(scores, setting, other, metric) for metric in COMPARED]
    comparisons = [test for test in tests if test is not None]
    return EqualSharpness(setting, other, sharpness, sigmas, unreached, summarize(scores), comparisons)


def compare_at_equal_sharpness(
    scores: dict[str, dict[str, dict[str, float]]], labels: dict[Setting, str]
) -> list[EqualSharpness]:
    """The greatest strength against none at each of `TARGETS`, for what was swept over start sigmas."""
    families: dict[Setting, dict[float, str]] = defaultdict(dict)
    for setting, label in labels.items():
        if setting.start_sigma is not None and setting.tokens == "own" and "sharpness" in scores[label]:
            families[setting._replace(start_sigma=None, seed=0)][setting.start_sigma] = label
    names = label_settings(list(families))
    greatest = max((family.strength for family in families), default=0.0)
    found = []
    for family, by_sigma in families.items():
        none = family._replace(strength=0.0)
        if family.strength == greatest > 0 and none in families and len(by_sigma) > 1:
            sweeps = {names[key]: Sweep(scores, families[key]) for key in (family, none)}
            found += [compare_sweeps(sweeps, target) for target in TARGETS]
    return found
