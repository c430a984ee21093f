"""The script `scripts/benchmark.py`: its arithmetic on hand-made numbers, and a run of the small preset."""

import json
import math
from itertools import pairwise

import benchmark
import pytest
import torch
import torch.nn.functional as F

from flux_dino_tile.plans import transformer_flops
from pipeline_flux_dino_tile import FluxDinoTilePipeline


SMALL = benchmark.PRESETS["small"]
CPU = torch.device("cpu")
SIZE = 128


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The JSON and the Markdown of one run."""
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["--preset", "small", "--device", "cpu", "--size", str(SIZE), "--steps", "2", "--repeats", "1"]
    files = ["--json", str(folder / "report.json"), "--markdown", str(folder / "report.md")]
    assert benchmark.main([*arguments, "--dino-strength", "0.5", "--second-size", "192", *files]) == 0
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


@pytest.fixture
def pipe():
    return build_pipeline(SMALL, CPU)


def build_pipeline(preset, device):
    return benchmark.build_pipeline(FluxDinoTilePipeline, preset, device, torch.float32)


def skeleton_and_plan(preset, size):
    pipe = build_pipeline(preset, torch.device("meta"))
    return pipe, pipe.plan_tiles(size, size, preset.tile_size, preset.tile_overlap)


def usage_error(capsys, *arguments):
    assert benchmark.main(["--device", "cpu", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("benchmark.py: error: ") and errors.count("\n") == 1
    return errors


# ---- A run ---------------------------------------------------------------------------------------------------------


def test_run_records_machine_and_settings(outcome):
    report, _ = outcome
    assert report["machine"]["torch"] == torch.__version__
    assert report["settings"]["size"] == SIZE and report["settings"]["input_size"] == SIZE // 4
    assert report["settings"]["variants"] == ["eager"]
    assert report["ceiling_tflops"] > 0


def test_run_measures_every_step_condition(outcome):
    report, _ = outcome
    _, plan = skeleton_and_plan(SMALL, SIZE)
    conditions = [
        (step["num_text_tokens"], step["num_dino_tokens"], step["dino_strength"]) for step in report["steps"]
    ]
    assert conditions == [(32, 16, 0.5), (32, 0, 0), (32, 16, 1), (16, 16, 1), (64, 16, 1)]
    for step in report["steps"]:
        num_tokens = step["num_text_tokens"] + step["num_dino_tokens"] + plan.tokens_per_tile
        assert step["num_tokens"] == num_tokens
        flops = transformer_flops(num_tokens, inner_dim=128, num_layers=4)
        assert step["tflops"] == pytest.approx(flops / (step["ms"] / 1e3) / 1e12)
        assert step["share_of_ceiling"] == pytest.approx(step["tflops"] / report["ceiling_tflops"])
    ratio = report["steps"][2]["ms"] / report["steps"][1]["ms"]
    assert report["steps"][2]["step_to_no_dino"] == pytest.approx(ratio)


def test_tiles_of_every_side_have_the_default_tokens(outcome):
    sides = outcome[0]["tile_sides"]
    expected = [(32, 32 + 16 + 8 * 8), (64, 32 + 16 + 16 * 16)]
    assert [(record["tile_side"], record["num_tokens"]) for record in sides] == expected


def test_shares_of_the_phases_sum_to_one(outcome):
    image = outcome[0]["images"][1]
    assert [phase["phase"] for phase in image["phases"]] == [*benchmark.PHASE_METHODS, "host and rest"]
    assert all(phase["seconds"] > 0 for phase in image["phases"])
    assert math.fsum(phase["share"] for phase in image["phases"]) == pytest.approx(1)
    assert math.fsum(phase["seconds"] for phase in image["phases"]) == pytest.approx(image["seconds"])


def test_work_of_the_phases_counts_all_tiles_and_steps(outcome):
    report, _ = outcome
    pipe, plan = skeleton_and_plan(SMALL, SIZE)
    phases = {phase["phase"]: phase for phase in report["images"][1]["phases"]}
    assert report["images"][1]["num_tiles"] == len(plan) > 1
    flops = transformer_flops(report["steps"][0]["num_tokens"], inner_dim=128, num_layers=4)
    assert phases["denoise"]["tflop"] == pytest.approx(len(plan) * 2 * flops / 1e12)
    pixels = torch.empty(1, 3, 68, 68, device="meta")
    latents = torch.empty(1, 4, 34, 34, device="meta")
    encode_flops = benchmark.count_flops(lambda: pipe.vae.encode(pixels))
    decode_flops = benchmark.count_flops(lambda: pipe.vae.decode(latents))
    assert phases["VAE encode"]["tflop"] == pytest.approx(len(plan) * encode_flops / 1e12)
    assert phases["VAE decode"]["tflop"] == pytest.approx(len(plan) * decode_flops / 1e12)
    assert phases["DINO"]["tflop"] is None and phases["host and rest"]["tflops"] is None


def test_stock_loop_is_compared_with_as_many_text_tokens(outcome):
    report, _ = outcome
    images = report["images"]
    found = [(image["variant"], image["size"], image["num_text_tokens"]) for image in images]
    stock, eager, double = (benchmark.STOCK, SIZE, 32), ("eager", SIZE, 32), (benchmark.STOCK, SIZE, 64)
    assert found == [stock, eager, ("eager", 192, 32), double, ("eager", SIZE, 64)]
    assert images[0]["num_tiles"] == report["settings"]["stock_tiles"] > 1
    assert images[1]["stock_to_run"] == pytest.approx(images[0]["seconds"] / images[1]["seconds"])
    assert images[2]["stock_to_run"] is None
    assert images[4]["stock_to_run"] == pytest.approx(images[3]["seconds"] / images[4]["seconds"])


def test_markdown_has_every_table(outcome):
    report, text = outcome
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Whole image",
        "## Phases of the whole image: eager, 128 px, 32 text tokens",
        "## Phases of the whole image: eager, 192 px, 32 text tokens",
        "## Phases of the whole image: eager, 128 px, 64 text tokens",
        "## One transformer step for one tile",
        "## VAE of the whole image",
        "## Tiles of several sides: eager",
    ]
    assert report["machine"]["date"] in text and f"diffusers {report['machine']['diffusers']}" in text


def test_vae_is_compared_with_tiling_on_the_same_picture(outcome):
    report, _ = outcome
    tiling, eager = benchmark.vae_records(report)
    phases = {phase["phase"]: phase["seconds"] for phase in report["images"][1]["phases"]}
    assert (eager["encode_seconds"], eager["decode_seconds"]) == (phases["VAE encode"], phases["VAE decode"])
    seconds = [record["encode_seconds"] + record["decode_seconds"] for record in (tiling, eager)]
    assert tiling["tiling_to_run"] == 1 and eager["tiling_to_run"] == pytest.approx(seconds[0] / seconds[1])


def test_error_leaves_what_was_measured(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(benchmark, "measure_step", fail)
    files = ["--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "report.md")]
    arguments = ["--preset", "small", "--device", "cpu", "--size", "64", "--steps", "1", "--repeats", "1"]
    assert benchmark.main([*arguments, *files]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "benchmark.py: error: out of luck"
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["images"]) == 2 and report["steps"] == []
    assert "| eager " in (tmp_path / "report.md").read_text()


def test_what_does_not_fit_into_the_budget_is_skipped(tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--preset", "small", "--device", "cpu", "--variants", "eager,compiled,caches", "--budget", "0"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["images"] == report["steps"] == report["caches"] == []
    output, errors = capsys.readouterr()
    assert report["skipped"][0] == "stock loop: 32 text tokens: takes about 0 s, 0 s are left"
    for line in report["skipped"]:
        assert f"- skipped: {line}" in output and f"benchmark.py: skipped: {line}" in errors


def test_tiling_is_measured_on_a_vae_that_is_not_compiled(monkeypatch):
    args = benchmark.parse_arguments(
        ["--preset", "small", "--device", "cpu", "--size", "64", "--variants", "compiled"]
    )
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    record = benchmark.measure_diffusers_tiling(SMALL, args)
    assert record["encode_seconds"] > 0 and record["decode_seconds"] > 0


def test_a_new_process_takes_the_first_tile():
    # Not compiled, which takes minutes.
    args = benchmark.parse_arguments(["--preset", "small", "--device", "cpu", "--size", "64", "--steps", "1"])
    _, plan = skeleton_and_plan(SMALL, 64)
    record = benchmark.measure_warm_start(benchmark.Run(args, SMALL, plan, {}, 0.0))
    assert record["variant"] == "eager" and record["warm_cache_seconds"] > 0


def test_caches_are_compared_with_the_uncached_picture(pipe):
    args = benchmark.parse_arguments(["--preset", "small", "--device", "cpu", "--repeats", "1"])
    plain: dict = {}
    plainly, cached = (
        benchmark.measure_cache(lambda: pipe, "small", 12, name, plain, 68, 4, args) for name in ("none", "TaylorSeer")
    )
    assert plainly["psnr"] is None and plainly["uncached_to_run"] == 1
    assert cached["psnr"] > 20
    assert cached["uncached_to_run"] == pytest.approx(plainly["seconds"] / cached["seconds"])


# ---- Variants ------------------------------------------------------------------------------------------------------


def test_cudnn_is_set_for_this_transformer_only(pipe):
    benchmark.apply_variant(pipe, "cudnn")
    backends = {processor._attention_backend.value for processor in pipe.transformer.attn_processors.values()}
    assert backends == {"_native_cudnn"}
    other = build_pipeline(SMALL, CPU)
    assert {processor._attention_backend for processor in other.transformer.attn_processors.values()} == {None}


def test_compiled_variant_takes_the_blocks_and_the_vae(monkeypatch):
    pipe, functions = build_pipeline(SMALL, CPU), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: functions.append(function) or function)
    benchmark.apply_variant(pipe, "eager")
    assert functions == []
    benchmark.apply_variant(pipe, "compiled")
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    assert [function.__self__ for function in functions] == [*blocks, pipe.vae.encoder, pipe.vae.decoder]


# ---- Arithmetic ----------------------------------------------------------------------------------------------------


def test_rates():
    assert benchmark.rates(6e12, seconds=2.0, ceiling=4.0) == {"tflops": 3.0, "share_of_ceiling": 0.75}


def test_estimate_takes_the_slowest_pace_and_the_longest_first_tile():
    images = [
        {"seconds": 20.0, "num_tiles": 10, "warm_up_seconds": 3.0},
        {"seconds": 12.0, "num_tiles": 12, "warm_up_seconds": 40.0},
    ]
    assert benchmark.estimate_seconds(images, 5, "eager") == 10
    assert benchmark.estimate_seconds(images, 5, "fp8") == 50
    assert benchmark.estimate_seconds([], 5, "fp8") == 0


def test_images_until_compiling_has_paid():
    eager, compiled = {"seconds": 20.0, "warm_up_seconds": 5.0}, {"seconds": 14.0}
    assert benchmark.count_until_paid(93.0, compiled, eager) == 15
    assert benchmark.count_until_paid(4.0, compiled, eager) == 1
    assert benchmark.count_until_paid(None, compiled, eager) is None
    assert benchmark.count_until_paid(93.0, compiled, None) is None
    assert benchmark.count_until_paid(93.0, eager, compiled) is None


def test_phase_records_on_hand_made_numbers():
    phases = benchmark.phase_records(10.0, {"DINO": 1.0, "denoise": 5.0}, {"denoise": 20e12}, ceiling=8.0)
    assert [tuple(phase.values()) for phase in phases] == [
        ("DINO", 1.0, 0.1, None, None, None),
        ("denoise", 5.0, 0.5, 20.0, 4.0, 0.5),
        ("host and rest", 4.0, 0.4, None, None, None),
    ]


def test_image_is_the_median_after_a_warm_up(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 13.0, 20.0, 22.0, 30.0, 34.0])
    monkeypatch.setattr(benchmark, "synchronized_time", lambda device: next(clock))
    phases = iter([{"denoise": value} for value in (2.5, 1.5, 3.5)])
    warm_ups: list = []
    arguments = (lambda: warm_ups.append(1), lambda: next(phases), 16, 3, CPU)
    result, phase_seconds = benchmark.measure_image("eager", *arguments)
    assert (result["seconds"], result["warm_up_seconds"], phase_seconds) == (3.0, 9.0, {"denoise": 2.5})
    assert warm_ups == [1]


def test_timed_methods_add_up(monkeypatch):
    class Target:
        def work(self, value):
            return 2 * value

    clock = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr(benchmark, "synchronized_time", lambda device: next(clock))
    target = Target()
    target.part = Target()
    seconds = benchmark.time_methods(target, {"own": ("", "work"), "part": ("part", "work")}, CPU)
    assert (target.work(3), target.part.work(value=4)) == (6, 8)
    assert seconds == {"own": 1.0, "part": 2.0}


def test_count_flops():
    with torch.device("meta"):
        left, right = torch.empty(2, 3), torch.empty(3, 5)
        image, kernel = torch.empty(1, 4, 8, 8), torch.empty(6, 4, 3, 3)
        query = torch.empty(1, 2, 16, 32)
    assert benchmark.count_flops(lambda: left @ right) == 2 * 2 * 3 * 5
    assert benchmark.count_flops(lambda: F.conv2d(image, kernel, padding=1)) == 2 * 64 * 4 * 6 * 9
    assert benchmark.count_flops(lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * 4 * 16 * 16 * 32


def test_work_of_a_step_agrees_with_a_count():
    preset = benchmark.PRESETS["full"]
    pipe, plan = skeleton_and_plan(preset, 4096)
    with torch.device("meta"):
        embeds, pooled_embeds = pipe.default_prompt_embeds
        inputs = {
            "hidden_states": torch.empty(1, plan.tokens_per_tile, 64),
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled_embeds,
            "timestep": torch.empty(1),
            "txt_ids": torch.empty(preset.num_text_tokens, 3),
            "img_ids": torch.empty(plan.tokens_per_tile, 3),
        }
        counted = benchmark.count_flops(lambda: pipe.transformer(**inputs))
    num_tokens, flops = benchmark.count_step(pipe, plan, 0.0)
    assert num_tokens == preset.num_text_tokens + plan.tokens_per_tile
    assert flops == pytest.approx(counted, rel=1e-3)


def test_presets_cut_the_image_alike():
    full, small = (skeleton_and_plan(preset, preset.size)[1] for preset in benchmark.PRESETS.values())
    assert (len(full), full.tile_height, full.tile_width) == (16, 1072, 1072)
    assert (len(small), small.tile_height, small.tile_width) == (16, 68, 68)
    counts = [len(benchmark.stock_places(preset, preset.size)) for preset in benchmark.PRESETS.values()]
    assert counts == [25, 25]


@pytest.mark.parametrize(("preset", "size"), [("full", 4096), ("full", 3008), ("full", 512), ("small", 128)])
def test_stock_tiles_cover_the_image(preset, size):
    preset = benchmark.PRESETS[preset]
    starts = sorted({top for top, _ in benchmark.stock_places(preset, size)})
    side = min(preset.stock_tile_size, size)
    assert starts[0] == 0 and starts[-1] + side == size
    assert all(later - start <= side - preset.stock_tile_overlap for start, later in pairwise(starts))


def test_format_table_aligns_columns():
    records = [{"seconds": 1.25, "variant": "eager", "phases": []}, {"seconds": 10.0, "variant": "a", "phases": []}]
    assert benchmark.format_table("Title", records) == (
        "## Title\n\n| variant |      s |\n|---------|-------:|\n| eager   |  1.250 |\n| a       | 10.000 |"
    )


def test_format_cell():
    values = ("eager", 5001, None, 0.01234, 12.34, 1234.5)
    assert [benchmark.format_cell(value, "") for value in values] == ["eager", "5001", "-", "0.0123", "12.3", "1234"]
    assert benchmark.format_cell(0.1234, ".1%") == "12.3 %" and benchmark.format_cell(None, ".1%") == "-"


# ---- Arguments -----------------------------------------------------------------------------------------------------


def test_defaults_by_preset():
    full = benchmark.parse_arguments(["--device", "cpu"])
    assert (full.size, full.input_size, full.steps, full.dtype) == (4096, 1024, 4, torch.float32)
    small = benchmark.parse_arguments(["--device", "cpu", "--preset", "small"])
    assert (small.size, small.input_size) == (256, 64)


def test_variants_by_device():
    cuda = torch.device("cuda", 0)
    assert benchmark.parse_variants(None, CPU) == ["eager"]
    assert benchmark.parse_variants(None, cuda) == ["eager", "cudnn", "compiled"]
    assert benchmark.parse_variants("compiled-cudnn,eager,eager", cuda) == ["compiled-cudnn", "eager"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "large"], "invalid choice: 'large'"),
        (["--size", "100"], "--size: must be a multiple of 16 px, not 100"),
        (["--size", "32"], "must be a whole number of at least 64"),
        (["--input-size", "0"], "must be a whole number of at least 16"),
        (["--steps", "0"], "must be a whole number of at least 1"),
        (["--repeats", "1.5"], "must be a whole number of at least 1"),
        (["--dino-strength", "-1"], "must be a number from 0 to 100"),
        (["--variants", "eager,fast"], "must be of eager, cudnn, compiled, compiled-cudnn, fp8, caches, not 'fast'"),
        (["--variants", ""], "not ''"),
        (["--variants", "cudnn"], "cudnn needs a CUDA device, not cpu"),
        (["--device", "toaster"], "--device toaster"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--json", "/no/such/folder/report.json"], "there is no such folder"),
        (["--markdown", "/no/such/folder/report.md"], "there is no such folder"),
        (["--compile"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in usage_error(capsys, *arguments)
