"""From a trained projector to the Hub and back: files, licences, model card, trial, upload, faults, and its users.

The client is the unmodified `huggingface_hub`, pointed at a Hub on the loopback.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import push_to_hub
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from dino_projector.comparison.statistics import summarize
from dino_projector.publishing.assemble import Contents, assemble, find_licence, list_tree
from dino_projector.publishing.card import read_report
from dino_projector.publishing.hub import PublishError, Target, compare, explain, publish
from dino_projector.publishing.licences import APACHE, DINOV3, FLUX_DEV
from dino_projector.publishing.trial import try_out
from dino_projector.training.models import save_result
from hub_server import HubServer, list_files
from tiny_models import POOLED_DIM, ROOT, tiny_pipeline


SCHNELL = "black-forest-labs/FLUX.1-schnell"
DEV = "black-forest-labs/FLUX.1-dev"
TOKEN = "hf_ownersecret"
USERS = {TOKEN: "owner", "hf_strangersecret": "stranger"}
REPO = "owner/flux-dino-tile"
FACTS = {
    "steps": 2000,
    "samples": 16000,
    "options": {
        "pretrained_model_name_or_path": SCHNELL,
        "dataset_name": "someone/photos",
        "resolution": 512,
        "scale_factor": [2.0, 8.0],
        "degradation": ["mild"],
    },
    "versions": {"torch": "2.13.0"},
    "validation": {
        "validation/with_tokens": 0.5,
        "validation/without_tokens": 0.51,
        "validation/other_tokens": 0.52,
        "validation/gap_without_tokens_percent": 2.0,
        "validation/gap_other_tokens_percent": 4.0,
    },
    "validation_is_held_out": True,
}
FILES = {
    "README.md",
    "dino_encoder/config.json",
    "dino_encoder/model.safetensors",
    "dino_projector/config.json",
    "dino_projector/diffusion_pytorch_model.safetensors",
    "pipeline.py",
    "training.json",
}


def save_final(folder: Path, facts: dict) -> None:
    """What a finished training leaves, of random weights."""
    prompt = {"num_prompt_tokens": 7, "pooled_dim": POOLED_DIM}
    pipe = tiny_pipeline(dino="dinov2_with_registers", projector=prompt)
    pipe.dino_projector.prompt_embeds.normal_()
    save_result(folder, pipe, facts)


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "final"
    folder.mkdir()
    save_final(folder, FACTS)
    return folder


@pytest.fixture(scope="module")
def assembled(final, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    assemble(final, folder, REPO, Contents())
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub without repositories, and this process's client set to it."""
    store = tmp_path / "store"
    store.mkdir()
    with HubServer({}, users=USERS, store=store) as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def push(hub: HubServer, folder: Path, repo: str = REPO, token: str = TOKEN, **target):
    return publish(HfApi(hub.url, token), Target(repo, **target), folder, "Upload")


def commits(hub: HubServer) -> int:
    return sum("/commit/" in write for write in hub.writes())


# ---- Files, licences and card --------------------------------------------------------------------------------------


def test_files_of_a_projector(assembled):
    assert set(list_files(assembled)) == FILES
    assert (assembled / "pipeline.py").read_bytes() == (ROOT / "pipeline_flux_dino_tile.py").read_bytes()
    assert [line.split()[1] for line in list_tree(assembled)] == sorted(FILES)


def test_a_whole_pipeline_is_published_with_its_code(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    tiny_pipeline(dino="dinov2").save_pretrained(source)
    config = source / "dino_projector" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/home/me/run"}))
    (source / "notes.txt").write_text("not for others")
    folder.mkdir()
    assert assemble(source, folder, REPO, Contents(licence="apache-2.0")) is None
    files = list_files(folder)
    assert {"pipeline.py", "model_index.json", "vae/config.json"} <= files.keys()
    assert "notes.txt" not in files
    assert not [path for path in files if "/home/me" in (folder / path).read_bytes().decode("latin-1")]
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict()
    try_out(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipe.load_dino_projector(folder)
    assert type(pipe).__name__ == "FluxDinoTilePipeline" and pipe.dino_projector is not None


@pytest.mark.parametrize(
    ("base", "dino", "redux", "given", "licence"),
    [
        (SCHNELL, "facebook/dinov2-base", None, None, APACHE),
        (SCHNELL, "dinov2", None, "mit", "mit"),
        (DEV, "facebook/dinov2-base", None, None, FLUX_DEV),
        (SCHNELL, "facebook/dinov2-base", "black-forest-labs/FLUX.1-Redux-dev", None, FLUX_DEV),
        (SCHNELL, "facebook/dinov3-vitb16-pretrain-lvd1689m", None, None, DINOV3),
        (SCHNELL, "dinov3_vit", None, None, DINOV3),
        (DEV, "dinov3_vit", None, "flux-1-dev-non-commercial-license", FLUX_DEV),
        ("me/my-flux", "facebook/dinov2-base", None, "apache-2.0", "apache-2.0"),
        (None, "dinov2", None, "mit", "mit"),
    ],
)
def test_licence(base, dino, redux, given, licence):
    found = find_licence(base, dino, {"options": {"init_from_redux": redux}}, given)
    assert found == licence or found.id == licence


@pytest.mark.parametrize(("base", "given"), [(DEV, "apache-2.0"), ("me/my-flux", None), (None, None)])
def test_a_licence_that_does_not_follow_is_refused(base, given):
    with pytest.raises(ValueError, match="license"):
        find_licence(base, "facebook/dinov2-base", {}, given)


def test_card_of_what_was_measured(final, tmp_path, hub):
    report = tmp_path / "report.json"
    report.write_text(
        '{"psnr_with_dino": [25.5, 24, 27], "seconds": 3, "monotone": true, "effects": [0, 1],'
        ' "distance_bicubic_minus_with_dino": [0.02, 0.01, 0.03],'
        ' "distance_without_minus_with_dino": [0.001, -0.002, 0.004]}'
    )
    samples = tmp_path / "samples"
    samples.mkdir()
    shutil.copy(ROOT / "samples" / "photo.jpg", samples / "two dogs.jpg")
    contents = Contents(report=report, report_data="10 held-out photos", samples=samples, gpu_hours=8, gpu="one H100")
    folder = tmp_path / "folder"
    folder.mkdir()
    assemble(final, folder, REPO, contents)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("apache-2.0", [SCHNELL], ["someone/photos"])
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "image-to-image")
    differences = ["distance_bicubic_minus_with_dino", "distance_without_minus_with_dino"]
    assert data["metrics"] == ["psnr_with_dino", "seconds", *differences]
    first = card.data.eval_results[0]
    assert (first.metric_value, first.metric_args, first.dataset_name) == (
        25.5,
        {"interval_95": [24, 27]},
        "10 held-out photos",
    )
    assert "| psnr with dino | 25.5 | 24 to 27 |\n| seconds | 3 |  |\n" in card.text
    assert "holds 0: distance without minus with dino.\n" in card.text
    assert "(samples/two%20dogs.jpg)" in card.text and (folder / "samples" / "two dogs.jpg").is_file()
    assert "8 GPU hours on one H100" in card.text
    assert "| other tokens | 0.52000 | +4.000 % |" in card.text and "held-out photos" in card.text
    assert HfApi(hub.url)._validate_yaml(card.content) is None


def test_card_of_a_comparison(final, tmp_path, hub):
    scores = {"bicubic": {"psnr_y": {"a": 24.0, "b": 26.0}}, "DINO 0.5": {"psnr_y": {"a": 20.0, "b": 20.0}}}
    report = tmp_path / "results.json"
    report.write_text(json.dumps({"settings": {}, "means": summarize(scores), "records": []}))
    folder = tmp_path / "folder"
    folder.mkdir()
    assemble(final, folder, REPO, Contents(report=report, report_data="two photos"))
    card = ModelCard.load(folder / "README.md")
    assert "| bicubic: psnr y | 25 | 24 to 26 |\n| DINO 0.5: psnr y | 20 | 20 to 20 |\n" in card.text
    assert "No difference is shown" not in card.text
    assert card.data.metrics == ["psnr_y"]
    found = [(item.metric_type, item.metric_value, item.metric_args["setting"]) for item in card.data.eval_results]
    assert found == [("psnr_y", 25, "bicubic"), ("psnr_y", 20, "DINO 0.5")]
    assert HfApi(hub.url)._validate_yaml(card.content) is None


def test_card_claims_nothing_that_was_not_measured(tmp_path):
    folder, source = tmp_path / "folder", tmp_path / "source"
    folder.mkdir()
    source.mkdir()
    save_final(source, {})
    (source / "training.json").unlink()
    assemble(source, folder, REPO, Contents(base_model=SCHNELL))
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None and card.data.metrics is None and card.data.datasets is None
    assert "The quality of the enlarged pictures was not measured." in card.text
    assert "were not recorded" in card.text and "| data | not stated |" in card.text
    assert "validation" not in card.text and "| steps |" not in card.text
    assert not re.search(r"\n{4}|[{}]{2}|None|undefined", card.text)


def test_card_of_dev_shows_its_notice(final, tmp_path, hub):
    base = tmp_path / "dev"
    base.mkdir()
    (base / "LICENSE.md").write_text("the licence of dev")
    hub.repos[DEV] = {"main": base}
    folder = tmp_path / "folder"
    folder.mkdir()
    assemble(final, folder, REPO, Contents(base_model=DEV))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", FLUX_DEV.name)
    assert "IN NO EVENT SHALL BLACK FOREST LABS" in card.text
    assert (folder / "NOTICE").is_file() and (folder / "LICENSE.md").read_text() == "the licence of dev"
    assert HfApi(hub.url)._validate_yaml(card.content) is None


@pytest.mark.parametrize("text", ["[1]", "{}", '{"name": "text"}', "{"])
def test_a_report_without_numbers_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json"):
        read_report(tmp_path / "report.json")


def test_sources_that_are_refused(final, tmp_path):
    with pytest.raises(ValueError, match="final"):
        assemble(tmp_path, tmp_path, REPO, Contents())
    pickled = tmp_path / "pickled"
    shutil.copytree(final, pickled)
    (pickled / "dino_projector" / "more.bin").touch()
    with pytest.raises(ValueError, match=r"more\.bin is pickled"):
        assemble(pickled, tmp_path, REPO, Contents())
    (pickled / "dino_projector" / "more.bin").unlink()
    facts = FACTS | {"options": {"pretrained_model_name_or_path": "a-folder"}}
    (pickled / "training.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="--base-model"):
        assemble(pickled, tmp_path, REPO, Contents())


def test_a_folder_that_does_not_run_is_one_line(assembled, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(assembled, broken)
    (broken / "pipeline.py").write_text("raise SystemError('this is broken')\n")
    with pytest.raises(RuntimeError, match=r"^the assembled repository does not run: SystemError: this is broken$"):
        try_out(broken)


# ---- Publishing ----------------------------------------------------------------------------------------------------


def test_one_commit_and_none_where_nothing_has_changed(hub, assembled):
    published = push(hub, assembled)
    assert published.is_new and published.commit == hub.commit(REPO)
    assert hub.writes() == ["POST /api/repos/create", f"POST /api/models/{REPO}/commit/main"]
    assert hub.files(REPO, "main").keys() == FILES | {".gitattributes"}
    again = push(hub, assembled)
    assert not again.is_new and again.commit == published.commit and commits(hub) == 1


def test_what_is_gone_here_goes_there_and_what_others_added_stays(hub, assembled, tmp_path):
    push(hub, assembled)
    HfApi(hub.url, TOKEN).upload_file(path_or_fileobj=b"a", path_in_repo="mine.txt", repo_id=REPO)
    HfApi(hub.url, TOKEN).upload_file(path_or_fileobj=b"a", path_in_repo="dino_projector/old.json", repo_id=REPO)
    folder = tmp_path / "folder"
    shutil.copytree(assembled, folder)
    (folder / "training.json").write_text("{}")
    before = commits(hub)
    assert push(hub, folder).is_new and commits(hub) == before + 1
    assert hub.files(REPO, "main").keys() == FILES | {".gitattributes", "mine.txt"}


def test_private(hub, assembled):
    push(hub, assembled, is_private=True)
    assert hub.private == {REPO: TOKEN}
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        HfApi(hub.url, "hf_strangersecret").model_info(REPO)
    with pytest.raises(PublishError, match=f"{REPO} is private, not public"):
        push(hub, assembled, is_private=False)


def test_branch(hub, assembled, tmp_path):
    push(hub, assembled)
    folder = tmp_path / "folder"
    shutil.copytree(assembled, folder)
    (folder / "training.json").write_text("{}")
    push(hub, folder, branch="v2")
    main, v2 = hub.files(REPO, "main"), hub.files(REPO, "v2")
    assert {path for path in main if main[path] != v2[path]} == {"training.json"}
    assert not push(hub, folder, branch="v2").is_new


def test_a_stranger_proposes_a_change(hub, assembled, tmp_path):
    push(hub, assembled)
    folder = tmp_path / "folder"
    shutil.copytree(assembled, folder)
    (folder / "training.json").write_text("{}")
    published = push(hub, folder, token="hf_strangersecret", is_pull_request=True)
    assert published.url.endswith(f"{REPO}/discussions/1")
    assert hub.commit(REPO, "refs/pr/1") == published.commit != hub.commit(REPO)
    with pytest.raises(PublishError, match="owner/nothing does not exist"):
        push(hub, folder, "owner/nothing", is_pull_request=True)


def test_names_that_are_taken(hub, assembled, tmp_path):
    with pytest.raises(PublishError, match=r"account owner cannot publish as stranger: .*under owner, .*--create-pr"):
        push(hub, assembled, "stranger/flux-dino-tile")
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("another model")
    hub.repos["owner/other"] = {"main": other}
    with pytest.raises(PublishError, match="owner/other holds something else"):
        push(hub, assembled, "owner/other")
    assert hub.writes() == []


def test_a_change_by_others_in_between_is_not_overwritten(hub, assembled, monkeypatch):
    push(hub, assembled)
    api = HfApi(hub.url, TOKEN)
    look = api.model_info

    def look_and_be_overtaken(*args, **kwargs):
        info = look(*args, **kwargs)
        HfApi(hub.url, TOKEN).upload_file(path_or_fileobj=b"b", path_in_repo="training.json", repo_id=REPO)
        return info

    monkeypatch.setattr(api, "model_info", look_and_be_overtaken)
    with pytest.raises(PublishError, match=r"refused \(412\).*A commit has happened since"):
        publish(api, Target(REPO), assembled, "Upload")
    assert (Path(hub.repos[REPO]["main"]) / "training.json").read_bytes() == b"b"


@pytest.mark.parametrize("target", [{}, {"branch": "v2"}])
def test_a_connection_lost_in_the_commit_leaves_nothing(hub, assembled, target):
    if target:
        push(hub, assembled)
    before = {repo: dict(branches) for repo, branches in hub.repos.items()}
    hub.cut("POST", "/commit/")
    (assembled / "training.json").write_text(json.dumps(FACTS | target))
    with pytest.raises(PublishError, match=r"^the connection to the Hub failed .*same command goes on"):
        push(hub, assembled, **target)
    assert hub.repos == before
    push(hub, assembled, **target)


def test_a_commit_whose_answer_is_lost_is_kept(hub, assembled):
    hub.cut("POST", "/commit/", is_carried_out=True)
    with pytest.raises(PublishError, match=r"^the connection to the Hub failed"):
        push(hub, assembled)
    assert not push(hub, assembled).is_new and commits(hub) == 1


def test_a_hub_that_dies_half_way(hub, assembled, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut("PUT", "/storage/", times=float("inf"))
    hub.cut("DELETE", "/api/repos/", times=float("inf"))
    with pytest.raises(PublishError, match=f"^the connection to the Hub failed .*{REPO} may have been made") as error:
        push(hub, assembled)
    assert "\n" not in str(error.value)
    hub.cuts.clear()
    assert push(hub, assembled).is_new


def test_an_upload_that_is_cut_once_goes_on(hub, assembled, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut("PUT", "/storage/")
    hub.cut("GET", "/storage/")
    assert push(hub, assembled).is_new


def test_what_arrived_is_compared(hub, assembled, tmp_path):
    published = push(hub, assembled)
    changed = tmp_path / "changed"
    shutil.copytree(assembled, changed)
    weights = changed / "dino_projector" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"dino_projector/diffusion_pytorch_model\.safetensors is not on the Hub"):
        compare(HfApi(hub.url, TOKEN), REPO, published.commit, changed)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "not logged in to the Hub: log in with `hf auth login`"),
        ("hf_unknownsecret", "the Hub does not accept the token"),
        ("hf_secret\nsecret", "Illegal header value"),
    ],
)
def test_tokens(hub, assembled, monkeypatch, token, message):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(PublishError, match=message) as error:
        publish(HfApi(hub.url, token), Target(REPO), assembled, "Upload")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert hub.writes() == []


def test_the_token_is_cut_out_of_every_message():
    error = RuntimeError(f"cannot send {TOKEN}")
    assert explain(error, TOKEN) == "cannot send <token>"


# ---- Command line --------------------------------------------------------------------------------------------------


def test_wrong_usage(final, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "nothing"), REPO], "no such folder"),
        ([str(final), "no-owner"], "must be owner/name"),
        ([str(final), REPO, "--report", "a.json"], "--report and --report-data go together"),
        ([str(final), REPO, "--credits", "a.md"], "--credits a.md: no such file"),
        ([REPO], "give either a folder or --demo"),
        ([str(final), REPO, "--demo"], "give either a folder or --demo"),
        ([str(final), REPO, "--private", "--public"], "not allowed with"),
    ):
        assert push_to_hub.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("push_to_hub.py: error: ") and message in line


def test_a_gated_base_is_one_line(hub, final, tmp_path, capsys):
    base = tmp_path / "dev"
    base.mkdir()
    (base / "LICENSE.md").write_text("the licence of dev")
    hub.repos[DEV], hub.gated[DEV] = {"main": base}, "hf_another"
    assert push_to_hub.main([str(final), REPO, "--base-model", DEV]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{DEV} is gated" in line and f"https://huggingface.co/{DEV}" in line
    assert hub.writes() == []


def test_dry_run_shows_files_and_card_and_sends_nothing(hub, final, capsys, monkeypatch):
    tried = []
    monkeypatch.setattr("dino_projector.publishing.trial.try_out", lambda *arguments: tried.append(arguments))
    assert push_to_hub.main([str(final), REPO, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert all(path in output for path in FILES) and f"# {REPO}" in output and "license: apache-2.0" in output
    assert len(tried) == 1 and "nothing was sent" in output
    assert hub.requests == []


def test_the_card_in_this_repository_is_that_of_the_embedded_checkpoint(tmp_path, monkeypatch):
    """By the command of docs/publishing.md, which brings it up to date."""
    monkeypatch.setattr("dino_projector.publishing.trial.try_out", lambda *arguments: None)
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    command = re.search(r"push_to_hub\.py (--demo [^`]*--card model_card\.md)", text)[1].replace("\\\n", " ")
    arguments = shlex.split(command.replace("--card model_card.md", f"--card {tmp_path / 'card.md'}"))
    assert push_to_hub.main([*arguments, "--dry-run"]) == 0
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == (ROOT / "model_card.md").read_text(encoding="utf-8")
    card = ModelCard.load(ROOT / "model_card.md")
    assert card.data.license == "apache-2.0" and card.data.eval_results


def run_program(hub: HubServer, folder: Path, *arguments: str):
    """In a fresh process of a new user, whose client talks to the Hub on the loopback."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "COV_"))}
    own = {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=inherited | own, capture_output=True, text=True, check=False
    )
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("is_complete", [False, True])
def test_the_card_s_own_lines_use_what_the_program_published(hub, final, tmp_path, is_complete):
    tiny_pipeline(dino="dinov2" if is_complete else None).save_pretrained(tmp_path / "flux")
    hub.repos[SCHNELL] = {"main": tmp_path / "flux"}
    source = [str(tmp_path / "flux"), REPO, "--license", "mit"] if is_complete else [str(final), REPO]
    program = str(ROOT / "scripts" / "push_to_hub.py")
    output = run_program(hub, tmp_path, program, *source, "--private")
    assert output.splitlines()[-1] == f"published and compared: {hub.url}/{REPO}/commit/{hub.commit(REPO)}"
    card = (Path(hub.repos[REPO]["main"]) / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) == 6
    Image.open(ROOT / "samples" / "photo.jpg").resize((24, 32)).save(tmp_path / "photo.jpg")
    run_program(hub, tmp_path, "-c", code.replace('.to("cuda")', ""))
    assert Image.open(tmp_path / "photo_x4.png").size == (96, 128)
