"""Repositories made to harm: what `load_dino_projector` refuses, from a folder and from a Hub on the loopback.

Every case must end in the documented `ValueError` or `OSError`, run no code that lies in the repository, and take
neither memory nor time by what a file claims.
"""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hub_server import HubServer
from tiny_models import POOLED_DIM, ROOT, tiny_dino, tiny_pipeline, tiny_projector


CONFIG = "dino_projector/config.json"
WEIGHTS = "dino_projector/diffusion_pytorch_model.safetensors"
ENCODER_CONFIG = "dino_encoder/config.json"
ENCODER_WEIGHTS = "dino_encoder/model.safetensors"
EVIL = "import pathlib, os\npathlib.Path(os.environ['MARK']).touch()\n"


def header(content: bytes, claimed: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with a header of any length and content."""
    return struct.pack("<Q", len(content) if claimed is None else claimed) + content + data


def tensors(**entries) -> bytes:
    described = {name: {"dtype": "F32", "shape": shape, "data_offsets": at} for name, (shape, at) in entries.items()}
    return header(json.dumps(described).encode(), data=bytes(16))


def configure(file: str, **values):
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **values}))

    return change


def put(file: str, content: bytes):
    return lambda folder: (folder / file).write_bytes(content)


def save_projector(**config):
    return lambda folder: tiny_projector(**config).save_pretrained(folder / "dino_projector")


def use_shard_outside(part: str, weights: str):
    """Moves the weights out of the folder and lets the index of the shards point to them."""

    def change(folder: Path) -> None:
        path = folder / weights
        index = dict.fromkeys(load_file(path), "../outside.safetensors")
        path.rename(folder / "outside.safetensors")
        (folder / f"{weights}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return change


def pickle(weights: str, name: str):
    def change(folder: Path) -> None:
        torch.save(load_file(folder / weights), (folder / weights).with_name(name))
        (folder / weights).unlink()

    return change


REFUSED = {
    "a pickled projector": (pickle(WEIGHTS, "diffusion_pytorch_model.bin"), "diffusion_pytorch_model.safetensors"),
    "a pickled encoder": (pickle(ENCODER_WEIGHTS, "pytorch_model.bin"), "model.safetensors"),
    "an endless header": (put(WEIGHTS, header(b"{}", 2**62)), "Unable to load weights"),
    "a header longer than the file": (put(WEIGHTS, header(b"{}", 10**7)), "Unable to load weights"),
    "tensors beyond the file": (put(WEIGHTS, tensors(gain=([2**40], [0, 2**42]))), "Unable to load weights"),
    "tensors over each other": (
        put(WEIGHTS, tensors(gain=([4], [0, 16]), a=([4], [0, 16]))),
        "Unable to load weights",
    ),
    "weights of other names": (put(WEIGHTS, tensors(a=([4], [0, 16]))), "dino_projector lack \\['gain', 'linear_1"),
    "weights of another shape": (configure(CONFIG, hidden_dim=7), r"expected shape .*\[7\]\), but got"),
    "many layers to read": (configure(CONFIG, layers=[-1] * 10**5), "but is 2400000"),
    "negative sizes": (configure(CONFIG, hidden_dim=-5), "negative dimension"),
    "texts for sizes": (configure(CONFIG, hidden_dim="__import__('os')"), "must be tuple of ints"),
    "a config that is a list": (put(CONFIG, b"[]"), "must be a DinoProjector's place"),
    "a config that is no text": (put(CONFIG, b"\xff\xfe\x00"), "config"),
    "a wide encoder": (configure(ENCODER_CONFIG, hidden_size=10**9), "but is 1000000000"),
    "an encoder of a long table": (configure(ENCODER_CONFIG, num_labels=10**9), "num_labels`, but is 1000000000"),
    "a deep encoder": (configure(ENCODER_CONFIG, num_hidden_layers=10**9), "100 `num_hidden_layers`, but is 1000"),
    "an encoder of other layers": (configure(ENCODER_CONFIG, mlp_ratio=3), "mismatched_sizes"),
    "an encoder of another kind": (configure(ENCODER_CONFIG, model_type="llama"), "must be one of dinov2"),
    "an encoder of its own code": (
        configure(ENCODER_CONFIG, model_type="evil", auto_map={"AutoModel": "evil.M", "AutoConfig": "evil.C"}),
        "custom code",
    ),
    "shards of the projector elsewhere": (use_shard_outside("dino_projector", WEIGHTS), "not allowed|safetensors"),
    "a prompt that is not there": (configure(CONFIG, num_prompt_tokens=9), "prompt_embeds expected shape"),
    "a prompt of another model": (
        save_projector(num_prompt_tokens=7, pooled_dim=POOLED_DIM + 1),
        "transformer's widths",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A repository that loads, with Python files beside everything that leave a mark when they run."""
    folder = tmp_path_factory.mktemp("hostile") / "sound"
    save_projector(num_prompt_tokens=7, pooled_dim=POOLED_DIM)(folder)
    tiny_dino().save_pretrained(folder / "dino_encoder")
    names = ("pipeline", "evil", "modeling_dinov2", "configuration_dinov2", "diffusers", "conftest", "__init__")
    for part in ("", "dino_projector", "dino_encoder"):
        for name in names:
            (folder / part / f"{name}.py").write_text(EVIL)
    # Code that is offered beside a kind of model that transformers knows is not needed, and not run.
    configure(ENCODER_CONFIG, auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})(folder)
    return folder


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_code_beside_the_weights_does_not_run(sound, pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    pipe.load_dino_projector(sound)
    assert pipe.dino_encoder is not None
    assert not (tmp_path / "mark").exists()
    pipe.unload_dino_projector()


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_folders_are_refused(sound, pipe, tmp_path, monkeypatch, case):
    change, message = REFUSED[case]
    folder = tmp_path / "repo"
    shutil.copytree(sound, folder)
    change(folder)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError, RuntimeError, TypeError), match=message):
        pipe.load_dino_projector(folder)
    # KiB on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert pipe.dino_projector is None
    assert pipe.dino_encoder is None
    assert not (tmp_path / "mark").exists()


SCRIPT = """
import json, sys
from tiny_models import tiny_pipeline
pipe = tiny_pipeline()
answers = {}
for repo in sys.argv[1:]:
    try:
        pipe.load_dino_projector(repo)
        answers[repo] = "loaded"
    except (ValueError, OSError) as error:
        answers[repo] = f"{type(error).__name__}: {error}"
    pipe.unload_dino_projector()
print(json.dumps(answers))
"""


def test_hostile_hub_repositories_are_refused(sound, tmp_path):
    cases = ["a pickled projector", "a pickled encoder", "an endless header", "an encoder of its own code"]
    cases += ["shards of the projector elsewhere"]
    repos = {"evil/code": sound, "evil/shards": tmp_path / "repos" / "shards"}
    for case in cases:
        repos[f"evil/{case.replace(' ', '-')}"] = folder = tmp_path / "repos" / case
        shutil.copytree(sound, folder)
        REFUSED[case][0](folder)
    shutil.copytree(sound, repos["evil/shards"])
    use_shard_outside("dino_encoder", ENCODER_WEIGHTS)(repos["evil/shards"])
    index = repos["evil/shards"] / f"{ENCODER_WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("../outside", "../../../../outside"))

    client = tmp_path / "client"
    (client / "cwd").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "COV_"))}
    environment |= {"HF_HOME": str(client / "home"), "MARK": str(client / "mark"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "HF_HUB_DISABLE_TELEMETRY": "1"}
    # transformers would ask a service on the internet to convert the encoder's pickled weights.
    environment |= {"DISABLE_SAFETENSORS_CONVERSION": "1"}
    with HubServer(repos) as hub:
        command = [sys.executable, "-c", SCRIPT, *repos]
        environment["HF_ENDPOINT"] = hub.url
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=client / "cwd", timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.pop("evil/code") == "loaded"
    # The script catches the documented errors only.
    assert "loaded" not in answers.values(), answers
    assert "cannot contain a '..' path segment" in answers["evil/shards"]
    got = [path for method, path in hub.requests if method == "GET"]
    assert not [path for path in got if path.endswith((".bin", ".py"))]
    assert not (client / "mark").exists()
    assert list((client / "cwd").iterdir()) == []
    assert {path.name for path in client.iterdir()} == {"cwd", "home"}
    assert not list(client.rglob("outside.safetensors"))
