"""Each layer and its gradients, against recorded values in float64."""

import pytest
import torch
from golden_vectors import error, load, set_recorded_weights
from torch import nn

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import starting_tokenizer
from cosmos_hpc.tokenizer.architecture import Resampling
from cosmos_hpc.tokenizer.layers import (
    FactorizedConv,
    FrameNorm,
    PointwiseConv,
    ResidualBlock,
    SpatialAttention,
    SpatialConv,
    TemporalAttention,
    TemporalConv,
    recompute_blocks,
)
from cosmos_hpc.tokenizer.resampling import Downsample, Upsample

RECORDED = load("unit_layers")
BOTH, IN_SPACE, IN_TIME = Resampling(True, True), Resampling(True, False), Resampling(False, True)
LAYERS = {
    "conv_t3": lambda: TemporalConv(4, 5),
    "conv_s3": lambda: SpatialConv(4, 5),
    "conv_1": lambda: PointwiseConv(4, 5),
    "norm": lambda: FrameNorm(8),
    "resblock_8_12": lambda: ResidualBlock(8, 12),
    "resblock_8_8": lambda: ResidualBlock(8, 8),
    "attn_spatial": lambda: SpatialAttention(16),
    "attn_temporal": lambda: TemporalAttention(16),
    "attn_factorised": lambda: nn.Sequential(SpatialAttention(16), TemporalAttention(16)),
    **{
        f"{way}_{name}_T{frames}": lambda layer=layer, resampling=resampling: layer(6, resampling)
        for way, layer in (("down", Downsample), ("up", Upsample))
        for name, resampling in (("both", BOTH), ("spatial", IN_SPACE), ("temporal", IN_TIME))
        for frames in (1, 3)
    },
}


def test_every_recorded_layer_is_checked():
    assert LAYERS.keys() == {key.split("/")[0] for key in RECORDED}


@pytest.mark.parametrize("tag", LAYERS)
def test_layer_and_its_gradients_are_as_recorded(tag):
    layer = LAYERS[tag]().double()
    set_recorded_weights(layer, prefix=f"unit.{tag}.")
    x = torch.from_numpy(RECORDED[f"{tag}/in"]).requires_grad_()
    y = layer(x)
    assert error(y, RECORDED[f"{tag}/out"]) < 1e-12
    (y * torch.from_numpy(RECORDED[f"{tag}/gout"])).sum().backward()
    assert error(x.grad, RECORDED[f"{tag}/gin"]) < 1e-12
    names = {key.removeprefix(f"{tag}/grad/") for key in RECORDED if key.startswith(f"{tag}/grad/")}
    assert names == {name for name, _ in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        largest = max(abs(RECORDED[f"{tag}/grad/{name}"]).max(), 1e-3)  # zero for the bias of k, which softmax ignores
        assert error(parameter.grad / largest, RECORDED[f"{tag}/grad/{name}"] / largest) < 1e-12 or (
            parameter.grad.abs().max() < 1e-12
        )


@pytest.mark.parametrize("silu", [False, True])
def test_the_norms_own_gradient_is_that_of_its_formula(silu):
    generator = torch.Generator().manual_seed(0)
    norm = FrameNorm(6).double()
    for parameter in norm.parameters():
        parameter.data = torch.randn(6, generator=generator, dtype=torch.float64)
    clips = torch.randn(2, 6, 3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm(x, silu=silu), (clips, *norm.parameters()))


def test_under_autocast_the_first_bias_of_a_pair_of_convolutions_counts_all_the_same():
    generator = torch.Generator().manual_seed(0)
    pair = FactorizedConv(4, 6)
    clips = torch.randn(1, 4, 5, 8, 8, generator=generator)
    expected = pair(clips)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in pair.parameters()]
    pair.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = pair(clips)
    found.sum().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    for parameter, gradient in zip(pair.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


def test_blocks_that_are_computed_again_keep_less_and_give_the_same_gradients():
    torch.manual_seed(0)
    network = starting_tokenizer(ModelConfig(channels=8), 0).double()
    clips = torch.randn(1, 3, 9, 32, 32, dtype=torch.float64)

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            reconstructions = network(clips).reconstructions
        for weight in network.parameters():
            kept.pop(weight.untyped_storage().data_ptr(), None)
        gradient = torch.autograd.grad(reconstructions.square().sum(), list(network.parameters()))
        return list(gradient), sum(kept.values())

    expected, plain = gradients()
    recompute_blocks(network)
    found, checkpointed = gradients()
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))
    assert 0 < checkpointed < plain / 2
