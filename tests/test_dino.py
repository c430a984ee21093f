"""DINO features: which encoders, which place in the picture, which place in the sequence."""

import numpy as np
import pytest
import torch

from pipeline_flux_dino_tile import DinoProjector
from tiny_models import DINO_DIM, tiny_dino, tiny_pipeline, tiny_projector


ENCODERS = ["dinov2", "dinov2_with_registers", "dinov3"]


def picture(height: int, width: int, row: int | None = None, column: int | None = None) -> torch.Tensor:
    """A grey picture with, at a token's place, a black-and-white square of 16 px."""
    pixels = torch.full((1, 3, height, width), 0.5)
    if row is not None:
        pixels[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
        pixels[..., 16 * row + 4 : 16 * row + 12, 16 * column + 4 : 16 * column + 12] = 0.0
    return pixels


@pytest.mark.parametrize("kind", ENCODERS)
def test_patch_features_are_the_encoders_own_without_cls_and_registers(kind):
    pipe = tiny_pipeline(dino=kind)
    patch = pipe.dino_encoder.config.patch_size
    pixels = torch.randn(2, 3, 3 * patch, 5 * patch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = pipe.get_patch_features(pixels, 3, 5)
        hidden_states = pipe.dino_encoder(pixels).last_hidden_state
    num_prefix = 1 + getattr(pipe.dino_encoder.config, "num_register_tokens", 0)
    assert hidden_states.shape[1] == num_prefix + 15
    for row, column in [(0, 0), (0, 4), (2, 1)]:
        assert torch.equal(features[:, row, column], hidden_states[:, num_prefix + 5 * row + column])


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("place", [(0, 0), (2, 5), (5, 3), (3, 8)])
def test_a_moved_patch_changes_the_token_of_its_place(kind, place):
    """
    With as many DINO tokens as image tokens, the token that changes most lies where the square lies in the picture.

    Attention spreads a change over all tokens, so the encoder's attention is switched off: what is left is where a
    pixel goes.
    """
    pipe = tiny_pipeline(dino=kind, projector={"token_grid": 16})
    for name, parameter in pipe.dino_encoder.named_parameters():
        if "attention" in name and ("output" in name or "o_proj" in name):
            torch.nn.init.zeros_(parameter)
    plan = pipe.plan_tiles(96, 144)
    with torch.no_grad():
        empty, moved = (pipe.encode_dino_tiles(2 * picture(96, 144, *where) - 1, plan) for where in ((), place))
    change = (moved - empty).norm(dim=-1)[0, 0]
    assert change.shape == (6, 9)
    assert tuple(np.unravel_index(int(change.argmax()), tuple(change.shape))) == place
    neighbours = change.clone()
    neighbours[place] = 0
    # Bicubic resizing to the encoder's patches reaches a little into the neighbours.
    assert neighbours.max() < 0.7 * change[place]
    far = torch.tensor([[max(abs(r - place[0]), abs(c - place[1])) > 1 for c in range(9)] for r in range(6)])
    assert change[far].max() < 1e-4


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_tile_sees_its_own_part_of_the_picture(kind):
    pipe = tiny_pipeline(dino=kind)
    image = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    plan = pipe.plan_tiles(96, 160, tile_size=64, tile_overlap=32)
    features = pipe.encode_dino(image, upscale_factor=1, tile_size=64, tile_overlap=32)
    assert features.shape == (len(plan), 1, 4, 4, DINO_DIM)
    for index, tile in enumerate(plan):
        alone = pipe.encode_dino(image[tile.slices()], upscale_factor=1)
        torch.testing.assert_close(features[index], alone[0], rtol=1e-5, atol=1e-5)


def test_the_input_is_normalised_as_the_config_says():
    """The processor's mean and deviation, applied to [0, 1]: checked against a hand-made input."""
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    pipe = tiny_pipeline(dino="dinov3", projector=settings)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = pipe.dino_encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    pipe.encode_dino(pixels, upscale_factor=1)
    handle.remove()
    expected = torch.stack([(pixels[0, c] - settings["image_mean"][c]) / settings["image_std"][c] for c in range(3)])
    torch.testing.assert_close(seen[0][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "tokens"), [(4, (8, 8)), (4, (6, 10)), (3, (3, 7)), (16, (5, 4))])
def test_pooling_averages_the_patches_of_a_token(grid, tokens):
    projector = tiny_projector(token_grid=grid)
    patches = torch.randn(1, *tokens, DINO_DIM, generator=torch.Generator().manual_seed(0))
    pooled = projector.pool(patches)
    rows, columns = (min(grid, length) for length in tokens)
    assert pooled.shape == (1, rows, columns, DINO_DIM)
    for row in range(rows):
        for column in range(columns):
            first, last = row * tokens[0] // rows, -(-(row + 1) * tokens[0] // rows)
            left, right = column * tokens[1] // columns, -(-(column + 1) * tokens[1] // columns)
            expected = patches[0, first:last, left:right].mean((0, 1))
            torch.testing.assert_close(pooled[0, row, column], expected, rtol=1e-5, atol=1e-6)


def test_positions_are_the_centres_of_the_described_places():
    projector = tiny_projector(position_mode="tile")
    one_to_one = projector.position_ids((3, 5), (3, 5))
    assert one_to_one.tolist() == [[0, row, column] for row in range(3) for column in range(5)]
    # Two tokens over eight image tokens: the centres of 0..3 and 4..7.
    assert projector.position_ids((2, 1), (8, 4))[:, 1:].tolist() == [[1.5, 1.5], [5.5, 1.5]]
    assert tiny_projector().position_ids((2, 3), (8, 9)).abs().max() == 0


def test_projector_is_norm_linear_silu_linear_gain():
    projector = tiny_projector()
    torch.nn.init.normal_(projector.gain)
    x = torch.randn(2, 5, DINO_DIM, generator=torch.Generator().manual_seed(0)).double()
    weights = {name: value.double() for name, value in projector.state_dict().items()}
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = normed @ weights["linear_1.weight"].T + weights["linear_1.bias"]
    hidden = hidden / (1 + torch.exp(-hidden))
    expected = (hidden @ weights["linear_2.weight"].T + weights["linear_2.bias"]) * weights["gain"]
    torch.testing.assert_close(projector(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_full_size_projector_maps_768_to_4096():
    with torch.device("meta"):
        tokens = DinoProjector()(torch.empty(2, 256, 768))
    assert tokens.shape == (2, 256, 4096)


def test_projector_saves_and_loads_all_that_inference_needs(tmp_path):
    settings = {
        "layers": [0, -1],
        "in_dim": 2 * DINO_DIM,
        "position_mode": "tile",
        "sigma_min": 0.03,
        "sigma_max": 0.8,
    }
    projector = tiny_projector(**settings, dino_model="someone/some-dino")
    projector.save_pretrained(tmp_path)
    loaded = DinoProjector.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in settings} == settings
    assert loaded.config.dino_model == "someone/some-dino"
    assert all(torch.equal(a, b) for a, b in zip(projector.state_dict().values(), loaded.state_dict().values()))
    assert [path.name for path in tmp_path.glob("*.bin")] == []


@pytest.mark.parametrize("kind", ENCODERS)
def test_hidden_layers_pass_the_final_norm(kind):
    """The last hidden state after the norm is what the encoder itself returns."""
    pipe = tiny_pipeline(dino=kind, projector={"layers": [1, -1], "in_dim": 2 * DINO_DIM})
    encoder = tiny_dino(kind)
    patch = encoder.config.patch_size
    pixels = torch.randn(1, 3, 2 * patch, 2 * patch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = pipe.get_patch_features(pixels, 2, 2)
        expected = encoder(pixels).last_hidden_state[:, -4:].unflatten(1, (2, 2))
    torch.testing.assert_close(features[..., DINO_DIM:], expected)
    assert (features[..., :DINO_DIM] - expected).abs().max() > 1e-2


def generate(pipe, scale, image, **settings):
    call = {"upscale_factor": 1, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    return pipe(image=image, dino_conditioning_scale=scale, generator=generator, **{**call, **settings}).images


@pytest.mark.parametrize("kind", ENCODERS)
def test_strength_zero_is_no_projector_bit_for_bit_and_the_effect_grows_from_there(kind):
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    pipe, plain = tiny_pipeline(dino=kind), tiny_pipeline()
    torch.nn.init.constant_(pipe.dino_projector.gain, 20.0)
    none = generate(plain, 1.0, image)
    results = {scale: generate(pipe, scale, image) for scale in (0, 1e-6, 0.1, 0.5, 1.0, 1 + 1e-6)}
    assert np.array_equal(results[0], none)
    np.testing.assert_allclose(results[1e-6], none, atol=1e-5)
    np.testing.assert_allclose(results[1 + 1e-6], results[1.0], atol=1e-5)
    effects = [np.abs(results[scale] - none).mean() for scale in (0.1, 0.5, 1.0)]
    assert 1e-6 < effects[0] < effects[1] < effects[2]


def test_strength_one_is_plain_attention_over_the_longer_sequence():
    """The same as handing the transformer the tokens as if they were text."""
    pipe = tiny_pipeline(dino="dinov2")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    result = generate(pipe, 1.0, image)
    plan = pipe.plan_tiles(64, 64)
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt("", max_sequence_length=16)
        tokens = pipe.dino_projector(pipe.encode_dino(image, upscale_factor=1)[0].flatten(1, 2))
    pipe.unload_dino_projector()
    embeds = torch.cat([tokens, text], dim=1)
    assert len(plan) == 1
    expected = generate(pipe, 1.0, image, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    np.testing.assert_allclose(result, expected, atol=1e-6)
