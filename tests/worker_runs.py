"""Processes for the tests of what happens when one is killed, and when several share the work.

They are forked from a server that has imported everything and built the small models, so that each starts in
milliseconds and can be killed at any moment.
"""

import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flux_dino_tile import image_files, upscale
from flux_dino_tile.processes import Processes
from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import ROOT, tiny_pipeline


PIPE = tiny_pipeline(dino="dinov2")
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
FLAT_PHOTO = PHOTO.copy()
FLAT_PHOTO.paste((90, 120, 200), (0, 0, 24, 32))
NUM_STEPS = 3


def make_context() -> multiprocessing.context.ForkServerContext:
    """The context whose processes find this module imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests", "scripts"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker_runs"])
    return context


def settings(**kwargs) -> dict:
    """Of a call: six tiles of 48 x 48 px in three steps; latents unless `kwargs` say otherwise."""
    values = {"image": PHOTO, "upscale_factor": 2, "prompt": "a photo", "start_sigma": 0.6}
    values |= {"num_inference_steps": NUM_STEPS, "max_sequence_length": 16, "tile_size": 48, "tile_overlap": 16}
    values |= {"dino_conditioning_scale": 0.5, "output_type": "latent", "generator": generator()}
    return {**values, **kwargs}


def enlarge(**kwargs):
    """The images of a call."""
    return PIPE(**settings(**kwargs)).images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kill_itself(*_args, **_kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_layers(function: Callable, *arguments, kill_at: int | None = None, **kwargs) -> int:
    """How many layers of all models run in a call; it is killed before the one of index `kill_at`."""
    calls: list = []

    def count(*_args):
        if len(calls) == kill_at:
            kill_itself()
        calls.append(1)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        function(*arguments, **kwargs)
    finally:
        handle.remove()
    return len(calls)


# ---- Several processes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_rank(function: Callable, rank: int, count: int, port: int, folder: Path, arguments: tuple) -> None:
    """Runs `function(*arguments)` as a launcher would; its output goes to `folder`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Unbuffered: the process may be killed.
    raw = open(folder / f"output-{rank}.txt", "wb", buffering=0)  # noqa: SIM115
    with io.TextIOWrapper(raw, write_through=True) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(function(*arguments))


def start_ranks(context, function: Callable, count: int, folder: Path, *arguments) -> list:
    """Starts `count` processes that run `function(*arguments)` and know each other."""
    port = free_port()
    processes = [
        context.Process(target=run_rank, args=(function, rank, count, port, folder, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list, timeout: float = 60) -> list[int | None]:
    """Waits for the processes; `None` for one that hangs, which is killed."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def outputs(folder: Path, count: int) -> list[str]:
    return [(folder / f"output-{rank}.txt").read_text() for rank in range(count)]


def exchange_twice(folder: Path) -> None:
    """Writes what every process gets of the first one's values, and which items it takes, in two rounds."""
    processes = Processes(30, print)
    values = [processes.from_first(f"{value} of {processes.rank}") for value in ("first", "second")]
    taken = [list(processes.take(4)) for _ in range(2)]
    (folder / f"exchanged-{processes.rank}.json").write_text(json.dumps([values, taken]))
    processes.collect([])


def command_line(arguments: list[str], faults: dict[int, Callable] | None = None) -> int:
    """`upscale.py` with the small models at hand in place of a folder's; `faults` change the pipeline of a process."""
    FluxDinoTilePipeline.from_pretrained = lambda *_arguments, **_options: PIPE
    fault = (faults or {}).get(int(os.environ.get("RANK", 0)))
    if fault is not None:
        fault()
    return upscale.main(arguments)


def at_step(step: int, action: Callable, image: int = 1) -> None:
    """Does `action` before the scheduler's `step`-th step, from 1, in the process's `image`-th image."""
    steps, scheduler_step = iter(range(1, 1000)), PIPE.scheduler.step

    def count(*arguments, **kwargs):
        if next(steps) == step + (image - 1) * NUM_STEPS:
            action()
        return scheduler_step(*arguments, **kwargs)

    PIPE.scheduler.step = count


def write_in_strips(tile: int | None = None) -> None:
    """Has every picture written in strips, and the process killed before it decodes the tile of that index."""
    image_files.MAX_WHOLE_PIXELS = 0
    tiles, decode = iter(range(1000)), PIPE.vae.decode

    def count(*arguments, **kwargs):
        if next(tiles) == tile:
            kill_itself()
        return decode(*arguments, **kwargs)

    PIPE.vae.decode = count


def write_in_strips_killed_at_the_end() -> None:
    """The same, but killed when the file is written and has not got its name."""
    write_in_strips()
    replace = os.replace
    os.replace = lambda source, target: kill_itself() if Path(target).suffix == ".png" else replace(source, target)


def write_in_strips_to_a_small_disk() -> None:
    """No file of this process gets larger than 60,000 bytes."""
    write_in_strips()
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def write_slowly() -> None:
    replace = os.replace
    os.replace = lambda *paths: time.sleep(4) or replace(*paths)


def fail_to_read() -> None:
    def fail(file):
        raise OSError("Input/output error")

    Image.open = fail


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def spoil_the_transformer() -> None:
    """A weight that is NaN."""
    PIPE.transformer.proj_out.bias.data[0] = torch.nan
