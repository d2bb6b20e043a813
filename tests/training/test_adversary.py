"""A tokenizer and its discriminator, by the real step on gloo ranks, against a plain torch loop in one process."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_ranks import start_ranks

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Losses, starting_tokenizer
from cosmos_hpc.tokenizer.losses.discriminator import PatchDiscriminator, hinge

STEPS, START = 5, 1
"""The discriminator joins at its start step."""

SETTINGS = [
    "model.channels=4",
    "trainer.precision=32",
    "data.num_frames=9",
    "data.crop_size=16",
    "data.global_batch_size=4",
    "loss.lpips.weight=0",
    "loss.adversarial.weight=0.5",
    f"loss.adversarial.start_step={START}",
    "loss.adversarial.channels=4",
    "loss.adversarial.lr=2e-2",
    "loss.adversarial.max_frames=16",
    "optim.lr=1e-2",
    "optim.eps=1e-3",  # Adam would turn the rounding noise of gradients near zero into whole steps
    "optim.warmup_steps=2",
    "optim.clip_grad=0.5",
    "optim.weight_decay=0.3",
]


def global_batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (4, 3, 9, 16, 16), generator=generator, dtype=torch.uint8)


def fresh(config) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(config.trainer.seed)
    return starting_tokenizer(config.model, 0), PatchDiscriminator(4)


@functools.cache
def plain_torch() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    config = resolve(load_experiment(None, SETTINGS), {})
    optim = config.optim
    module, judge = fresh(config)
    decays = [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.3}]
    decays += [{"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(decays, betas=optim.betas, eps=optim.eps)
    judges_adam = torch.optim.AdamW(judge.parameters(), betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        clips = global_batch(step).float() / 127.5 - 1
        made = module(clips).reconstructions
        (slope,) = torch.autograd.grad((made - clips).abs().mean(), made, retain_graph=True)
        if step >= START:
            leaf = made.detach().requires_grad_()
            (own,) = torch.autograd.grad(-judge(leaf).mean((1, 2, 3, 4)).sum(), leaf)
            ratios = [a.norm() * len(clips) / b.norm() for a, b in zip(slope, own, strict=True)]
            slope = slope + torch.stack([0.5 * r * b / len(clips) for r, b in zip(ratios, own, strict=True)])
        adam.zero_grad()
        made.backward(slope)
        torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip_grad)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 2)
        if step >= START:
            loss = hinge(judge(clips), judge(made.detach()))
            losses.append(loss.item())
            judges_adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(judge.parameters(), optim.clip_grad)
            judges_adam.param_groups[0]["lr"] = 2e-2 * min(1.0, (step + 1 - START) / 2)
            judges_adam.step()
        adam.step()
    return module.state_dict(), judge.state_dict(), losses


class NoLoader:
    """Stands for the data room, whose position is not at issue."""

    def state(self) -> None:
        return None

    def restore(self, _: object) -> None:
        return None


def build(config, groups, folder: Path):
    """State, run and the store of its checkpoints, with the newest one loaded."""
    from cosmos_hpc.training.adversary import Adversary
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.optimizer import Optimizer

    module = starting_tokenizer(config.model, 0)
    ddp = groups.wrap(module, use_distributed_optimizer=config.optim.use_distributed_optimizer)
    adversary = Adversary(config, groups)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), None, NoLoader(), adversary)
    store = CheckpointStore(RunFolder(folder), config, groups)
    store.load_newest(state)
    losses = Losses.build(config, groups.device, adversary.term)
    return state, SimpleNamespace(config=config, groups=groups, losses=losses), store


def train_on_rank(rank: Rank, micro: int, last: int, overrides: list[str], folder: Path) -> None:
    from cosmos_hpc.training import parallel
    from cosmos_hpc.training.loop import train_step
    from cosmos_hpc.training.queued_steps import StepQueue

    parallel.BUCKET_SIZE = 2000  # several buckets also in small networks
    torch.set_num_threads(1)
    groups = parallel.Groups.start(rank)
    config = resolve(load_experiment(None, [*SETTINGS, *overrides, f"data.micro_batch_size={micro}"]), {})
    state, run, store = build(config, groups, folder)
    queue, found = StepQueue(), []
    while state.step < last:
        own = global_batch(state.step).chunk(rank.world_size)[rank.rank]
        queue.append(train_step(state, iter(own.split(micro)), run))
        for metrics in queue.arrived(everything=True):
            state.learn(metrics)
            found += [] if metrics.discriminator is None else [metrics.discriminator]
    store.save(state, 0, None)
    if rank.is_first:
        weights = [each.state_dict() for each in (state.module, state.adversary.module)]
        torch.save({"weights": weights, "losses": found}, folder / f"at_{last}.pt")
    groups.stop()


@pytest.mark.parametrize(
    ("parts", "overrides"),
    [
        ([(1, 4, 1), (2, 1, 3), (1, 1, STEPS)], []),  # a checkpoint before its first step, then two other cuts
        ([(2, 2, 2), (2, 2, STEPS)], ["optim.use_distributed_optimizer=true"]),
    ],
    ids=["resumed before its start, on two ranks and on one", "beside a distributed optimizer"],
)
def test_ranks_micro_batches_and_resumes_give_the_weights_of_a_plain_torch_loop(tmp_path, parts, overrides):
    losses: list[float] = []
    for world_size, micro, last in parts:
        start_ranks(train_on_rank, world_size, micro, last, overrides, tmp_path)
        trained = torch.load(tmp_path / f"at_{last}.pt", weights_only=True)
        losses += trained["losses"]
    *expected, plain_losses = plain_torch()
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    fresh_judge = fresh(resolve(load_experiment(None, SETTINGS), {}))[1].state_dict()
    for found, wanted in zip(trained["weights"], expected, strict=True):
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=5e-6)
    assert max(float((w - fresh_judge[n]).abs().max()) for n, w in expected[1].items()) > 1e-2, "it never moved"


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


@pytest.mark.parametrize("spoilt", ["tokenizer", "discriminator"])
def test_what_is_not_finite_in_one_leaves_both_as_they_are(groups, tmp_path, spoilt):
    from cosmos_hpc.training.loop import train_step
    from cosmos_hpc.training.queued_steps import StepQueue

    config = resolve(load_experiment(None, [*SETTINGS, "data.micro_batch_size=4"]), {})
    state, run, _ = build(config, groups, tmp_path)
    queue, metrics = StepQueue(), []

    def step() -> None:
        queue.append(train_step(state, iter([global_batch(state.step)]), run))
        for each in queue.arrived(everything=True):
            state.learn(each)
            metrics.append(each)

    for _ in range(2):
        step()
    modules = {"tokenizer": state.module, "discriminator": state.adversary.module}
    before = [{name: value.clone() for name, value in each.state_dict().items()} for each in modules.values()]
    hook = modules[spoilt].register_forward_hook(
        lambda _module, _inputs, outputs: (
            outputs * float("inf")
            if torch.is_tensor(outputs)
            else outputs._replace(reconstructions=outputs.reconstructions * float("nan"))
        )
    )
    step()
    hook.remove()
    assert [each.skipped for each in metrics] == [False, False, True]
    for module, held in zip(modules.values(), before, strict=True):
        assert all(value.equal(held[name]) for name, value in module.state_dict().items())
    step()
    assert not metrics[-1].skipped
    for module, held in zip(modules.values(), before, strict=True):
        assert any(not value.equal(held[name]) for name, value in module.state_dict().items())


def test_before_its_start_the_discriminator_costs_nothing(groups, tmp_path):
    from cosmos_hpc.training.loop import train_step

    config = resolve(load_experiment(None, [*SETTINGS, "data.micro_batch_size=4"]), {})
    state, run, _ = build(config, groups, tmp_path)
    state.adversary.module.register_forward_pre_hook(lambda *_: pytest.fail("it was asked"))
    assert train_step(state, iter([global_batch(0)]), run).terms == ("l1",)
    assert run.losses.names(1) == ("l1", "adversarial", "adversarial_weight", "discriminator")
