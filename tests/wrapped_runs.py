"""What the processes of the tests run that wrap a call: going on after a crash, and sharing tiles."""

import os
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import worker_runs
from torch.distributed import group
from worker_runs import PHOTO, count_layers, generator, kill_itself, settings

from flux_dino_tile.diagnostics import upscale_with_diagnosis
from flux_dino_tile.resume import Checkpoint
from flux_dino_tile.sharing import sharing_tiles


def say_place(image, box) -> str:
    """A prompt of its own for each tile."""
    return f"{box[0]} and {box[1]}"


def say_size(image, box) -> str:
    return f"{image.size}"


def enlarge(folder: Path | None = None, every: int = 1, **kwargs):
    """The images of a call, with a checkpoint in `folder`."""
    call = worker_runs.PIPE if folder is None else partial(Checkpoint(folder, every).run, worker_runs.PIPE)
    return call(**settings(**kwargs)).images


# ---- Killed --------------------------------------------------------------------------------------------------------


def finish_picture(folder: Path, **kwargs) -> None:
    """What a run does for one picture: denoise with checkpoints and write the file."""
    torch.set_num_threads(1)
    enlarge(folder / "checkpoint", output_type="pil", **kwargs)[0].save(folder / "picture.png")


def finish_picture_killed_in_step(folder: Path, step: int) -> None:
    """The same, but killed in the callback of a step, from 0."""

    def kill(pipeline, index, timestep, tensors):
        return kill_itself() if index == step else {}

    finish_picture(folder, callback_on_step_end=kill)


def finish_picture_killed_in_layer(folder: Path, layer: int) -> None:
    """The same, but killed in a forward pass."""
    count_layers(finish_picture, folder, kill_at=layer)


def finish_picture_killed_in_write(folder: Path, write: int, moment: str) -> None:
    """The same, but killed at a moment of the `write`-th checkpoint's write."""
    save_file, replace, counter = safetensors.torch.save_file, os.replace, iter(range(100))

    def save(tensors, path, metadata):
        if next(counter) == write:
            if moment == "half written":
                save_file(tensors, path, metadata)
                os.truncate(path, os.path.getsize(path) // 2)
            if moment in ("half written", "before"):
                kill_itself()
            if moment == "written":
                os.replace = kill_itself
            if moment == "replaced":
                os.replace = lambda *paths: kill_itself(replace(*paths))
        save_file(tensors, path, metadata)

    safetensors.torch.save_file = save
    finish_picture(folder)


def write_strips(folder: Path, kill_at: int | None = None) -> None:
    """Writes the strips of a picture one by one; killed before the one of that index."""
    torch.set_num_threads(1)
    with open(folder / "picture.raw", "wb") as file:
        for index, strip in enumerate(enlarge(folder / "checkpoint", output_type="strips")):
            if index == kill_at:
                kill_itself()
            file.write(strip.tobytes())


# ---- Several processes ---------------------------------------------------------------------------------------------


def share_picture(folder: Path, kwargs: dict) -> None:
    """Saves what this process gets of a picture whose tiles it shares: latents, strips, the received bytes."""
    torch.distributed.init_process_group("gloo")
    gather, received = torch.distributed.all_gather, []

    def counting_gather(results, value, group):
        received.append((len(results) - 1) * value.nbytes)
        gather(results, value, group=group)

    torch.distributed.all_gather = counting_gather
    with sharing_tiles(worker_runs.PIPE, group.WORLD) as call:
        latents = call(**settings(**{**kwargs, "vae_residual": None})).images
        num_bytes = sum(received)
        strips = [torch.from_numpy(strip) for strip in call(**settings(**kwargs, output_type="strips")).images]
    assert worker_runs.PIPE.map_tiles is map
    result = {"latents": latents, "strips": torch.cat(strips, 1), "received": num_bytes}
    torch.save(result, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def share_other_calls(folder: Path, seeds: list[int | None], kwargs: list[dict], checkpoints: list | None) -> None:
    """Calls with another seed and other settings in each process; saves the error."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    seed = seeds[rank]
    with sharing_tiles(worker_runs.PIPE, group.WORLD) as call:
        if checkpoints is not None:
            call = partial(Checkpoint(checkpoints[rank]).run, worker_runs.PIPE)
        try:
            call(**settings(generator=None if seed is None else generator(seed), **kwargs[rank]))
        except ValueError as error:
            (folder / f"error-{rank}.txt").write_text(str(error))


def share_with_checkpoint(folder: Path, dead: int | None) -> None:
    """Saves the latents of a picture with a checkpoint; the process `dead` is killed in the second step."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()

    def kill(pipeline, index, timestep, tensors):
        return kill_itself() if index == 1 and rank == dead else {}

    with sharing_tiles(worker_runs.PIPE, group.WORLD):
        latents = enlarge(folder / "checkpoint", callback_on_step_end=kill)
    torch.save(latents, folder / f"{rank}.pt")


def share_diagnosis(folder: Path, kwargs: dict) -> None:
    """Saves the diagnosis of a picture whose tiles are shared, all of them done again."""
    torch.distributed.init_process_group("gloo")
    with sharing_tiles(worker_runs.PIPE, group.WORLD):
        output = upscale_with_diagnosis(worker_runs.PIPE, 1.0, 0.2, **settings(**kwargs))
    torch.save(output.to_tuple(), folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def run_code(folder: Path, code: str) -> None:
    """Runs an example in its own folder, with a pipeline and a small picture as `pipe` and `small`."""
    os.chdir(folder)
    exec(code, {"pipe": worker_runs.PIPE, "small": PHOTO})
