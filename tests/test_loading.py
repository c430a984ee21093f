"""Every way to get the pipeline and its projector, each in a fresh process, from disk and from a Hub on the loopback.

A process loads tiny random models with the unmodified clients, upscales one picture on the CPU and says what it got.
Nothing may appear on its stderr that the stock pipeline does not print for the same models.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file

from hub_server import HubServer
from pipeline_flux_dino_tile import DinoProjector, FluxDinoTilePipeline
from tiny_models import DINO_DIM, JOINT_ATTENTION_DIM, POOLED_DIM, ROOT, tiny_components, tiny_dino


# Of the copy of the project that the fixture `folder` makes.
PIPELINE_FILE = "source/pipeline_flux_dino_tile.py"

PRELUDE = """
import hashlib, json, os, subprocess, sys
import numpy, torch
from PIL import Image
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline
from huggingface_hub import hf_hub_download

folder, pipeline_file = sys.argv[1:]
small = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=numpy.uint8))

def upscale(pipe, **kwargs):
    settings = {"num_inference_steps": 2, "max_sequence_length": 32, "output_type": "np"}
    settings |= {"upscale_factor": 2, "prompt": "a photo", "dino_conditioning_scale": 0.6, **kwargs}
    image = pipe(image=small, generator=torch.Generator().manual_seed(0), **settings).images[0]
    assert image.shape == (48, 64, 3) and numpy.isfinite(image).all(), image.shape
    return hashlib.sha256(image.tobytes()).hexdigest()

def with_and_without_dino(pipe, **kwargs):
    digests = [upscale(pipe, **kwargs), upscale(pipe, dino_conditioning_scale=0.0, **kwargs)]
    assert digests[0] != digests[1], "the projector does nothing"
    return digests

def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"

def answer(value):
    print(json.dumps(value))
"""


@dataclass
class Route:
    """A script for a fresh process, which shares its `HF_HOME` and waits for the other route that `after` names."""

    script: str
    after: str | None = None
    home: str | None = None
    environment: dict = field(default_factory=dict)


@dataclass
class Outcome:
    """What a route's script passed to `answer`, the lines of its stderr, and the Hub that it talked to."""

    answer: object
    lines: set[str]
    hub: HubServer


# Models of both libraries are also loaded alone, as the projector and its encoder are.
STOCK = """
from diffusers import FluxTransformer2DModel
from transformers import AutoModel
FluxTransformer2DModel.from_pretrained("base/flux", subfolder="transformer", use_safetensors=True)
pipe = FluxImg2ImgPipeline.from_pretrained("base/flux")
AutoModel.from_pretrained("facebook/tiny-dino")
pipe(prompt="a photo", image=small.resize((64, 48)), num_inference_steps=2, max_sequence_length=32)
answer(None)
"""

FILE = """
pipe = DiffusionPipeline.from_pretrained(f"{folder}/flux", custom_pipeline=pipeline_file, trust_remote_code=True)
assert pipe.dino_projector is None and pipe.dino_encoder is None
plain = upscale(pipe, dino_conditioning_scale=1.0)
pipe.load_dino_projector(f"{folder}/with-encoder")
digests = with_and_without_dino(pipe)
assert digests[1] == plain, "a scale of 0 is not the pipeline without a projector"
pipe.save_pretrained(f"{folder}/saved")
pipe.unload_dino_projector()
assert upscale(pipe, dino_conditioning_scale=1.0) == plain
answer(digests)
"""

FOLDER = """
pipe = DiffusionPipeline.from_pretrained(
    f"{folder}/flux", custom_pipeline=f"{folder}/projector", trust_remote_code=True
)
pipe.load_dino_projector(f"{folder}/projector", dino_encoder=f"{folder}/tiny-dino")
answer(with_and_without_dino(pipe))
"""

HUB = """
pipe = DiffusionPipeline.from_pretrained("base/flux", custom_pipeline="user/flux-dino-tile", trust_remote_code=True)
pipe.load_dino_projector("user/flux-dino-tile")
answer(with_and_without_dino(pipe))
"""

# diffusers asks the Hub for the commit of `custom_pipeline="user/repo"` even when offline, so its folder is named.
OFFLINE = """
code = os.path.dirname(hf_hub_download("user/flux-dino-tile", "pipeline.py"))
pipe = DiffusionPipeline.from_pretrained("base/flux", custom_pipeline=code, trust_remote_code=True)
pipe.load_dino_projector("user/flux-dino-tile")
answer(with_and_without_dino(pipe))
"""

# With its own prompt embeddings a projector makes the text encoders superfluous.
NO_TEXT_ENCODER = """
absent = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
pipe = DiffusionPipeline.from_pretrained(
    "base/flux", custom_pipeline="user/with-prompt", trust_remote_code=True, **absent
)
no_prompt = {"prompt": None, "max_sequence_length": None}
refusals = {"no embeds": refusal(upscale, pipe, **no_prompt)}
pipe.load_dino_projector("user/with-prompt")
digests = with_and_without_dino(pipe, **no_prompt)
pipe.save_pretrained(f"{folder}/saved-with-prompt")
pipe = pipe.__class__.from_pretrained(f"{folder}/saved-with-prompt")
pipe.load_dino_projector(f"{folder}/saved-with-prompt")
assert with_and_without_dino(pipe, **no_prompt) == digests, "the saved pipeline is another one"
answer(refusals | {"a prompt": refusal(upscale, pipe)})
"""

# `main` of that repository holds code that does not run and pickled weights; both must come from v2.
PRIVATE = """
pipe = DiffusionPipeline.from_pretrained(
    "base/flux", custom_pipeline="user/secret", custom_revision="v2", trust_remote_code=True
)
pipe.load_dino_projector("user/secret", revision="v2")
answer(with_and_without_dino(pipe))
"""

# A download that is cut goes on where it was; a file that is damaged on the Hub is an error that names it.
DAMAGED = """
pipe = DiffusionPipeline.from_pretrained("base/flux", custom_pipeline="user/flux-dino-tile", trust_remote_code=True)
refusals = {name: refusal(pipe.load_dino_projector, f"user/{name}") for name in ("truncated", "corrupt", "no-json")}
assert pipe.dino_projector is None and pipe.dino_encoder is None, "a damaged projector is half loaded"
pipe.load_dino_projector("user/flux-dino-tile")
answer([refusals, with_and_without_dino(pipe)])
"""

REFUSALS = """
load = DiffusionPipeline.from_pretrained
refusals = {
    "code in a file": refusal(load, f"{folder}/flux", custom_pipeline=pipeline_file),
    "code in a folder": refusal(load, f"{folder}/flux", custom_pipeline=f"{folder}/projector"),
    "code on the hub": refusal(load, "base/flux", custom_pipeline="user/flux-dino-tile"),
    "code for a saved pipeline": refusal(load, f"{folder}/saved", custom_pipeline=pipeline_file),
    "code for a pipeline on the hub": refusal(load, "user/complete", custom_pipeline="user/flux-dino-tile"),
}
pipe = load(f"{folder}/flux", custom_pipeline=pipeline_file, trust_remote_code=True)
refusals |= {
    "no token": refusal(pipe.load_dino_projector, "user/secret"),
    "wrong token": refusal(pipe.load_dino_projector, "user/secret", token="hf_wrong"),
    "gated": refusal(pipe.load_dino_projector, "user/gated"),
    "no repository": refusal(pipe.load_dino_projector, "user/nowhere"),
    "no branch": refusal(pipe.load_dino_projector, "user/flux-dino-tile", revision="nowhere"),
    "no projector": refusal(pipe.load_dino_projector, "base/flux"),
    "no projector on disk": refusal(pipe.load_dino_projector, f"{folder}/flux"),
    "pickled": refusal(pipe.load_dino_projector, "user/pickled"),
    "pickled on disk": refusal(pipe.load_dino_projector, f"{folder}/pickled"),
    "pickled encoder": refusal(pipe.load_dino_projector, "user/pickled-encoder"),
}
assert pipe.dino_projector is None and pipe.dino_encoder is None, "a refused projector is half loaded"
pipe.load_dino_projector("user/secret", revision="v2", token="hf_secret")
answer([refusals, with_and_without_dino(pipe)])
"""

REFUSED = {
    "code in a file": "ValueError.*trust_remote_code=True",
    "code in a folder": "ValueError.*trust_remote_code=True",
    "code on the hub": "ValueError.*trust_remote_code=True",
    "code for a saved pipeline": "ValueError.*trust_remote_code=True",
    "code for a pipeline on the hub": "ValueError.*trust_remote_code=True",
    "no token": "user/secret.*private.*token",
    "wrong token": "user/secret.*Invalid credentials",
    "gated": "user/gated.*private.*token",
    "no repository": "user/nowhere.*private.*token",
    "no branch": "user/flux-dino-tile.*nowhere|nowhere.*user/flux-dino-tile",
    "no projector": "base/flux.*config.json",
    "no projector on disk": "config.json.*/flux",
    "pickled": "user/pickled.*diffusion_pytorch_model.safetensors",
    "pickled on disk": "diffusion_pytorch_model.safetensors.*/pickled",
    "pickled encoder": "facebook/pickled-dino.*model.safetensors",
}

INSTALLED = """
pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--root-user-action=ignore"]
offline = ["--no-index", "--no-deps", "--no-build-isolation"]
subprocess.run([*pip, *offline, "--target", f"{folder}/site", f"{folder}/source"], check=True)
sys.path.insert(0, f"{folder}/site")
from pipeline_flux_dino_tile import FluxDinoTilePipeline
assert sys.modules["pipeline_flux_dino_tile"].__file__ == f"{folder}/site/pipeline_flux_dino_tile.py"
pipe = FluxDinoTilePipeline.from_pretrained(f"{folder}/saved")
assert pipe.dino_projector is None and pipe.dino_encoder is None
pipe.load_dino_projector(f"{folder}/saved")
answer(with_and_without_dino(pipe))
"""

SAVED = """
pipe = DiffusionPipeline.from_pretrained({saved}, custom_pipeline={code}, trust_remote_code=True)
assert pipe.dino_projector is None and pipe.dino_encoder is None
pipe.load_dino_projector({saved})
assert pipe.__class__.__name__ == "FluxDinoTilePipeline"
assert sys.modules[pipe.__class__.__module__].__file__.startswith(os.environ["HF_HOME"])
answer(with_and_without_dino(pipe))
"""

DAMAGE = {
    "truncated": "OSError.*dino_projector/diffusion_pytorch_model.safetensors",
    "corrupt": "OSError.*dino_projector/diffusion_pytorch_model.safetensors",
    "no-json": "OSError.*dino_projector.*config.json",
}

OFF = {"HF_HUB_OFFLINE": "1"}

# In the order in which they start.
ROUTES = {
    "file": Route(FILE),
    "stock": Route(STOCK),
    "hub": Route(HUB),
    "stock offline": Route(STOCK, after="stock", home="stock", environment=OFF),
    "offline": Route(OFFLINE, after="hub", home="hub", environment=OFF),
    "folder": Route(FOLDER),
    "no text encoder": Route(NO_TEXT_ENCODER),
    "private, by revision": Route(PRIVATE, environment={"HF_TOKEN": "hf_secret"}),
    "damaged": Route(DAMAGED),
    "installed": Route(INSTALLED, after="file"),
    "saved, by file": Route(SAVED.format(saved="f'{folder}/saved'", code="pipeline_file"), after="file"),
    "saved, by folder": Route(SAVED.format(saved="f'{folder}/saved'", code="f'{folder}/projector'"), after="file"),
    "saved, on the hub": Route(SAVED.format(saved="'user/complete'", code="'user/flux-dino-tile'"), after="file"),
    # transformers would ask a service on the internet to convert the encoder's pickled weights.
    "refusals": Route(REFUSALS, after="file", environment={"DISABLE_SAFETENSORS_CONVERSION": "1"}),
}
SAME_AS_FILE = ["hub", "offline", "folder", "private, by revision", "installed", "saved, by file"]
SAME_AS_FILE += ["saved, by folder", "saved, on the hub"]


def save_projector(folder: Path, repo: str, dino_model: str | None, num_prompt_tokens: int = 0) -> None:
    """Saves a repository with the code and a small random projector, the same one every time."""
    torch.manual_seed(4)
    projector = DinoProjector(
        in_dim=DINO_DIM,
        out_dim=JOINT_ATTENTION_DIM,
        hidden_dim=32,
        token_grid=4,
        layers=[-1],
        position_mode="zero",
        dino_model=dino_model,
        num_prompt_tokens=num_prompt_tokens,
        pooled_dim=POOLED_DIM,
    )
    for buffer in projector.buffers():
        buffer.normal_()
    projector.save_pretrained(folder / repo / "dino_projector")
    shutil.copy(folder / PIPELINE_FILE, folder / repo / "pipeline.py")


def pickle_weights(safetensors_file: Path, name: str) -> None:
    torch.save(load_file(safetensors_file), safetensors_file.with_name(name))
    safetensors_file.unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder with all the repositories, and `source`, a copy of the project to install from."""
    folder = tmp_path_factory.mktemp("loading")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "samples", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)

    FluxImg2ImgPipeline(**tiny_components()).save_pretrained(folder / "flux")
    tiny_dino().save_pretrained(folder / "tiny-dino")

    save_projector(folder, "projector", "facebook/tiny-dino")
    save_projector(folder, "with-encoder", None)
    shutil.copytree(folder / "tiny-dino", folder / "with-encoder" / "dino_encoder")
    save_projector(folder, "with-prompt", "facebook/tiny-dino", num_prompt_tokens=7)

    save_projector(folder, "pickled", "facebook/tiny-dino")
    pickle_weights(
        folder / "pickled" / "dino_projector" / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
    )
    (folder / "pickled" / "pipeline.py").write_text("raise SystemError('code of another revision')\n")
    for name in ("truncated", "corrupt", "no-json"):
        shutil.copytree(folder / "projector", folder / name)
    weights = [folder / name / "dino_projector" / SAFETENSORS_WEIGHTS_NAME for name in ("truncated", "corrupt")]
    content = weights[0].read_bytes()
    weights[0].write_bytes(content[: len(content) // 2])
    weights[1].write_bytes(bytes([255]) * 64 + content[64:])
    (folder / "no-json" / "dino_projector" / "config.json").write_text("{")
    save_projector(folder, "pickled-encoder", "facebook/pickled-dino")
    shutil.copytree(folder / "tiny-dino", folder / "pickled-dino")
    pickle_weights(folder / "pickled-dino" / "model.safetensors", "pytorch_model.bin")
    return folder


def run(route: Route, name: str, folder: Path) -> Outcome:
    """Runs the route's script in a process that knows nothing of this one, with a Hub of its own."""
    inherited = {
        variable: value
        for variable, value in os.environ.items()
        if not variable.startswith(("HF_", "HUGGING", "DIFFUSERS_", "TRANSFORMERS_", "PYTHON", "COV_"))
    }
    repos = {
        "base/flux": folder / "flux",
        "facebook/tiny-dino": folder / "tiny-dino",
        "facebook/pickled-dino": folder / "pickled-dino",
        "user/flux-dino-tile": folder / "projector",
        "user/with-prompt": folder / "with-prompt",
        "user/secret": {"main": folder / "pickled", "v2": folder / "with-encoder"},
        "user/gated": folder / "projector",
        "user/pickled": folder / "pickled",
        "user/pickled-encoder": folder / "pickled-encoder",
        "user/complete": folder / "saved",
        **{f"user/{damaged}": folder / damaged for damaged in DAMAGE},
    }
    with HubServer(repos, private={"user/secret": "hf_secret"}, gated={"user/gated": "hf_gated"}) as hub:
        if name == "damaged":
            hub.cut("GET", "flux-dino-tile.*safetensors")
        home = folder / "homes" / (route.home or name)
        own = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        # As many processes as cores run at a time, each on one.
        own |= {"OMP_NUM_THREADS": "1", **route.environment}
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + route.script, str(folder), str(folder / PIPELINE_FILE)],
            cwd=folder,
            env=inherited | own,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    # Progress bars move the cursor up, which puts the movement before the next line, whatever that is.
    stderr = done.stderr.replace("\x1b[A", "").replace(hub.url, "HF_ENDPOINT")
    # Where the stock pipeline prints a line about a repository, it is not ours to explain.
    stderr = re.sub(r"\b(base|facebook|user)/[\w-]+", "REPO", stderr)
    lines = {line.strip() for line in re.split(r"[\r\n]", stderr) if not re.search(r"\d+%\|.*\|", line)} - {""}
    return Outcome(json.loads(done.stdout.splitlines()[-1]), lines, hub)


@pytest.fixture(scope="module")
def outcome(folder) -> Callable[[str], Outcome]:
    """Gives the outcome of a route by name. All of them start together, as many at a time as there are cores."""

    def run_in_turn(name: str) -> Outcome:
        if ROUTES[name].after is not None:
            futures[ROUTES[name].after].result()
        return run(ROUTES[name], name, folder)

    futures = {}
    pool = ThreadPoolExecutor(os.cpu_count())
    for name in ROUTES:
        futures[name] = pool.submit(run_in_turn, name)
    yield lambda name: futures[name].result()
    pool.shutdown(cancel_futures=True)


def test_file_as_custom_pipeline(outcome):
    assert len(outcome("file").answer) == 2


@pytest.mark.parametrize("name", SAME_AS_FILE)
def test_every_route_gives_the_same_picture(outcome, name):
    """Bit for bit: in particular, a saved pipeline gives what it gave before it was saved."""
    assert outcome(name).answer == outcome("file").answer


@pytest.mark.parametrize("name", ["file", "no text encoder", *SAME_AS_FILE])
def test_prints_nothing_to_explain_away(outcome, name):
    unexplained = outcome(name).lines - outcome("stock").lines - outcome("stock offline").lines
    assert not unexplained, "\n".join(sorted(unexplained))


def test_hub_downloads(outcome):
    hub = outcome("hub").hub
    weights = "dino_projector/diffusion_pytorch_model.safetensors"
    assert hub.downloads("user/flux-dino-tile") == {"pipeline.py", "dino_projector/config.json", weights}
    assert hub.downloads("facebook/tiny-dino") == {"config.json", "model.safetensors"}


def test_offline(outcome):
    assert outcome("offline").hub.requests == []


def test_no_text_encoder(outcome):
    refusals = outcome("no text encoder").answer
    refusal = "ValueError: `prompt` must be None without the two text encoders, but is {!r}."
    assert refusals == {"no embeds": refusal.format(""), "a prompt": refusal.format("a photo")}
    hub = outcome("no text encoder").hub
    weights = "dino_projector/diffusion_pytorch_model.safetensors"
    assert hub.downloads("user/with-prompt") == {"pipeline.py", "dino_projector/config.json", weights}
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.downloads("base/flux")
    assert not [path for path in hub.downloads("base/flux") if path.startswith(("text_encoder", "tokenizer"))]


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(outcome, case):
    refusals, _ = outcome("refusals").answer
    assert re.search(REFUSED[case], refusals[case], re.DOTALL), refusals[case]


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(outcome, case):
    refusals, _ = outcome("damaged").answer
    assert re.search(DAMAGE[case], refusals[case], re.DOTALL), refusals[case]


def test_a_download_that_is_cut_goes_on(outcome):
    damaged = outcome("damaged")
    _, digests = damaged.answer
    assert digests == outcome("file").answer
    paths = [path for method, path in damaged.hub.requests if method == "GET" and "flux-dino-tile" in path]
    assert sum("safetensors" in path for path in paths) == 2


def test_private_projector(outcome):
    """Its token and its revision reach the encoder in the same repository too."""
    _, with_token = outcome("refusals").answer
    assert with_token == outcome("file").answer


def test_nothing_pickled_is_downloaded(outcome):
    for name in ROUTES:
        paths = [path for method, path in outcome(name).hub.requests if method == "GET"]
        assert not [path for path in paths if path.endswith((".bin", ".pt", ".pth", ".ckpt"))], name


def test_saved_files(outcome, folder):
    outcome("file")
    index = json.loads((folder / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxDinoTilePipeline"
    # diffusers loads no class of another library: these lie beside, for `load_dino_projector`.
    assert index["dino_encoder"] == index["dino_projector"] == [None, None]
    for part, name in {"dino_encoder": "model", "dino_projector": "diffusion_pytorch_model"}.items():
        assert {path.name for path in (folder / "saved" / part).iterdir()} == {"config.json", f"{name}.safetensors"}
    suffixes = {path.suffix for path in (folder / "saved").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".py", ".safetensors"}


def test_a_saved_model_brings_its_defaults(tmp_path):
    defaults = {"default_start_sigma": 0.1, "default_tile_size": 80, "default_vae_residual": True}
    FluxDinoTilePipeline(**tiny_components(), **defaults).save_pretrained(tmp_path)
    pipe = FluxDinoTilePipeline.from_pretrained(tmp_path)
    assert pipe.get_default_settings()[2] == 0.1
    assert pipe.get_default_settings(start_sigma=0.2)[2] == 0.2
    assert pipe.get_default_settings(strength=0.5)[2] is None
    sizes = [(plan.tile_height, plan.tile_width) for plan in (pipe.plan_tiles(96, 32), pipe.plan_tiles(96, 128, 96))]
    assert sizes == [(80, 32), (96, 96)]
    call = {"image": Image.new("RGB", (48, 48)), "upscale_factor": 2, "tile_overlap": 16, "prompt": "a photo"}
    pictures = [
        np.asarray(pipe(**call, generator=torch.Generator().manual_seed(0), **options).images[0])
        for options in (
            {},
            {"start_sigma": 0.1, "tile_size": 80, "vae_residual": True},
            {"start_sigma": 0.2},
            {"vae_residual": False},
        )
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[3])
    # A default does not ask for pixels where a call has none.
    assert pipe(**call, output_type="latent").images.shape == (1, 36, 16)
