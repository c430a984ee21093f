"""Random files, command lines and arguments: whatever comes in, only documented errors come out.

The choice is fixed (see `conftest.py`). `FUZZ_CASES=900 python -m pytest tests/test_fuzz.py` runs 900 files, 900
command lines and 450 calls; without it there are 60, 60 and 30.
"""

import contextlib
import io
import itertools
import os
import re
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from PIL import Image

from flux_dino_tile import image_files, options, upscale
from tiny_models import save_tiny_pipeline, tiny_pipeline


CASES = int(os.environ.get("FUZZ_CASES", "60"))
HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
fuzz = settings(max_examples=CASES, suppress_health_check=HEALTH)
fuzz_calls = settings(max_examples=CASES // 2, suppress_health_check=HEALTH)

FORMATS = {
    ".png": ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    ".jpg": ("JPEG", ["L", "RGB", "CMYK"]),
    ".webp": ("WEBP", ["RGB", "RGBA"]),
    ".tif": ("TIFF", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I;16", "F"]),
    ".gif": ("GIF", ["L", "P", "RGB"]),
    ".bmp": ("BMP", ["1", "L", "P", "RGB"]),
    ".avif": ("AVIF", ["RGB", "RGBA"]),
}
# An error that nobody thought of begins with its type.
UNEXPECTED = re.compile(r"\b(?!OSError)[A-Z]\w*(Error|Exception|Warning): ")


def command_line(*arguments):
    """Runs `upscale.py` in this process; returns its exit code and what it printed."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = upscale.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # --help
            code = exit.code
    return code, output.getvalue(), errors.getvalue()


# A case with everything odd at once would end at the first check.
ODD_PART = st.sampled_from(["nothing", "image", "arguments"])


# Files


@st.composite
def files(draw):
    """The suffix and the bytes of an image file, with random damage in most cases."""
    suffix = draw(st.sampled_from(list(FORMATS)))
    image_format, modes = FORMATS[suffix]
    mode = draw(st.sampled_from(modes))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if mode in ("I;16", "F"):
        image = Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        image = image.convert("L").convert(mode) if mode in ("1", "LA") else convert(image, mode)
    options = {}
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[draw(st.sampled_from([271, 274, 282, 305, 40961, 700]))] = draw(
            st.sampled_from([0, 1, 6, 8, 99, "text", 0.5])
        )
        options["exif"] = exif
    if draw(st.booleans()):
        options["icc_profile"] = draw(st.binary(max_size=40))
    if suffix in (".gif", ".webp", ".tif", ".png") and draw(st.integers(0, 4)) == 0:
        options |= {"save_all": True, "append_images": [image] * draw(st.integers(1, 3))}
    file = io.BytesIO()
    try:
        image.save(file, image_format, **options)
    except Exception:  # not every option goes with every format
        file = io.BytesIO()
        image.save(file, image_format)
    return draw(st.sampled_from(list(FORMATS))) if draw(st.integers(0, 9)) == 0 else suffix, damage(
        draw, file.getvalue()
    )


def convert(image, mode):
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert(mode)


def damage(draw, data):
    data = bytearray(data)
    for kind in draw(
        st.lists(st.sampled_from(["cut", "set", "set", "set", "insert", "remove", "repeat", "grow"]), max_size=4)
    ):
        # The beginning holds the sizes, offsets and kinds.
        at = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([32, 200, 10**6]))) - 1)))
        if kind == "cut":
            del data[at:]
        elif kind == "set":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\x80\0"])
            )
    return bytes(data)


@fuzz
@given(file=files(), target=st.sampled_from([".png", ".jpg", ".webp", ".tif"]), strips=st.booleans())
def test_files(file, target, strips):
    suffix, data = file
    limit = image_files.MAX_WHOLE_PIXELS
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flux_dino_tile.image_files.MAX_WHOLE_PIXELS", 0 if strips else limit)
        # A damaged header may tell any size below the limit for bombs: that is much work, and no error.
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)
        source, result = Path(folder, f"in{suffix}"), Path(folder, f"out{target}")
        source.write_bytes(data)
        code, output, errors = command_line(source, result, "--scale", "1.5")
        event(f"exit status {code}")
        assert sorted(path.name for path in Path(folder).iterdir()) == sorted(
            [source.name] + [result.name] * (code == 0)
        )
        if code == 0:
            assert errors == ""
            with Image.open(result) as image:
                image.load()
                assert f"({image.width}x{image.height} px)" in output
        else:
            assert (code, errors.count("\n"), output) == (1, 1, ""), (output, errors)
            assert errors.startswith(f"upscale.py: error: {source}: ")
            assert "cannot be read" in errors or not UNEXPECTED.search(errors), errors


# Command lines


VALUES = st.one_of(
    st.sampled_from(
        [
            "",
            "0",
            "1",
            "2",
            "-1",
            "16",
            "32",
            "1e9",
            "nan",
            "inf",
            "auto",
            "none",
            "cpu",
            "cuda:99",
            "a/b",
            "../..",
            "-",
        ]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_nan=True).map(str),
    st.text(max_size=6),
)
GOOD_OPTIONS = [
    *[
        ("--scale", "2"),
        ("--scale", "1.3"),
        ("--tile-size", "32"),
        ("--tile-overlap", "16"),
        ("--dino-strength", "0.5"),
    ],
    *[("--start-sigma", "0.4"), ("--guidance", "2"), ("--seed", "7"), ("--prompt", "a dog"), ("--color-fix", "adain")],
    *[("--text-tokens", "64"), ("--skip-flat-tiles", "0.5"), ("--tile-batch-size", "3"), ("--dtype", "float32")],
    *[("--summary", "summary.json"), ("--allow-large-input",), ("--offload", "none"), ("--output", "new.png")],
    *[("--resume",), ("--checkpoint-steps", "2"), ("--worker-timeout", "30")],
]
FLAGS = ("--plan", "--use-flux", "--overwrite", "--allow-large-input", "--resume")
OPTIONS = sorted(
    option
    for action in options.build_parser()._actions
    for option in action.option_strings
    if option not in ("-h", "--help", "--compile", "--quantize")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    save_tiny_pipeline(folder := tmp_path_factory.mktemp("fuzz") / "model")
    return folder


@contextlib.contextmanager
def place(model):
    """A new working folder with a photo, a broken one and a tiny model: results must not become inputs."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        Path("model").symlink_to(model)
        Path("in").mkdir()
        Image.new("RGB", (20, 12), "red").save("in/photo.png")
        Path("in/broken.jpg").write_bytes(b"no image")
        yield


def without_slash(text):
    # Outputs would land anywhere.
    return text.replace("/", "").replace("\\", "").replace("..", "") if text not in ("a/b",) else text


@fuzz
@given(
    inputs=st.sampled_from(
        [
            ["in/photo.png"],
            ["in/photo.png", "new.jpg"],
            ["in"],
            ["in", "new/"],
            ["in/broken.jpg"],
            ["gone"],
            ["in", "in"],
            [],
        ]
    ),
    good=st.lists(st.sampled_from(GOOD_OPTIONS), max_size=3),
    odd=st.lists(st.tuples(st.sampled_from(OPTIONS), VALUES.map(without_slash)), max_size=3),
    odd_part=ODD_PART,
    mode=st.sampled_from(
        [
            [],
            ["--plan"],
            ["--plan", "--model", "model"],
            ["--use-flux", "--model", "model", "--device", "cpu", "--steps", "1"],
        ]
    ),
)
def test_command_lines(model, inputs, good, odd, odd_part, mode):
    arguments = [*inputs, *mode, "--overwrite", *itertools.chain.from_iterable(good)]
    for option, value in odd if odd_part == "arguments" else []:
        # More than a few steps take minutes, and the Hub is not there.
        if option not in ("--steps", "--model", "--projector"):
            arguments += [option] if option in FLAGS else [option, value]
    with place(model):
        code, _, errors = command_line(*arguments)
    event(f"exit status {code}")
    assert code in (0, 1, 2), arguments
    assert code == 0 or errors != "", arguments
    assert not UNEXPECTED.search(errors), (arguments, errors)
    if code == 2:
        # After those of single images, where the model is what cannot be used.
        assert errors.splitlines()[-1].startswith("upscale.py: error: "), (arguments, errors)


# Calls


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.floats(), max_size=3),
    st.just({}),
)
NUMBERS = st.one_of(st.integers(-2, 70), st.floats(-0.5, 2))
OUTPUT_TYPES = ["pil", "np", "pt", "latent", "strips"]
ARGUMENTS = {
    "upscale_factor": st.one_of(st.floats(0.5, 3), ODD),
    "start_sigma": NUMBERS,
    "strength": NUMBERS,
    "num_inference_steps": st.one_of(st.integers(-1, 3), st.none(), st.text(max_size=2), st.floats(0, 2)),
    "guidance_scale": ODD,
    "tile_size": st.one_of(st.integers(0, 5).map(lambda n: 16 * n), st.tuples(NUMBERS, NUMBERS), ODD),
    "tile_overlap": st.one_of(st.integers(-1, 64), ODD),
    "tile_batch_size": st.one_of(st.integers(-1, 9), ODD),
    "dino_conditioning_scale": st.one_of(st.floats(0, 2), ODD),
    "dino_guidance_start": NUMBERS,
    "dino_guidance_end": NUMBERS,
    "vae_residual": st.one_of(st.booleans(), ODD),
    "output_type": st.one_of(st.sampled_from(OUTPUT_TYPES), ODD),
    "prompt": st.one_of(st.text(max_size=5), ODD),
    "negative_prompt": st.one_of(st.text(max_size=5), ODD),
    "true_cfg_scale": st.one_of(st.floats(0, 3), ODD),
    "num_images_per_prompt": st.one_of(st.integers(-1, 2), st.text(max_size=1), st.floats(0, 2)),
    "max_sequence_length": st.one_of(st.integers(-1, 600), ODD),
    "sigmas": st.one_of(st.lists(st.floats(0, 1), max_size=3).map(lambda x: sorted(x, reverse=True)), ODD),
    "generator": st.one_of(st.builds(torch.Generator), ODD),
    "height": st.one_of(st.integers(-1, 80), ODD),
    "width": st.one_of(st.integers(-1, 80), ODD),
    "latents": st.one_of(st.just(torch.zeros(1, 4, 16)), ODD),
    "prompt_embeds": st.one_of(st.just(torch.zeros(1, 4, 32)), ODD),
    "pooled_prompt_embeds": st.one_of(st.just(torch.zeros(1, 16)), ODD),
    "dino_embeds": st.one_of(st.just(torch.zeros(1, 1, 2, 2, 24)), ODD),
    "callback_on_step_end": ODD,
    "joint_attention_kwargs": ODD,
    "first_step": st.one_of(st.integers(-1, 3), ODD),
    "frozen_tiles": st.one_of(st.lists(st.integers(-1, 7), max_size=3), ODD),
    "frozen_latents": st.one_of(st.just(torch.zeros(1, 4, 16)), ODD),
}
GOOD_ARGUMENTS = {
    "upscale_factor": [1, 1.5, 3],
    "start_sigma": [0.01, 0.5, 1],
    "num_inference_steps": [1, 2],
    "guidance_scale": [0, 3.5],
    "tile_size": [16, 32, (16, 48)],
    "tile_overlap": [0, 8, 16],
    "tile_batch_size": [1, 3, 1000],
    "dino_conditioning_scale": [0, 0.3, 1, 1.7],
    "dino_guidance_end": [0.5, 1],
    "vae_residual": [None, False, True],
    "output_type": OUTPUT_TYPES,
    "frozen_tiles": [(), [0], (0,)],
    "prompt": ["", "a dog", "\N{DOG}"],
    "negative_prompt": ["", "a cat"],
    "true_cfg_scale": [1, 2.5],
    "num_images_per_prompt": [1, 2],
    "max_sequence_length": [1, 16, 512],
    "generator": [torch.Generator(), None],
}
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]
IMAGES = st.one_of(
    st.tuples(st.sampled_from(MODES), st.integers(1, 33), st.integers(1, 33)).map(
        lambda spec: Image.new(spec[0], spec[1:])
    ),
    st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 20)).map(torch.zeros),
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 4)).map(np.zeros),
    st.lists(st.just(Image.new("RGB", (8, 8))), max_size=2),
    ODD,
)


# What should be refused, written without the pipeline's help.


def is_whole(value, low, high=float("inf")):
    return type(value) is int and low <= value <= high


def is_number(value, low, high):
    return type(value) in (int, float) and low <= value <= high


def is_text(value):
    return value is None or isinstance(value, str)


def is_tensor(value, *shape):
    fits = isinstance(value, torch.Tensor) and value.ndim == len(shape)
    return fits and all(wanted in (None, length) for length, wanted in zip(value.shape, shape))


def is_falling(values):
    return values != [] and values[0] <= 1 and all(a > b for a, b in itertools.pairwise([*values, 0]))


def is_side(value):
    return is_whole(value, 1) and value % 16 == 0


IS_GOOD = {
    "num_inference_steps": lambda value: value is None or is_whole(value, 1),
    "start_sigma": lambda value: value is None or is_number(value, 0.01, 1),
    "strength": lambda value: value is None or is_number(value, 0, 1),
    "guidance_scale": lambda value: value is None or is_number(value, 0, 1000),
    "true_cfg_scale": lambda value: is_number(value, 0, 1000),
    "tile_overlap": lambda value: is_whole(value, 0),
    "tile_size": lambda value: (
        value is None or is_side(value) or (type(value) in (tuple, list) and [*map(is_side, value)] == [True] * 2)
    ),
    "tile_batch_size": lambda value: is_whole(value, 1),
    "dino_conditioning_scale": lambda value: is_number(value, 0, 100),
    "dino_guidance_start": lambda value: is_number(value, 0, 1),
    "dino_guidance_end": lambda value: is_number(value, 0, 1),
    "vae_residual": lambda value: value is None or type(value) is bool,
    "output_type": lambda value: type(value) is str and value in OUTPUT_TYPES,
    "prompt": is_text,
    "negative_prompt": is_text,
    "num_images_per_prompt": lambda value: is_whole(value, 1),
    "max_sequence_length": lambda value: value is None or is_whole(value, 1, 512),
    "sigmas": lambda value: value is None or (type(value) is list and is_falling(value)),
    "generator": lambda value: value is None or isinstance(value, torch.Generator),
    "prompt_embeds": lambda value: value is None or is_tensor(value, None, None, 32),
    "pooled_prompt_embeds": lambda value: value is None or is_tensor(value, None, 16),
    "callback_on_step_end": lambda value: value is None,
    "joint_attention_kwargs": lambda value: value is None or value == {},
    "first_step": lambda value: is_whole(value, 0),
}
DEFAULTS = {
    "strength": None,
    "start_sigma": None,
    "sigmas": None,
    "latents": None,
    "frozen_latents": None,
    "dino_embeds": None,
    "prompt": None,
    "prompt_embeds": None,
    "pooled_prompt_embeds": None,
    "height": None,
    "width": None,
    "tile_size": None,
    "tile_overlap": 64,
    "first_step": 0,
    "frozen_tiles": (),
    "num_images_per_prompt": 1,
    "dino_conditioning_scale": 1,
    "dino_guidance_start": 0,
    "dino_guidance_end": 1,
    "vae_residual": None,
    "output_type": "pil",
}


def image_sizes(image):
    """The number, height and width of the pictures, or `None` if this is no picture."""
    images = image if isinstance(image, list) else [image]
    if images and all(isinstance(item, Image.Image) for item in images):
        return len(images), images[0].height, images[0].width
    if not isinstance(image, torch.Tensor | np.ndarray):
        return None
    shape = tuple(image.shape) if isinstance(image, torch.Tensor) else (image.shape[2], *image.shape[:2])
    return (1, *shape[1:]) if shape[0] in (1, 3) and 0 not in shape else None


def executed_steps(arguments):
    sigmas, steps = arguments["sigmas"], arguments["num_inference_steps"] or 4
    steps = steps if sigmas is None else len(sigmas)
    return steps if arguments["strength"] is None else steps - int(steps - steps * arguments["strength"])


def tiles_of(length, size, overlap):
    """The number of tiles along an axis, all lengths in tokens, or `None` if the overlap fills them."""
    if size >= length:
        return 1
    return None if overlap >= size else next(n for n in itertools.count(2) if n * size - (n - 1) * overlap >= length)


def expect(image, arguments):
    """The arguments to blame, and the number, height and width of the results where there is none."""
    wrong = {name for name, is_good in IS_GOOD.items() if name in arguments and not is_good(arguments[name])}
    given = {**DEFAULTS, **arguments}
    sizes = image_sizes(image)
    if sizes is None:
        wrong.add("image")
    sides, factor = [given["height"], given["width"]], given["upscale_factor"]
    if sides != [None, None]:
        wrong |= {name for name in ("height", "width") if not is_whole(given[name], 1)}
        wrong |= {"upscale_factor"} if factor is not None else set()
    elif factor is not None and not is_number(factor, 1, 8):
        wrong.add("upscale_factor")
    for name in ("strength", "sigmas"):
        if given[name] is not None and given["start_sigma"] is not None:
            wrong.add(name)
    if given["prompt"] is not None and given["prompt_embeds"] is not None:
        wrong |= {"prompt", "prompt_embeds"}
    if (given["prompt_embeds"] is None) != (given["pooled_prompt_embeds"] is None):
        wrong |= {"prompt_embeds", "pooled_prompt_embeds"}
    if given["vae_residual"] is True and given["output_type"] == "latent":
        wrong.add("vae_residual")
    if {"image", "height", "width", "upscale_factor", "tile_size", "tile_overlap"} & wrong:
        return wrong, None

    num_images, *sides = sizes
    if given["height"] is None:
        sides = [round(side * (4 if factor is None else factor)) for side in sides]
    else:
        sides = [given["height"], given["width"]]
    canvas = [-(-side // 16) for side in sides]
    size = given["tile_size"]
    # A picture of up to 0.8 MP is one tile by default.
    tile = canvas if size is None else [side // 16 for side in (size if type(size) in (tuple, list) else (size, size))]
    overlap = -(-given["tile_overlap"] // 16)
    grid = [tiles_of(length, min(length, side), overlap) for length, side in zip(canvas, tile)]
    if None in grid:
        wrong.add("tile_overlap")
    if wrong:
        return wrong, None
    num_tiles, batch = grid[0] * grid[1], num_images * given["num_images_per_prompt"]
    steps = executed_steps(given)
    if steps < 1:
        wrong.add("strength")
    for name in ("latents", "frozen_latents"):
        if given[name] is not None and not is_tensor(given[name], batch, canvas[0] * canvas[1], 16):
            wrong.add(name)
    if given["dino_embeds"] is not None and not is_tensor(given["dino_embeds"], num_tiles, num_images, None, None, 24):
        wrong.add("dino_embeds")
    if given["first_step"] > (0 if given["latents"] is None else steps):
        wrong.add("first_step")
    frozen = given["frozen_tiles"]
    if not isinstance(frozen, (list, tuple, str)) or not all(is_whole(tile, 0, num_tiles - 1) for tile in frozen):
        wrong.add("frozen_tiles")
    start, end = given["dino_guidance_start"] * steps, given["dino_guidance_end"] * steps
    if given["dino_conditioning_scale"] > 0 and not any(start <= i and i + 1 <= end for i in range(steps)):
        wrong.add("dino_guidance_end")
    return wrong, None if wrong else (batch, *sides)


def assert_results(images, output_type, batch, height, width):
    """Of the right number and size, and finite."""
    if output_type == "latent":
        assert images.shape == (batch, -(-height // 16) * -(-width // 16), 16) and images.isfinite().all()
        return
    if output_type == "pil":
        assert all(image.mode == "RGB" for image in images)
        images = np.stack([np.asarray(image) for image in images])
    elif output_type == "strips":
        images = np.concatenate(list(images), axis=1)
    elif output_type == "pt":
        images = images.permute(0, 2, 3, 1).numpy()
    assert images.shape == (batch, height, width, 3)
    assert images.dtype == (np.float32 if output_type in ("np", "pt") else np.uint8)
    assert np.isfinite(images).all() and images.min() >= 0 and (images.max() <= 1 or images.dtype == np.uint8)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dino="dinov2")


@fuzz_calls
@given(
    image=IMAGES,
    odd_part=ODD_PART,
    good=st.sets(st.sampled_from(list(GOOD_ARGUMENTS)), max_size=5),
    odd=st.sets(st.sampled_from(list(ARGUMENTS)), max_size=3),
    data=st.data(),
)
def test_calls(pipe, image, odd_part, good, odd, data):
    arguments = {name: data.draw(st.sampled_from(GOOD_ARGUMENTS[name]), label=name) for name in sorted(good)}
    if odd_part == "arguments":
        arguments |= {name: data.draw(ARGUMENTS[name], label=name) for name in sorted(odd)}
    if odd_part != "image":
        image = Image.new("RGB", (20, 12), "blue")
    # The size of the output is bounded for the time's sake.
    for name in ("height", "width"):
        if isinstance(arguments.get(name), (int, float)) and arguments[name] > 200:
            arguments[name] = 200
    defaults = {
        "num_inference_steps": 1,
        "max_sequence_length": 16,
        "upscale_factor": None if {"height", "width"} & arguments.keys() else 2,
    }
    arguments = {**defaults, **arguments}
    wrong, sizes = expect(image, arguments)
    event("to be refused" if wrong else "to be enlarged")
    if wrong:
        with pytest.raises(ValueError, match="|".join(f"`{name}`" for name in sorted(wrong))):
            pipe(image=image, **arguments)
    else:
        assert_results(pipe(image=image, **arguments).images, arguments.get("output_type", "pil"), *sizes)


# Tones


@st.composite
def plain_images(draw):
    """A picture of one colour in any form that a call takes, and its red, green and blue in [0, 1]."""
    form = draw(st.sampled_from([*MODES, "array", "grey array", "tensor", "flipped array", "list"]))
    size = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    red, green, blue = draw(st.tuples(*[st.integers(0, 255)] * 3))
    if form == "1":
        return Image.new("1", size, red % 2), [red % 2] * 3
    if form in ("L", "P"):
        return Image.new("L", size, red).convert(form), [red / 255] * 3
    if form == "LA":
        return Image.new("LA", size, (red, 255)), [red / 255] * 3
    if form in ("I;16", "I"):
        return Image.new(form, size, red * 200 + green), [(red * 200 + green) / 65535] * 3
    if form == "F":
        return Image.new("F", size, red / 255), [red / 255] * 3
    colour = np.array([red, green, blue]) / 255
    array = np.broadcast_to(colour, (*size, 3))
    if form == "array":
        return array.copy(), colour
    if form == "flipped array":
        return np.broadcast_to(colour[::-1], (*size, 3)).copy()[::-1, ::-1, ::-1], colour
    if form == "grey array":
        return array[None, ..., :1], [colour[0]] * 3
    if form == "tensor":
        return torch.from_numpy(array.copy()).permute(2, 0, 1)[None], colour
    image = Image.new("RGB", size, (red, green, blue))
    return ([image] if form == "list" else image.convert(form)), colour


@fuzz_calls
@given(plain_images(), st.floats(1, 3), st.sampled_from([None, 16, (32, 16)]), st.sampled_from(OUTPUT_TYPES))
def test_tones(pipe, plain, factor, tile_size, output_type):
    """Untouched latents and what the VAE loses of them are the picture itself, of one colour whatever its size."""
    image, colour = plain
    _, *sides = image_sizes(
        image if not isinstance(image, (torch.Tensor, np.ndarray)) or image.ndim == 3 else image[0]
    )
    height, width = (round(side * factor) for side in sides)
    tiles = {"tile_size": tile_size, "tile_overlap": 0}
    frozen = range(len(pipe.plan_tiles(height, width, **tiles)))
    call = {"upscale_factor": factor, "num_inference_steps": 1, "max_sequence_length": 4, **tiles}
    call |= {"frozen_tiles": frozen, "vae_residual": output_type != "latent", "output_type": output_type}
    images = pipe(image=image, prompt="", **call).images
    assert_results(images := [*images] if output_type == "strips" else images, output_type, 1, height, width)
    if output_type != "latent":
        if output_type == "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        pixels = np.concatenate([np.atleast_2d(np.asarray(part)).reshape(-1, 3) for part in images])
        scale = 1 if output_type in ("np", "pt") else 255
        # Rounded to 8 bits at the most: at the end, or at the start for what has more of them.
        np.testing.assert_allclose(pixels / scale, np.broadcast_to(colour, pixels.shape), atol=0.502 / 255)
