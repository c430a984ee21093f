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
    assert benchmark.main([*arguments, "--dino-strength", "0.5", *files]) == 0
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
    assert [step["dino_strength"] for step in report["steps"]] == [0.0, 1.0, 0.5]
    without, full, half = (step["num_tokens"] for step in report["steps"])
    assert without == SMALL.num_text_tokens + plan.tokens_per_tile
    assert full == half == without + SMALL.projector["token_grid"] ** 2
    for step in report["steps"]:
        flops = transformer_flops(step["num_tokens"], inner_dim=128, num_layers=4)
        assert step["tflops"] == pytest.approx(flops / (step["ms"] / 1e3) / 1e12)
        assert step["share_of_ceiling"] == pytest.approx(step["tflops"] / report["ceiling_tflops"])


def test_shares_of_the_phases_sum_to_one(outcome):
    (image,) = outcome[0]["images"]
    assert [phase["phase"] for phase in image["phases"]] == [*benchmark.PHASE_METHODS, "host and rest"]
    assert all(phase["seconds"] > 0 for phase in image["phases"])
    assert math.fsum(phase["share"] for phase in image["phases"]) == pytest.approx(1)
    assert math.fsum(phase["seconds"] for phase in image["phases"]) == pytest.approx(image["seconds"])


def test_work_of_the_phases_counts_all_tiles_and_steps(outcome):
    report, _ = outcome
    pipe, plan = skeleton_and_plan(SMALL, SIZE)
    phases = {phase["phase"]: phase for phase in report["images"][0]["phases"]}
    assert report["images"][0]["num_tiles"] == len(plan) > 1
    flops = transformer_flops(report["steps"][2]["num_tokens"], inner_dim=128, num_layers=4)
    assert phases["denoise"]["tflop"] == pytest.approx(len(plan) * 2 * flops / 1e12)
    pixels = torch.empty(1, 3, 68, 68, device="meta")
    latents = torch.empty(1, 4, 34, 34, device="meta")
    encode_flops = benchmark.count_flops(lambda: pipe.vae.encode(pixels))
    decode_flops = benchmark.count_flops(lambda: pipe.vae.decode(latents))
    assert phases["VAE encode"]["tflop"] == pytest.approx(len(plan) * encode_flops / 1e12)
    assert phases["VAE decode"]["tflop"] == pytest.approx(len(plan) * decode_flops / 1e12)
    assert phases["DINO"]["tflop"] is None and phases["host and rest"]["tflops"] is None


def test_ratio_of_the_stock_loop(outcome):
    report, _ = outcome
    ratio = report["stock"]["seconds"] / report["images"][0]["seconds"]
    assert report["stock_to_variant"] == {"eager": pytest.approx(ratio)}
    assert report["stock"]["num_tiles"] == report["settings"]["stock_tiles"] > 1


def test_markdown_has_every_table(outcome):
    report, text = outcome
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Whole image",
        "## Phases of the whole image: eager",
        "## One transformer step for one tile",
        "## Cost of DINO in a step",
        "## VAE of the whole image",
        "## Tiles of several sides: eager",
        "## A step by its tokens: eager",
    ]
    assert report["machine"]["date"] in text and f"diffusers {report['machine']['diffusers']}" in text


def test_error_leaves_the_json_so_far(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(benchmark, "measure_step", fail)
    path = tmp_path / "report.json"
    arguments = ["--preset", "small", "--device", "cpu", "--size", "64", "--steps", "1", "--repeats", "1"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "benchmark.py: error: out of luck"
    report = json.loads(path.read_text())
    assert report["stock"]["seconds"] > 0 and len(report["images"]) == 1 and report["steps"] == []


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


def test_step_ratios_of_one_variant():
    times = {"eager": (100.0, 110.0, 121.0), "cudnn": (1.0, 1.0, 1.0)}
    steps = [
        {"variant": variant, "dino_strength": strength, "ms": ms}
        for variant in times
        for strength, ms in zip((0.0, 1.0, 0.6), times[variant])
    ]
    ratio = pytest.approx(1.1)
    expected = {"variant": "eager", "given_strength_to_full": ratio, "full_strength_to_none": ratio}
    assert benchmark.step_ratios("eager", steps, 0.6) == expected


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
    records = [{"seconds": 1.25, "name": "eager", "phases": []}, {"seconds": 10.0, "name": "a", "phases": []}]
    assert benchmark.format_table("Title", records, {"dino_strength": 0.6}) == (
        "## Title\n\n| run   |      s |\n|-------|-------:|\n| eager |  1.250 |\n| a     | 10.000 |"
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
        (["--variants", "eager,fast"], "must be of eager, cudnn, compiled, compiled-cudnn, fp8, not 'fast'"),
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
