"""Whatever the stock pipeline can do still works with the DINO parts in place."""

import gguf
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from torch.overrides import TorchFunctionMode
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from pipeline_flux_dino_tile import (
    FluxDinoAttnProcessor,
    FluxDinoTilePipeline,
    cudnn_attention_with_lse,
    flash_attention_with_lse,
    merge_attention,
)
from tiny_models import (
    DINO_DIM,
    JOINT_ATTENTION_DIM,
    POOLED_DIM,
    tiny_dino,
    tiny_ip_adapter,
    tiny_pipeline,
)


DINO_KINDS = ["dinov2", "dinov2_with_registers", "dinov3"]
ONE_TILE = {"tile_size": 1024}
SIX_TILES = {"tile_size": 32, "tile_overlap": 16}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_photo(seed=0, size=(32, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


PHOTO, OTHER_PHOTO, LARGE_PHOTO = make_photo(0), make_photo(1), make_photo(2, (64, 48))


def upscale(pipe, **kwargs):
    """Latents of 48 x 64 px, 3 x 4 tokens, from six tiles in two steps, unless `kwargs` say otherwise."""
    settings = {"image": PHOTO, "prompt": "a photo", "num_inference_steps": 2, "max_sequence_length": 16}
    settings |= {"tile_batch_size": 3, **SIX_TILES}
    if not {"height", "sigmas", "strength", "upscale_factor"} & kwargs.keys():
        settings |= {"start_sigma": 0.5}
    if "height" not in kwargs and not isinstance(kwargs.get("image"), torch.Tensor):
        settings |= {"upscale_factor": 2}
    if "prompt_embeds" in kwargs:
        del settings["prompt"]
    return pipe(**{**settings, "generator": generator(), "output_type": "latent", **kwargs}).images


@torch.no_grad()
def embed(pipe, prompt):
    """The arguments that stand in for a prompt."""
    embeds, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=16)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def assert_same(result, expected, atol=1e-5):
    """The same up to the order of the summations."""
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


def assert_different(*results):
    """So that no two of them can be the same up to rounding."""
    for index, result in enumerate(results):
        for other in results[:index]:
            assert (result - other).abs().max() > 1e-4


@pytest.fixture(scope="module")
def pipe():
    """Not to be changed."""
    return tiny_pipeline(dino="dinov2")


@pytest.fixture
def own_pipe():
    return tiny_pipeline(dino="dinov2")


def parent_of(pipe):
    names = FluxImg2ImgPipeline._get_signature_types()
    parent = FluxImg2ImgPipeline(**{name: part for name, part in pipe.components.items() if name in names})
    parent.set_progress_bar_config(disable=True)
    return parent


# ---- Prompts and batches -------------------------------------------------------------------------------------------


def test_prompt_and_dino_both_count(pipe):
    results = [
        upscale(pipe, prompt=prompt, dino_conditioning_scale=scale) for prompt in ("a", "b") for scale in (0, 0.5, 1)
    ]
    assert_different(*results)


@pytest.mark.parametrize("scale", [0.5, 1])
def test_batch_entries_equal_their_own_runs(pipe, scale):
    prompts, images = ["a cat", "dog"], [PHOTO, OTHER_PHOTO]
    kwargs = {"dino_conditioning_scale": scale}
    batch = upscale(pipe, prompt=prompts, image=images, generator=[generator(0), generator(1)], **kwargs)
    singles = [
        upscale(pipe, prompt=prompt, image=image, generator=[generator(seed)], **kwargs)
        for seed, (prompt, image) in enumerate(zip(prompts, images))
    ]
    assert_different(*batch)
    assert_same(batch, torch.cat(singles))


@pytest.mark.parametrize(
    ("prompts", "num_images", "num_images_per_prompt"), [(2, 2, 2), (1, 2, 2), (2, 1, 2), (4, 2, 1), (1, 1, 3)]
)
def test_order_of_a_batch(pipe, prompts, num_images, num_images_per_prompt):
    """Prompts and images side by side, the fewer repeated, each result `num_images_per_prompt` times."""
    prompts = ["a cat", "dog", "three", "x"][:prompts]
    # Latents, from which nothing random is drawn but the noise.
    latents = torch.randn(num_images, 4, 6, 8, generator=generator(7))
    features = pipe.encode_dino([PHOTO, OTHER_PHOTO][:num_images], upscale_factor=2, **SIX_TILES)
    num_prompts = max(len(prompts), num_images)
    size = num_prompts * num_images_per_prompt
    batch = upscale(
        pipe,
        image=latents,
        prompt=prompts,
        dino_embeds=features,
        dino_conditioning_scale=0.5,
        num_images_per_prompt=num_images_per_prompt,
        generator=[generator(seed) for seed in range(size)],
    )
    assert len(batch) == size
    for entry, result in enumerate(batch):
        index = entry // num_images_per_prompt
        image = index % num_images
        single = upscale(
            pipe,
            image=latents[image : image + 1],
            prompt=prompts[index % len(prompts)],
            dino_embeds=features[:, image : image + 1],
            dino_conditioning_scale=0.5,
            generator=generator(entry),
        )
        assert_same(result, single[0])


def test_pixels_with_several_results(pipe):
    results = upscale(pipe, num_images_per_prompt=2, output_type="pt", vae_residual=True)
    assert results.shape == (2, 3, 48, 64)
    assert_different(*results)


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_true_cfg_extrapolates_from_the_negative_prompt(pipe, scale):
    """One Euler step is linear in the velocity."""
    kwargs = {"num_inference_steps": 1, "dino_conditioning_scale": scale}
    positive, negative = upscale(pipe, prompt="a cat", **kwargs), upscale(pipe, prompt="a dog", **kwargs)
    for guidance in (1, 3.0):
        result = upscale(pipe, prompt="a cat", negative_prompt="a dog", true_cfg_scale=guidance, **kwargs)
        assert_same(result, negative + guidance * (positive - negative))
    assert_different(positive, negative, result)


def test_second_prompt_is_for_t5(pipe):
    embeds = {**embed(pipe, "b"), "pooled_prompt_embeds": embed(pipe, "a")["pooled_prompt_embeds"]}
    expected = upscale(pipe, **embeds)
    assert torch.equal(upscale(pipe, prompt="a", prompt_2="b"), expected)
    assert_different(upscale(pipe, prompt="a"), expected)


def test_prompt_embeds_equal_the_prompt(pipe):
    expected = upscale(pipe, prompt="a cat", negative_prompt="a dog", true_cfg_scale=2)
    negative = {f"negative_{name}": value for name, value in embed(pipe, "a dog").items()}
    assert torch.equal(upscale(pipe, **embed(pipe, "a cat"), **negative, true_cfg_scale=2), expected)


def test_no_prompt_is_the_empty_prompt(pipe):
    assert torch.equal(upscale(pipe, prompt=None), upscale(pipe, prompt=""))


# ---- Images and latents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_image_modes(pipe, mode):
    image = LARGE_PHOTO.convert(mode)
    expected = upscale(pipe, image=image.convert("RGB"), upscale_factor=1)
    assert torch.equal(upscale(pipe, image=image, upscale_factor=1), expected)


def image_forms():
    array = np.asarray(LARGE_PHOTO, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return {
        "list": [LARGE_PHOTO],
        "tuple": (LARGE_PHOTO,),
        "array": array,
        "batch of arrays": array[None],
        "list of arrays": [array],
        "float64": array.astype(np.float64),
        "tensor": tensor,
        "batch of tensors": tensor[None],
        "list of tensors": [tensor],
        "strides of a flip": np.ascontiguousarray(array[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "list of flips": [np.ascontiguousarray(array[:, ::-1])[:, ::-1]],
        "columns first": np.asfortranarray(array),
    }


@pytest.mark.parametrize(("name", "image"), image_forms().items(), ids=list(image_forms()))
def test_image_forms(pipe, name, image):
    expected = upscale(pipe, image=LARGE_PHOTO, upscale_factor=1)
    assert_same(upscale(pipe, image=image, upscale_factor=1), expected)


def test_grey_arrays_are_grey_images(pipe):
    grey = LARGE_PHOTO.convert("L")
    array = np.asarray(grey, dtype=np.float32)[..., None] / 255
    expected = upscale(pipe, image=grey, upscale_factor=1)
    assert_same(upscale(pipe, image=array, upscale_factor=1), expected)
    assert_same(upscale(pipe, image=torch.from_numpy(array).permute(2, 0, 1), upscale_factor=1), expected)


# From black to white in columns, and what the pixels of each mode are then.
RAMP = np.repeat(np.linspace(0, 1, 64)[None], 48, axis=0)
DEEP_RAMP = np.round(65535 * RAMP)


@pytest.mark.parametrize(
    ("mode", "pixels"),
    [
        ("I;16", DEEP_RAMP.astype("<u2")),
        ("I;16B", DEEP_RAMP.astype(">u2")),
        ("I", DEEP_RAMP.astype(np.int32)),
        ("F", RAMP.astype(np.float32)),
    ],
)
@pytest.mark.parametrize("in_list", [False, True])
def test_deep_images_have_the_right_tones(pipe, unclipped, mode, pixels, in_list):
    """What comes out is the ramp itself, in steps of 8 bits at the most, from latents that nobody touched."""
    image = Image.frombytes(mode, (64, 48), pixels.tobytes())
    assert image.mode == mode
    result = untouched(pipe, [image] if in_list else image, vae_residual=True, upscale_factor=1)
    expected = torch.from_numpy(RAMP).float().expand(1, 3, -1, -1)
    torch.testing.assert_close(result, expected, atol=0.501 / 255, rtol=0)


def test_rounding_beyond_the_range_is_cut(pipe):
    """A sum of floats may be 2e-7 above 1."""
    inside = torch.rand(1, 3, 48, 64, generator=generator())
    inside[0, 0, 0, 0], inside[0, 1, 3, 5] = 1, 0
    outside = inside.clone()
    outside[0, 0, 0, 0], outside[0, 1, 3, 5] = 1 + 2e-7, -2e-7
    assert outside.max() > 1 and outside.min() < 0
    expected = upscale(pipe, image=inside, upscale_factor=1)
    assert torch.equal(upscale(pipe, image=outside, upscale_factor=1), expected)
    assert torch.equal(upscale(pipe, image=outside.permute(0, 2, 3, 1).numpy(), upscale_factor=1), expected)


def test_image_latents_equal_the_image(pipe):
    noise = generator(3)
    features = pipe.encode_dino(LARGE_PHOTO, upscale_factor=1, **ONE_TILE)
    expected = upscale(pipe, image=LARGE_PHOTO, upscale_factor=1, generator=generator(3), start_sigma=0.5, **ONE_TILE)
    pixels = torch.from_numpy(np.asarray(LARGE_PHOTO, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample(noise)
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert_same(upscale(pipe, image=latents, dino_embeds=features, generator=noise, **ONE_TILE), expected)


def test_latents_are_where_it_starts(pipe):
    latents = torch.randn(1, 4, 6, 8, generator=generator(5))
    kwargs = {"image": latents, "dino_embeds": pipe.encode_dino(PHOTO, upscale_factor=2, **SIX_TILES)}
    noisy = 0.5 * latents + 0.5 * torch.randn(latents.shape, generator=generator(6))
    packed = noisy.unflatten(3, (4, 2)).unflatten(2, (3, 2)).permute(0, 2, 4, 1, 3, 5).reshape(1, 12, 16)
    expected = upscale(pipe, generator=generator(6), **kwargs)
    assert_same(upscale(pipe, latents=packed, generator=None, **kwargs), expected)
    assert_different(upscale(pipe, **kwargs), expected)


def test_output_types(pipe):
    results = {kind: upscale(pipe, output_type=kind, **ONE_TILE) for kind in ("latent", "np", "pt", "pil")}
    latents = FluxImg2ImgPipeline._unpack_latents(results["latent"], 48, 64, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)[0]
    assert_same(results["pt"], (decoded / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(results["np"], results["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(results["pil"][0]), (results["np"][0] * 255).round().astype(np.uint8))


def test_return_dict(pipe):
    kwargs = {"image": PHOTO, "num_inference_steps": 1, "upscale_factor": 1, "output_type": "np"}
    result = pipe(generator=generator(), return_dict=False, **kwargs)
    assert type(result) is tuple and len(result) == 1
    assert np.array_equal(result[0], pipe(generator=generator(), **kwargs).images)


# ---- Steps ---------------------------------------------------------------------------------------------------------


def test_sigmas_are_the_noise_levels(pipe):
    expected = upscale(pipe, start_sigma=0.5)
    assert_same(upscale(pipe, sigmas=[0.5, 0.25]), expected)
    assert_same(upscale(pipe, sigmas=np.array([0.5, 0.25])), expected)
    assert_same(upscale(pipe, sigmas=[1.0, 0.75, 0.5, 0.25], strength=0.5), expected)
    assert_same(upscale(pipe, strength=0.5, num_inference_steps=4), expected)
    assert_different(upscale(pipe, sigmas=[0.5, 0.1]), expected)


@pytest.mark.parametrize("scale", [0.5, 1])
def test_guidance_window(pipe, scale):
    def run(start, end):
        window = {"dino_guidance_start": start, "dino_guidance_end": end}
        return upscale(pipe, dino_conditioning_scale=scale, **window)

    never, always = upscale(pipe, dino_conditioning_scale=0), upscale(pipe, dino_conditioning_scale=scale)
    assert torch.equal(run(0, 1), always)
    # Whole steps: here the second one.
    assert torch.equal(run(0.3, 1), run(0.5, 1))
    assert_different(never, always, run(0, 0.5), run(0.5, 1))


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", DINO_KINDS)
def test_a_sweep_with_dino_embeds_encodes_once(kind):
    pipe = tiny_pipeline(dino=kind)
    scales = (0, 0.5, 1, 2)
    expected = [upscale(pipe, dino_conditioning_scale=scale) for scale in scales]
    calls = count_calls(pipe.dino_encoder)
    features = pipe.encode_dino(PHOTO, upscale_factor=2, **SIX_TILES)
    assert features.shape == (6, 1, 2, 2, DINO_DIM)
    assert len(calls) == 6
    for scale, result in zip(scales, expected):
        assert torch.equal(upscale(pipe, dino_embeds=features, dino_conditioning_scale=scale), result)
    assert len(calls) == 6
    assert_different(*expected)


@pytest.mark.parametrize("max_sequence_length", [16, 512])
def test_encode_dino_plans_the_tiles_of_the_call(pipe, monkeypatch, max_sequence_length):
    """However long the text is, which the planner may weigh."""
    plans = []

    def encode_dino_tiles(image, plan):
        plans.append(plan)
        raise InterruptedError

    monkeypatch.setattr(pipe, "encode_dino_tiles", encode_dino_tiles)
    size = {"image": PHOTO, "height": 1024, "width": 2304}
    for call, kwargs in ((pipe.encode_dino, {}), (pipe, {"max_sequence_length": max_sequence_length})):
        with pytest.raises(InterruptedError):
            call(**size, **kwargs)
    assert plans[0] == plans[1] and len(plans[0]) > 1


class Bar:
    """Stands in for tqdm."""

    def __init__(self, total):
        self.total, self.updates = total, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self):
        self.updates += 1


@pytest.mark.parametrize(("tile_batch_size", "batches"), [(1, 6), (4, 2), (8, 1)])
def test_progress_bar_counts_tile_batches(pipe, monkeypatch, tile_batch_size, batches):
    bars = []

    def progress_bar(total):
        bars.append(Bar(total))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    upscale(pipe, num_inference_steps=3, tile_batch_size=tile_batch_size)
    (bar,) = bars
    assert bar.total == bar.updates == 3 * batches


# ---- Callback ------------------------------------------------------------------------------------------------------


def test_callback_sees_the_packed_canvas_after_each_step(pipe):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        assert pipeline is pipe and kwargs.keys() == {"latents"}
        seen.append((step, float(timestep), kwargs["latents"]))
        return kwargs

    result = upscale(pipe, callback_on_step_end=callback)
    assert [step[:2] for step in seen] == [(0, 500.0), (1, 250.0)]
    assert seen[0][2].shape == (1, 12, 16)
    assert torch.equal(seen[1][2], result)
    assert_different(seen[0][2], result)
    assert torch.equal(result, upscale(pipe)), "reading the latents changes the result"
    nothing = upscale(pipe, callback_on_step_end=lambda *args: {})
    assert torch.equal(result, nothing)


@pytest.mark.parametrize("how", ["returned", "in place", "in place, nothing returned"])
def test_callback_may_change_the_latents(pipe, how):
    def callback(pipeline, step, timestep, kwargs):
        if step == last:
            if how == "returned":
                return {"latents": torch.full_like(kwargs["latents"], 0.25)}
            kwargs["latents"].fill_(0.25)
        return {} if how.endswith("nothing returned") else kwargs

    last = 1
    result = upscale(pipe, callback_on_step_end=callback)
    assert_same(result, torch.full_like(result, 0.25))
    # A change before the last step is where the next one starts.
    last = 0
    result = upscale(pipe, callback_on_step_end=callback)
    start = torch.full_like(result, 0.25)
    assert_same(result, upscale(pipe, latents=start, sigmas=[0.25]))


def test_callback_may_change_the_prompt_embeds(pipe):
    first, second = embed(pipe, "a photo"), embed(pipe, "another")
    second["pooled_prompt_embeds"] = first["pooled_prompt_embeds"]
    between = []

    def callback(pipeline, step, timestep, kwargs):
        assert torch.equal(kwargs["prompt_embeds"], (second if step else first)["prompt_embeds"])
        between.append(kwargs["latents"])
        return {"prompt_embeds": second["prompt_embeds"]}

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    result = upscale(pipe, **first, callback_on_step_end=callback, **inputs)
    assert_different(result, upscale(pipe, **first))
    assert_same(result, upscale(pipe, **second, latents=between[0], sigmas=[0.25]))


def test_interrupt_stops_after_the_step(pipe):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        pipeline._interrupt = True
        seen.append(kwargs["latents"])
        return kwargs

    expected = upscale(pipe)
    calls = count_calls(pipe.transformer)
    result = upscale(pipe, callback_on_step_end=callback, dino_conditioning_scale=0.5)
    assert len(seen) == 1 and len(calls) == 2
    assert torch.equal(result, seen[0])
    assert torch.equal(upscale(pipe), expected), "the next call does not start anew"


# ---- Attention processors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "replaced"), [(0, False), (0.5, True), (1, False), (2, True)])
def test_processors_are_the_same_after_a_call(pipe, scale, replaced):
    before = dict(pipe.transformer.attn_processors)

    def callback(pipeline, step, timestep, kwargs):
        inside = pipe.transformer.attn_processors
        assert all(isinstance(value, FluxDinoAttnProcessor) for value in inside.values()) == replaced
        return kwargs

    upscale(pipe, dino_conditioning_scale=scale, callback_on_step_end=callback)
    assert {name: id(value) for name, value in pipe.transformer.attn_processors.items()} == {
        name: id(value) for name, value in before.items()
    }


def test_processors_are_the_same_after_an_exception(pipe):
    before = list(map(id, pipe.transformer.attn_processors.values()))
    expected = upscale(pipe, dino_conditioning_scale=0)

    def callback(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale(pipe, dino_conditioning_scale=0.5, callback_on_step_end=callback)
    assert list(map(id, pipe.transformer.attn_processors.values())) == before
    assert torch.equal(upscale(pipe, dino_conditioning_scale=0), expected)


# ---- IP-Adapter ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ip_pipe():
    """With an IP-Adapter and its image encoder."""
    pipe = tiny_pipeline(dino="dinov2")
    torch.manual_seed(6)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config).eval(), feature_extractor=processor)
    pipe.transformer._load_ip_adapter_weights([tiny_ip_adapter(pipe.transformer)])
    return pipe


IP_EMBEDS = {
    "ip_adapter_image_embeds": [torch.ones(1, 1, 8)],
    "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 8)],
}


@pytest.mark.parametrize("ip_inputs", [IP_EMBEDS, {"ip_adapter_image": OTHER_PHOTO}], ids=["embeds", "image"])
@pytest.mark.parametrize("true_cfg_scale", [1, 2])
def test_ip_adapter_equals_the_parent(ip_pipe, ip_inputs, true_cfg_scale):
    kwargs = {
        "prompt": "a photo",
        "negative_prompt": "a dog",
        "true_cfg_scale": true_cfg_scale,
        "image": LARGE_PHOTO,
        "height": 48,
        "width": 64,
        "strength": 0.5,
        "num_inference_steps": 4,
        "max_sequence_length": 16,
        "output_type": "latent",
        **ip_inputs,
    }
    expected = parent_of(ip_pipe)(generator=generator(), **kwargs).images
    assert_same(ip_pipe(generator=generator(), dino_conditioning_scale=0, **kwargs).images, expected)


def test_ip_adapter_embeds_need_no_image_encoder():
    """Nor does the negative branch, which is not there."""
    pipe = tiny_pipeline(dino="dinov2")
    pipe.transformer._load_ip_adapter_weights([tiny_ip_adapter(pipe.transformer)])
    expected = upscale(pipe, **IP_EMBEDS)
    assert torch.equal(upscale(pipe, ip_adapter_image_embeds=IP_EMBEDS["ip_adapter_image_embeds"]), expected)


def test_ip_adapter_and_dino_strength(ip_pipe, pipe):
    def callback(pipeline, step, timestep, kwargs):
        processors = ip_pipe.transformer.attn_processors.values()
        assert [isinstance(item, FluxIPAdapterAttnProcessor) for item in processors] == [True, True, False, False]
        return kwargs

    scales, results = (0, 0.5, 1), {}
    for ip_scale in (1.0, 0.0):
        ip_pipe.set_ip_adapter_scale(ip_scale)
        results[ip_scale] = [
            upscale(ip_pipe, dino_conditioning_scale=scale, callback_on_step_end=callback, **IP_EMBEDS)
            for scale in scales
        ]
    ip_pipe.set_ip_adapter_scale(1.0)
    assert_different(*results[1.0], *results[0.0])
    # An adapter of scale 0 leaves the DINO strength to be compared with the stock processors'.
    for scale, result in zip(scales, results[0.0]):
        assert_same(result, upscale(pipe, dino_conditioning_scale=scale))


def test_ip_adapter_with_a_batch_of_images(ip_pipe):
    kwargs = {"dino_conditioning_scale": 0.5, "tile_batch_size": 4, **IP_EMBEDS}
    batch = upscale(ip_pipe, image=[PHOTO, OTHER_PHOTO], generator=[generator(0), generator(1)], **kwargs)
    assert_same(batch[1:], upscale(ip_pipe, image=OTHER_PHOTO, generator=[generator(1)], **kwargs))


# ---- LoRA, fused projections, compilation --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(pipe):
    torch.manual_seed(7)
    width, rank = pipe.transformer.inner_dim, 2
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_v_proj"]
    layers += ["single_transformer_blocks.0.attn.to_v"]
    return {
        f"transformer.{layer}.{name}.weight": torch.randn(shape)
        for layer in layers
        for name, shape in (("lora_A", (rank, width)), ("lora_B", (width, rank)))
    }


@pytest.mark.parametrize("from_file", [True, False])
def test_lora(own_pipe, lora, from_file, tmp_path):
    plain = upscale(own_pipe, dino_conditioning_scale=0.5)
    if from_file:
        layers = {name.removeprefix("transformer."): weight for name, weight in lora.items()}
        own_pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    own_pipe.load_lora_weights(tmp_path if from_file else dict(lora))

    def run(scale):
        kwargs = {"scale": scale}
        result = upscale(own_pipe, dino_conditioning_scale=0.5, joint_attention_kwargs=kwargs)
        assert kwargs == {"scale": scale}
        return result

    full = upscale(own_pipe, dino_conditioning_scale=0.5)
    assert_same(run(1.0), full)
    assert_same(run(0.0), plain)
    assert_different(plain, run(0.5), full)
    own_pipe.unload_lora_weights()
    assert torch.equal(upscale(own_pipe, dino_conditioning_scale=0.5), plain)


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_fused_projections(pipe, own_pipe, scale):
    expected = upscale(pipe, dino_conditioning_scale=scale)
    own_pipe.transformer.fuse_qkv_projections()
    assert_same(upscale(own_pipe, dino_conditioning_scale=scale), expected)


@pytest.fixture
def compiled_pipe(own_pipe):
    torch._dynamo.reset()
    own_pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    yield own_pipe
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_compiled_blocks_give_the_same(pipe, compiled_pipe, scale):
    expected = upscale(pipe, dino_conditioning_scale=scale)
    assert_same(upscale(compiled_pipe, dino_conditioning_scale=scale), expected)


def test_compiled_blocks_stay_compiled(pipe, compiled_pipe):
    """For another image, another number of tiles and another strength."""
    row = {"height": 32, "tile_batch_size": 2}
    upscale(compiled_pipe, dino_conditioning_scale=0.5, width=80, **row)
    kwargs = {"image": OTHER_PHOTO, "dino_conditioning_scale": 0.7, **row}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for width in (80, 48, 112):
            result = upscale(compiled_pipe, width=width, **kwargs)
            assert_same(result, upscale(pipe, width=width, **kwargs))


# ---- Data types and VAEs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_bfloat16(pipe, own_pipe, scale):
    own_pipe.to(dtype=torch.bfloat16)
    kwargs = {"dino_conditioning_scale": scale, "output_type": "pt"}
    assert_same(upscale(own_pipe, **kwargs), upscale(pipe, **kwargs), atol=0.05)
    features = own_pipe.encode_dino(PHOTO, upscale_factor=2, **SIX_TILES)
    assert torch.equal(upscale(own_pipe, dino_embeds=features, **kwargs), upscale(own_pipe, **kwargs))


def test_vae_tiling_below_our_tiles(pipe, own_pipe, monkeypatch):
    own_pipe.vae.enable_tiling()
    own_pipe.vae.tile_sample_min_size, own_pipe.vae.tile_latent_min_size = 32, 4
    calls = []
    tiled_decode = own_pipe.vae._tiled_decode if hasattr(own_pipe.vae, "_tiled_decode") else own_pipe.vae.tiled_decode
    monkeypatch.setattr(own_pipe.vae, "tiled_decode", lambda *a, **k: calls.append(1) or tiled_decode(*a, **k))
    result = upscale(own_pipe, output_type="pt", **ONE_TILE)
    assert calls
    assert result.shape == (1, 3, 48, 64) and torch.isfinite(result).all()
    assert_different(result, upscale(pipe, output_type="pt", **ONE_TILE))


def test_vae_slicing(pipe, own_pipe):
    own_pipe.vae.enable_slicing()
    calls = count_calls(own_pipe.vae.decoder)
    kwargs = {"image": [PHOTO, OTHER_PHOTO], "output_type": "pt"}
    assert_same(upscale(own_pipe, **kwargs), upscale(pipe, **kwargs))
    assert len(calls) == 2 * 6


def test_tiny_autoencoder_equals_the_parent(pipe):
    torch.manual_seed(8)
    channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    pipe = FluxDinoTilePipeline(**{**pipe.components, "vae": AutoencoderTiny(**channels).eval()})
    pipe.set_progress_bar_config(disable=True)
    assert upscale(pipe, output_type="pt", dino_conditioning_scale=0.5).shape == (1, 3, 48, 64)
    kwargs = {"prompt": "a", "image": LARGE_PHOTO, "height": 48, "width": 64, "strength": 0.5, "output_type": "pt"}
    kwargs |= {"num_inference_steps": 4, "max_sequence_length": 16}
    expected = parent_of(pipe)(generator=generator(), **kwargs).images
    assert_same(pipe(generator=generator(), dino_conditioning_scale=0, **kwargs).images, expected)


# ---- Offloading ----------------------------------------------------------------------------------------------------

REGIONS = [("a photo", None), ("a dog", (0, 0, 0.3, 0.3)), ("a cat", (0.6, 0.6, 1, 1))]
OFFLOADS = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "group": lambda pipe, device: pipe.enable_group_offload(
        onload_device=torch.device(device), offload_type="leaf_level", use_stream=device == "cuda"
    ),
}
# On the CPU accelerate's sequential offload fails in the stock pipeline too.
offloads = pytest.mark.parametrize(
    ("offload", "device"),
    [
        *[(OFFLOADS[name], "cpu") for name in ("model", "group")],
        *[pytest.param(offload, "cuda", marks=[pytest.mark.gpu, gpu]) for offload in OFFLOADS.values()],
    ],
    ids=["model-cpu", "group-cpu", *[f"{name}-cuda" for name in OFFLOADS]],
)


def tolerance(device):
    return 1e-5 if device == "cpu" else 1e-2


@offloads
@pytest.mark.parametrize("prompt", ["a photo", REGIONS], ids=["prompt", "regions"])
def test_offloading_gives_the_same(pipe, own_pipe, offload, device, prompt):
    kwargs = {"prompt": prompt, "dino_conditioning_scale": 0.5}
    expected = upscale(pipe, **kwargs)
    offload(own_pipe, device)
    for _ in range(2):
        result = upscale(own_pipe, **kwargs)
        assert result.device.type == device
        assert_same(result.cpu(), expected, tolerance(device))
    features = own_pipe.encode_dino(PHOTO, upscale_factor=2, **SIX_TILES)
    assert_same(upscale(own_pipe, dino_embeds=features, **kwargs), result, tolerance(device))


def test_model_offload_moves_each_component_once_per_image(own_pipe):
    """Six tiles and two steps; what the hooks of accelerate do is counted, so that no GPU is needed."""
    own_pipe.enable_model_cpu_offload(device="cpu")
    place = {hook.model: "host" for hook in own_pipe._all_hooks}
    names = {getattr(own_pipe, name): name for name in own_pipe.components if getattr(own_pipe, name) in place}
    moves = []

    def watch(hook):
        load, offload = hook.pre_forward, hook.init_hook

        def pre_forward(module, *args, **kwargs):
            if place[module] == "host":
                moves.append(names[module])
            place[module] = "device"
            return load(module, *args, **kwargs)

        def init_hook(module):
            place[module] = "host"
            return offload(module)

        hook.pre_forward, hook.init_hook = pre_forward, init_hook

    for user_hook in own_pipe._all_hooks:
        watch(user_hook.hook)
    once = ["text_encoder", "text_encoder_2", "dino_encoder", "dino_projector", "vae", "transformer"]
    upscale(own_pipe, output_type="pil")
    assert moves == once


@offloads
def test_projector_loaded_and_unloaded_under_offloading(pipe, offload, device, tmp_path):
    pipe.dino_projector.save_pretrained(tmp_path)
    own_pipe = tiny_pipeline()
    offload(own_pipe, device)
    plain = upscale(own_pipe)
    own_pipe.load_dino_projector(tmp_path, dino_encoder=tiny_dino())
    if offload is OFFLOADS["model"]:
        assert {own_pipe.dino_encoder, own_pipe.dino_projector} <= {hook.model for hook in own_pipe._all_hooks}
    for _ in range(2):
        assert_same(upscale(own_pipe).cpu(), upscale(pipe), tolerance(device))
    own_pipe.unload_dino_projector()
    assert_same(upscale(own_pipe), plain, tolerance(device))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_bfloat16_on_a_gpu(pipe, own_pipe, scale):
    own_pipe.to("cuda", torch.bfloat16)
    kwargs = {"dino_conditioning_scale": scale, "output_type": "pt"}
    assert_same(upscale(own_pipe, **kwargs).cpu().float(), upscale(pipe, **kwargs), atol=0.05)


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "atol"),
    [
        (flash_attention_with_lse, "cpu", torch.float32, 1e-5),
        (flash_attention_with_lse, "cpu", torch.bfloat16, 2e-2),
        *[
            pytest.param(attention, "cuda", dtype, 2e-2, marks=[pytest.mark.gpu, gpu])
            for attention in (cudnn_attention_with_lse, flash_attention_with_lse)
            for dtype in (torch.float16, torch.bfloat16)
        ],
    ],
)
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_merged_attention_is_a_softmax_with_weighted_keys(attention, device, dtype, atol, scale):
    """On the strided tensors that the processor has, and not on contiguous ones."""
    num_dino_tokens = 16
    query, key, value = torch.randn(3, 2, 69, 4, 64, generator=generator()).to(device, dtype).transpose(2, 3)
    logits = query.double() @ key.double().transpose(-1, -2) / 8
    logits[..., :num_dino_tokens] += np.log(scale)
    expected = logits.softmax(-1) @ value.double()
    groups = (slice(num_dino_tokens, None), slice(num_dino_tokens))
    rest, dino = (attention(query, key[:, :, keys], value[:, :, keys]) for keys in groups)
    log_scale = torch.full((1, 1, 1), np.log(scale), device=device, dtype=dtype)
    result = merge_attention(*rest, *dino, log_scale)
    assert result.dtype == dtype
    assert_same(result.double(), expected, atol)
    plain = (query.double() @ key.double().transpose(-1, -2) / 8).softmax(-1) @ value.double()
    assert (expected - plain).abs().max() > 4 * atol


# ---- What the VAE loses --------------------------------------------------------------------------------------------


RESIDUAL_TILES = {"upscale_factor": 2, "tile_size": 48, "tile_overlap": 16}
ALL_TILES = range(2)


def untouched(pipe, image, **kwargs):
    """What the decoder makes of the latents of an input: no tile is denoised."""
    settings = {"frozen_tiles": ALL_TILES, "output_type": "pt", **RESIDUAL_TILES, **kwargs}
    return upscale(pipe, image=image, **settings)


def resized(image):
    pixels = np.asarray(image.resize((64, 48), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


@pytest.fixture
def unclipped(pipe, monkeypatch):
    monkeypatch.setattr(pipe.image_processor, "postprocess", lambda images, output_type: images / 2 + 0.5)


def test_untouched_latents_decode_to_the_input(pipe, unclipped):
    assert len(pipe.plan_tiles(48, 64, 48, 16)) == len(ALL_TILES)
    assert_same(untouched(pipe, PHOTO, vae_residual=True), resized(PHOTO))
    assert_different(untouched(pipe, PHOTO), resized(PHOTO))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_residual_is_the_same_whatever_is_drawn(pipe, unclipped, seed):
    """The input less its own reconstruction."""
    plain, result = (
        upscale(pipe, **RESIDUAL_TILES, output_type="pt", vae_residual=kept, generator=generator(seed))
        for kept in (False, True)
    )
    assert_same(result - plain, resized(PHOTO) - untouched(pipe, PHOTO))


def test_every_result_gets_the_residual_of_its_own_image(pipe, unclipped):
    """Two results for each of two pictures: 0, 0, 1, 1."""
    images = [PHOTO, PHOTO.transpose(Image.Transpose.ROTATE_180)]
    call = {"image": images, "prompt": ["a photo"] * 2, "num_images_per_prompt": 2, **RESIDUAL_TILES}
    noise = torch.randn(4, 12, 16, generator=generator())
    plain, result = (
        upscale(pipe, **call, latents=noise, output_type="pt", vae_residual=kept) for kept in (False, True)
    )
    residuals = [resized(image) - untouched(pipe, image) for image in images]
    assert_different(*residuals)
    assert_same(result - plain, torch.cat([residuals[index // 2] for index in range(4)]))


# ---- Work that is done once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "strips", "latent"])
@pytest.mark.parametrize(
    ("kwargs", "encoded", "decoded"),
    [
        ({}, 6, 6),
        ({"vae_residual": True}, 6, 12),
        ({"latents": torch.zeros(1, 12, 16)}, 0, 6),
        ({"latents": torch.zeros(1, 12, 16), "vae_residual": True}, 6, 12),
        ({"frozen_tiles": [1, 2]}, 6, 6),
        ({"frozen_tiles": [1], "frozen_latents": torch.ones(1, 12, 16), "latents": torch.zeros(1, 12, 16)}, 0, 6),
        ({"num_images_per_prompt": 2}, 6, 6),
    ],
)
def test_each_tile_is_encoded_and_decoded_once(own_pipe, output_type, kwargs, encoded, decoded):
    """And decoded twice for what the VAE loses."""
    calls = count_calls(own_pipe.vae.encoder), count_calls(own_pipe.vae.decoder)
    if output_type == "latent":
        kwargs, decoded = {name: value for name, value in kwargs.items() if name != "vae_residual"}, 0
        encoded = 0 if "latents" in kwargs and "frozen_tiles" not in kwargs else encoded
    result = upscale(own_pipe, output_type=output_type, **kwargs)
    if output_type == "strips":
        assert len(calls[1]) == 0
        list(result)
    assert (len(calls[0]), len(calls[1])) == (encoded, decoded)


class Scans(TorchFunctionMode):
    """Counts how often all elements of a tensor of this size are looked at for the least one."""

    def __init__(self, num_elements):
        super().__init__()
        self.num_elements, self.count = num_elements, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("min", "amin", "aminmax", "isfinite", "isnan") and args[0].numel() == self.num_elements:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kwargs", [{}, {"vae_residual": True, "output_type": "pil"}])
def test_a_picture_is_checked_once(pipe, kwargs):
    image = torch.rand(1, 3, 37, 41, generator=generator())
    with Scans(image.numel()) as scans:
        upscale(pipe, image=image, upscale_factor=1.5, **kwargs)
    assert scans.count == 1


# ---- Projectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DINO_KINDS)
def test_projector_of_two_layers(kind):
    last = tiny_pipeline(dino=kind)
    both = tiny_pipeline(dino=kind, projector={"layers": [0, -1], "in_dim": 2 * DINO_DIM})
    place = {"image": PHOTO, "upscale_factor": 2, **SIX_TILES}
    features, last_features = both.encode_dino(**place), last.encode_dino(**place)
    assert features.shape == (6, 1, 2, 2, 2 * DINO_DIM)
    assert_same(features[..., DINO_DIM:], last_features)
    assert_different(features[..., :DINO_DIM], last_features)
    assert_different(upscale(both), upscale(last), upscale(both, dino_conditioning_scale=0))


def test_positions_of_the_tile(pipe):
    place = tiny_pipeline(dino="dinov2", projector={"position_mode": "tile"})
    small_grid = tiny_pipeline(dino="dinov2", projector={"position_mode": "tile", "token_grid": 2})
    ids = []
    for pipeline in (pipe, place, small_grid):
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: ids.append(kwargs["txt_ids"]), with_kwargs=True
        )
        upscale(pipeline, num_inference_steps=1, **ONE_TILE)
        hook.remove()
    assert torch.equal(ids[0], torch.zeros(16 + 12, 3))
    cells = [[0.0, row, column] for row in range(3) for column in range(4)]
    assert torch.equal(ids[1], torch.cat([torch.tensor(cells), torch.zeros(16, 3)]))
    # Two cells for three rows and four columns of tokens: their centres.
    cells = [[0.0, row, column] for row in (0.25, 1.75) for column in (0.5, 2.5)]
    assert torch.equal(ids[2], torch.cat([torch.tensor(cells), torch.zeros(16, 3)]))
    assert_different(upscale(pipe), upscale(place))


def save_repository(folder, **config):
    """A projector's repo with its own encoder; returns the pipeline that it was made from."""
    pipe = tiny_pipeline(dino="dinov2_with_registers", projector=config)
    pipe.dino_projector.save_pretrained(folder / "dino_projector")
    pipe.dino_encoder.save_pretrained(folder / "dino_encoder")
    return pipe


@pytest.mark.parametrize("form", ["repository", "projector", "encoder", "encoder folder", "string", "named in config"])
def test_load_dino_projector_from_a_folder(form, tmp_path):
    encoder = str(tmp_path / "dino_encoder") if form == "named in config" else None
    source = save_repository(tmp_path, sigma_min=0.1, sigma_max=0.6, dino_model=encoder)
    pipe = tiny_pipeline()
    plain = upscale(pipe)
    pipe.load_dino_projector(
        **{
            "repository": {"pretrained_model_name_or_path": tmp_path},
            "string": {"pretrained_model_name_or_path": str(tmp_path)},
            "named in config": {"pretrained_model_name_or_path": tmp_path},
            "projector": {"pretrained_model_name_or_path": tmp_path / "dino_projector"},
            "encoder": {"pretrained_model_name_or_path": tmp_path, "dino_encoder": source.dino_encoder},
            "encoder folder": {
                "pretrained_model_name_or_path": tmp_path / "dino_projector",
                "dino_encoder": tmp_path / "dino_encoder",
            },
        }[form]
    )
    assert (pipe.dino_projector.config.sigma_min, pipe.dino_projector.config.sigma_max) == (0.1, 0.6)
    assert not pipe.dino_projector.training and not pipe.dino_encoder.training
    assert torch.equal(upscale(pipe, dino_conditioning_scale=0.5), upscale(source, dino_conditioning_scale=0.5))
    pipe.unload_dino_projector()
    assert pipe.dino_encoder is None and pipe.dino_projector is None
    assert torch.equal(upscale(pipe), plain)


def test_loaded_projector_takes_the_transformers_dtype(tmp_path):
    save_repository(tmp_path)
    pipe = tiny_pipeline().to(dtype=torch.bfloat16)
    pipe.load_dino_projector(tmp_path)
    assert pipe.dino_projector.dtype == pipe.dino_encoder.dtype == torch.bfloat16
    assert torch.isfinite(upscale(pipe, dino_conditioning_scale=0.5)).all()


@pytest.mark.parametrize(
    ("part", "pickle"), [("dino_projector", "diffusion_pytorch_model.bin"), ("dino_encoder", "pytorch_model.bin")]
)
def test_pickles_are_refused(part, pickle, tmp_path):
    source = save_repository(tmp_path)
    for weights in (tmp_path / part).glob("*.safetensors"):
        weights.unlink()
    torch.save(source.components[part].state_dict(), tmp_path / part / pickle)
    pipe = tiny_pipeline()
    with pytest.raises(OSError, match="safetensors"):
        pipe.load_dino_projector(tmp_path)
    assert pipe.dino_encoder is None and pipe.dino_projector is None


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        tiny_pipeline().load_dino_projector(tmp_path / "nowhere")


# ---- What a review found -------------------------------------------------------------------------------------------


def carrying_pipe(**embeds):
    """A pipeline whose projector carries these embeddings of the empty prompt."""
    sizes = {"num_prompt_tokens": embeds["prompt_embeds"].shape[1], "pooled_dim": POOLED_DIM}
    pipe = tiny_pipeline(dino="dinov2", projector=sizes)
    for name, value in embeds.items():
        getattr(pipe.dino_projector, name).copy_(value)
    return pipe


def without_text_encoders(pipe):
    pipe.register_modules(**dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]))
    return pipe


RANDOM_EMBEDS = {
    "prompt_embeds": torch.randn(1, 8, JOINT_ATTENTION_DIM, generator=generator(11)),
    "pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator(12)),
}


def test_a_carried_prompt_stands_in_for_the_text_encoders(pipe):
    carrying = without_text_encoders(carrying_pipe(**embed(pipe, "")))
    no_prompt = {"prompt": None, "max_sequence_length": None}
    expected = upscale(pipe, prompt="")
    assert torch.equal(upscale(carrying, **no_prompt), expected)
    assert torch.equal(upscale(carrying, prompt=None, max_sequence_length=16), expected)
    images = {"image": [PHOTO, OTHER_PHOTO], "generator": [generator(0), generator(1)]}
    assert_same(upscale(carrying, **images, **no_prompt)[:1], upscale(carrying, **no_prompt, generator=[generator()]))
    carrying.unload_dino_projector()
    with pytest.raises(ValueError, match="`prompt` must be None without the two text encoders, but is ''"):
        upscale(carrying, **no_prompt)


def test_a_carried_prompt_is_saved_and_shared(tmp_path):
    """Also by a pipeline that is made from the pipeline, and by one that is saved again."""
    pipe = without_text_encoders(carrying_pipe(**RANDOM_EMBEDS))
    no_prompt = {"prompt": None, "max_sequence_length": None}
    expected = upscale(pipe, **no_prompt)
    assert torch.equal(upscale(FluxDinoTilePipeline.from_pipe(pipe), **no_prompt), expected)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        pipe.save_pretrained(folder)
        pipe = FluxDinoTilePipeline.from_pretrained(folder)
        assert pipe.dino_projector is None and pipe.default_prompt_embeds is None
        pipe.load_dino_projector(folder)
        pipe.set_progress_bar_config(disable=True)
        for value, wanted in zip(pipe.default_prompt_embeds, RANDOM_EMBEDS.values()):
            assert torch.equal(value, wanted)
        assert torch.equal(upscale(pipe, **no_prompt), expected)


def test_a_negative_prompt_has_as_many_tokens_as_the_carried_one():
    """Both share the positions; the text encoders are there."""
    pipe = carrying_pipe(**RANDOM_EMBEDS)
    kwargs = {"max_sequence_length": None, "negative_prompt": "a dog", "true_cfg_scale": 2}
    expected = upscale(pipe, **RANDOM_EMBEDS, **kwargs)
    assert torch.equal(upscale(pipe, prompt=None, **kwargs), expected)
    assert_different(upscale(pipe, prompt=None, **{**kwargs, "true_cfg_scale": 1}), expected)


def test_embeddings_of_another_dtype_are_cast(own_pipe):
    own_pipe.to(dtype=torch.bfloat16)
    given = upscale(own_pipe, **RANDOM_EMBEDS)
    carrying = carrying_pipe(**RANDOM_EMBEDS).to(dtype=torch.bfloat16)
    assert torch.equal(upscale(carrying, prompt=None, max_sequence_length=None), given)


def test_prompt_2_counts_also_with_a_carried_prompt(pipe):
    carrying, no_prompt = carrying_pipe(**embed(pipe, "")), {"prompt": None, "max_sequence_length": None}
    assert torch.equal(upscale(carrying, **no_prompt), upscale(carrying, **embed(pipe, "")))
    moss = upscale(carrying, prompt=None, prompt_2="moss")
    assert torch.equal(moss, upscale(pipe, prompt="", prompt_2="moss"))
    assert_different(upscale(carrying, **no_prompt), moss)


def test_each_prompt_has_its_own_ip_adapter_embeddings(own_pipe):
    own_pipe.transformer._load_ip_adapter_weights([tiny_ip_adapter(own_pipe.transformer)])
    embeds = torch.randn(2, 1, 8, generator=generator())
    noise = torch.randn(2, 12, 16, generator=generator(1))
    both = upscale(own_pipe, prompt=["a", "a"], latents=noise, ip_adapter_image_embeds=[embeds])
    for index in range(2):
        each = slice(index, index + 1)
        alone = upscale(own_pipe, prompt="a", latents=noise[each], ip_adapter_image_embeds=[embeds[each]])
        assert_same(both[each], alone)
    assert_different(*both.split(1))


def test_the_text_encoder_leaves_before_the_transformer_comes():
    """Model offload frees the model before the running one in the sequence, and DINO may have nothing to do."""
    order = FluxDinoTilePipeline.model_cpu_offload_seq.split("->")
    between = order[order.index("text_encoder_2") + 1 : order.index("transformer")]
    assert set(between) <= {"image_encoder"}
    assert {"dino_encoder", "dino_projector"} <= set(order)


def test_a_projector_folder_belongs_to_its_repo(tmp_path, own_pipe):
    """The encoder lies beside the folder; a broken file there leaves nothing half loaded."""
    own_pipe.dino_projector.save_pretrained(tmp_path / "dino_projector")
    own_pipe.dino_encoder.save_pretrained(tmp_path / "dino_encoder")
    pipe = tiny_pipeline()
    pipe.load_dino_projector(tmp_path / "dino_projector")
    assert_same(upscale(pipe), upscale(own_pipe))
    (tmp_path / "dino_encoder" / "model.safetensors").write_bytes(b"broken")
    pipe = tiny_pipeline()
    with pytest.raises(Exception, match="header"):
        pipe.load_dino_projector(tmp_path / "dino_projector")
    assert pipe.dino_projector is None and pipe.dino_encoder is None


@pytest.mark.parametrize("encoder_dtype", [torch.float32, torch.float16])
def test_a_given_encoder_keeps_its_dtype(tmp_path, encoder_dtype):
    """It is the caller's, who may use it elsewhere."""
    save_repository(tmp_path)
    encoder = tiny_dino("dinov2_with_registers").to(encoder_dtype)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    pipe = tiny_pipeline().to(dtype=torch.bfloat16)
    pipe.load_dino_projector(tmp_path, dino_encoder=encoder)
    assert pipe.dino_encoder is encoder and encoder.dtype == encoder_dtype
    assert pipe.dino_projector.dtype == torch.bfloat16
    assert torch.isfinite(upscale(pipe, dino_conditioning_scale=0.5)).all()
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


def test_a_variant_of_the_weights(tmp_path):
    """As `save_pretrained` writes it, and no other."""
    source = tiny_pipeline(dino="dinov2").to(dtype=torch.float16)
    source.save_pretrained(tmp_path, variant="fp16")
    pipe = FluxDinoTilePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    pipe.load_dino_projector(tmp_path, variant="fp16")
    for part in ("dino_encoder", "dino_projector"):
        for name, value in getattr(source, part).state_dict().items():
            assert torch.equal(getattr(pipe, part).state_dict()[name], value)
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        tiny_pipeline().load_dino_projector(tmp_path)


def test_a_variant_of_the_projector_says_nothing_of_another_encoder(tmp_path):
    source = tiny_pipeline(dino="dinov2")
    source.dino_projector.save_pretrained(tmp_path / "projector", variant="fp16")
    source.dino_encoder.save_pretrained(tmp_path / "encoder")
    pipe = tiny_pipeline()
    pipe.load_dino_projector(tmp_path / "projector", variant="fp16", dino_encoder=tmp_path / "encoder")
    assert pipe.dino_encoder is not None


@pytest.mark.parametrize(("part", "name"), [("transformer", "FluxTransformer2DModel"), ("dino_encoder", "model")])
def test_another_model_is_no_projector(tmp_path, own_pipe, part, name):
    getattr(own_pipe, part).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`pretrained_model_name_or_path` must be a DinoProjector's place, but is "):
        own_pipe.load_dino_projector(tmp_path)


def test_a_strength_without_a_projector_is_said_to_have_no_effect(caplog):
    pipe = tiny_pipeline()
    with caplog.at_level("WARNING"):
        upscale(pipe, dino_conditioning_scale=1)
        assert not caplog.records
        upscale(pipe, dino_conditioning_scale=0.6)
    assert "`dino_conditioning_scale` 0.6 has no effect" in caplog.text


def test_a_start_above_the_trained_noise_is_said(caplog):
    pipe = tiny_pipeline(dino="dinov2", projector={"sigma_max": 0.4})
    with caplog.at_level("WARNING"):
        upscale(pipe, start_sigma=0.4)
        assert not caplog.records
        upscale(pipe, start_sigma=0.7)
    assert "sigma 0.700" in caplog.text and "up to 0.4" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        upscale(pipe, start_sigma=0.7, dino_guidance_start=0.5)
    assert not caplog.records


def test_tiles_in_which_flux_draws_grids_are_named(caplog):
    pipe = tiny_pipeline()
    with caplog.at_level("WARNING"):
        pipe.plan_tiles(4096, 4096, tile_size=1024)
        assert not caplog.records
        pipe.plan_tiles(4096, 4096, tile_size=1280)
    assert "1280x1280 px are 6400 tokens" in caplog.text


@pytest.mark.parametrize(("guidance_embeds", "num_tokens"), [(False, 256), (True, 512)], ids=["schnell", "dev"])
def test_text_tokens_by_default_are_those_of_the_training(guidance_embeds, num_tokens):
    pipe = tiny_pipeline(guidance_embeds)
    lengths = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    for max_sequence_length in (None, 128):
        upscale(pipe, num_inference_steps=1, max_sequence_length=max_sequence_length, **ONE_TILE)
    assert lengths == [num_tokens, 128]


# ---- Quantized transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_transformer_gives_nearly_the_same(pipe, own_pipe, tmp_path, dtype):
    pipe.transformer.save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, tensor in pipe.transformer.state_dict().items():
        is_large = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "blocks" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if is_large else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    transformer = FluxTransformer2DModel.from_single_file(
        tmp_path / "flux.gguf",
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        dtype=dtype,
    )
    assert type(transformer.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    own_pipe.to(dtype).register_modules(transformer=transformer)
    result = upscale(own_pipe, dino_conditioning_scale=0.5)
    expected = upscale(pipe, dino_conditioning_scale=0.5)
    assert 0 < (result - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_quantized_transformer_gives_nearly_the_same(pipe, tmp_path, kind):
    """As `upscale.py --quantize` loads it."""
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    from flux_dino_tile.loading import quantization_config

    pipe.save_pretrained(tmp_path)
    mapping = {"transformer": quantization_config(kind, torch.bfloat16)}
    quantized = FluxDinoTilePipeline.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    ).to("cuda")
    quantized.set_progress_bar_config(disable=True)
    result = upscale(quantized, dino_conditioning_scale=0.5).cpu()
    expected = upscale(pipe, dino_conditioning_scale=0.5)
    assert 0 < (result - expected).abs().max() < 0.5 * expected.std()
