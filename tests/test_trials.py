"""`upscale.py --preview` and `--redo`: which files and settings, what stays, and what is refused."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from flux_dino_tile import upscale
from flux_dino_tile.embedded import DEMO_FOLDER
from flux_dino_tile.preview import preview
from flux_dino_tile.redo import redo
from pipeline_flux_dino_tile import FluxDinoTilePipeline
from tiny_models import ROOT, save_tiny_pipeline


SCRIPT = ROOT / "scripts" / "upscale.py"
REGION = (30, 20, 16, 12)
SETTINGS = ["--scale", "2", "--steps", "1", "--tile-size", "48", "--tile-overlap", "16", "--device", "cpu"]
CALL = {"num_inference_steps": 1, "tile_size": 48, "tile_overlap": 16}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photo(mode="RGB") -> Image.Image:
    """48 x 40 px of a photo."""
    sample = Image.open(ROOT / "samples" / "photo.jpg").crop((60, 60, 156, 140)).resize((48, 40)).convert(mode)
    if mode == "RGBA":
        sample.putalpha(Image.linear_gradient("L").resize(sample.size))
    return sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_pipeline(directory)
    return directory


@pytest.fixture(scope="module")
def pipe(model):
    pipe = FluxDinoTilePipeline.from_pretrained(model)
    pipe.load_dino_projector(model)
    pipe.vae.to(memory_format=torch.channels_last)  # as the command line on the CPU, to the bit
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with `photo.png` in it."""
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")
    return tmp_path


@pytest.fixture
def result(folder, model):
    """`photo_x2_flux.png`, made from `photo.png`."""
    assert run("photo.png", "--use-flux", "--model", model, *SETTINGS) == 0
    return folder / "photo_x2_flux.png"


def run(*arguments) -> int:
    return upscale.main([str(argument) for argument in arguments])


def failure(capsys, status: int, *arguments) -> str:
    """The line on stderr of a command that must fail with this status before anything is written."""
    capsys.readouterr()
    assert run(*arguments) == status
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("upscale.py: error: ")
    return errors.removeprefix("upscale.py: error: ").rstrip()


def record_of(path) -> dict:
    return json.loads(Image.open(path).getexif()[ExifTags.Base.Software].split(" ", 2)[2])


def write_record(path, target, record: dict | None) -> None:
    """Saves a picture under another record."""
    exif = Image.Exif()
    if record is not None:
        exif[ExifTags.Base.Software] = f"flux-dino-tile 0.1.0 {json.dumps(record)}"
    Image.open(path).save(target, exif=exif)


def forbid_loading(monkeypatch) -> None:
    monkeypatch.setattr(FluxDinoTilePipeline, "from_pretrained", None)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- A preview -----------------------------------------------------------------------------------------------------


def test_a_preview_is_a_sheet_beside_the_photo(folder, model, pipe, capsys):
    command = ["photo.png", "--preview", "--model", model, *SETTINGS, "--seed", "3"]
    assert run(*command, "--start-sigma", "0.2,0.5", "--dino-strength", "0,1", "--at", "47,39", "--at", "0,0") == 0
    assert run(*command, "--start-sigma", "0.4", "--dino-strength", "0.5") == 0
    assert run(*command) == 0
    sheets = ["photo_x2_flux_preview.png", "photo_x2_flux_preview_2.png", "photo_x2_flux_preview_3.png"]
    assert names(folder) == ["photo.png", *sheets]
    for name, more in (
        (sheets[0], {"start_sigma": [0.2, 0.5], "dino_conditioning_scale": [0, 1], "at": [(47, 39), (0, 0)]}),
        (sheets[1], {"start_sigma": 0.4, "dino_conditioning_scale": 0.5}),
        (sheets[2], {}),
    ):
        generator = torch.Generator().manual_seed(3)
        shown = preview(pipe, photo(), upscale_factor=2, generator=generator, **CALL, **more)
        assert Image.open(name).tobytes() == shown.sheet.tobytes()
        assert record_of(name)["method"] == "preview"
        assert record_of(name)["start_sigma"] == pytest.approx(shown.start_sigmas)
        assert record_of(name)["dino_strength"] == shown.dino_conditioning_scales
    assert re.search(r"photo\.png -> photo_x2_flux_preview\.png \(\d+x\d+ px\)", capsys.readouterr().out)


def test_a_preview_goes_where_it_is_told_and_replaces_nothing_unasked(folder, model, capsys):
    command = ["photo.png", "--preview", "--model", model, *SETTINGS, "--dino-strength", "0", "--start-sigma", "0.3"]
    photo().save("sheet.png")
    before = (folder / "sheet.png").read_bytes()
    assert run(*command, "-o", "sheet.png") == 0
    assert "skipped, sheet.png is already there" in capsys.readouterr().out
    assert (folder / "sheet.png").read_bytes() == before
    assert run(*command, "-o", "sheet.png", "--overwrite", "--summary", "summary.json") == 0
    assert (folder / "sheet.png").read_bytes() != before
    assert json.loads((folder / "summary.json").read_text())["outcomes"] == {"done": 1}
    assert run(*command, "-o", "sheets/") == 0 and run(*command, "-o", "sheets/") == 0
    assert names(folder / "sheets") == ["photo_x2_flux_preview.png", "photo_x2_flux_preview_2.png"]


def test_a_preview_keeps_the_colour_profile_and_says_what_it_does_not_show(folder, model, capsys):
    photo("RGBA").save("photo.png", icc_profile=PROFILE)
    command = ["photo.png", "--preview", "--model", model, *SETTINGS, "--dino-strength", "0", "--start-sigma", "0.3"]
    assert run(*command, "--color-fix", "wavelet", "--skip-flat-tiles", "1") == 0
    assert "photo.png: the preview shows the colours without --color-fix" in capsys.readouterr().out
    sheet = Image.open("photo_x2_flux_preview.png")
    assert sheet.info["icc_profile"] == PROFILE and sheet.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.png", "--preview", "--at", "48,0"], "--at 48,0: outside of photo.png, which has 48x40 px"),
        (["photo.png", "--preview", "--at", "0,40"], "--at 0,40: outside of photo.png, which has 48x40 px"),
        (["photo.png", "--preview", "--at", "1"], "argument --at: must be X,Y in whole pixels, not '1'"),
        (["photo.png", "--preview", "--at", "1,-1"], "argument --at: must be X,Y in whole pixels, not '1,-1'"),
        (
            ["photo.png", "--preview", "--start-sigma", "0.2,2"],
            "--start-sigma: must be a number from 0.01 to 1, not '2'",
        ),
        (
            ["photo.png", "--preview", "--dino-strength", "1,"],
            "--dino-strength: must be a number from 0 to 100, not ''",
        ),
        (["photo.png", "--at", "1,1"], "--at needs --preview"),
        (["photo.png", "--photo", "a.png"], "--photo needs --redo"),
        (["photo.png", "--use-flux", "--dino-strength", "0,1"], "--dino-strength: several values need --preview"),
        (["photo.png", "--use-flux", "--start-sigma", "0.1,1"], "--start-sigma: several values need --preview"),
        (["photo.png", "--preview", "--plan"], "--plan does not work with --preview"),
        (["photo.png", "--preview", "--resume"], "--resume does not work with --preview"),
        (["photo.png", "--preview", "--redo", "0,0,1,1"], "--redo does not work with --preview"),
        ([".", "--preview"], "--preview takes one picture"),
        (["photo.png", "b.png", "--preview", "-o", "out/"], "--preview takes one picture"),
        (["b.png", "--preview"], "b.png: no such file or folder"),
        (["b.png", "--redo", "0,0,1,1"], "--redo b.png: No such file or directory"),
        (["photo.png", "--preview", "-o", "photo.png"], "photo.png: the output would overwrite the input"),
        (["photo.png", "--redo", "0,0,1"], "argument --redo: must be X,Y,W,H in whole pixels, not '0,0,1'"),
    ],
)
def test_wrong_usage_is_one_line_before_a_model_is_loaded(folder, capsys, monkeypatch, arguments, message):
    forbid_loading(monkeypatch)
    assert message in failure(capsys, 2, *arguments)
    assert names(folder) == ["photo.png"]


# ---- One region again ----------------------------------------------------------------------------------------------


def test_a_region_again_with_other_settings(result, model, pipe):
    assert (
        run("--redo", "30,20,16,12", result, "--model", model, "--device", "cpu", "--seed", "5", "--prompt", "x") == 0
    )
    before, again = Image.open(result), Image.open(result.with_name("photo_x2_flux_redo.png"))
    call = {"upscale_factor": 2, "prompt": "x", "generator": torch.Generator().manual_seed(5), **CALL}
    assert again.tobytes() == redo(pipe, before, REGION, photo(), **call).tobytes()
    assert again.tobytes() != before.tobytes()
    reach = (14, 4, 62, 48)
    for picture in (before, again):
        picture.load()
        picture.paste(0, reach)
    assert again.tobytes() == before.tobytes()


def test_what_was_done_is_noted_and_tries_stand_side_by_side(result, model, folder):
    command = ["--redo", "30,20,16,12", "--model", model, "--device", "cpu"]
    assert run(*command, result, "--start-sigma", "0.6") == 0
    assert run(*command, result, "--dino-strength", "0.5", "--no-vae-residual") == 0
    assert run(*command, "photo_x2_flux_redo.png", "--seed", "2", "--color-fix", "adain") == 0
    assert names(folder) == ["photo.png", "photo_x2_flux.png"] + [
        f"photo_x2_flux_redo{number}.png" for number in ("", "_2", "_3")
    ]
    first = {"region": list(REGION), "start_sigma": 0.6}
    second = {"region": list(REGION), "dino_strength": 0.5, "vae_residual": False}
    # The settings are those of the first run again.
    third = {"region": list(REGION), "seed": 2, "color_fix": "adain"}
    for number, redone in (("", [first]), ("_2", [second]), ("_3", [first, third])):
        assert record_of(f"photo_x2_flux_redo{number}.png") == {**record_of(result), "redone": redone}


@pytest.mark.parametrize(("suffix", "expected"), [(".png", ".png"), (".tif", ".tif"), (".jpg", ".png")])
def test_the_file_keeps_what_belongs_to_it(folder, model, suffix, expected):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Ann"
    photo("RGBA" if suffix != ".jpg" else "RGB").save("photo.png", exif=exif, icc_profile=PROFILE, dpi=(300, 200))
    assert run("photo.png", "-o", f"large{suffix}", "--use-flux", "--model", model, *SETTINGS) == 0
    assert run("--redo", "30,20,16,12", f"large{suffix}", "--model", model, "--device", "cpu", "--seed", "1") == 0
    before, again = Image.open(f"large{suffix}"), Image.open(f"large_redo{expected}")
    assert again.getexif()[ExifTags.Base.Artist] == "Ann"
    assert again.info["icc_profile"] == PROFILE and again.info["dpi"] == pytest.approx((300, 200), abs=0.1)
    assert again.mode == before.mode and again.size == before.size
    if suffix != ".jpg":
        assert again.getchannel("A").tobytes() == before.getchannel("A").tobytes()
    assert np.array_equal(np.asarray(again)[48:], np.asarray(before)[48:])
    assert not np.array_equal(np.asarray(again)[20:32, 30:46], np.asarray(before)[20:32, 30:46])


def test_a_format_that_changes_all_pixels_is_said(result, model, capsys):
    command = ["--redo", "30,20,16,12", result, "--model", model, "--device", "cpu", "--seed", "1"]
    assert run(*command, "-o", "out.jpg") == 0
    assert "all pixels change a little in out.jpg: only .png and .tif keep them as they are" in capsys.readouterr().out
    assert run(*command, "-o", "out.png") == 0
    assert "change a little" not in capsys.readouterr().out


def test_the_photo_may_lie_elsewhere(result, model, folder, capsys):
    (folder / "photos").mkdir()
    (folder / "photo.png").rename(folder / "photos" / "moved.png")
    command = ["--redo", "30,20,16,12", result, "--model", model, "--device", "cpu", "--seed", "1"]
    error = failure(capsys, 2, *command)
    assert error.endswith("there is no photo.png, from which it was made, beside it: --photo FILE says where it is")
    assert failure(capsys, 2, *command, "--photo", "b.png").endswith("there is no b.png")
    assert run(*command, "--photo", "photos/moved.png") == 0
    assert failure(capsys, 2, *command, "--photo", "photos/moved.png", "-o", "photos/moved.png", "--overwrite") == (
        "photos/moved.png: the output would overwrite the photo"
    )


def test_a_photo_that_is_not_the_one_of_then(result, model, folder, capsys, monkeypatch):
    forbid_loading(monkeypatch)
    command = ["--redo", "30,20,16,12", "photo_x2_flux.png", "--model", model, "--seed", "1"]
    photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("photo.png")
    message = "photo_x2_flux.png: photo.png is not the photo from which it was made, or was changed since"
    assert failure(capsys, 1, *command) == message
    # Tags may change.
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Ann"
    photo().save("photo.png", exif=exif)
    Image.open(result).resize((100, 80)).save("small.png", exif=Image.open(result).getexif())
    error = failure(capsys, 1, "--redo", "30,20,16,12", "small.png", "--model", model)
    assert error == (
        "small.png: has 100x80 px, but photo.png enlarged 2 times has 96x80 px: it was cut or resized since"
    )


@pytest.mark.parametrize("region", ["90,0,7,7", "0,74,7,7", "0,0,0,7"])
def test_a_region_that_is_not_in_the_picture(result, model, capsys, monkeypatch, region):
    forbid_loading(monkeypatch)
    error = failure(capsys, 2, "--redo", region, "photo_x2_flux.png", "--model", model)
    inside = "the region must be inside photo_x2_flux.png, which has 96x80 px, and of at least 1x1 px"
    assert error == f"--redo {region}: {inside}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "--redo a.png: does not say how it was made, as pictures of this program do while their EXIF is kept"),
        ({"redone": 1}, "--redo a.png: does not say in a list which regions were painted again"),
        ({"method": "bicubic"}, "--redo a.png: was not enlarged with FLUX"),
        ({"photo": None}, "--redo a.png: does not name its photo, as pictures of an older version: make it again"),
        ({"photo": {"name": 1, "digest": ""}}, "--redo a.png: does not name its photo"),
        (
            {"photo": {"name": "../..", "digest": ""}},
            "--redo a.png: there is no .., from which it was made, beside it",
        ),
        (
            {"photo": {"name": "a.png", "digest": ""}},
            "--redo a.png: there is no a.png, from which it was made, beside",
        ),
        ({"later": 1}, "--redo a.png: has settings that this version does not know: later"),
        ({"device": "cuda"}, "--redo a.png: has settings that this version does not know: device"),
        ({"steps": "many"}, "--redo a.png: has a setting that cannot be: argument --steps: must be a whole number"),
        ({"scale": 80}, "--redo a.png: has a setting that cannot be: argument --scale: must be a number from 1 to 8"),
        ({"seed": True}, "--redo a.png: has a setting that cannot be: argument --seed: expected one argument"),
        ({"model": "elsewhere"}, "--redo a.png: was made with the folder elsewhere: --model says where it is"),
        ({"projector": "other"}, "--redo a.png: was made with the folder other: --projector says where it is"),
    ],
)
def test_pictures_without_the_settings(result, capsys, monkeypatch, change, message):
    forbid_loading(monkeypatch)
    record = {**record_of(result), "model": "embedded", **(change or {})}
    write_record(result, "a.png", None if change is None else record)
    assert message in failure(capsys, 2, "--redo", "1,1,1,1", "a.png")


def test_another_scale_is_refused(result, model, capsys, monkeypatch):
    forbid_loading(monkeypatch)
    error = failure(capsys, 2, "--redo", "1,1,1,1", "photo_x2_flux.png", "--model", model, "--scale", "4")
    assert error == "--scale 4: photo_x2_flux.png was enlarged 2 times: leave it out"


def test_the_picture_s_regions_hold_for_a_region_again_unless_a_prompt_is_given(folder, model):
    """Its tile is the left half, which the first box is."""
    regions = [{"prompt": "a dog", "box": [0, 0, 0.5, 1]}, {"prompt": "sky", "box": [0.5, 0, 1, 1]}]
    (folder / "regions.json").write_text(json.dumps(regions))
    command = ["--use-flux", "--model", model, *SETTINGS, "--region-prompts", "regions.json"]
    assert run("photo.png", *command) == 0
    for more in ((), ("--prompt", "a dog"), ("--prompt", "sky")):
        assert run("photo_x2_flux.png", "--redo", "0,0,8,8", "--model", model, "--seed", 1, *more) == 0
    again, dog, sky = (Image.open(f"photo_x2_flux_redo{name}.png") for name in ("", "_2", "_3"))
    assert again.tobytes() == dog.tobytes() != sky.tobytes()


def test_regions_that_no_file_could_have_are_said(result, model, capsys, monkeypatch):
    write_record(result, "other.png", {**record_of(result), "region_prompts": [{"box": [0, 0, 1, 1]}]})
    forbid_loading(monkeypatch)
    message = failure(capsys, 2, "other.png", "--redo", "0,0,8,8", "--model", model)
    assert "other.png: has regions that cannot be: must be a list of entries like" in message


def test_the_sides_of_a_compiled_runs_tiles_are_taken_up(result, model):
    write_record(result, "a.png", {**record_of(result), "tile_size": [64, 48]})
    command = ["--redo", "30,20,16,12", "--model", model, "--device", "cpu", "--seed", "1"]
    assert run(*command, "a.png") == 0 and run(*command, result) == 0
    assert record_of("a_redo.png")["redone"] == [{"region": list(REGION), "seed": 1}]
    assert Image.open("a_redo.png").tobytes() != Image.open("photo_x2_flux_redo.png").tobytes()


# ---- The guide ----------------------------------------------------------------------------------------------------


def test_the_examples_of_the_guide(folder, pipe):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "preview.md").read_text(), re.DOTALL):
        exec(block, {"pipe": pipe, "small": photo()})
    assert Image.open("sheet.png").width > 4 * 192 and Image.open("again.png").size == (192, 160)


# ---- With the small checkpoint -------------------------------------------------------------------------------------


def test_preview_picture_and_a_region_again_with_the_small_checkpoint(folder):
    def upscale_py(*arguments) -> str:
        command = [sys.executable, SCRIPT, *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        return finished.stdout

    sheet = upscale_py("photo.png", "--scale", "2", "--preview", "--start-sigma", "0.03,0.2", "--dino-strength", "0,1")
    assert re.fullmatch(r"photo\.png -> photo_x2_flux_preview\.png \(\d+x\d+ px\)\n", sheet)
    assert upscale_py("photo.png", "--scale", "2", "--use-flux") == "photo.png -> photo_x2_flux.png (96x80 px)\n"
    again = upscale_py("--redo", "0,0,20,10", "photo_x2_flux.png", "--start-sigma", "0.2", "--tile-overlap", "16")
    assert again == "photo_x2_flux.png -> photo_x2_flux_redo.png (96x80 px)\n"

    pipe = FluxDinoTilePipeline.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    pipe.load_dino_projector(DEMO_FOLDER)
    call = {"upscale_factor": 2, "start_sigma": 0.2, "generator": torch.Generator().manual_seed(0)}
    before, after = Image.open("photo_x2_flux.png"), np.asarray(Image.open("photo_x2_flux_redo.png"), dtype=int)
    expected = redo(pipe, before, (0, 0, 20, 10), photo(), tile_overlap=16, **call)
    # Another number of threads may round otherwise.
    assert np.abs(after - np.asarray(expected)).max() <= 1
    assert np.array_equal(after[26:], np.asarray(before)[26:])
    assert record_of("photo_x2_flux_redo.png")["redone"] == [
        {"region": [0, 0, 20, 10], "start_sigma": 0.2, "tile_overlap": 16}
    ]
