"""`scripts/train_projector.py` as a user meets it: usage, resuming, signals, several processes, a full disk."""

import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import train_projector
import webdataset
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchdata.stateful_dataloader import StatefulDataLoader
from training_runs import arguments, save_model, save_photos, start

from dino_projector.folders import replace_folder
from dino_projector.training.checkpoints import error_line, find_checkpoint, list_checkpoints, save_checkpoint
from dino_projector.training.degradation import DEGRADATIONS
from dino_projector.training.samples import SampleStream, Sampling
from dino_projector.training.sources import ImageFolder
from tiny_models import POOLED_DIM, ROOT, tiny_pipeline


SCRIPT = str(ROOT / "scripts" / "train_projector.py")
EVERYTHING = ("--token_dropout", 0.5, "--degradation", "mild", "bicubic", "--random_flip")
RESTORED = ("--restoration_share", 0.5, "--pixel_loss_weight", 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    save_photos(folder, 80)
    (folder / "broken.jpg").write_text("no picture")
    (folder / "dogs.txt").write_text("two dogs")
    return folder


def run(*argv):
    assert train_projector.main(arguments(*argv)) == 0


def state(output, step):
    return torch.load(output / f"checkpoint-{step}" / "training_state.pt", weights_only=True)


def usage_error(capsys, *argv):
    """The one line that is printed before torch's models are loaded."""
    assert train_projector.main([str(item) for item in argv]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("train_projector.py: error: ") and errors.count("\n") == 1
    return errors


# ---- Usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", 500], "argument --resolution: must be a multiple of 16 px, not 500"),
        (["--resolution", "x"], "argument --resolution: must be a whole number of at least 16, not 'x'"),
        (["--sigma_min", 0.7], "--sigma_min 0.7 must be below --sigma_max 0.6"),
        (["--restoration_share", 1.1], "argument --restoration_share: must be a number from 0 to 1, not '1.1'"),
        (
            ["--restoration_share", 0.5, "--sigma_min", 0, "--sigma_max", 0.02],
            "--sigma_max 0.02 must be above 0.02 with --restoration_share",
        ),
        (["--pixel_loss_weight", -1], "argument --pixel_loss_weight: must be a number of at least 0, not '-1'"),
        (["--pixel_loss_weight", 0.5], "--pixel_loss_weight 0.5 needs a --restoration_share above 0"),
        (["--lr_warmup_steps", 4], "--lr_warmup_steps 4 must be below --max_train_steps 4"),
        (["--scale_factor", 4, 2], "argument --scale_factor: 4 is above 2"),
        (["--degradation", "bad"], "argument --degradation: invalid choice: 'bad'"),
        (["--dino_dropout", 1.5], "argument --dino_dropout: must be a number from 0 to 1, not '1.5'"),
        (["--train_data_dir", "nowhere"], "--train_data_dir nowhere: no such folder"),
        (["--validation_data_dir", "nowhere"], "--validation_data_dir nowhere: no such folder"),
        (["--dataset_name", "a/b"], "one of --train_data_dir, --dataset_name, --train_shards is needed, not"),
        (["--streaming"], "--streaming needs --dataset_name"),
        (["--dino_model", "nowhere at all"], "--dino_model nowhere at all: no such folder, and no name of a Hub"),
        (["--init_from_redux", ROOT], "the folder has no model_index.json"),
        (["--quantization", "nf4"], "--quantization nf4 needs a CUDA device"),
        (["--output_dir", ROOT / "README.md"], "is a file"),
        (["--num_validation_images", 1], "argument --num_validation_images: must be a whole number of at least 2"),
        (["--learning", 1], "unrecognized arguments: --learning"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_argument(model, photos, tmp_path, capsys, options, message):
    assert message in usage_error(capsys, *arguments(model, photos, tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_a_source_is_needed(model, tmp_path, capsys):
    message = usage_error(capsys, "--pretrained_model_name_or_path", model, "--output_dir", tmp_path)
    assert "is needed, not none" in message


def test_missing_packages_are_named(model, photos, tmp_path, capsys, monkeypatch):
    find_spec, missing = importlib.util.find_spec, ["wandb"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    message = usage_error(capsys, *arguments(model, photos, tmp_path, "--quantization", "fp8"))
    assert "--quantization fp8: " in message and "torchao.quantization" in message and "extra `quant`" in message
    options = ("--report_to", "wandb")
    assert "needs the package wandb" in usage_error(capsys, *arguments(model, photos, tmp_path, *options))
    missing.append("torchdata")
    assert "training needs the package torchdata" in usage_error(capsys, *arguments(model, photos, tmp_path))


def test_a_used_output_folder_is_not_overwritten(model, photos, tmp_path, capsys):
    run(model, photos, tmp_path, "--max_train_steps", 2)
    capsys.readouterr()
    message = usage_error(capsys, *arguments(model, photos, tmp_path))
    assert "holds checkpoint-2 of another run; pass --resume_from_checkpoint latest" in message


def test_help_names_every_option_and_the_licence(capsys):
    with pytest.raises(SystemExit):
        train_projector.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("-\n", "-").split()).replace("- ", "-")
    assert "non-commercial" in text and "docs/training.md" in text
    assert all(f"--{action.dest}" in text for action in train_projector.build_parser()._actions)
    assert set(train_projector.DEGRADATIONS) == set(DEGRADATIONS)


def test_errors_of_the_run_are_one_line(model, photos, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (80, 80)).save(few / "a.png")
    assert train_projector.main(arguments(model, photos, tmp_path / "out", "--validation_data_dir", few)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("train_projector.py: error: the validation needs two")


@pytest.fixture
def broken(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    return folder


def test_pictures_of_which_none_can_be_used_are_one_line(model, broken, tmp_path, capsys):
    assert train_projector.main(arguments(model, broken, tmp_path / "out")) == 1
    skipped, last = capsys.readouterr().err.splitlines()[-2:]
    assert skipped.endswith("a.png: skipped, is not a picture that Pillow can read")
    assert last == "train_projector.py: error: none of the pictures can be used"


def test_an_error_of_several_lines_is_cut_to_the_one_that_says_what_happened(broken):
    cuda = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`.\n"
    assert error_line(RuntimeError(cuda)) == "CUDA error: an illegal memory access was encountered"
    assert error_line(MemoryError()) == "MemoryError"
    stream = SampleStream(ImageFolder(broken, 0), Sampling(64, (2.0, 4.0), ("bicubic",)), None, 0)
    with pytest.raises(ValueError, match="Traceback") as error:
        next(iter(StatefulDataLoader(stream, num_workers=1)))
    assert error_line(error.value).startswith("ValueError: 100 pictures in a row cannot be used, the last is ")


def test_a_base_without_text_encoders_brings_the_empty_prompt(photos, tmp_path, capsys):
    bases = {}
    for num_tokens in (5, 0):
        projector = {"num_prompt_tokens": num_tokens, "pooled_dim": POOLED_DIM}
        pipe = tiny_pipeline(dino="dinov2", projector=projector)
        for embeds in pipe.dino_projector.buffers():
            embeds.normal_()
        pipe.register_modules(**dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")))
        pipe.save_pretrained(tmp_path / f"base-{num_tokens}")
        bases[num_tokens] = tmp_path / f"base-{num_tokens}"
    for num_tokens, options, message in (
        (5, (), "base-5 has no text encoders for captions: pass --caption_column none"),
        (0, ("--caption_column", "none"), "base-0 has neither text encoders nor a projector with the empty prompt"),
    ):
        assert train_projector.main(arguments(bases[num_tokens], photos, tmp_path / "out", *options)) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    run(bases[5], photos, tmp_path / "out", "--caption_column", "none")
    base, trained = (
        load_file(folder / "dino_projector" / "diffusion_pytorch_model.safetensors")
        for folder in (bases[5], tmp_path / "out" / "final")
    )
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(trained[name], base[name])


# ---- A run and its checkpoints -------------------------------------------------------------------------------------


def test_a_run_says_what_it_does_logs_and_validates(model, photos, tmp_path, capfd):
    options = ("--report_to", "tensorboard", "--validation_steps", 2, "--max_train_steps", 4, *EVERYTHING)
    run(model, photos, tmp_path, *options)
    output, errors = capfd.readouterr()
    for line in ("steps         4 to go, of 2 samples", "on 2 TRAINING pictures", "validation loss at sigma", "done:"):
        assert line in output
    assert "broken.jpg: skipped" in errors
    events = EventAccumulator(str(tmp_path / "logs" / "dino_projector"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation/gap_other_tokens_percent")] == [0, 2, 4]
    assert events.Tags()["images"] == ["validation/pictures"]
    # The enlarged input, without and with tokens, and the sharp picture, for two examples.
    assert Image.open(tmp_path / "validation" / "step-000004.png").size == (4 * 64, 2 * 64)
    facts = json.loads((tmp_path / "final" / "training.json").read_text())
    assert "train_data_dir" not in facts["options"]
    assert facts["options"]["degradation"] == ["mild", "bicubic"] and facts["validation"]


@pytest.mark.parametrize("kind", ["shards", "dataset", "stream"])
def test_other_sources_train_with_their_captions(model, photos, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in photos.glob("*.png")]
    if kind == "shards":
        with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
            for row in rows:
                key = row["image"]["path"].removesuffix(".png")
                writer.write({"__key__": key, "png": row["image"]["bytes"], "txt": f"a {key}"})
        options = ["--train_shards", tmp_path / "a.tar"]
    else:
        table = datasets.Dataset.from_list([{**row, "text": f"a {row['image']['path']}"} for row in rows])
        (tmp_path / "table").mkdir()
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table" / "a.parquet")
        options = ["--dataset_name", tmp_path / "table", "--caption_column", "text"]
        options += ["--streaming"] if kind == "stream" else []
    run(model, None, tmp_path / "out", *options, "--proportion_empty_prompts", 0)
    # The empty prompt, what set the tokens' scale, and the captions: of all pictures where they are listed.
    stored = len(list((tmp_path / "out" / "precomputed" / "text").iterdir()))
    assert stored == 7 if kind == "dataset" else stored > 4
    assert (tmp_path / "out" / "final").is_dir()


@pytest.mark.parametrize(("column", "stays"), [("txt", True), ("none", False)])
def test_text_encoders_stay_for_the_captions_of_a_stream_only(model, photos, tmp_path, column, stays):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for path in photos.glob("*.png"):
            writer.write({"__key__": path.stem, "png": path.read_bytes()})
    options = ("--train_shards", tmp_path / "a.tar", "--caption_column", column)
    trainer, _, _ = start(model, None, tmp_path / "out", *options)
    assert (trainer.make_inputs.embed_captions.pipe is not None) == stays


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_not_having_stopped_bit_for_bit(model, photos, tmp_path, workers):
    options = (*EVERYTHING, "--dataloader_num_workers", workers, "--gradient_accumulation_steps", 2)
    options += RESTORED
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(model, photos, whole, "--max_train_steps", 7, *options)
    run(model, photos, parts, "--max_train_steps", 7, "--checkpointing_steps", 3, *options)
    for step in (6, 7):
        os.rename(parts / f"checkpoint-{step}", parts / f"set-aside-{step}")
    run(model, photos, parts, "--max_train_steps", 7, "--resume_from_checkpoint", "latest", *options)
    trainers = [state(output, 7)["trainer"] for output in (whole, parts)]
    assert trainers[0]["step"] == trainers[1]["step"] == 7
    torch.testing.assert_close(*trainers, rtol=0, atol=0)
    weights = [load_file(o / "final/dino_projector/diffusion_pytorch_model.safetensors") for o in (whole, parts)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_changed_options_are_named_when_resuming(model, photos, tmp_path, capsys):
    run(model, photos, tmp_path, "--max_train_steps", 2)
    more = ("--max_train_steps", 3, "--learning_rate", 0.5, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    run(model, photos, tmp_path, *more)
    output = capsys.readouterr().out
    assert "--learning_rate was 0.0001 and is now 0.5" in output and "step 2" in output


def test_changed_options_take_effect_when_resuming(model, photos, tmp_path):
    run(model, photos, tmp_path, "--max_train_steps", 2)
    changed = ("--learning_rate", 0.5, "--adam_beta1", 0.3, "--adam_weight_decay", 0.1, "--ema_decay", 0.4)
    more = ("--max_train_steps", 6, "--lr_scheduler", "linear", "--resume_from_checkpoint", "latest")
    trainer, _, _ = start(model, photos, tmp_path, *changed, *more)
    settings = trainer.optimizer.param_groups[0]
    # After one step of warm-up and one of the five down to zero.
    assert settings["lr"] == trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.5 * 4 / 5)
    assert settings["betas"] == (0.3, 0.999) and settings["weight_decay"] == 0.1
    assert trainer.ema.decay == 0.4


def test_a_folder_without_a_checkpoint_is_named(model, photos, tmp_path, capsys):
    argv = arguments(model, photos, tmp_path, "--resume_from_checkpoint", photos)
    assert train_projector.main(argv) == 1
    message = f"--resume_from_checkpoint {photos}: the folder has no training_state.pt"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_other_numbers_of_readers_cannot_resume(model, photos, tmp_path, capsys):
    run(model, photos, tmp_path, "--max_train_steps", 2)
    more = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", 1)
    assert train_projector.main(arguments(model, photos, tmp_path, *more)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("was made with 1 processes and --dataloader_num_workers 0, not 1 and 1. Use the same.")


def test_an_early_checkpoint_needs_a_folder_without_later_ones(model, photos, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    run(model, photos, first, "--max_train_steps", 6, "--checkpointing_steps", 2)
    more = ("--resume_from_checkpoint", first / "checkpoint-2", "--checkpoints_total_limit", 1)
    assert train_projector.main(arguments(model, photos, first, *more)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "holds checkpoint-4, checkpoint-6, which are later. Move them away, or use another --output_dir" in message
    run(model, photos, second, *more)
    assert [path.name for path in list_checkpoints(second)] == ["checkpoint-4"]


def test_only_the_newest_checkpoints_are_kept(model, photos, tmp_path):
    run(model, photos, tmp_path, "--max_train_steps", 5, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert find_checkpoint(tmp_path / "nowhere", "latest") is None


def test_a_failed_validation_comes_after_the_checkpoint(model, photos, tmp_path, capsys):
    run(model, photos, tmp_path, "--max_train_steps", 2)
    shutil.rmtree(tmp_path / "validation")
    (tmp_path / "validation").write_text("no folder")
    more = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert train_projector.main(arguments(model, photos, tmp_path, *more)) == 1
    assert "File exists" in capsys.readouterr().err.splitlines()[-1]
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-4"


def test_resuming_a_finished_run_gives_the_same_result(model, photos, tmp_path):
    run(model, photos, tmp_path)
    facts = (tmp_path / "final" / "training.json").read_text()
    run(model, photos, tmp_path, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "final" / "training.json").read_text() == facts


def test_captions_of_the_validation_are_not_read(model, photos, tmp_path):
    held_out = tmp_path / "held_out"
    shutil.copytree(photos, held_out)
    (held_out / "metadata.jsonl").write_text("no JSON")
    run(model, photos, tmp_path / "out", "--validation_data_dir", held_out)


def test_a_checkpoint_loads_as_a_projector(model, photos, tmp_path):
    from pipeline_flux_dino_tile import DinoProjector

    run(model, photos, tmp_path, "--max_train_steps", 2)
    projector = DinoProjector.from_pretrained(tmp_path / "checkpoint-2" / "dino_projector")
    shadow = state(tmp_path, 2)["trainer"]["ema"]["shadow_params"]
    torch.testing.assert_close(list(projector.parameters()), shadow, rtol=0, atol=0)


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("is_projector_large", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, full_disk, is_projector_large):
    def save(step, size, projector_size):
        def write_projector(folder):
            save_file({"x": torch.zeros(projector_size)}, folder / "weights.safetensors")

        save_checkpoint(tmp_path, step, {"x": torch.zeros(size)}, write_projector, 1)

    save(1, 100, 100)
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be written .* The last checkpoint is .*checkpoint-1\."):
        save(2, *((100, 40_000) if is_projector_large else (40_000, 100)))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.load(tmp_path / "checkpoint-1" / "training_state.pt")["x"].shape == (100,)


def test_a_full_disk_for_text_embeddings_is_one_line(model, photos, tmp_path, full_disk, capsys):
    assert train_projector.main(arguments(model, photos, tmp_path, "--max_sequence_length", 512)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train_projector.py: error: ") and "File too large" in last


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    replace_folder(tmp_path / "final", lambda folder: (folder / "a").write_text("old"))
    with pytest.raises(OSError, match="full"):
        replace_folder(tmp_path / "final", lambda folder: (_ for _ in ()).throw(OSError("full")))
    assert (tmp_path / "final" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kills", [False, True])
def test_a_replacement_that_ends_between_its_renames_keeps_the_old_folder(tmp_path, monkeypatch, kills):
    """Whether the second rename fails, or the process is killed before it."""
    target, rename = tmp_path / "final", os.replace
    replace_folder(target, lambda folder: (folder / "a").write_text("old"))

    def rename_the_old_one_only(source, destination):
        if Path(source).name != ".final.tmp":
            return rename(source, destination)
        if kills:
            os._exit(9)
        raise OSError("no more renames")

    def replace():
        os.replace = rename_the_old_one_only
        replace_folder(target, lambda folder: (folder / "a").write_text("new"))

    if kills:
        process = multiprocessing.get_context("fork").Process(target=replace)
        process.start()
        process.join()
        assert process.exitcode == 9
        # What follows fails too, but has put the old folder back.
        with pytest.raises(OSError, match="full"):
            replace_folder(target, lambda folder: (_ for _ in ()).throw(OSError("full")))
    else:
        monkeypatch.setattr(os, "replace", rename_the_old_one_only)
        with pytest.raises(OSError, match="no more renames"):
            replace_folder(target, lambda folder: (folder / "a").write_text("new"))
        monkeypatch.undo()
    assert (target / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    replace_folder(target, lambda folder: (folder / "a").write_text("new"))
    assert (target / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "final").symlink_to("large_disk")
    replace_folder(tmp_path / "final", lambda folder: (folder / "a").write_text("new"))
    assert (tmp_path / "final").is_symlink() and (tmp_path / "large_disk" / "a").read_text() == "new"


# ---- Processes -----------------------------------------------------------------------------------------------------


def start_script(*argv, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, *launcher, SCRIPT, *arguments(*argv)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_so_that_the_run_can_go_on(model, photos, tmp_path, number):
    options = ("--max_train_steps", 100_000, "--dataloader_num_workers", 1, "--checkpointing_steps", 5)
    process = start_script(model, photos, tmp_path, *options)
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    # To the workers too, as a terminal or a batch system does.
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    stopped = list_checkpoints(tmp_path)[-1]
    step = state(tmp_path, int(stopped.name.split("-")[1]))["trainer"]["step"]
    assert f"stopped at step {step}; --resume_from_checkpoint latest goes on from here" in output
    assert not (tmp_path / "final").exists()
    more = ("--max_train_steps", step + 1, "--dataloader_num_workers", 1)
    run(model, photos, tmp_path, *more, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "final").is_dir()


def test_two_processes_train_as_one_with_their_batches_together(model, photos, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--max_train_steps", 3, "--learning_rate", 0.01, "--dino_dropout", 0.5, *RESTORED)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start_script(model, photos, two, "--train_batch_size", 1, *options, launcher=launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "2 samples (1 x 1 accumulated x 2 processes)" in output
    assert output.count("done:") == 1
    run(model, photos, one, "--train_batch_size", 2, *options)
    trainers = [state(folder, 3)["trainer"] for folder in (one, two)]
    torch.testing.assert_close(trainers[0]["projector"], trainers[1]["projector"], rtol=1e-3, atol=1e-5)
    assert len(state(two, 3)["loaders"]) == 2
