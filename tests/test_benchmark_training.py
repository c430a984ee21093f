"""The script `scripts/benchmark_training.py` on its small preset."""

import json

import benchmark_training
import pytest
import torch
import train_projector
from accelerate import Accelerator

from dino_projector.training.models import load_transformer
from tiny_models import tiny_transformer


ARGUMENTS = ["--preset", "small", "--device", "cpu", "--repeats", "1"]


def test_a_run_measures_every_batch_and_reports_what_fails(tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory\nand a hint")

    monkeypatch.setattr(benchmark_training, "quantize", fail)
    file = tmp_path / "report.json"
    assert benchmark_training.main([*ARGUMENTS, "--recipes", "plain,fp8", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [(s["recipe"], s["resolution"]) for s in report["steps"]] == [
        (recipe, resolution) for recipe in ("plain", "fp8") for resolution in (64, 96)
    ]
    for step in report["steps"][:2]:
        assert step["samples_per_second"] == pytest.approx(step["batch_size"] / step["seconds"])
        assert step["error"] is None
    assert all(step["error"] == "no memory" and "seconds" not in step for step in report["steps"][2:])
    table = capsys.readouterr().out
    assert "| plain | 64 | 2 |" in table and "32 text tokens, gradient checkpointing" in table


def test_what_is_measured_is_a_training_step():
    args = benchmark_training.parse_arguments(ARGUMENTS)
    preset, recipe = benchmark_training.PRESETS["small"], benchmark_training.RECIPES["plain"]
    pipe = benchmark_training.build_recipe(preset, recipe, args)
    trainer = benchmark_training.make_trainer(pipe, False, 64, 2, args, Accelerator(cpu=True))
    before = [parameter.detach().clone() for parameter in trainer.projector.parameters()]
    batch = benchmark_training.random_batch(64, 2)
    inputs = trainer.make_inputs(batch)
    assert inputs.branch.prompt_embeds.shape[:2] == (2, 32) and inputs.log_scale is not None
    assert trainer.pipe.transformer.gradient_checkpointing
    for _ in range(2):  # the first step's learning rate is 0
        values = trainer.train_step([batch])
    assert values["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.projector.parameters()))


def test_a_batch_without_memory_leaves_the_others(monkeypatch, capsys):
    measure = benchmark_training.measure

    def fail_at_first(trainer, batch, *args):
        if batch["sharp"].shape[-1] == 64:
            raise torch.OutOfMemoryError("no memory")
        return measure(trainer, batch, *args)

    monkeypatch.setattr(benchmark_training, "measure", fail_at_first)
    assert benchmark_training.main([*ARGUMENTS, "--recipes", "plain"]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("no memory |") and second.startswith("| plain | 96 | 1 |") and second.endswith("| - |")


@pytest.mark.parametrize("options", [["--recipes", "int3"], ["--json", "nowhere/a.json"], ["--text-tokens", "513"]])
def test_wrong_usage_is_one_line(capsys, options):
    assert benchmark_training.main([*ARGUMENTS, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("benchmark_training.py: error: ") and errors.count("\n") == 1
    assert options[0] in errors


def test_fp8_transformer_gives_nearly_the_same_gradients(tmp_path):
    pytest.importorskip("torchao")
    whole = tiny_transformer().to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "transformer")
    layers = [
        whole,
        load_transformer(tmp_path, torch.bfloat16, train_projector.training_quantization("fp8", torch.bfloat16)),
    ]
    layers[1].requires_grad_(False)
    layers = [model.single_transformer_blocks[0].proj_mlp for model in layers]
    assert type(layers[1].weight) is not type(layers[0].weight)
    gradients = []
    for layer in layers:
        torch.manual_seed(0)
        states = torch.randn(4, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        layer(states).float().square().sum().backward()
        gradients.append(states.grad.float())
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.1
