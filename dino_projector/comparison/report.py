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

"""What a comparison leaves behind: a page that needs nothing else, sheets of pictures, and tables."""

import base64
import csv
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .equal_sharpness import EqualSharpness, compare_at_equal_sharpness
from .measure import METRICS
from .statistics import Comparison, compare_all, group_scores, label_settings, summarize
from .sweep import PICTURE_NAME, Sample, Setting, result_folder


TEMPLATE = Path(__file__).with_name("report.html")
PACKAGES = ("flux-dino-tile", "torch", "diffusers", "transformers", "torchmetrics", "pillow")
# The first of these that was measured decides what the page says first.
KEY_METRICS = ("lpips", "dists", "feature_distance", "haarpsi", "psnr_y", "input_distance", "low_res_psnr")
WEBP_QUALITY = 88
SHEET_DETAIL = 256  # px, side of a sheet's pictures
SHEET_CAPTION = 22  # px
SHEET_COLUMNS = 6
EQUAL_SHARPNESS_HEAD = (
    *("setting", "against", "sharpness", "what", "of the setting", "of the other"),
    *("difference", "p", "pictures", ""),
)


def encode_picture(picture: Image.Image, max_side: int) -> str:
    """A data URI of the picture, shrunk where a side is longer than `max_side`."""
    picture = picture.copy()
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def explain_missing(means: dict, samples: Sequence[Sample], judges_missing: dict[str, str], has_model: bool) -> dict:
    """Why a metric is in no table, by its label."""
    has_reference = samples[0].reference is not None
    reasons = {}
    for name, metric in METRICS.items():
        if any(name in metrics for metrics in means.values()):
            continue
        if not has_reference and "reference" in metric.meaning:
            reasons[metric.label] = "the pictures have no reference"
        elif name == "input_distance" or name in judges_missing:
            reasons[metric.label] = judges_missing["feature_distance" if name == "input_distance" else name]
        elif not has_model:
            reasons[metric.label] = "needs a model and its tiles"
        elif "similarity" in metric.label:
            reasons[metric.label] = "the model has no DINO"
        else:
            reasons[metric.label] = "every picture is one tile"
    return reasons


def open_result(output: Path, sample: Sample, setting: Setting) -> Image.Image:
    return Image.open(result_folder(output, sample, setting) / PICTURE_NAME).convert("RGB")


class Results:
    """Records of a sweep with their labels, of which the first seed's are shown."""

    def __init__(self, samples: Sequence[Sample], settings: Sequence[Setting], records: Sequence[dict], output: Path):
        self.samples, self.records, self.output = samples, records, output
        self.labels = label_settings(settings)
        self.shown: dict[str, Setting] = {}
        for setting, label in self.labels.items():
            self.shown.setdefault(label, setting)
        self.scores = group_scores(records, self.labels)
        self.means = summarize(self.scores)
        self.comparisons = compare_all(self.scores, self.labels)
        self.equal_sharpness = compare_at_equal_sharpness(self.scores, self.labels)
        self.by_place = {(record["image"], Setting(**record["setting"])): record for record in records}
        self.metrics = [name for name in METRICS if any(name in means for means in self.means.values())]
        self.key_metric = next(name for name in KEY_METRICS if name in self.metrics)

    def findings(self) -> list[Comparison]:
        """Tests of the key metric: FLUX against bicubic, each strength against none, and the greatest against all."""
        flux = [setting for setting in self.shown.values() if setting.method == "flux"]
        base = flux[0] if flux else None
        plain = {
            self.labels[setting]: setting
            for setting in flux
            if base is not None and setting._replace(strength=base.strength) == base
        }
        greatest = max(plain, key=lambda label: plain[label].strength, default=None)
        none = next((label for label, setting in plain.items() if setting.strength == 0), None)
        return [
            item
            for item in self.comparisons
            if item.metric == self.key_metric
            and (
                item.setting == greatest
                or (item.setting in plain and item.other == none)
                or (item.setting, item.other) == (none, "bicubic")
            )
        ]

    def equal_sharpness_rows(self) -> list[list[str]]:
        """Cells of a table below `EQUAL_SHARPNESS_HEAD`."""
        return [row for found in self.equal_sharpness for row in format_equal_sharpness(found)]

    def views(self, sample: Sample, max_side: int) -> list[dict[str, Any]]:
        """What the page can show of a picture."""
        originals = {"input": sample.small, "reference": sample.reference}
        views: list[dict[str, Any]] = [
            {"name": name, "source": encode_picture(picture, max_side), "group": None, "is_input": name == "input"}
            for name, picture in originals.items()
            if picture is not None
        ]
        for label, setting in self.shown.items():
            record = self.by_place[sample.name, setting]
            is_family = setting.method == "flux" and setting.tokens == "own"
            group = json.dumps(setting._replace(strength=0.0)) if is_family else None
            views.append(
                {
                    "name": label,
                    "source": encode_picture(open_result(self.output, sample, setting), max_side),
                    "group": group,
                    "strength": setting.strength,
                    "scores": record["scores"],
                    "tiles": record["tiles"],
                }
            )
        return views

    def curve(self) -> list[dict[str, Any]]:
        """The settings of the first model that differ in strength and tokens only."""
        flux = [setting for setting in self.shown.values() if setting.method == "flux"]
        return [
            {"label": self.labels[setting], "strength": setting.strength, "tokens": setting.tokens}
            for setting in flux
            if setting._replace(strength=flux[0].strength, tokens=flux[0].tokens) == flux[0]
        ]


def page_data(
    results: Results,
    judges_missing: dict[str, str],
    settings: dict[str, str],
    suspect_threshold: float,
    max_pictures: int,
    max_side: int,
) -> dict[str, Any]:
    """
    All that the page shows.

    Args:
        judges_missing (`dict[str, str]`): Why distances are missing, from [`~dino_projector.metrics.load_judges`].
        settings (`dict[str, str]`): What the page says about how it was made.
        suspect_threshold (`float`): DINO similarity below which tiles are outlined at first.
        max_pictures (`int`): Pictures in the page; the numbers are of all.
        max_side (`int`): Pixels of a side that the page shows at most.
    """
    samples, shown = results.samples, results.shown
    baselines = [label for label, setting in shown.items() if setting.method != "flux"]
    has_model = any(setting.model is not None for setting in shown.values())
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    made_of = "shrunk from references" if samples[0].reference is not None else "as they are, without references"
    return {
        "subtitle": f"{len(samples)} pictures, {made_of}; {len(shown)} ways to enlarge them. {now}",
        "metrics": {name: METRICS[name]._asdict() for name in results.metrics},
        "key_metric": results.key_metric,
        "missing": explain_missing(results.means, samples, judges_missing, has_model),
        "labels": list(shown),
        "baselines": baselines,
        "means": results.means,
        "comparisons": [item._asdict() for item in results.comparisons],
        "findings": [item._asdict() for item in results.findings()],
        "equal_sharpness": {"head": EQUAL_SHARPNESS_HEAD, "rows": results.equal_sharpness_rows()},
        "curve": results.curve(),
        "suspect_threshold": suspect_threshold,
        "settings": {**settings, **{f"version of {name}": text for name, text in find_versions().items()}},
        "pictures": [
            {
                "name": sample.name,
                "width": sample.size[0],
                "height": sample.size[1],
                "views": results.views(sample, max_side),
            }
            for sample in samples[:max_pictures]
        ],
    }


def write_page(data: dict[str, Any], path: Path) -> None:
    # "</script>" in a name would end the script that holds the data.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text), encoding="utf-8")


# ---- Files ---------------------------------------------------------------------------------------------------------


def make_sheet(results: Results, sample: Sample) -> Image.Image:
    """The middle of a picture, enlarged in every way, with captions."""
    blocks = sample.small.resize(sample.size, Image.Resampling.NEAREST)
    pictures = [("input", blocks)]
    if sample.reference is not None:
        pictures.append(("reference", sample.reference))
    pictures += [(label, open_result(results.output, sample, setting)) for label, setting in results.shown.items()]
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * SHEET_DETAIL, rows * (SHEET_DETAIL + SHEET_CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (caption, picture) in enumerate(pictures):
        side = min(SHEET_DETAIL, *picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        x, y = index % columns * SHEET_DETAIL, index // columns * (SHEET_DETAIL + SHEET_CAPTION)
        sheet.paste(picture.crop((left, top, left + side, top + side)), (x, y + SHEET_CAPTION))
        while pen.textlength(caption, font) > SHEET_DETAIL - 8:
            caption = f"{caption.rstrip('…')[:-1]}…"
        pen.text((x + 4, y + 3), caption, "black", font)
    return sheet


def write_csv(results: Results, path: Path) -> None:
    """A row for each picture and setting."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", *Setting._fields, *results.metrics])
        for record in results.records:
            setting = Setting(**record["setting"])
            scores = [record["scores"].get(name, "") for name in results.metrics]
            writer.writerow([record["image"], results.labels[setting], *setting, *scores])


def format_interval(metric: str, mean: float, low: float, high: float) -> str:
    digits = METRICS[metric].digits
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def format_equal_sharpness(found: EqualSharpness) -> list[list[str]]:
    """A row with the start sigmas, or why there is none, and one for each test."""
    labels = (found.setting, found.other)
    place = [*labels, f"{found.sharpness:g}"]
    sigmas = [
        f"{found.start_sigmas[label]:.3g}" if label in found.start_sigmas else f"not reached: {found.unreached[label]}"
        for label in labels
    ]
    rows = [[*place, "start sigma", *sigmas, "", "", "", ""]]
    for test in found.comparisons:
        means = [format_interval(test.metric, *found.means[label][test.metric]) for label in labels]
        difference = format_interval(test.metric, *test.difference)
        cells = [*means, difference, f"{test.p_value:.3g}", str(test.num_images), test.verdict]
        rows.append([*place, METRICS[test.metric].label, *cells])
    return rows


def format_tables(results: Results, settings: dict[str, str], missing: dict[str, str]) -> str:
    """Markdown: means with intervals, and the paired tests of the key metric."""
    names = results.metrics
    lines = [f"- {name}: `{text}`" for name, text in settings.items()]
    lines += [f"- {name}: not measured, {reason}" for name, reason in missing.items()]
    lines += ["", "| | " + " | ".join(METRICS[name].label for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, means in results.means.items():
        cells = [format_interval(name, *means[name]) if name in means else "" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", f"{METRICS[results.key_metric].label}, paired by picture:", ""]
    lines += ["| setting | against | difference | p | pictures | |", "|---|---|---|---|---|---|"]
    for item in results.comparisons:
        if item.metric == results.key_metric:
            difference = format_interval(item.metric, *item.difference)
            cells = [item.setting, item.other, difference, f"{item.p_value:.3g}", str(item.num_images), item.verdict]
            lines.append("| " + " | ".join(cells) + " |")
    if results.equal_sharpness:
        lines += ["", "At equal sharpness, each from the start sigma that reaches it in the mean:", ""]
        lines += ["| " + " | ".join(EQUAL_SHARPNESS_HEAD) + " |", "|---" * len(EQUAL_SHARPNESS_HEAD) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in results.equal_sharpness_rows()]
    return "\n".join(lines) + "\n"


def write_report(results: Results, data: dict[str, Any]) -> Path:
    """
    Writes `index.html`, `results.json`, `results.csv`, `tables.md` and `sheets/` and returns the page's path.

    Args:
        data (`dict`): From [`page_data`].
    """
    output = results.output
    write_page(data, output / "index.html")
    kept = {name: data[name] for name in ("settings", "metrics", "missing", "means", "comparisons")}
    equal_sharpness = [
        {**found._asdict(), "comparisons": [test._asdict() for test in found.comparisons]}
        for found in results.equal_sharpness
    ]
    internal = ("key", "measured_by")
    records = [{name: value for name, value in record.items() if name not in internal} for record in results.records]
    numbers = {**kept, "equal_sharpness": equal_sharpness, "records": records}
    (output / "results.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    write_csv(results, output / "results.csv")
    (output / "tables.md").write_text(format_tables(results, data["settings"], data["missing"]), encoding="utf-8")
    for sample in results.samples:
        sheet = output / "sheets" / f"{sample.name}.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        make_sheet(results, sample).save(sheet)
    return output / "index.html"
