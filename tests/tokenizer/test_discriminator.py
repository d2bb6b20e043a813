"""The discriminator's two passes against plain autograd over whole batches."""

from functools import partial

import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.loss_schema import AdversarialConfig
from cosmos_hpc.tokenizer.losses.discriminator import LARGEST_RATIO, AdversarialTerm, PatchDiscriminator, hinge


@pytest.fixture
def judge() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(4).double()


def batch(seed: int, num_clips: int = 3, num_frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_clips, 3, num_frames, 16, 24, generator=generator, dtype=torch.float64) * 2 - 1


def term(judge: PatchDiscriminator, **settings) -> AdversarialTerm:
    return AdversarialTerm(judge, AdversarialConfig(weight=1.0, **settings))


def pieces(clips: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Nine frames, at most four at once: three times three."""
    return clips.split(3, dim=2)


def test_hinge_is_one_where_the_judge_knows_nothing_and_zero_where_it_is_sure_and_right():
    sure = torch.full((2, 2), 1.5)
    assert hinge(torch.zeros(4), torch.zeros(4)) == 1
    assert hinge(sure, -sure) == 0
    assert hinge(torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])) == 0.5 * (0.25 + 1.0)


def test_a_patch_sees_both_neighbours_in_time_and_any_length_gets_a_verdict(judge):
    assert judge(batch(0)).shape == (3, 1, 2, 2, 3)
    assert judge(batch(0, num_frames=1)).shape == (3, 1, 1, 2, 3)
    clips = batch(0, num_clips=1, num_frames=17).requires_grad_()
    judge(clips)[0, 0, 1, 0, 0].backward()
    assert clips.grad[0, :, :, :8].abs().amax((0, 2, 3)).count_nonzero() > 8


def test_a_fixed_weight_gives_the_gradient_of_the_mean_verdict(judge):
    made = batch(1).requires_grad_()
    value = -torch.stack([judge(piece).mean() for piece in pieces(made)]).mean()
    (expected,) = torch.autograd.grad(0.2 * 0.25 * value, made)
    rest = batch(2)
    gradient = rest.clone()
    fixed = term(judge, adaptive=False, max_frames=4)
    found = fixed.differentiate(made.detach(), gradient, weight=0.2, scale=0.25)
    torch.testing.assert_close(gradient - rest, expected)
    assert found.adversarial.item() == pytest.approx(value.item())
    assert (found.weight.item(), found.weighted.item()) == pytest.approx((0.2, 0.2 * value.item()))
    assert all(weight.grad is None for weight in judge.parameters()), "the reduction hooks of the judge would start"


def test_an_adaptive_weight_makes_each_clips_gradient_as_long_as_that_of_the_other_terms(judge):
    made, rest = batch(1), batch(2) * torch.tensor([1e-3, 5e-3, 1e-4]).view(3, 1, 1, 1, 1)
    gradient = rest.clone()
    found = term(judge).differentiate(made, gradient, weight=0.5, scale=0.25)
    added = (gradient - rest).flatten(1).norm(dim=1)
    torch.testing.assert_close(added, 0.5 * rest.flatten(1).norm(dim=1))
    alone = [rest[index : index + 1] * 3 / 0.25 for index in range(3)]  # as one clip's mean would have it
    weights = [
        term(judge).differentiate(made[index : index + 1], own, weight=0.5, scale=1.0).weight.item()
        for index, own in enumerate(alone)
    ]
    assert found.weight.item() == pytest.approx(sum(weights) / 3)


def test_a_judge_without_a_gradient_blows_nothing_up(judge):
    torch.nn.init.zeros_(judge.layers[-1].weight)
    gradient = batch(2)
    found = term(judge).differentiate(batch(1), gradient, weight=0.5, scale=1.0)
    torch.testing.assert_close(gradient, batch(2))
    assert found.weight.item() == 0.5 * LARGEST_RATIO


def test_the_judge_learns_the_hinge_loss_of_the_whole_batch_however_it_is_cut(judge):
    real, made = batch(1), batch(2)
    value = torch.stack([hinge(judge(a), judge(b)) for a, b in zip(pieces(real), pieces(made), strict=True)]).mean()
    expected = torch.autograd.grad(value, list(judge.parameters()))
    whole = term(judge, max_frames=4).learn(real, made, scale=1.0, is_last=True)
    assert whole.item() == pytest.approx(value.item())
    for weight, own in zip(judge.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, own, rtol=1e-6, atol=1e-12)
        weight.grad = None
    learn = partial(term(judge, max_frames=4).learn, scale=1 / 3)
    for index in range(3):
        learn(real[index : index + 1], made[index : index + 1], is_last=index == 2)
    for weight, own in zip(judge.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, own, rtol=1e-6, atol=1e-12)


def test_only_the_last_piece_of_the_last_micro_batch_lets_the_ranks_add_up(judge):
    held = []

    class Held:
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *_: object) -> None:
            held.append(False)

    own = AdversarialTerm(judge, AdversarialConfig(max_frames=4), no_sync=Held)
    own.learn(batch(1), batch(2), scale=1.0, is_last=False)
    assert held == [True, False] * 9
    held.clear()
    own.learn(batch(1), batch(2), scale=1.0, is_last=True)
    assert held == [True, False] * 8


def test_the_term_starts_at_its_step():
    late = AdversarialConfig(weight=0.1, start_step=5, boundaries=(8,), values=(0.2,))
    assert [late.weight_at(step) for step in (0, 4, 5, 7, 8)] == [0, 0, 0.1, 0.1, 0.2]
    assert not late.is_used(5)
    assert late.is_used(6)


@pytest.mark.parametrize(
    ("settings", "words"), [({"channels": 6}, "multiples of 4"), ({"lr": 0}, "above 0"), ({"max_frames": 0}, "1")]
)
def test_what_can_not_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        AdversarialConfig(**settings)
