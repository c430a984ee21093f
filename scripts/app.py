# Copyright 2026 The flux-dino-tile authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A page in the browser that enlarges a photo with FLUX.1 and DINO, and shows its tiles and which are suspect."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from flux_dino_tile.diagnostics import upscale_with_diagnosis
from flux_dino_tile.flux_enlarger import EXPECTED_ERRORS, FluxEnlarger
from flux_dino_tile.image_files import read_for_flux, upright_size, write_picture
from flux_dino_tile.jobs import register_heif, target_size
from flux_dino_tile.loading import load_flux
from flux_dino_tile.messages import Parser, UsageError, first_line, number, run_script
from flux_dino_tile.options import Settings, add_flux_options, make_options
from flux_dino_tile.records import describe_photo, software_text


PAGE_OPTIONS = ("host", "port", "max_upload", "max_megapixels")
COMPILED_TILE_SIZE = 1024  # px, what FLUX.1 was trained on
VIEW_SIDE = 1600  # px, of the pictures on the page; the file to download has all of them
MAX_WAITING = 16
KEPT_SECONDS = 3600  # uploads and results, on the disk
COLORS = {False: "#ffffff", True: "#ff2020"}  # of tiles, and of suspects

EPILOG = """example:
  app.py --model black-forest-labs/FLUX.1-schnell --projector user/flux-dino-tile --memory 16

What the page asks for, such as DINO strength and prompt, begins with the value of the option. --model and --projector
are also read from $MODEL and $PROJECTOR. One picture is enlarged at a time, the others wait. docs/app.md says how to
make a Space of it."""


def build_parser() -> Parser:
    parser = Parser(
        prog="app.py",
        usage="%(prog)s [options]",
        description="Serve a page that enlarges photos with FLUX.1, on this machine.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too (default: %(default)s)")
    add("--port", type=number(int, 0, 65535), default=7860, help="(default: %(default)s)")
    add("--max-upload", metavar="MB", type=number(int, 1), default=20, help="size of a file (default: 20)")
    add(
        "--max-megapixels",
        metavar="MP",
        type=number(float, 0.01),
        default=32.0,
        help="size of the enlarged picture (default: 32)",
    )
    add_flux_options(parser)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    """The page's own options, and how FLUX is to enlarge."""
    given = vars(build_parser().parse_args(argv))
    own = argparse.Namespace(**{name: given.pop(name) for name in PAGE_OPTIONS})
    from_environment = {name: os.environ.get(name.upper()) for name in ("model", "projector")}
    given = {name: value for name, value in from_environment.items() if value} | given
    return own, make_options({**given, "use_flux": True})


def check_size(path: str, scale: float, max_megapixels: float) -> tuple[int, int]:
    """Width and height of the enlarged picture, from the file's header; raises a `ValueError` if it is too large."""
    check_filled_in(scale, "scale")
    register_heif([Path(path)])
    width, height = target_size(upright_size(Path(path)), scale)
    if width * height > max_megapixels * 1e6:
        raise ValueError(
            f"{width} x {height} px is more than the {max_megapixels:g} megapixels that this page enlarges to:"
            " choose a smaller scale or picture"
        )
    return width, height


def check_filled_in(value: float | None, name: str) -> None:
    if value is None:
        raise ValueError(f"the {name} is empty: give a number")


def for_view(image: Image.Image) -> Image.Image:
    view = image.copy()
    view.thumbnail((VIEW_SIDE, VIEW_SIDE))
    return view


def draw_tiles(image: Image.Image, plan, suspects) -> Image.Image:
    """The picture, small enough for a page, with the borders of its tiles; suspects are drawn last, in red."""
    view = for_view(image.convert("RGB"))
    draw = ImageDraw.Draw(view)
    factor = view.width / plan.width
    for tile in sorted(plan, key=lambda tile: tile in suspects):
        is_suspect = tile in suspects
        corners = (tile.left, tile.top, tile.left + plan.tile_width - 1, tile.top + plan.tile_height - 1)
        box = [min(corner * factor, side - 1) for corner, side in zip(corners, view.size * 2)]
        draw.rectangle(box, outline=COLORS[is_suspect], width=5 if is_suspect else 2)
    return view


def describe_plan(plan) -> str:
    return (
        f"{plan.width} x {plan.height} px in {len(plan)} tiles ({len(plan.lefts)} across, {len(plan.tops)} down) of"
        f" {plan.tile_width} x {plan.tile_height} px"
    )


def describe_suspects(output) -> str:
    """What the diagnosis says, in a sentence."""
    similarity = output.dino_similarity[:, 0]
    if similarity.isnan().any():
        return "Without a DINO encoder the tiles are not judged."
    count, least = len(output.suspects[0]), float(similarity.min())
    named = f"{count} of them, outlined in red, may show what the photo does not" if count else "None is suspect"
    return (
        f"{named}; the least similarity to the photo is {least:.2f}. DINO steers the result, so that it judges itself."
    )


class Page:
    """
    What the page's buttons do.

    Args:
        pipe ([`FluxDinoTilePipeline`]): On its device.
        settings ([`Settings`]): As [`load_flux`] returns them; what the page asks for begins with them.
        max_megapixels (`float`): Of an enlarged picture.
    """

    def __init__(self, pipe, settings: Settings, max_megapixels: float):
        if settings.compile and settings.tile_size is None:
            # Compiled code fits one size.
            settings = replace(settings, tile_size=pipe.config.default_tile_size or COMPILED_TILE_SIZE)
        self.pipe, self.settings, self.max_megapixels = pipe, settings, max_megapixels

    def plan(self, path: str | None, scale: float) -> tuple[Any, str]:
        """The photo with its tiles, and a sentence about them."""
        if path is None:
            return None, ""
        width, height = check_size(path, scale, self.max_megapixels)
        plan = self.pipe.plan_tiles(height, width, self.settings.tile_size, self.settings.tile_overlap)
        return draw_tiles(read_for_flux(Path(path)).image, plan, []), describe_plan(plan)

    def enlarge(self, path: str, scale: float, strength: float, sigma: float, seed: float, prompt: str, folder: Path):
        """Before and after, the tiles, a sentence about them, and the file with the enlarged photo."""
        for value, name in ((strength, "DINO strength"), (sigma, "noise at the start"), (seed, "seed")):
            check_filled_in(value, name)
        size = check_size(path, scale, self.max_megapixels)
        picture = read_for_flux(Path(path))
        image = picture.image
        settings = replace(
            self.settings,
            start_sigma=sigma,
            seed=int(seed),
            prompt=prompt or None,
            dino_strength=None if self.pipe.dino_projector is None else strength,
        )
        enlarger = FluxEnlarger(self.pipe, settings)
        output = enlarger.retry(partial(upscale_with_diagnosis, self.pipe), image, size, "pil")
        picture.image = enlarger.like_source(output.images[0], image)
        description = {**enlarger.description, "photo": describe_photo(Path(path), image)}
        target = folder / f"{Path(path).stem}_x{scale:g}_flux.png"
        write_picture(picture, target, software_text(scale, description))
        view = for_view(picture.image)
        before = image.resize(view.size, Image.Resampling.BICUBIC)
        tiles = draw_tiles(picture.image, output.tile_plan, output.suspects[0])
        text = f"{describe_plan(output.tile_plan)}. {describe_suspects(output)}"
        return (before, view), tiles, text, str(target)


def build_app(page: Page):
    """The Gradio page."""
    import gradio as gr

    has_projector = page.pipe.dino_projector is not None
    settings = page.settings

    def show_plan(path, scale):
        try:
            return page.plan(path, scale)
        except EXPECTED_ERRORS as error:
            raise gr.Error(first_line(error)) from None

    # `track_tqdm` shows the pipeline's own bar, of tiles times steps.
    def enlarge(path, scale, strength, sigma, seed, prompt, progress=gr.Progress(track_tqdm=True)) -> Iterator:  # noqa: B008
        if path is None:
            raise gr.Error("drop a photo first")
        # What is given out has been copied when the folder is deleted.
        with tempfile.TemporaryDirectory() as folder:
            try:
                results = page.enlarge(path, scale, strength, sigma, seed, prompt, Path(folder))
            except EXPECTED_ERRORS as error:
                raise gr.Error(first_line(error)) from None
            yield results

    with gr.Blocks(title="flux-dino-tile", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.Markdown(
            "# flux-dino-tile\nEnlarges a photo with FLUX.1, tile by tile. Detail is invented: it is no evidence."
        )
        with gr.Row():
            with gr.Column():
                photo: Any = gr.Image(sources=["upload"], label="Photo", elem_id="photo")
                # The file as it is: Gradio would decode it, whatever its size.
                photo.preprocess = lambda payload: payload and payload.path
                scale = gr.Slider(1, 8, 4, step=0.5, label="Scale")
                strength = gr.Slider(
                    0,
                    2,
                    1.0 if settings.dino_strength is None else settings.dino_strength,
                    step=0.1,
                    label="DINO strength (0 is off)",
                    interactive=has_projector,
                    elem_id="strength",
                )
                sigma = gr.Slider(
                    0.01, 1, settings.start_sigma, step=0.01, label="Noise at the start: how much is invented"
                )
                with gr.Accordion("More", open=False):
                    can_prompt = page.pipe.text_encoder is not None
                    prompt = gr.Textbox(settings.prompt or "", label="Prompt, optional", interactive=can_prompt)
                    seed = gr.Number(settings.seed, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
                run = gr.Button("Enlarge", variant="primary", elem_id="run")
            with gr.Column():
                slider = gr.ImageSlider(type="pil", label="Bicubic and FLUX", elem_id="slider", buttons=["fullscreen"])
                download = gr.DownloadButton("Download", elem_id="download")
                tiles = gr.Image(label="Tiles", interactive=False, elem_id="tiles", buttons=["fullscreen"])
                text = gr.Markdown(elem_id="text")
        inputs = [photo, scale, strength, sigma, seed, prompt]
        for event in (photo.change, scale.release):
            event(show_plan, [photo, scale], [tiles, text], concurrency_limit=1, show_progress="hidden")
        run.click(enlarge, inputs, [slider, tiles, text, download], concurrency_limit=1, api_name="enlarge")
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(app, own: argparse.Namespace, **options):
    """Serves the page; fonts are the system's, so that nothing is fetched from elsewhere."""
    import gradio as gr

    return app.launch(
        server_name=own.host,
        server_port=own.port or None,
        max_file_size=f"{own.max_upload}mb",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        share=False,
        show_error=True,
        **options,
    )


def main(argv: list[str] | None = None) -> int:
    # gradio reads it when it is imported.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

    def script() -> None:
        own, settings = parse(sys.argv[1:] if argv is None else argv)
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise UsageError('the page needs gradio: pip install "flux-dino-tile[app]" brings it') from None
        launch(build_app(Page(*load_flux(settings), own.max_megapixels)), own)

    return run_script("app.py", script)


if __name__ == "__main__":
    sys.exit(main())
