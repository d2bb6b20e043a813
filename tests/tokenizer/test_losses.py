"""Each term against recorded values, and the faults of the known recipes."""

import numpy as np
import pytest
import torch
from golden_vectors import error, load, set_recorded_vgg_weights

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.loss_schema import LossTermConfig
from cosmos_hpc.tokenizer.losses import mean_absolute_difference
from cosmos_hpc.tokenizer.losses.feature_distance import FeatureDistance
from cosmos_hpc.tokenizer.losses.flow import FlowTerm
from cosmos_hpc.tokenizer.losses.latents import kl_to_standard_normal, uneven_use
from cosmos_hpc.tokenizer.losses.perceptual import LAYER_WEIGHTS, Eye
from cosmos_hpc.tokenizer.losses.vgg import SCALE, SHIFT, Vgg16
from cosmos_hpc.tokenizer.losses.windows import cut_windows, join_windows, window_disagreement

EXACT = 1e-9
"""Of float64, as the recorded values are."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load("losses")


@pytest.fixture(scope="module")
def vgg() -> Vgg16:
    network = Vgg16()
    set_recorded_vgg_weights(network)
    return network


@pytest.fixture
def pair(recorded) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips and reconstructions [2, 3, 3, 32, 48]."""
    return torch.from_numpy(recorded["x"]), torch.from_numpy(recorded["recon"])


def mask_by_name(recorded, name: str) -> torch.Tensor | None:
    return None if name == "ones" else torch.from_numpy(recorded["mask"]).double()


@pytest.mark.parametrize(
    ("name", "weight", "boundaries", "values"),
    [
        ("color", 1.0, (), ()),
        ("lpips", 0.1, (500000,), (0.073,)),
        ("gram", 0.0, (500000,), (0.062,)),
        ("flow", 0.0, (250000,), (0.01,)),
        ("three", 1.0, (10, 250000), (2.0, 3.0)),
    ],
)
def test_weights_change_at_their_boundaries_as_recorded(recorded, name, weight, boundaries, values):
    term = LossTermConfig(weight=weight, boundaries=boundaries, values=values)
    assert [term.weight_at(step) for step in recorded["sched_iters"]] == recorded[f"sched/{name}"].tolist()


def test_a_term_counts_as_used_only_if_the_run_is_long_enough_for_it():
    late = LossTermConfig(boundaries=(500,), values=(0.1,))
    assert not late.is_used(500)
    assert late.is_used(501)
    assert not LossTermConfig().is_used(10**9)
    assert not LossTermConfig(weight=1.0, boundaries=(0,), values=(0.0,)).is_used(10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": -1.0}, "can't be negative"),
        ({"boundaries": (3,)}, "1 boundaries but 0 values"),
        ({"boundaries": (3, 3), "values": (1.0, 2.0)}, "have to rise"),
        ({"boundaries": (3,), "values": (-2.0,)}, r"is -2\.0, but"),
    ],
)
def test_weights_that_can_not_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        LossTermConfig(**settings)


@pytest.mark.parametrize("name", ["ones", "mask"])
def test_l1_is_as_recorded_but_its_mean_is_over_what_the_mask_counts(recorded, pair, name):
    clips, reconstructions = (each.double() for each in pair)
    mask = mask_by_name(recorded, name)
    counted = 1.0 if mask is None else mask.mean().item()  # the recorded mean is over all pixels, masked or not
    ours = mean_absolute_difference(clips, reconstructions, mask).item()
    assert ours * counted == pytest.approx(float(recorded[f"f64/{name}/color/mean"]), rel=EXACT)


def test_what_is_masked_away_changes_neither_l1_nor_its_gradient():
    clips, reconstructions = torch.zeros(1, 3, 1, 4, 4), torch.full((1, 3, 1, 4, 4), 0.5, requires_grad=True)
    mask = torch.zeros(1, 3, 1, 4, 4)
    mask[..., :2] = 1
    value = mean_absolute_difference(clips, reconstructions + 7 * (1 - mask), mask)
    value.backward()
    assert value.item() == 0.5
    assert not reconstructions.grad[..., 2:].any()
    assert reconstructions.grad[..., :2].sum().item() == pytest.approx(1)
    assert mean_absolute_difference(clips, clips + 1, torch.zeros_like(mask)).item() == 0


def test_l1_of_bfloat16_is_summed_in_float32():
    clips = torch.zeros(1, 3, 9, 64, 64, dtype=torch.bfloat16)
    value = mean_absolute_difference(clips, clips + 0.125)
    assert (value.dtype, value.item()) == (torch.float32, 0.125)


def test_clips_and_reconstructions_of_different_lengths_are_refused_not_broadcast():
    with pytest.raises(ValueError, match="pass clips and what became of them"):
        mean_absolute_difference(torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 1, 8, 8))


def test_vgg_sees_what_was_recorded(recorded, vgg, pair):
    assert pytest.approx(recorded["scaling_shift"].tolist()) == SHIFT
    assert pytest.approx(recorded["scaling_scale"].tolist()) == SCALE
    assert pytest.approx(recorded["layer_weights"].tolist()) == LAYER_WEIGHTS
    numbers = {name.partition(".")[2] for name in recorded["vgg_names"].tolist()}
    assert {name.partition(".")[2] for name, _ in vgg.named_parameters()} == numbers
    for name, seen in zip(("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"), vgg(pair[0][:, :, 0]), strict=True):
        values = seen.contiguous().flatten().numpy()
        probe = recorded[f"vgg/{name}/probe"]
        chosen = values[np.arange(len(probe)) * len(values) // len(probe)]
        assert np.abs(chosen - probe).max() < 1e-4 * recorded[f"vgg/{name}/stats"][3]


@pytest.mark.parametrize("chunk_frames", [2, 8])
@pytest.mark.parametrize("name", ["ones", "mask"])
@pytest.mark.parametrize(("iteration", "lpips", "gram"), [(0, 0.1, 0.0), (500000, 0.073, 0.062)])
def test_perceptual_and_gram_are_as_recorded_in_any_chunks(
    recorded, vgg, pair, chunk_frames, name, iteration, lpips, gram
):
    clips, reconstructions = (each.double() for each in pair)
    gradient = torch.zeros_like(clips)
    eye = Eye(vgg.double(), chunk_frames)
    mask = mask_by_name(recorded, name)
    seen = eye.differentiate(clips, reconstructions, gradient, lpips=lpips, gram=gram, mask=mask)
    vgg.float()
    key = f"f64/{name}/iter{iteration}"
    assert lpips * seen.lpips.item() == pytest.approx(float(recorded[f"{key}/lpips/mean"]), rel=EXACT)
    assert gram * seen.gram.item() == pytest.approx(float(recorded.get(f"{key}/gram/mean", 0)), rel=EXACT)
    assert gradient.norm().item() == pytest.approx(float(recorded[f"{key}/grad_recon_norm"]), rel=EXACT)
    probe = recorded[f"{key}/grad_recon_probe"]
    chosen = gradient.flatten()[torch.arange(len(probe)) * gradient.numel() // len(probe)]
    assert error(chosen, probe) < EXACT


def test_perceptual_and_gram_of_single_frames_are_as_recorded(recorded, vgg, pair):
    clips, reconstructions = (each[:, :, :1] for each in pair)
    mask = torch.from_numpy(recorded["mask"])[:, :, :1]
    slope = torch.zeros_like(clips)
    seen = Eye(vgg, 4).differentiate(clips, reconstructions, slope, lpips=0.073, gram=0.062, mask=mask)
    assert 0.073 * seen.lpips.item() == pytest.approx(recorded["f32/image/iter500000/lpips/per_image"].mean(), rel=1e-4)
    assert 0.062 * seen.gram.item() == pytest.approx(recorded["f32/image/iter500000/gram/per_image"].mean(), rel=1e-4)


def test_the_metric_is_the_same_distance_clip_by_clip(recorded, vgg, pair):
    expected = recorded["f32/ones/iter0/lpips/per_frame"].mean(1) / 0.1
    assert Eye(vgg, 2).distances(*pair).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_vgg_never_sees_more_frames_than_a_chunk_and_the_clip_gets_no_graph(vgg, pair):
    clips, reconstructions = pair
    calls = []
    handle = vgg.register_forward_hook(
        lambda _, frames, seen: calls.append((len(frames[0]), [each.requires_grad for each in seen]))
    )
    Eye(vgg, 2).differentiate(clips, reconstructions, torch.zeros_like(clips), lpips=0.1, gram=0.0)
    handle.remove()
    without, with_graph = [False] * 5, [True] * 5
    assert calls == [(2, without), (2, with_graph), (1, without), (1, with_graph)] * 2
    assert not any(parameter.requires_grad for parameter in vgg.parameters())


@pytest.mark.parametrize(
    ("chunk_frames", "expected"),
    [(2, [(1, 2), (1, 1)] * 3), (3, [(1, 3)] * 3), (6, [(2, 3), (1, 3)]), (99, [(3, 3)])],
)
def test_features_alone_are_compared_in_ranges_of_frames_or_some_clips_at_a_time(vgg, chunk_frames, expected):
    clips, reconstructions = torch.rand(2, 3, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clips, reconstructions = clips.double(), reconstructions.double()  # no sign or largest value hangs on rounding
    eye, shapes = Eye(vgg.double(), chunk_frames), []
    compare = FeatureDistance(vgg)

    def noted(expected, seen):
        shapes.append((seen.shape[0], seen.shape[2]))
        return compare(expected, seen)

    eye.feature_distance = noted
    gradient = torch.zeros_like(clips)
    value = eye.differentiate(clips, reconstructions, gradient, lpips=0.1, gram=0.0).lpips
    assert shapes == expected
    other = torch.zeros_like(clips)
    whole = Eye(vgg, 99).differentiate(clips, reconstructions, other, lpips=0.1, gram=0.0).lpips
    vgg.float()
    assert value.item() == pytest.approx(whole.item(), rel=1e-9)
    assert error(gradient, other.numpy()) < 1e-9


def flow_double(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """The network in whose place the recorded flow was made."""
    return [torch.zeros(()), torch.stack([(second - first).mean(1), (first * second).mean(1)], 1)]


@pytest.mark.parametrize("chunk_pairs", [1, 2, 5])
def test_flow_is_as_recorded_in_any_chunks(recorded, pair, chunk_pairs):
    clips, reconstructions = pair
    term, gradient = FlowTerm(flow_double, chunk_pairs), torch.zeros_like(clips)
    both = torch.stack([term.flow(clip.movedim(0, 1)) for clip in clips]).movedim(2, 1)
    assert error(both, recorded["flow/bidirectional_input"]) < 1e-5
    value = term.differentiate(clips, reconstructions, gradient, weight=1.0)
    assert 0.01 * value.item() == pytest.approx(float(recorded["flow/loss_mean"]), rel=1e-5)
    leaf = reconstructions.clone().requires_grad_()
    moved = [torch.stack([term.flow(each.movedim(0, 1)) for each in videos]) for videos in (clips, leaf)]
    (whole,) = torch.autograd.grad((moved[0] - moved[1]).abs().mean(), leaf)
    torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-9)


def test_kl_is_as_recorded(recorded):
    mean, logvar = (torch.from_numpy(recorded[f"kl/{name}_in"]) for name in ("mean", "logvar"))
    assert error(1e-6 * kl_to_standard_normal(mean, logvar), recorded["kl/out"]) < 1e-5
    with pytest.raises(ValueError, match="pass both halves"):
        kl_to_standard_normal(mean, logvar[:, :1])


def test_windows_and_their_disagreement_are_as_recorded(recorded):
    clips = torch.from_numpy(recorded["cons/in"])
    windows = cut_windows(clips, 16, 8)
    assert list(windows.shape) == recorded["cons/shuffled_shape"].tolist()
    assert join_windows(windows, 2, 8).equal(clips)
    noisy = windows + 0.1 * torch.from_numpy(recorded["cons/noise"])
    assert error(join_windows(noisy, 2, 8), recorded["cons/unshuffled_recon"]) < 1e-6
    value = window_disagreement(noisy, 2, 8).item()
    assert value == pytest.approx(float(recorded["cons/frame_consistency"]), rel=1e-5)
    latents = torch.from_numpy(recorded["cons/latent"])
    per_latent = 3 * (16 // 2) * (4 // 2) * (6 // 3) / 5  # pixels' values over latent values, as the recipe scales it
    value = per_latent * window_disagreement(latents, 2, 8 // (16 // 2)).item()
    assert value == pytest.approx(float(recorded["cons/latent_consistency"]), rel=1e-5)


def test_even_use_of_levels_costs_nothing_and_a_single_one_the_most():
    even = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)
    alone = torch.zeros(1, 1, 3, 1, 1)
    shares = np.array([np.exp(-1), 1, np.exp(-1)]) / (1 + 2 * np.exp(-1))  # a level counts softly in its neighbours
    assert uneven_use(alone, (3,)).item() == pytest.approx(1 + (shares * np.log(shares)).sum() / np.log(3))
    assert 0 <= uneven_use(even, (3,)).item() < 0.02
    mixed = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 4, 1, 1).requires_grad_()
    uneven_use(mixed, (3,)).backward()
    assert uneven_use(mixed - 0.1 * mixed.grad.sign(), (3,)) < uneven_use(mixed, (3,))
