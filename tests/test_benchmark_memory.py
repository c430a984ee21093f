"""The script `scripts/benchmark_memory.py`: runs of the small preset on the CPU, where nothing is limited."""

import json

import benchmark_memory
import pytest


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "report.json"
    arguments = ["--preset", "small", "--device", "cpu", "--input-size", "16", "--json", str(path)]
    assert benchmark_memory.main([*arguments, "--runs", "68:8:1,132:12:4"]) == 0
    return json.loads(path.read_text())


def test_every_run_is_recorded(report):
    runs = report["runs"]
    assert [(run["size"], run["limit_gib"], run["tile_batch_size"]) for run in runs] == [(68, 8, 1), (132, 12, 4)]
    assert all(run["recipe"] == "group" and run["seconds"] > 0 and run["host_gib"] > 0 for run in runs)
    # Only a GPU has a limit and a peak.
    assert all(run["peak_gib"] is None and run["reserved_gib"] is None for run in runs)


def test_the_text_encoders_run_and_everything_is_offloaded(monkeypatch):
    calls = []
    add = benchmark_memory.add_text_encoders

    def add_and_watch(pipe, *arguments):
        add(pipe, *arguments)
        for name in ("text_encoder", "text_encoder_2"):
            getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))

    placed = []
    monkeypatch.setattr(benchmark_memory, "add_text_encoders", add_and_watch)
    monkeypatch.setattr(benchmark_memory, "place", lambda pipe, device, offload: placed.append(offload))
    arguments = ["--preset", "small", "--device", "cpu", "--input-size", "16", "--runs", "68:8:1"]
    assert benchmark_memory.main(arguments) == 0
    # Once for the warm-up and once for the run.
    assert calls == ["text_encoder", "text_encoder_2"] * 2 and placed == ["group"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "4096:8"], "size:GiB:tiles, with commas between them, not '4096:8'"),
        (["--runs", "big:8:1"], "not 'big:8:1'"),
        (["--preset", "large"], "invalid choice"),
        (["--device", "toaster"], "--device toaster"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert benchmark_memory.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
