"""The strength of the DINO keys: three ways to compute it against a float64 softmax."""

import math

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxPosEmbed
from hypothesis import given
from hypothesis import strategies as st

from pipeline_flux_dino_tile import (
    FluxDinoAttnProcessor,
    cudnn_attention_with_lse,
    flash_attention_with_lse,
    merge_attention,
    select_lse_attention,
)


BATCH, HEADS, HEAD_DIM = 2, 3, 8
DINO, TEXT, IMAGE = 4, 5, 12
TOKENS = DINO + TEXT + IMAGE
DIM = HEADS * HEAD_DIM


def log_bias(scale: float | torch.Tensor) -> torch.Tensor:
    """The additive bias `(batch or 1, 1, 1, TOKENS)` that carries the strength."""
    scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1, 1, 1)
    bias = torch.zeros(len(scales), 1, 1, TOKENS)
    bias[..., :DINO] = scales.log()
    return bias


def softmax_attention(query, key, value, bias):
    """Naive attention in float64 of `(batch, heads, tokens, head_dim)` tensors."""
    query, key, value, bias = (x.double() for x in (query, key, value, bias))
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    return torch.softmax(logits, dim=-1) @ value


def block(kind: str, seed: int, fused: bool = False) -> FluxAttention:
    """The attention of a double or a single block, with norms that do something."""
    torch.manual_seed(seed)
    if kind == "double":
        attn = FluxAttention(
            DIM, HEADS, HEAD_DIM, bias=True, added_kv_proj_dim=DIM, out_dim=DIM, context_pre_only=False
        )
    else:
        attn = FluxAttention(DIM, HEADS, HEAD_DIM, bias=True, out_dim=DIM, pre_only=True)
    for name, parameter in attn.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    if fused:
        attn.fuse_projections()
    return attn


def inputs(kind: str, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(BATCH, TOKENS, DIM, generator=generator) * 2
    ids = torch.randint(0, 9, (TOKENS, 3), generator=generator).float()
    rotary = FluxPosEmbed(theta=10000, axes_dim=(2, 2, 4))(ids)
    if kind == "single":
        return {"hidden_states": states, "image_rotary_emb": rotary}
    text, image = states.split([DINO + TEXT, IMAGE], dim=1)
    return {"hidden_states": image, "encoder_hidden_states": text, "image_rotary_emb": rotary}


def expected_output(attn: FluxAttention, kind: str, arguments: dict, bias: torch.Tensor) -> list[torch.Tensor]:
    """The block's attention in float64, written out from the weights: project, norm, rotate, softmax, project."""
    weights = {name: parameter.double() for name, parameter in attn.named_parameters()}

    def heads_of(states, names, norms):
        projected = []
        for name, norm in zip(names, norms):
            x = (states.double() @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).unflatten(
                -1, (HEADS, HEAD_DIM)
            )
            if norm is not None:
                rms = x.square().mean(-1, keepdim=True).add(getattr(attn, norm).eps).rsqrt()
                x = x * rms * weights[f"{norm}.weight"]
            projected.append(x.transpose(1, 2))
        return projected

    streams = [heads_of(arguments["hidden_states"], ["to_q", "to_k", "to_v"], ["norm_q", "norm_k", None])]
    if kind == "double":
        names, norms = ["add_q_proj", "add_k_proj", "add_v_proj"], ["norm_added_q", "norm_added_k", None]
        streams.insert(0, heads_of(arguments["encoder_hidden_states"], names, norms))
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*streams))
    cos, sin = (x.double() for x in arguments["image_rotary_emb"])

    def rotate(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin

    out = softmax_attention(rotate(query), rotate(key), value, bias).transpose(1, 2).flatten(2)
    if kind == "single":
        return [out]
    text, image = out.split([DINO + TEXT, IMAGE], dim=1)
    return [
        image @ weights["to_out.0.weight"].T + weights["to_out.0.bias"],
        text @ weights["to_add_out.weight"].T + weights["to_add_out.bias"],
    ]


def run(attn: FluxAttention, arguments: dict, processor, bias) -> list[torch.Tensor]:
    attn.set_processor(processor)
    with torch.no_grad():
        out = attn(**arguments, attention_mask=bias)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("scale", [0.01, 0.3, 0.6, 1.0, 2.5])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused-qkv"])
@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("path", ["merge", "bias"])
def test_blocks_equal_a_float64_softmax(kind, fused, path, scale):
    for seed in range(3):
        arguments = inputs(kind, seed)
        expected = expected_output(block(kind, seed), kind, arguments, log_bias(scale))
        lse_attention = flash_attention_with_lse if path == "merge" else None
        processor = FluxDinoAttnProcessor(DINO, lse_attention)
        for out, wanted in zip(run(block(kind, seed, fused), arguments, processor, log_bias(scale)), expected):
            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_the_merge_takes_a_strength_for_each_sample(kind):
    """A sample of strength 0 is as if its DINO keys were not there."""
    arguments, bias = inputs(kind, 0), log_bias([0.4, 0.0])
    expected = expected_output(block(kind, 0), kind, arguments, bias)
    processor = FluxDinoAttnProcessor(DINO, flash_attention_with_lse)
    for out, wanted in zip(run(block(kind, 0), arguments, processor, bias), expected):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_without_a_bias_it_is_the_stock_processor_bit_for_bit(kind):
    arguments = inputs(kind, 1)
    stock = run(block(kind, 1), arguments, FluxAttnProcessor(), None)
    ours = run(block(kind, 1), arguments, FluxDinoAttnProcessor(DINO, flash_attention_with_lse), None)
    assert all(torch.equal(a, b) for a, b in zip(stock, ours))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_backends_that_take_a_mask_give_the_same(backend):
    arguments, bias = inputs("double", 2), log_bias(0.3)
    expected = expected_output(block("double", 2), "double", arguments, bias)
    processor = FluxDinoAttnProcessor(DINO)
    processor._attention_backend = AttentionBackendName(backend)
    for out, wanted in zip(run(block("double", 2), arguments, processor, bias), expected):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


def test_training_takes_the_bias_because_the_merge_has_no_gradient():
    """The gradient for the DINO tokens equals that of the naive softmax."""
    attn, arguments, bias = block("single", 3), inputs("single", 3), log_bias(0.5)
    attn.set_processor(FluxDinoAttnProcessor(DINO, flash_attention_with_lse))
    states = arguments["hidden_states"].requires_grad_()
    attn(**arguments, attention_mask=bias).square().sum().backward()
    gradient = states.grad.clone()
    states.grad = None
    expected_output(attn, "single", arguments, bias)[0].square().sum().backward()
    torch.testing.assert_close(gradient, states.grad, rtol=1e-4, atol=1e-4)


tensors = st.tuples(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.floats(-8, 3))


@given(tensors)
def test_merging_two_groups_of_keys_is_one_softmax(case):
    seed, num_rest, num_dino, log_scale = case
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator) * 3 for n in (7, *[num_rest + num_dino] * 2))
    bias = torch.zeros(num_rest + num_dino)
    bias[num_rest:] = log_scale
    groups = [
        flash_attention_with_lse(query, key[:, :, keys], value[:, :, keys])
        for keys in (slice(num_rest), slice(num_rest, None))
    ]
    merged = merge_attention(*groups[0], *groups[1], torch.tensor(log_scale))
    expected = softmax_attention(query, key, value, bias)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("capability", "native"), [((9, 0), "cudnn"), ((8, 9), "flash"), ((10, 0), "cudnn")])
def test_lse_attention_is_chosen_by_backend_device_and_dtype(monkeypatch, capability, native):
    """cuDNN's is the fastest from Hopper on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cpu, mps, cuda = torch.device("cpu"), torch.device("mps"), torch.device("cuda")
    assert select_lse_attention("native", cpu, torch.float32) is flash_attention_with_lse
    assert select_lse_attention("_native_math", cpu, torch.float32) is None
    assert select_lse_attention("native", mps, torch.bfloat16) is None
    kernels = {"cudnn": cudnn_attention_with_lse, "flash": flash_attention_with_lse}
    expected = {"_native_cudnn": kernels["cudnn"], "_native_flash": kernels["flash"], "native": kernels[native]}
    for backend, kernel in expected.items():
        assert select_lse_attention(backend, cuda, torch.float32) is None
        for dtype in (torch.bfloat16, torch.float16):
            assert select_lse_attention(backend, cuda, dtype) is kernel
    for backend in ("_native_math", "flex", "flash", "xformers"):
        assert select_lse_attention(backend, cuda, torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_flash", "native"])
@pytest.mark.parametrize("scale", [0.05, 0.6, 2.0])
def test_merge_on_cuda_kernels(backend, scale):
    """bf16 inputs: the error against float64 is that of the kernel, below 1 %."""
    lse_attention = select_lse_attention(backend, torch.device("cuda"), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    # Laid out as the projections give them: tokens before heads, so that the groups of keys are strided views.
    query, key, value = (torch.randn(2, 1280, 24, 128, generator=generator).bfloat16().cuda() for _ in range(3))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bias = torch.zeros(1280, device="cuda")
    bias[:256] = math.log(scale)
    expected = softmax_attention(query, key, value, bias)

    def attend(query, key, value, log_scale):
        groups = (slice(256, None), slice(256))
        rest, dino = (lse_attention(query, key[:, :, keys], value[:, :, keys]) for keys in groups)
        return merge_attention(*rest, *dino, log_scale)

    for function in (attend, torch.compile(attend, fullgraph=True)):
        merged = function(query, key, value, bias[0].view(1, 1, 1))
        assert ((merged.double() - expected).norm() / expected.norm()).item() < 1e-2
