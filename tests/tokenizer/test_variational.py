"""A CV tokenizer whose latents have a variance while it is trained."""

import pytest
import torch

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import Losses, export_jit, load_tokenizer, load_weights, starting_tokenizer
from cosmos_hpc.tokenizer.continuous import FIRST_LOGVAR

VAE = ModelConfig(channels=4, formulation="VAE")


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_sample_of_the_posterior_is_decoded_in_training_and_its_mean_elsewhere(clips):
    network = starting_tokenizer(VAE, 0)
    with torch.no_grad():
        plain = network(clips)
        assert plain.logvar is None
        assert plain.latents.equal(network.encode(clips))
        assert plain.reconstructions.equal(starting_tokenizer(ModelConfig(channels=4), 0)(clips).reconstructions)
    first, second = network(clips), network(clips)
    assert first.latents.equal(plain.latents)
    assert not first.reconstructions.equal(second.reconstructions)
    assert (first.logvar == FIRST_LOGVAR).all()
    noise = []
    network.post_quant_conv.register_forward_pre_hook(lambda _, inputs: noise.append(inputs[0] - plain.latents))
    torch.nn.init.constant_(network.quant_conv_logvar.conv3d.bias, 2 * torch.log(torch.tensor(0.25)))
    for _ in range(40):
        network(clips)
    assert torch.stack(noise).std().item() == pytest.approx(0.25, rel=0.05)


def test_the_divergence_reaches_mean_and_variance(clips):
    settings = ["loss.kl.weight=1", "loss.l1.weight=0", "loss.lpips.weight=0", "model.formulation=VAE"]
    network = starting_tokenizer(VAE, 0)
    outputs = network(clips)
    total, _, kl = Losses(resolve(load_experiment(None, settings), {}).loss).backward(clips, outputs, 0)
    mean, spread = outputs.latents.detach(), torch.tensor(FIRST_LOGVAR).exp()
    assert kl.item() == pytest.approx((0.5 * (mean.square() + spread - 1 - FIRST_LOGVAR)).mean().item(), rel=1e-5)
    assert total == kl
    # d KL / d logvar = (exp(logvar) - 1) / 2, mean over all latents
    bias = network.quant_conv_logvar.conv3d.bias.grad
    torch.testing.assert_close(bias, torch.full_like(bias, (spread.item() - 1) / 2 / 16))
    assert network.quant_conv.conv3d.weight.grad.abs().max() > 0


def test_it_starts_from_a_plain_tokenizers_weights_and_leaves_as_one(clips, tmp_path):
    plain = starting_tokenizer(ModelConfig(channels=4), 7)
    export_jit(plain, tmp_path / "plain")
    network = starting_tokenizer(VAE, 0)
    load_weights(network, tmp_path / "plain")
    assert network.encode(clips).equal(plain.encode(clips))
    assert (network.quant_conv_logvar.conv3d.bias == FIRST_LOGVAR).all()
    torch.save(network.state_dict(), tmp_path / "vae.pt")
    read = load_tokenizer(tmp_path / "vae.pt")
    assert read.state_dict().keys() == plain.state_dict().keys()
    assert read.decode(read.encode(clips)).equal(plain.decode(plain.encode(clips)))
