"""The fast form computes what the specification says, for every released variant and its gradients."""

import pytest
import torch
from reference_network import ReferenceTokenizer

VARIANTS = ["CV8x8x8", "CV8x16x16", "CV4x8x8", "DV8x16x16", "DV8x8x8", "DV4x8x8"]


@pytest.mark.parametrize("name", VARIANTS)
def test_fast_form_and_specification_agree(small, name):
    network = small(name).double()
    reference = ReferenceTokenizer(network.architecture).double()
    tensors = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("quantizer.")}
    assert list(tensors) == list(reference.state_dict())
    reference.load_state_dict(tensors)
    clips = torch.rand(2, 3, 9, 32, 48, dtype=torch.float64) * 2 - 1

    reconstructions, latents, _ = network(clips)
    expected_latents = reference.encode(clips)
    expected = reference.decode(expected_latents)
    assert (latents - expected_latents).abs().max() < 1e-12
    assert (reconstructions - expected).abs().max() < 1e-12 * expected.abs().max()

    reconstructions.square().mean().backward()
    expected.square().mean().backward()
    for (parameter_name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad.allclose(theirs.grad, rtol=1e-9, atol=1e-12), parameter_name
