"""Processes that share the tiles of a picture: the result is that of one process, bit for bit."""

import re

import pytest
import torch
import worker_runs
from diffusers import FlowMatchEulerDiscreteScheduler
from worker_runs import FLAT_PHOTO, NUM_STEPS, PHOTO, exit_codes, outputs, settings, start_ranks
from wrapped_runs import (
    enlarge,
    say_place,
    say_size,
    share_diagnosis,
    share_other_calls,
    share_picture,
    share_with_checkpoint,
)

from flux_dino_tile.diagnostics import upscale_with_diagnosis
from flux_dino_tile.resume import CHECKPOINT_NAME
from flux_dino_tile.sharing import is_first_process, sharing_tiles


@pytest.fixture(scope="module")
def context():
    return worker_runs.make_context()


def run_ranks(context, function, count, folder, *arguments):
    """Exit codes and outputs of `count` processes."""
    processes = start_ranks(context, function, count, folder, folder, *arguments)
    return exit_codes(processes), outputs(folder, count)


# ---- The same result -----------------------------------------------------------------------------------------------

CALLS = {
    "plain": {},
    "batches": {"tile_batch_size": 4},  # six tiles: two batches of three
    "a smaller last batch": {"tile_batch_size": 2, "image": PHOTO.crop((0, 0, 40, 40)), "upscale_factor": 3},
    "frozen tiles": {"image": FLAT_PHOTO, "frozen_tiles": [0, 3], "negative_prompt": "blur", "true_cfg_scale": 2.0},
    "all tiles frozen": {"frozen_tiles": range(6)},
    "regions": {"prompt": [("a photo", None), ("a dog", (0, 0, 0.3, 0.3))], "tile_batch_size": 2},
    "a function": {"prompt": say_place, "negative_prompt": "blur", "true_cfg_scale": 2.0},
    "VAE's residual": {"vae_residual": True, "num_images_per_prompt": 2},
}


@pytest.mark.parametrize(
    ("count", "name"),
    [
        *[(1, "plain"), (2, "batches"), (3, "batches"), (2, "a smaller last batch"), (3, "a smaller last batch")],
        *[(2, "frozen tiles"), (2, "all tiles frozen"), (3, "VAE's residual")],
        *[(2, "regions"), (2, "a function")],
    ],
)
def test_shared_tiles_give_the_same(context, tmp_path, count, name):
    kwargs = CALLS[name]
    latents = enlarge(**{**kwargs, "vae_residual": None})
    strips = torch.cat([torch.from_numpy(strip) for strip in enlarge(**kwargs, output_type="strips")], 1)
    codes, texts = run_ranks(context, share_picture, count, tmp_path, kwargs)
    assert codes == [0] * count, texts
    for rank in range(count):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(result["latents"], latents)
        assert torch.equal(result["strips"], strips)


def test_a_shared_diagnosis_gives_the_same(context, tmp_path):
    kwargs = {"output_type": "pt"}
    expected = upscale_with_diagnosis(worker_runs.PIPE, 1.0, 0.2, **settings(**kwargs))
    codes, texts = run_ranks(context, share_diagnosis, 2, tmp_path, kwargs)
    assert codes == [0, 0], texts
    for rank in range(2):
        images, _, similarity, seams, suspects = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert torch.equal(images, expected.images)
        assert torch.equal(similarity, expected.dino_similarity) and torch.equal(seams, expected.seam_score)
        assert suspects == expected.suspects


def test_bytes_that_a_process_receives(context, tmp_path):
    """As docs/several_gpus.md computes them: the tiles of the others, in float32, in every step."""
    count = 3
    codes, texts = run_ranks(context, share_picture, count, tmp_path, {})
    assert codes == [0] * count, texts
    num_rounds = 6 // count
    velocity, mean_and_variance, features = 4 * 6 * 6 * 4, 8 * 6 * 6 * 4, 3 * 3 * 24 * 4
    values = num_rounds * (NUM_STEPS * velocity + mean_and_variance + features)
    # In the last round of each of the phases, the length of the value too.
    lengths = 8 * (NUM_STEPS + 2)
    assert torch.load(tmp_path / "0.pt")["received"] == (count - 1) * (values + lengths)


@pytest.mark.parametrize("tile_batch_size", [2, 4, 6])
def test_tile_batch_size_changes_rounding_only(tile_batch_size):
    """Matrix products of another size round otherwise, so that a byte of the picture may change by one."""
    kwargs = {"tile_batch_size": tile_batch_size}
    torch.testing.assert_close(enlarge(**kwargs), enlarge(), atol=1e-6, rtol=0)
    result, expected = (
        torch.cat([torch.from_numpy(strip) for strip in enlarge(**call, output_type="strips")], 1).int()
        for call in (kwargs, {})
    )
    assert (result - expected).abs().max() <= 1
    assert (result != expected).float().mean() < 1e-3


def test_without_a_group_a_process_works_alone():
    with sharing_tiles(worker_runs.PIPE, None) as call:
        assert call is worker_runs.PIPE and call.map_tiles is map
    assert is_first_process(None)


def test_the_map_of_before_comes_back_after_an_error(monkeypatch):
    def own_map(compute, items):
        return map(compute, items)

    def fail_in_context():
        with sharing_tiles(worker_runs.PIPE, object()):
            assert worker_runs.PIPE.map_tiles is not own_map
            raise KeyError

    monkeypatch.setattr(worker_runs.PIPE, "map_tiles", own_map)
    with pytest.raises(KeyError):
        fail_in_context()
    assert worker_runs.PIPE.map_tiles is own_map


# ---- Processes that do not agree -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_checkpoint", [False, True])
@pytest.mark.parametrize(
    ("seeds", "changes", "message"),
    [
        ([0, 1], [{}, {}], "generator is 'seed 0, .*, in process 1 'seed 1,"),
        ([0, None], [{}, {}], "generator is 'seed 0, .*, in process 1 None"),
        ([0, 0], [{"prompt": "a"}, {"prompt": "b"}], "prompt is 'a', in process 1 'b'"),
        (
            [0, 0],
            [{"prompt": [("a", None)]}, {"prompt": [("a", (0, 0, 9, 9))]}],
            r"prompt is \[\['a', None\]\], in pro",
        ),
        ([0, 0], [{"prompt": say_place}, {"prompt": say_size}], r"prompt is {'\(0, 0, 48, 48\)': '0 and 0'"),
        ([None, None], [{}, {}], "`generator` must be given, of one seed, in processes that share a picture"),
    ],
    ids=["seed", "a seed in one", "prompt", "regions", "a function", "no seed"],
)
def test_other_calls_are_refused_in_all(context, tmp_path, seeds, changes, message, has_checkpoint):
    folders = [tmp_path / "shared"] * 2 if has_checkpoint else None
    codes, texts = run_ranks(context, share_other_calls, 2, tmp_path, seeds, changes, folders)
    assert codes == [0, 0], texts
    for rank in range(2):
        assert re.search(message, (tmp_path / f"error-{rank}.txt").read_text())


def test_a_scheduler_that_draws_noise_is_refused(monkeypatch):
    """Each process would draw its own."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(worker_runs.PIPE, "scheduler", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    try:
        with (
            sharing_tiles(worker_runs.PIPE, torch.distributed.group.WORLD) as call,
            pytest.raises(ValueError, match=r"`scheduler` must be .*, but is 'stochastic "),
        ):
            call(**settings())
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpoint_that_only_one_sees_is_refused_in_all(context, tmp_path):
    enlarge(tmp_path / "shared")
    folders = [tmp_path / "shared", tmp_path / "other"]
    codes, texts = run_ranks(context, share_other_calls, 2, tmp_path, [0, 0], [{}, {}], folders)
    assert codes == [0, 0], texts
    for rank in range(2):
        error = (tmp_path / f"error-{rank}.txt").read_text()
        assert "must make the same call: step saved is 3, in process 1 0" in error


# ---- Processes that die --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 2])
def test_a_shared_picture_goes_on_with_another_number_of_processes(context, tmp_path, dead):
    codes, _ = run_ranks(context, share_with_checkpoint, 3, tmp_path, dead)
    assert codes[dead] == -9 and 0 not in codes and None not in codes
    assert (tmp_path / "checkpoint" / CHECKPOINT_NAME).exists()
    codes, texts = run_ranks(context, share_with_checkpoint, 2, tmp_path, None)
    assert codes == [0, 0], texts
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), enlarge())
