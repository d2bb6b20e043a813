"""The sum of the terms: its gradient, what it builds, what it reads, and the faults of the known recipes."""

import dataclasses
import sys
from functools import partial
from typing import Any

import pytest
import torch
from golden_vectors import load, set_recorded_vgg_weights
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.tokenizer import Losses, starting_tokenizer
from cosmos_hpc.tokenizer.continuous import Autoencoded
from cosmos_hpc.tokenizer.losses.flow import FlowTerm
from cosmos_hpc.tokenizer.losses.latents import uneven_use
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.pixels import mean_absolute_difference
from cosmos_hpc.tokenizer.losses.vgg import Vgg16
from cosmos_hpc.tokenizer.losses.windows import join_windows, window_disagreement

EVERY_CV_TERM = {"l1": 1.0, "lpips": 0.1, "gram": 0.062, "flow": 0.01, "consistency": 0.5, "kl": 1e-2}
FLOW_FILE = "loss.flow.weights=raft.pth"
WINDOWS = (
    "model.formulation=VAE",
    "data.num_frames=17",
    "loss.consistency.num_frames=9",
    "loss.consistency.step=8",
    "data.crop_size=256",
)


def run(*overrides: str) -> RunConfig:
    return resolve(load_experiment(None, ["model.model=CV8x8x8", "model.channels=4", *overrides]), {})


def weighted(weights: dict[str, float]) -> list[str]:
    return [FLOW_FILE, *(f"loss.{name}.weight={weight}" for name, weight in weights.items())]


def motion(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """In the place of RAFT."""
    assert first.dtype == torch.float32, "coordinates are rounded in bfloat16"
    return [torch.stack([(second - first).mean(1), (first * second).mean(1)], 1)]


@pytest.fixture(scope="module")
def vgg() -> Vgg16:
    network = Vgg16()
    set_recorded_vgg_weights(network)
    return network


def losses(vgg: Vgg16, *overrides: str, chunk: int = 2) -> Losses:
    return Losses(run(*overrides).loss, eye=Eye(vgg, chunk), flow=FlowTerm(motion, chunk))


def pair(num_frames: int = 3, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, num_frames, size, size, generator=generator) * 2 - 1 for _ in range(2))


@pytest.mark.parametrize(("step", "is_masked"), [(0, False), (500000, True)])
def test_the_guides_recipe_gives_its_recorded_total(vgg, step, is_masked):
    recorded, key = load("losses"), f"total_nemo/iter{step}"
    clips, reconstructions, mask = (torch.from_numpy(recorded[name]) for name in ("x", "recon", "mask"))
    lists = ["loss.lpips.boundaries=[500000]", "loss.lpips.values=[0.073]"]
    lists += ["loss.gram.boundaries=[500000]", "loss.gram.values=[0.062]"]
    outputs = Autoencoded(reconstructions.requires_grad_(), torch.zeros(1))
    total, l1, lpips, *gram = losses(vgg, *lists).backward(clips, outputs, step, mask=mask if is_masked else None)
    # the recipe divides the masked L1 by all pixels, we by those that the mask counts
    color = l1 * (mask.mean() if is_masked else 1)
    assert color.item() == pytest.approx(float(recorded[f"{key}/color"]), rel=1e-5)
    assert (total - l1 + color).item() == pytest.approx(float(recorded[f"{key}/total"]), rel=1e-4)
    assert (0.073 if step else 0.1) * lpips.item() == pytest.approx(float(recorded[f"{key}/lpips"]), rel=1e-4)
    expected = [float(recorded[f"{key}/gram"])] if step else []
    assert [0.062 * each.item() for each in gram] == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_the_weighted_sum_with_every_term_once(vgg):
    clips, noise = pair(17, size=16)
    every = losses(vgg, *weighted(EVERY_CV_TERM), *WINDOWS)
    assert every.names(0) == tuple(EVERY_CV_TERM)
    cut = every.inputs(clips, 0)
    assert cut.shape == (4, 3, 9, 16, 16)
    leaf = (0.8 * cut + 0.2 * every.inputs(noise, 0)).requires_grad_()
    latents = torch.linspace(-1, 1, 4 * 16 * 2).view(4, 16, 2, 1, 1).requires_grad_()
    logvar = (latents.detach().flip(0) * 2 - 1).requires_grad_()
    total, *terms = every.backward(clips, Autoencoded(leaf * 1, latents * 1, logvar * 1), 0, scale=0.25)
    assert total.item() == pytest.approx(
        sum(weight * term.item() for weight, term in zip(EVERY_CV_TERM.values(), terms, strict=True)), rel=1e-5
    )

    plain, plain_latents, plain_logvar = (each.detach().clone().requires_grad_() for each in (leaf, latents, logvar))
    whole = join_windows(plain, 2, 8)
    gradient = torch.zeros_like(whole)
    seen = Eye(vgg, 99).differentiate(clips, whole.detach(), gradient, lpips=0.1, gram=0.062)
    assert terms[1].item() == pytest.approx(seen.lpips.item(), rel=1e-5)
    FlowTerm(motion, 99).differentiate(clips, whole.detach(), gradient, weight=0.01)
    rest = mean_absolute_difference(clips, whole) + 0.5 * window_disagreement(plain, 2, 8)
    divergence = 0.5 * (plain_latents.square() + plain_logvar.exp() - 1 - plain_logvar).mean()
    (rest + 1e-2 * divergence + (whole * gradient).sum()).mul(0.25).backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(latents.grad, plain_latents.grad)
    torch.testing.assert_close(logvar.grad, plain_logvar.grad)


def test_uneven_use_of_codes_reaches_the_encoder_through_the_rounding():
    config = run("model.model=DV8x16x16", "loss.lpips.weight=0", "loss.fsq_entropy.weight=1", "loss.l1.weight=0")
    network = starting_tokenizer(config.model, 0)
    clips = pair(9)[0]
    outputs = network(clips)
    total, _, entropy = Losses(config.loss).backward(clips, outputs, 0)
    assert total == entropy == uneven_use(outputs.latents.detach(), (8, 8, 8, 5, 5, 5))
    assert network.quant_conv.conv3d.weight.grad.abs().max() > 0
    assert network.post_quant_conv.conv3d.weight.grad.abs().max() == 0


class NothingIsRead(TorchDispatchMode):
    """Refuses whatever would wait for a GPU: a number of a tensor, or a shape that depends on its values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        return func(*args, **kwargs or {})


def test_no_term_reads_from_the_device_and_none_stops_at_a_nan(vgg):
    clips, reconstructions = pair(17, size=16)
    every = losses(vgg, *weighted(EVERY_CV_TERM), *WINDOWS, chunk=16)
    leaf = every.inputs(reconstructions * float("nan"), 0).requires_grad_()
    latents = torch.zeros(4, 16, 2, 1, 1, requires_grad=True)
    with NothingIsRead():
        values = every.backward(clips, Autoencoded(leaf * 1, latents * 1, latents * 1), 0)
    assert values[0].isnan()
    with pytest.raises(AssertionError), NothingIsRead():
        float(values[0])


class Saved:
    """A tensor that a graph keeps for its backward; counts the bytes of those alive, and their peak."""

    now = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        Saved.now += tensor.nbytes
        Saved.peak = max(Saved.peak, Saved.now)

    def __del__(self) -> None:
        Saved.now -= self.tensor.nbytes


def test_memory_of_the_graphs_is_that_of_one_chunk_whatever_the_clips_length(vgg):
    peaks = []
    for num_frames in (1, 6):
        Saved.now = Saved.peak = 0
        clips, reconstructions = pair(num_frames)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            Eye(vgg, 1).differentiate(clips, reconstructions, torch.zeros_like(clips), lpips=0.1, gram=0.062)
        peaks.append(Saved.peak)
    assert peaks[0] == peaks[1] > 10 * clips[0, :, 0].nbytes


def test_networks_are_neither_built_nor_read_where_their_weight_is_never_above_zero():
    late = ["loss.gram.boundaries=[500]", "loss.gram.values=[0.062]", "loss.flow.boundaries=[500]"]
    overrides = ["loss.lpips.weight=0", "loss.lpips.weights=/no/vgg", *late, "loss.flow.values=[0.01]"]
    config = run(*overrides, "loss.flow.weights=/no/raft", "trainer.max_steps=500")
    built = Losses.build(config, torch.device("cpu"))
    assert built.eye is None
    assert built.names(499) == ("l1",)
    for other in ("trainer.max_steps=501", "loss.lpips.weight=0.1"):
        with pytest.raises(ConfigError, match=r"loss\.lpips\.weights is /no/vgg, which can't be read"):
            Losses.build(run(*overrides, other, "loss.flow.weights=/no/raft"), torch.device("cpu"))


def test_vgg_is_read_from_a_classifiers_file_in_either_format(vgg, tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in vgg.state_dict().items()}
    save_file(tensors | {"head.fc.weight": torch.zeros(2, 2)}, tmp_path / "vgg.safetensors")
    torch.save(tensors, tmp_path / "vgg.pth")
    clips, reconstructions = pair()
    exact = Eye(vgg, 9).distances(clips, reconstructions)
    for file in ("vgg.safetensors", "vgg.pth"):
        eye = Losses.build(run(f"loss.lpips.weights={tmp_path / file}"), torch.device("cpu")).eye
        torch.testing.assert_close(eye.distances(clips, reconstructions), exact, rtol=1e-5, atol=0)


def test_features_in_bfloat16_are_compared_in_float32(vgg):
    clips, reconstructions = pair()
    rounded = Vgg16().bfloat16()
    rounded.load_state_dict(vgg.state_dict())
    gradients = [torch.zeros_like(clips) for _ in range(2)]
    exact, ours = (
        Eye(network, 9).differentiate(clips, reconstructions, gradient, lpips=0.1, gram=0.0).lpips
        for network, gradient in zip((vgg, rounded), gradients, strict=True)
    )
    assert ours.dtype == gradients[1].dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0.01, atol=0)
    assert torch.nn.functional.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.95


def test_a_file_that_is_not_vgg16_is_refused(vgg, tmp_path):
    tensors = vgg.state_dict()
    save_file({**tensors, "features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    read = partial(Losses.build, device=torch.device("cpu"))
    for file, words in (
        ("grey.safetensors", r"holds no VGG16 \(features\.0\.weight is missing or of another shape\)"),
        ("list.pth", "holds no state dict"),
        ("text.safetensors", "can't be read"),
        ("gone.pth", "can't be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(run(f"loss.lpips.weights={tmp_path / file}"))


def test_flow_without_torchvision_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ConfigError, match=r"torchvision is not there .*: pip install 'cosmos-hpc\[flow\]'"):
        Losses.build(run("loss.lpips.weight=0", "loss.flow.weight=1", FLOW_FILE), torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.kl.weight=1"], "whose latents have no distribution: set VAE"),
        (["loss.kl.weight=1", "model.model=DV8x16x16"], "whose latents have no distribution: set it to 0"),
        (["model.formulation=VAE", "model.model=DV8x16x16"], "set AE, or VAE for a CV tokenizer"),
        (["loss.fsq_entropy.weight=1"], "has no codes"),
        (["loss.flow.weight=1"], r"name RAFT-large in loss\.flow\.weights"),
        (["loss.flow.weight=1", FLOW_FILE, "data.crop_size=248"], "RAFT takes 128 pixels"),
        (["loss.flow.weight=1", FLOW_FILE, "data.num_frames=1"], "nothing moves"),
        (["loss.consistency.weight=1", "loss.consistency.num_frames=16"], "set 1, 9, 17, 25"),
        (["loss.consistency.weight=1", "loss.consistency.step=12"], "set 8"),
        (["loss.consistency.weight=1", "loss.consistency.num_frames=33"], "below data.num_frames = 33"),
    ],
)
def test_terms_that_can_not_work_are_refused_before_anything_starts(overrides, words):
    with pytest.raises(ConfigError, match=words):
        run(*overrides)


def test_the_defaults_are_l1_and_a_tenth_of_vgg():
    loss = RunConfig().loss
    weights = {item.name: getattr(loss, item.name).weight for item in dataclasses.fields(loss)}
    assert {name: weight for name, weight in weights.items() if weight} == {"l1": 1.0, "lpips": 0.1}
