"""What the tests of the training share: a small model folder, small photos and the arguments of short runs."""

from pathlib import Path

import skimage.data
import torch
import train_projector
from accelerate import Accelerator
from PIL import Image, ImageOps

from tiny_models import ROOT, tiny_pipeline


RESOLUTION = 64
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina")  # in scikit-image's wheel


def save_model(folder: Path, guidance_embeds: bool = False, is_sensitive: bool = False) -> None:
    """A pipeline folder; a sensitive one has what training gives to FLUX, see [`make_sensitive`]."""
    pipe = tiny_pipeline(guidance_embeds, dino="dinov2_with_registers")
    if is_sensitive:
        make_sensitive(pipe)
    pipe.save_pretrained(folder)


def make_sensitive(pipe) -> None:
    """
    Lets the text stream count for the image, and the photo for the latents: a posterior as narrow as a trained VAE's,
    of means with a deviation of about one. Otherwise the latents are mostly the posterior's noise, of which DINO tells
    nothing.
    """
    for block in pipe.transformer.transformer_blocks:
        block.attn.add_v_proj.weight.data *= 4
        block.attn.to_out[0].weight.data *= 4
    for block in pipe.transformer.single_transformer_blocks:
        block.proj_out.weight.data *= 4
    means, log_variances = pipe.vae.encoder.conv_out.weight.data.chunk(2)
    means *= 9
    log_variances.zero_()
    pipe.vae.encoder.conv_out.bias.data[len(means) :] = -10


def save_photos(folder: Path, size: int = RESOLUTION) -> None:
    """The sample photo and five of scikit-image's, square."""
    folder.mkdir()
    pictures = {name: Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS}
    pictures["dogs"] = Image.open(ROOT / "samples" / "photo.jpg")
    for name, picture in pictures.items():
        ImageOps.fit(picture.convert("RGB"), (size, size)).save(folder / f"{name}.png")


def arguments(model: Path, photos: Path | None, output: Path, *more: object) -> list[str]:
    """Of a short run on the CPU; later options win. Without photos, another source must be among them."""
    options = {
        "pretrained_model_name_or_path": model,
        "dino_model": model / "dino_encoder",
        "train_data_dir": photos,
        "output_dir": output,
        "resolution": RESOLUTION,
        "token_grid": 4,
        "hidden_dim": 32,
        "max_sequence_length": 16,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "lr_warmup_steps": 1,
        "num_validation_images": 2,
        "validation_steps": 100,
        "checkpointing_steps": 100,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    flat = [item for name, value in options.items() if value is not None for item in (f"--{name}", str(value))]
    return [*flat, "--cpu", *map(str, more)]


def parse(*argv) -> object:
    args = train_projector.parse_arguments(arguments(*argv))
    train_projector.fill_in_defaults(args)
    return args


def start(*argv):
    """Trainer, loader and arguments, as `train` would have them."""
    from dino_projector.training.run import start_run

    args = parse(*argv)
    torch.manual_seed(0)
    return (*start_run(args, Accelerator(cpu=True)), args)
