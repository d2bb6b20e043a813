"""What an update does that must not be made, and the average of the weights."""

import pytest
import torch

from cosmos_hpc.config.schema import OptimConfig
from cosmos_hpc.ranks import Rank


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


class Line(torch.nn.Module):
    """One weight, so that the arithmetic can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0]]))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.weight


def build(groups, decay_steps=None, **settings):
    from cosmos_hpc.training.optimizer import Optimizer

    module = Line()
    config = OptimConfig(**{"lr": 0.1, "warmup_steps": 4, "weight_decay": 0.0, "clip_grad": 0.0} | settings)
    ddp = groups.wrap(module, use_distributed_optimizer=config.use_distributed_optimizer)
    return module, ddp, Optimizer(ddp, config, groups, decay_steps=decay_steps)


def update(groups, ddp, optimizer, value: float) -> tuple[float, bool]:
    optimizer.zero_grad()
    loss = ddp(torch.tensor([[value]], device=groups.device)).sum()
    loss.backward()
    groups.finish_gradients(ddp)
    norm, skipped = optimizer.step(loss.detach())
    optimizer.learn(bool(skipped))
    return float(norm), bool(skipped)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_an_update_that_is_not_finite_leaves_weights_moments_and_counter_alone(groups, distributed, bad, clip_grad):
    module, ddp, optimizer = build(groups, use_distributed_optimizer=distributed, clip_grad=clip_grad)
    update(groups, ddp, optimizer, 2.0)
    weight = module.weight.detach().clone()
    (moments,) = optimizer.megatron.chained_optimizers[0].optimizer.state.values()
    before = {name: value.clone() for name, value in moments.items()}
    assert update(groups, ddp, optimizer, bad)[1]
    assert module.weight.equal(weight)
    assert all(value.equal(before[name]) for name, value in moments.items())
    assert float(moments["step"]) == 1
    assert update(groups, ddp, optimizer, 2.0) == (pytest.approx(2.0), False)
    assert not module.weight.equal(weight)


def test_a_small_update_moves_a_large_weight_as_bfloat16_weights_would_not(groups):
    module, ddp, optimizer = build(groups, lr=1e-4, warmup_steps=0, betas=(0.0, 0.0))
    with groups.autocast("bf16"):
        update(groups, ddp, optimizer, 2.0)  # Adam's first step is lr, whatever the gradient
    (moments,) = optimizer.megatron.chained_optimizers[0].optimizer.state.values()
    assert {module.weight.dtype, moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {torch.float32}
    assert module.weight.item() == pytest.approx(1 - 1e-4, abs=1e-7)
    assert torch.tensor(1 - 1e-4).bfloat16().item() == 1.0


def test_the_second_moment_shrinks_as_it_would_not_in_bfloat16(groups):
    _, ddp, optimizer = build(groups)
    update(groups, ddp, optimizer, 2.0)
    (moments,) = optimizer.megatron.chained_optimizers[0].optimizer.state.values()
    before = moments["exp_avg_sq"].clone()
    update(groups, ddp, optimizer, 0.0)
    assert moments["exp_avg_sq"].item() == pytest.approx(0.999 * before.item(), rel=1e-6)
    assert (0.999 * before.bfloat16()).equal(before.bfloat16()), "half an ulp is more than a thousandth"


def test_the_schedule_counts_only_updates_that_were_made(groups):
    _, ddp, optimizer = build(groups)
    rates = []
    for value in (2.0, float("nan"), 2.0, 2.0, 2.0):
        update(groups, ddp, optimizer, value)
        rates.append(optimizer.lr / 0.1 * 4)
    # the host knows of a skipped update one update later, and the schedule takes it back in the one after that
    assert rates == pytest.approx([1, 2, 3, 3, 4])


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        # half a cosine over four steps, from 1 to 0.2: 0.2 + 0.8 x (1 + cos(pi k / 4)) / 2
        ("cosine", [0.5, 1, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2, 0.2, 0.2]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]),
    ],
)
def test_after_the_warm_up_the_rate_stays_or_falls_to_its_least_at_the_last_step(groups, schedule, shares):
    settings = {"lr": 0.1, "min_lr": 0.02, "warmup_steps": 2, "lr_schedule": schedule}
    _, ddp, optimizer = build(groups, decay_steps=None if schedule == "constant" else 6, **settings)
    rates = []
    for _ in shares:
        update(groups, ddp, optimizer, 2.0)
        rates.append(optimizer.lr / 0.1)
    assert rates == pytest.approx(shares)


def test_large_gradients_are_clipped_to_the_norm_asked_for(groups):
    _, ddp, optimizer = build(groups, clip_grad=0.5, betas=(0.0, 0.999), warmup_steps=0)
    assert update(groups, ddp, optimizer, 100.0)[0] == pytest.approx(100.0)
    (moments,) = optimizer.megatron.chained_optimizers[0].optimizer.state.values()
    assert float(moments["exp_avg"]) == pytest.approx(0.5)


def test_average_follows_the_weights_with_warm_up_and_ignores_skipped_updates(groups):
    from cosmos_hpc.training.ema import WeightAverage

    module = Line()
    average = WeightAverage(module, decay=0.5)
    made, skipped = torch.zeros(()), torch.ones(())
    module.weight.data.fill_(12.0)
    average.update(1, made)  # decay (1 + 1) / (10 + 1)
    assert float(average.module.weight) == pytest.approx(1 + (1 - 2 / 11) * 11)
    average.update(2, skipped)
    assert float(average.module.weight) == pytest.approx(10.0)
    average.update(100, made)  # past the warm-up: 0.5
    assert float(average.module.weight) == pytest.approx(11.0)
    assert not average.module.weight.requires_grad
