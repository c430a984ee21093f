"""Small random models of the very classes that FLUX.1 uses, built from configs, for tests and for a dry run.

`python tests/tiny_models.py DIR` saves a pipeline folder that `scripts/upscale.py --use-flux --model DIR` accepts. Its
weights are random: it proves that everything runs, the picture is noise.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


ROOT = Path(__file__).resolve().parent.parent
JOINT_ATTENTION_DIM = 32
POOLED_DIM = 16
DINO_DIM = 24


def tiny_tokenizer(max_length: int = 77) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, in place of CLIP's and T5's, which need downloaded vocabularies."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def tiny_transformer(
    guidance_embeds: bool = False, latent_channels: int = 4, in_channels: int | None = None
) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels or 4 * latent_channels,
        out_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=JOINT_ATTENTION_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def tiny_vae(latent_channels: int = 4, scale_factor: int = 8) -> AutoencoderKL:
    """An untrained VAE of `scale_factor` pixels for a latent cell (a power of two)."""
    torch.manual_seed(1)
    num_blocks = scale_factor.bit_length()
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
        block_out_channels=[8] * num_blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=1024,
    ).eval()


def tiny_text_encoders() -> dict:
    torch.manual_seed(2)
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=POOLED_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=128,
            projection_dim=POOLED_DIM,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    t5 = T5EncoderModel(
        T5Config(vocab_size=128, d_model=JOINT_ATTENTION_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    return {
        "text_encoder": clip,
        "tokenizer": tiny_tokenizer(77),
        "text_encoder_2": t5,
        "tokenizer_2": tiny_tokenizer(512),
    }


def tiny_dino(kind: str = "dinov2"):
    """A DINO backbone of `DINO_DIM` features: "dinov2", "dinov2_with_registers" or "dinov3"."""
    torch.manual_seed(3)
    shared = {"hidden_size": DINO_DIM, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(patch_size=14, image_size=56, mlp_ratio=2, **shared)).eval()
    if kind == "dinov2_with_registers":
        config = Dinov2WithRegistersConfig(patch_size=14, image_size=56, num_register_tokens=4, mlp_ratio=2, **shared)
        return Dinov2WithRegistersModel(config).eval()
    return DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, num_register_tokens=4, intermediate_size=48, **shared)).eval()


def scheduler_for(guidance_embeds: bool) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler settings of FLUX.1-dev (guidance embeddings) or FLUX.1-schnell (none)."""
    if guidance_embeds:
        return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def tiny_components(guidance_embeds: bool = False, latent_channels: int = 4, scale_factor: int = 8) -> dict:
    """Every component that `FluxImg2ImgPipeline` needs, dev-like with `guidance_embeds` and schnell-like without."""
    return {
        "transformer": tiny_transformer(guidance_embeds, latent_channels),
        "vae": tiny_vae(latent_channels, scale_factor),
        "scheduler": scheduler_for(guidance_embeds),
        **tiny_text_encoders(),
    }


def tiny_projector(**config):
    """A projector from `tiny_dino` to `tiny_transformer`."""
    from pipeline_flux_dino_tile import DinoProjector

    torch.manual_seed(4)
    settings = {"in_dim": DINO_DIM, "out_dim": JOINT_ATTENTION_DIM, "hidden_dim": 32, "token_grid": 4}
    return DinoProjector(**{**settings, "dino_model": None, **config}).eval()


def tiny_pipeline(guidance_embeds: bool = False, dino: str | None = None, projector: dict | None = None, **sizes):
    """A `FluxDinoTilePipeline`, with the DINO parts if `dino` names an encoder of `tiny_dino`."""
    from pipeline_flux_dino_tile import FluxDinoTilePipeline

    parts = (
        {} if dino is None else {"dino_encoder": tiny_dino(dino), "dino_projector": tiny_projector(**projector or {})}
    )
    pipe = FluxDinoTilePipeline(**tiny_components(guidance_embeds, **sizes), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ip_adapter(transformer, image_embed_dim: int = 8) -> dict:
    """Random weights of an IP-Adapter for `transformer`, in the form in which diffusers loads them."""
    torch.manual_seed(5)
    config = transformer.config
    projection = {
        "proj.weight": torch.randn(4 * config.joint_attention_dim, image_embed_dim),
        "proj.bias": torch.randn(4 * config.joint_attention_dim),
        "norm.weight": torch.ones(config.joint_attention_dim),
        "norm.bias": torch.zeros(config.joint_attention_dim),
    }
    attention = {}
    for index in range(config.num_layers):
        for name in ("to_k_ip", "to_v_ip"):
            attention[f"{index}.{name}.weight"] = torch.randn(transformer.inner_dim, config.joint_attention_dim)
            attention[f"{index}.{name}.bias"] = torch.randn(transformer.inner_dim)
    return {"image_proj": projection, "ip_adapter": attention}


def save_tiny_pipeline(directory: str | Path, with_dino: bool = True) -> None:
    """Saves a complete pipeline folder, with `dino_encoder/` and `dino_projector/` on request."""
    tiny_pipeline(dino="dinov2_with_registers" if with_dino else None).save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny_models.py DIR")
    sys.path.insert(0, str(ROOT))
    save_tiny_pipeline(sys.argv[1])
