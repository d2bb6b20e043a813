"""The loop's own step, by Megatron-Core on gloo ranks, against a plain torch loop in one process."""

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import start_ranks

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.loss_schema import LossConfig, PerceptualConfig
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import ModelConfig, OptimConfig, RunConfig, TrainerConfig
from cosmos_hpc.data.loader import TrainLoader
from cosmos_hpc.launch.status import stragglers
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Losses, load_tokenizer, starting_tokenizer
from cosmos_hpc.training import parallel
from cosmos_hpc.training.checkpoint import CheckpointStore
from cosmos_hpc.training.loop import TrainState, train_step
from cosmos_hpc.training.optimizer import Optimizer
from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.queued_steps import StepQueue

MODEL = ModelConfig(channels=4)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.3, clip_grad=0.5, eps=1e-3)
"""With a large eps: Adam would turn the rounding noise of gradients near zero into whole steps."""
STEPS = 4


def global_batch(step: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 9, 16, 16), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


@functools.cache
def plain_torch() -> tuple[torch.nn.Module, list[float]]:
    """AdamW as torch's documentation has it; decay on weights of two or more dimensions only."""
    module = starting_tokenizer(MODEL, seed=0)
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    norms = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup_steps)
        clips = global_batch(step).float() / 127.5 - 1
        optimizer.zero_grad()
        (module(clips).reconstructions - clips).abs().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip_grad)))
        optimizer.step()
    return module, norms


class GivenClips:
    """Stands for the data room: this rank's share of `global_batch`, cut into micro batches."""

    def __init__(self, config: DataConfig, rank: Rank, first: int = 0) -> None:
        self._size, self._rank, self._step = config.micro_batch_size, rank, first

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield from global_batch(self._step).chunk(self._rank.world_size)[self._rank.rank].split(self._size)
            self._step += 1


def start_rank(rank: Rank, config: RunConfig, loader: Any = None) -> tuple[TrainState, SimpleNamespace]:
    """What `train_step` works with, on one of the ranks of a test."""
    parallel.BUCKET_SIZE = 2000  # several buckets also in a small network
    torch.set_num_threads(1)
    groups = Groups.start(rank)
    module = starting_tokenizer(MODEL, seed=rank.rank)  # rank 0's weights count
    ddp = groups.wrap(module, use_distributed_optimizer=config.optim.use_distributed_optimizer)
    assert len(ddp.buffers[0].buckets) > 3
    loader = loader or GivenClips(config.data, groups.rank)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), None, loader)
    return state, SimpleNamespace(config=config, groups=groups, losses=Losses(config.loss))


def run_config(world_size: int, num_microbatches: int = 1, distributed: bool = False, **data: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(global_batch_size=4, micro_batch_size=4 // (world_size * num_microbatches), **data),
        trainer=TrainerConfig(precision="32", devices=world_size),
        optim=dataclasses.replace(OPTIM, use_distributed_optimizer=distributed),
        loss=LossConfig(lpips=PerceptualConfig(weight=0.0)),
    )


def take_steps(state: TrainState, run: SimpleNamespace, batches: Iterator[torch.Tensor], count: int) -> Iterator[Any]:
    queue = StepQueue()
    for _ in range(count):
        queue.append(train_step(state, batches, run))
        (metrics,) = queue.arrived(everything=True)
        state.optimizer.learn(metrics.skipped)
        yield metrics


def train_on_rank(rank: Rank, config: RunConfig, out: Path) -> None:
    state, run = start_rank(rank, config)
    norms = [metrics.grad_norm for metrics in take_steps(state, run, iter(state.loader), STEPS)]
    assert run.groups.gather(rank.rank) == list(range(rank.world_size))
    assert run.groups.from_first(rank.rank) == 0
    if rank.is_first:
        trained = {"weights": copy.deepcopy(state.module.state_dict()), "norms": norms, "lr": state.optimizer.lr}
        torch.save(trained, out)
    run.groups.stop()


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
@pytest.mark.parametrize(("world_size", "num_microbatches"), [(1, 2), (2, 2), (4, 1)])
def test_megatron_core_on_gloo_ranks_equals_a_plain_torch_loop(tmp_path, world_size, num_microbatches, distributed):
    out = tmp_path / "rank_0.pt"
    config = run_config(world_size, num_microbatches, distributed)
    start_ranks(train_on_rank, world_size, config, out)
    trained = torch.load(out, weights_only=True)
    expected, norms = plain_torch()
    assert trained["norms"] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > OPTIM.clip_grad, "clipping was never at work"
    assert trained["lr"] == pytest.approx(OPTIM.lr)
    start = starting_tokenizer(MODEL, seed=0).state_dict()
    moved = 0.0
    for name, weight in expected.state_dict().items():
        moved = max(moved, float((weight.float() - start[name].float()).abs().max()))
        torch.testing.assert_close(trained["weights"][name], weight, rtol=0, atol=1e-6)
    assert moved > 1e-2


def test_outside_the_scope_nothing_of_torch_is_changed():
    from cosmos_hpc.training.parallel import cuda_calls_on

    real = torch.cuda.current_device
    with cuda_calls_on(torch.device("cpu")):
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.cuda.current_device() == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.cuda.current_device is real
    assert torch.zeros(1).type() == "torch.FloatTensor"


def go_on_with_ranks(rank: Rank, steps: range, config: RunConfig, folder: Path) -> None:
    loader = TrainLoader(config.data, seed=0, rank=rank.rank, world_size=rank.world_size)
    state, run = start_rank(rank, config, loader)
    store = CheckpointStore(RunFolder(folder), config, run.groups)
    assert (store.load_newest(state) is None) == (steps.start == 0)
    assert state.step == steps.start
    list(take_steps(state, run, iter(GivenClips(config.data, run.groups.rank, steps.start)), len(steps)))
    store.save(state, 0, None)
    run.groups.stop()


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
def test_a_run_goes_on_exactly_with_more_and_with_fewer_ranks(tmp_path, dataset, distributed):
    data = {"path": str(dataset), "num_frames": 9, "crop_size": 16, "num_streams": 4}
    for world_size, steps in ((2, range(2)), (4, range(2, 3)), (1, range(3, STEPS))):
        config = run_config(world_size, distributed=distributed, **data)
        start_ranks(go_on_with_ranks, world_size, steps, config, tmp_path)
    trained = load_tokenizer(RunFolder(tmp_path).checkpoint(STEPS)).state_dict()
    for name, weight in plain_torch()[0].state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6)


def wait_for_a_slow_rank(rank: Rank, config: RunConfig, out: Path) -> None:
    state, run = start_rank(rank, config)
    if not rank.is_first:
        state.module.register_forward_pre_hook(lambda *_: time.sleep(1.0))
    queue, batches = StepQueue(), iter(state.loader)
    for _ in range(2):
        queue.append(train_step(state, batches, run))
        state.optimizer.learn(False)
        list(queue.arrived(everything=True))
    busy_s = run.groups.gather(queue.busy_s)
    if rank.is_first:
        out.write_text(json.dumps(busy_s))
    run.groups.stop()


def test_the_rank_that_the_others_wait_for_is_the_straggler(tmp_path):
    start_ranks(wait_for_a_slow_rank, 2, run_config(2), tmp_path / "busy_s")
    (found,) = stragglers(json.loads((tmp_path / "busy_s").read_text()))
    assert found.rank == 1
