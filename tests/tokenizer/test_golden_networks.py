"""The networks compute what the released ones do."""

from functools import partial

import numpy as np
import pytest
import torch
from golden_vectors import error, load, probe_error, recorded_clip, set_recorded_weights

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import ContinuousTokenizer, DiscreteTokenizer, build_tokenizer
from cosmos_hpc.tokenizer.traceable import empty_quantisation_loss

NAMES = {"cv": "CV8x8x8", "dv": "DV8x16x16"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def recorded_network(kind: str, channels: int) -> ContinuousTokenizer | DiscreteTokenizer:
    network = build_tokenizer(ModelConfig(model=NAMES[kind], channels=channels))
    set_recorded_weights(network)
    return network


@pytest.fixture(scope="module", params=["cv", "dv"])
def full_width(request) -> tuple[str, ContinuousTokenizer | DiscreteTokenizer]:
    with torch.device("meta"):  # spares drawing 100 million numbers that are replaced at once
        network = build_tokenizer(ModelConfig(model=NAMES[request.param]))
    constants = build_tokenizer(ModelConfig(model=NAMES[request.param], channels=1)).named_buffers()
    network = network.to_empty(device="cpu")
    for name, constant in constants:
        network.get_buffer(name).copy_(constant)
    set_recorded_weights(network)
    return request.param, network


def check(
    network: ContinuousTokenizer | DiscreteTokenizer, kind: str, shape: str, recorded: dict[str, np.ndarray]
) -> None:
    """Every recorded activation, the result, and the gradients where the file has them."""
    dtype = network.post_quant_conv.conv3d.weight.dtype
    activations = {}

    def note(layer, arguments, keywords, output, name):
        activations[name] = layer.forward(*arguments) if keywords.get("silu") else output  # recorded before SiLU

    hooks = [
        network.get_submodule(name).register_forward_hook(partial(note, name=name), with_kwargs=True)
        for name in recorded["act_order"]
    ]
    clips = recorded_clip(kind, shape).to(dtype)
    with torch.set_grad_enabled("grad_names" in recorded):
        reconstructions, latents, _ = network(clips)
    for hook in hooks:
        hook.remove()

    for name in recorded["act_order"]:
        assert list(activations[name].shape) == list(recorded[f"shape/{name}"]), name
        if f"act/{name}" in recorded:
            difference = error(activations[name], recorded[f"act/{name}"])
        else:
            difference = probe_error(activations[name], recorded[f"probe/{name}"], recorded[f"stats/{name}"])
        assert difference < TOLERANCE[dtype], name
    assert error(reconstructions, recorded["recon"]) < TOLERANCE[dtype]
    if isinstance(network, DiscreteTokenizer):
        check_codes(network, latents, activations["quant_conv"], recorded)
    else:
        assert error(latents, recorded["latent"]) < TOLERANCE[dtype]
    if "grad_names" in recorded:
        loss = (clips - reconstructions).abs().mean()
        assert loss.item() == pytest.approx(recorded["l1_loss"].item(), rel=TOLERANCE[dtype])
        loss.backward()
        check_gradients(network, GRADIENT_TOLERANCE[dtype], recorded)


def check_codes(
    network: DiscreteTokenizer, codes: torch.Tensor, latents: torch.Tensor, recorded: dict[str, np.ndarray]
) -> None:
    assert error(latents, recorded["prequant"]) < TOLERANCE[latents.dtype]
    assert empty_quantisation_loss(codes).shape == recorded["quant_loss"].shape
    indices = network.quantizer.codes_to_indices(codes)
    assert indices.dtype == torch.int32
    bounded = network.quantizer.bound(latents.detach())
    is_near_boundary = ((bounded - bounded.floor() - 0.5).abs() < 1e-3).any(1)
    assert (torch.from_numpy(recorded["indices"]) == indices)[~is_near_boundary].all()
    assert ((torch.from_numpy(recorded["codes"]) == codes) | is_near_boundary[:, None]).all()
    assert network.quantizer.indices_to_codes(indices).equal(codes.detach().float())


def check_gradients(
    network: ContinuousTokenizer | DiscreteTokenizer, tolerance: float, recorded: dict[str, np.ndarray]
) -> None:
    parameters = dict(network.named_parameters())
    assert sorted(parameters) == list(recorded["grad_names"])
    norms = torch.stack([parameter.grad.norm() for parameter in parameters.values()])
    assert norms.norm().item() == pytest.approx(recorded["grad_global_norm"].item(), rel=tolerance)
    smallest = 1e-6 * recorded["grad_norms"].max()  # below lie biases that softmax does not see
    for name, norm in zip(recorded["grad_names"], recorded["grad_norms"], strict=True):
        if norm > smallest:
            assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=tolerance), name
    for key in recorded:
        if key.startswith("grad/"):
            assert error(parameters[key.removeprefix("grad/")].grad, recorded[key]) < 2 * tolerance, key
    network.zero_grad()


@pytest.mark.parametrize("kind", ["cv", "dv"])
@pytest.mark.parametrize("shape", ["1x3x1x32x48", "1x3x9x32x32", "1x3x17x64x48", "1x3x33x32x32", "2x3x9x32x48"])
def test_narrow_network_computes_the_recorded_values_in_float64(kind, shape):
    network = recorded_network(kind, channels=16).double()
    check(network, kind, shape, load(f"{kind}_tiny_{shape}_f64"))


@pytest.mark.parametrize("kind", ["cv", "dv"])
def test_narrow_network_computes_the_recorded_values_in_float32(kind):
    check(recorded_network(kind, channels=16), kind, "2x3x9x32x48", load(f"{kind}_tiny_2x3x9x32x48"))


@pytest.mark.parametrize("shape", ["1x3x1x64x64", "1x3x9x64x64", "1x3x17x64x96"])
def test_released_network_computes_the_recorded_values(full_width, shape):
    kind, network = full_width
    check(network, kind, shape, load(f"{kind}_full_{shape}"))


@pytest.mark.parametrize("kind", ["cv", "dv"])
def test_decoding_what_was_encoded_is_the_forward(kind):
    network = recorded_network(kind, channels=4)
    clips = recorded_clip(kind, "2x3x9x32x48")
    reconstructions, latents, _ = network(clips)
    assert network.decode(network.encode(clips)).equal(reconstructions)
    assert network.encode(clips).equal(latents)
    if isinstance(network, DiscreteTokenizer):
        assert network.decode_indices(network.encode_indices(clips)).equal(reconstructions)
