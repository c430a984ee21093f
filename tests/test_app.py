"""The page of scripts/app.py: what its buttons do, and a person's way through it in a headless Chromium."""

import os
import re
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import app
import pytest
from huggingface_hub import SpaceCard
from packaging.version import Version
from PIL import Image, ImageChops

from flux_dino_tile.records import check_photo, find_photo, read_record
from tiny_models import ROOT, save_tiny_pipeline


gradio = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    save_tiny_pipeline(folder / "tiny")
    Image.open(ROOT / "samples" / "photo.jpg").resize((48, 64)).save(folder / "photo.jpg", exif=Image.Exif())
    return folder


@pytest.fixture(scope="module")
def page(folder):
    options = ["--model", str(folder / "tiny"), "--steps", "2", "--tile-size", "64", "--tile-overlap", "16"]
    own, settings = app.parse([*options, "--port", "0", "--max-megapixels", "0.05"])
    return app.Page(*app.load_flux(settings), own.max_megapixels)


@pytest.fixture(scope="module")
def url(page):
    """The page, served; it takes files of up to 1 MB."""
    own, _ = app.parse(["--model", "a/b", "--port", "0", "--max-upload", "1"])
    served = app.build_app(page)
    _, url, _ = app.launch(served, own, prevent_thread_lock=True, quiet=True)
    yield url
    served.close()


def test_tiles_are_drawn_before_the_run(page, folder):
    view, text = page.plan(str(folder / "photo.jpg"), 2)
    assert text == "96 x 128 px in 6 tiles (2 across, 3 down) of 64 x 64 px"
    assert view.size == (48, 64) and ImageChops.difference(view, Image.open(folder / "photo.jpg")).getbbox()
    assert page.plan(None, 2) == (None, "")


def test_suspects_are_red(page):
    plan = page.pipe.plan_tiles(128, 96, 64, 16)
    plain = Image.new("RGB", (96, 128), "blue")
    red = (255, 32, 32)
    colors = {color for _, color in app.draw_tiles(plain, plan, []).getcolors()}
    assert red not in colors and (255, 255, 255) in colors
    view = app.draw_tiles(plain, plan, [plan[0]])
    assert view.getpixel((0, 0)) == red and view.getpixel((95, 127)) == (255, 255, 255)


def test_enlarge(page, folder, tmp_path):
    (before, after), tiles, text, path = page.enlarge(str(folder / "photo.jpg"), 2, 0.6, 0.35, 0, "", tmp_path)
    result = Image.open(path)
    assert Path(path).name == "photo_x2_flux.png"
    assert before.size == after.size == tiles.size == result.size == (96, 128)
    assert ImageChops.difference(after, result.convert("RGB")).getbbox() is None
    record = read_record(Path(path))
    assert record["dino_strength"] == 0.6
    # What `upscale.py --redo` looks for.
    shutil.copy(folder / "photo.jpg", tmp_path)
    photo = find_photo(Path(path), record, None)
    check_photo(record, photo, Image.open(photo))
    assert text.startswith("96 x 128 px in 6 tiles") and "similarity to the photo is" in text
    again = page.enlarge(str(folder / "photo.jpg"), 2, 0.0, 0.35, 0, "", tmp_path)[0][1]
    assert ImageChops.difference(after, again).getbbox(), "the DINO strength does nothing"


def test_too_large_a_result_is_refused_before_the_work(page, folder):
    with pytest.raises(ValueError, match=r"384 x 512 px is more than the 0\.05 megapixels"):
        page.plan(str(folder / "photo.jpg"), 8)


def test_too_large_a_file_is_refused(url, tmp_path):
    client = pytest.importorskip("gradio_client")
    Image.effect_noise((1200, 1200), 100).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 1e6
    remote = client.Client(url, verbose=False)
    with pytest.raises(Exception, match=r"(?i)size|large"):
        remote.predict(client.handle_file(str(tmp_path / "large.png")), 2, 0.6, 0.3, 0, "", api_name="/enlarge")


def test_errors_reach_the_page(url, tmp_path):
    client = pytest.importorskip("gradio_client")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    remote = client.Client(url, verbose=False)
    with pytest.raises(Exception, match="is not an image"):
        remote.predict(client.handle_file(str(tmp_path / "broken.png")), 2, 0.6, 0.3, 0, "", api_name="/enlarge")


@pytest.mark.parametrize("mode", ["LA", "RGBA", "L"])
def test_the_result_is_as_transparent_and_grey_as_the_photo(page, tmp_path, mode):
    """As on the command line."""
    photo = Image.new(mode, (24, 16), 200 if mode == "L" else None)
    photo.paste(Image.new(mode, (8, 8), "white"), (4, 4))
    photo.save(tmp_path / "photo.png")
    (_, after), *_, path = page.enlarge(str(tmp_path / "photo.png"), 2, 0.6, 0.35, 0, "", tmp_path)
    result = Image.open(path)
    assert result.mode == after.mode == mode
    if mode != "L":
        expected = photo.getchannel("A").resize(result.size, Image.Resampling.BICUBIC)
        assert result.getchannel("A").tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": None}, "the seed is empty: give a number"),
        ({"scale": None}, "the scale is empty"),
        ({"strength": None}, "the DINO strength is empty"),
        ({"sigma": None}, "the noise at the start is empty"),
    ],
)
def test_a_cleared_field_is_named(page, folder, tmp_path, fields, message):
    filled_in = {"scale": 2, "strength": 0.6, "sigma": 0.35, "seed": 0, "prompt": "", "folder": tmp_path}
    with pytest.raises(app.EXPECTED_ERRORS, match=message):
        page.enlarge(str(folder / "photo.jpg"), **{**filled_in, **fields})


def components(page):
    config = app.build_app(page).get_config_file()
    return {part["props"].get("label"): part["props"] for part in config["components"]}


def test_the_page_begins_with_the_options(page):
    options = ["--dino-strength", "0.4", "--prompt", "a dog", "--start-sigma", "0.2", "--seed", "7"]
    _, settings = app.parse(["--model", "a/b", *options])
    begun = components(app.Page(page.pipe, settings, 1.0))
    assert begun["DINO strength (0 is off)"]["value"] == 0.4
    assert begun["Prompt, optional"]["value"] == "a dog"
    assert begun["Noise at the start: how much is invented"]["value"] == 0.2
    assert begun["Seed"]["value"] == 7
    begun = components(page)
    assert (begun["DINO strength (0 is off)"]["value"], begun["Prompt, optional"]["value"]) == (1.0, "")


def test_a_compiled_page_keeps_to_one_tile_size(page, folder):
    for options, tile_size in (
        (["--compile"], 1024),
        (["--compile", "--tile-size", "64", "--tile-overlap", "16"], 64),
        ([], None),
    ):
        _, settings = app.parse(["--model", "a/b", *options])
        compiled = app.Page(page.pipe, settings, 1.0)
        assert compiled.settings.tile_size == tile_size
        assert compiled.plan(str(folder / "photo.jpg"), 2)[1].endswith(
            "96 x 128 px" if tile_size != 64 else "64 x 64 px"
        )


@pytest.mark.parametrize(
    "options",
    [
        *(["--resume"], ["--checkpoint-steps", "2"], ["--worker-timeout", "9"], ["--scale", "2"], ["--plan"]),
        *(["--overwrite"], ["--summary", "a.json"], ["--allow-large-input"], ["-o", "a.png"], ["a.png"]),
    ],
)
def test_options_that_the_page_cannot_follow_are_refused(capsys, options):
    assert app.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"app.py: error: unrecognized arguments: {' '.join(options)}"


def test_the_environment_names_the_models(monkeypatch):
    monkeypatch.setenv("MODEL", "owner/model")
    monkeypatch.setenv("PROJECTOR", "owner/projector")
    assert app.parse([])[1].model == "owner/model"
    settings = app.parse(["--model", "other/model"])[1]
    assert (settings.model, settings.projector) == ("other/model", "owner/projector")


def test_one_picture_at_a_time(page):
    config = app.build_app(page).get_config_file()
    assert [dependency["queue"] for dependency in config["dependencies"]] == [True] * 3
    limits = {function.concurrency_limit for function in app.build_app(page).fns.values()}
    assert limits == {1}


def test_usage_errors_are_one_line(capsys):
    assert app.main(["--model", "nowhere at all"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("app.py: error: --model nowhere at all")


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-component-update")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1400,1400")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


# What the page says of the progress, as it comes and goes.
WATCH_PROGRESS = """
window.seen = [];
new MutationObserver(() => document.querySelectorAll('.progress-level-inner, .progress-text')
    .forEach(element => window.seen.push(element.innerText)))
    .observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def wait_for(driver, script: str, seconds: float = 60):
    """The value of the JavaScript expression, once it is truthy."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.1)
    return value


def test_a_person_enlarges_a_photo(url, browser, folder, tmp_path):
    browser.get(url)
    wait_for(browser, "document.querySelector('#photo input[type=file]')")
    browser.find_element("css selector", "#photo input[type=file]").send_keys(str(folder / "photo.jpg"))
    # Four times is what the page begins with.
    wait_for(browser, "document.querySelector('#text').innerText.includes('192 x 256 px in ')")
    wait_for(browser, "document.querySelector('#tiles img')")
    browser.execute_script(WATCH_PROGRESS)
    browser.find_element("css selector", "#run").click()
    wait_for(browser, "document.querySelectorAll('#slider img').length >= 2")
    wait_for(browser, "document.querySelector('#text').innerText.includes('similarity')")
    assert [text for text in browser.execute_script("return window.seen") if re.search(r"\d+/\d+ steps", text)]
    pictures = wait_for(
        browser,
        "[...document.querySelectorAll('#slider img')].every(i => i.naturalWidth) &&"
        " [...document.querySelectorAll('#slider img')].map(i => [i.src, i.naturalWidth, i.naturalHeight])",
    )
    assert len({source for source, *_ in pictures}) == 2 and all(size == [192, 256] for _, *size in pictures)
    # The slider moves what is seen of the pictures.
    before = browser.find_element("css selector", "#slider").screenshot_as_png
    action_chains = pytest.importorskip("selenium.webdriver").ActionChains
    handle = browser.find_element("css selector", "#slider [data-testid=slider] .icon-wrap")
    action_chains(browser).drag_and_drop_by_offset(handle, 60, 0).perform()
    after = browser.find_element("css selector", "#slider").screenshot_as_png
    assert ImageChops.difference(*(Image.open(BytesIO(png)).convert("RGB") for png in (before, after))).getbbox()
    browser.find_element("css selector", "#download").click()
    downloads = tmp_path / "downloads"
    end = time.monotonic() + 30
    while not list(downloads.glob("*.png")):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert Image.open(downloads / "photo_x4_flux.png").size == (192, 256)
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


# ---- As a Space ----------------------------------------------------------------------------------------------------


def space_blocks():
    guide = (ROOT / "docs" / "app.md").read_text()
    patterns = (r"```yaml\n(.*?)```", r"```python\n(.*?)```", r"```\n(torch.*?)```")
    return [re.search(pattern, guide, re.DOTALL)[1] for pattern in patterns]


def test_space_metadata():
    metadata, *_ = space_blocks()
    data = SpaceCard(f"---\n{metadata}---\n").data
    assert (data.sdk, data.license) == ("gradio", "apache-2.0")
    assert data.app_file == "app.py"
    assert Version(data.sdk_version) >= Version("6") and len(data.short_description) <= 60


def test_the_file_that_a_space_runs(tmp_path):
    """In the project's folder as it is pushed, without installing it."""
    for name in ("flux_dino_tile", "dino_projector", "scripts", "pipeline_flux_dino_tile.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "app.py").write_text(space_blocks()[1])
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "app.py", "--model", "nowhere at all"]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("app.py: error: --model nowhere at all")


def test_space_requirements():
    """What pyproject.toml asks for, with the extra `flux`."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {*project["dependencies"], *project["optional-dependencies"]["flux"]}
    assert set(space_blocks()[2].split()) == expected
