"""Which sizes a network takes, and what it says to others."""

import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import build_tokenizer, starting_tokenizer
from cosmos_hpc.tokenizer.architecture import Architecture
from cosmos_hpc.tokenizer.build import build

REFUSALS = {
    (2, 3, 8, 32, 32): "clips have 8 frames, but CV8x8x8 takes 1 + 8k: cut or repeat frames to 1 or 9",
    (2, 3, 13, 32, 32): "clips have 13 frames, but CV8x8x8 takes 1 + 8k: cut or repeat frames to 9 or 17",
    (2, 3, 9, 36, 32): "clips have height 36, but CV8x8x8 takes multiples of 8: crop or pad to 32 or 40",
    (2, 3, 9, 32, 4): "clips have width 4, but CV8x8x8 takes multiples of 8: crop or pad to 8",
    (2, 9, 32, 32, 3): "clips are [2, 9, 32, 32, 3], but CV8x8x8 takes [B, 3, T, H, W]: put the colours second",
    (3, 9, 32, 32): "clips are [3, 9, 32, 32], but CV8x8x8 takes [B, 3, T, H, W]: put the colours second",
}
LATENT_SHAPES = {
    "CV8x8x8": (16, 3, 4, 6),
    "CV8x16x16": (16, 3, 2, 3),
    "CV4x8x8": (16, 5, 4, 6),
    "DV8x16x16": (6, 3, 2, 3),
    "DV8x8x8": (6, 3, 4, 6),
    "DV4x8x8": (6, 5, 4, 6),
    "Cosmos-Tokenize1-CV8x8x8-720p": (16, 3, 4, 6),
    ["nvidia", "Cosmos-1.0-Tokenizer-DV8x16x16"][1]: (6, 3, 2, 3),
}


@pytest.mark.parametrize("shape", REFUSALS, ids=str)
def test_other_sizes_are_refused_with_the_mend(small, shape):
    with pytest.raises(ConfigError) as refusal:
        small("CV8x8x8").encode(torch.zeros(shape))
    assert str(refusal.value) == REFUSALS[shape]


def test_what_is_no_latent_is_refused(small):
    with pytest.raises(ConfigError, match=r"latents are \[1, 6, 2, 4, 4\], but CV8x8x8 decodes \[B, 16, T', H', W'\]"):
        small("CV8x8x8").decode(torch.zeros(1, 6, 2, 4, 4))
    with pytest.raises(ConfigError, match=r"decoded as \[B, T', H', W'\]: pass one clip's as \[1, ...\]"):
        small("DV8x16x16").decode_indices(torch.zeros(2, 4, 4, dtype=torch.int32))


@pytest.mark.parametrize("name", LATENT_SHAPES)
def test_every_released_variant_returns_the_size_it_was_given(small, name):
    clips = torch.zeros(2, 3, 17, 32, 48)
    reconstructions, latents, _ = small(name)(clips)
    assert reconstructions.shape == clips.shape
    assert tuple(latents.shape) == (2, *LATENT_SHAPES[name])


@pytest.mark.parametrize("name", ["CV8x8x8", "DV8x16x16", "CV4x8x8"])
@pytest.mark.parametrize("num_frames", [1, 17])
def test_every_parameter_gets_a_gradient_in_each_backward(small, name, num_frames):
    network = small(name)
    network(torch.rand(1, 3, num_frames, 16, 16)).reconstructions.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.is_contiguous() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["CV8x8x8", "DV8x16x16"])
def test_later_frames_do_not_change_earlier_ones(small, name):
    clips = torch.rand(1, 3, 17, 16, 32) * 2 - 1
    changed = clips.clone()
    changed[:, :, 9:] = 0
    network = small(name)
    assert network(changed).reconstructions[:, :, :9].allclose(network(clips).reconstructions[:, :, :9], atol=1e-6)


@pytest.mark.parametrize("name", ["CV8x8x8", "DV8x16x16"])
def test_lower_precision_stays_near_float32(small, name):
    network, clips = small(name), torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = network.encode(clips)
        exact = network.decode(latents)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = network.decode(latents)
        assert mixed.dtype == torch.float32
        low = network.bfloat16().decode(latents.bfloat16())
    assert low.dtype == torch.bfloat16
    for other in (mixed, low.float()):
        assert (other - exact).abs().max() < 0.05 * exact.abs().max()


def test_activations_keep_their_memory_order_from_end_to_end(small):
    """A layer that returns another order makes its neighbours copy."""
    network = small("CV8x8x8")
    orders = {}
    for name, module in network.named_modules():
        if not isinstance(module, (torch.nn.ModuleList, type(network))) and name not in (
            "decoder",
            "decoder.unpatcher3d",
        ):
            module.register_forward_hook(
                lambda _, __, output, name=name: orders.__setitem__(
                    name, output.is_contiguous(memory_format=torch.channels_last_3d)
                )
            )
    network(torch.rand(1, 3, 9, 64, 64))
    assert [name for name, is_kept in orders.items() if not is_kept] == []


def test_an_architecture_that_can_not_return_its_size_is_refused():
    with pytest.raises(ConfigError, match="no decoder that undoes its encoder: use patch size 4"):
        Architecture(kind="CV", temporal_compression=8, spatial_compression=8, patch_size=2)


def test_patch_size_two_of_the_360p_releases_is_built():
    for is_first in (False, True):
        architecture = Architecture(
            kind="CV", temporal_compression=4, patch_size=2, channels=4, upsamples_time_first=is_first
        )
        assert build(architecture)(torch.zeros(1, 3, 9, 16, 16)).reconstructions.shape == (1, 3, 9, 16, 16)


def test_fresh_weights_depend_on_the_seed_alone(small):
    model = ModelConfig(model="CV8x8x8", channels=4)
    state = torch.get_rng_state()
    first, second, other = (starting_tokenizer(model, seed).state_dict() for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(state)
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["quant_conv.conv3d.weight"].equal(other["quant_conv.conv3d.weight"])
    build_tokenizer(model)
    assert not torch.get_rng_state().equal(state)
