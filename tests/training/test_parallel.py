"""Megatron-Core's wrapper, optimizer and schedule on gloo ranks against a plain torch loop in one process."""

import copy
import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch
from forked_ranks import start_ranks

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import load_tokenizer, starting_tokenizer
from cosmos_hpc.training.parallel import free_port

MODEL = ModelConfig(channels=4)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.3, clip_grad=0.5, eps=1e-3)
"""With a large eps: Adam would turn the rounding noise of gradients near zero into whole steps."""
STEPS = 4


def global_batch(step: int) -> torch.Tensor:
    return torch.rand(4, 3, 9, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1


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
        clips = global_batch(step)
        optimizer.zero_grad()
        (module(clips).reconstructions - clips).abs().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip_grad)))
        optimizer.step()
    return module, norms


def train_on_rank(index: int, world_size: int, num_microbatches: int, distributed: bool, port: int, out: Path) -> None:
    from cosmos_hpc.training import parallel
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.parallel import Groups

    parallel.BUCKET_SIZE = 2000  # several buckets also in a small network
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    groups = Groups.start(Rank(index, index, world_size))
    module = starting_tokenizer(MODEL, seed=index)  # rank 0's weights count
    ddp = groups.wrap(module, use_distributed_optimizer=distributed)
    assert len(ddp.buffers[0].buckets) > 3
    optimizer = Optimizer(ddp, dataclasses.replace(OPTIM, use_distributed_optimizer=distributed), groups)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        own = global_batch(step).chunk(world_size)[index]
        for count, clips in enumerate(own.chunk(num_microbatches), 1):
            loss = (ddp(clips).reconstructions - clips).abs().mean() / num_microbatches
            if count < num_microbatches:
                with ddp.no_sync():
                    loss.backward()
            else:
                loss.backward()
        groups.finish_gradients(ddp)
        norm, skipped = optimizer.step(loss.detach())
        optimizer.learn(bool(skipped))
        norms.append(float(norm))
    assert groups.gather(index) == list(range(world_size))
    assert groups.from_first(index) == 0
    if index == 0:
        torch.save({"weights": copy.deepcopy(module.state_dict()), "norms": norms, "lr": optimizer.lr}, out)
    groups.stop()


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
@pytest.mark.parametrize(("world_size", "num_microbatches"), [(1, 2), (2, 2), (4, 1)])
def test_megatron_core_on_gloo_ranks_equals_a_plain_torch_loop(tmp_path, world_size, num_microbatches, distributed):
    out = tmp_path / "rank_0.pt"
    arguments = (world_size, num_microbatches, distributed, free_port(), out)
    start_ranks(train_on_rank, arguments, world_size)
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


def go_on_with_ranks(index: int, world_size: int, steps: range, config: RunConfig, port: int, folder: Path) -> None:
    from cosmos_hpc.data.loader import TrainLoader
    from cosmos_hpc.training import parallel
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.parallel import Groups

    parallel.BUCKET_SIZE = 2000  # several buckets also in a small network
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    groups = Groups.start(Rank(index, index, world_size))
    module = starting_tokenizer(MODEL, seed=0)
    ddp = groups.wrap(module, use_distributed_optimizer=config.optim.use_distributed_optimizer)
    loader = TrainLoader(config.data, seed=0, rank=index, world_size=world_size)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), None, loader)
    store = CheckpointStore(RunFolder(folder), config, groups)
    assert (store.load_newest(state) is None) == (steps.start == 0)
    assert state.step == steps.start
    for step in steps:
        clips = global_batch(step).chunk(world_size)[index]
        state.optimizer.zero_grad()
        loss = (ddp(clips).reconstructions - clips).abs().mean()
        loss.backward()
        groups.finish_gradients(ddp)
        _, skipped = state.optimizer.step(loss.detach())
        state.optimizer.learn(bool(skipped))
    state.step = steps.stop
    store.save(state, 0, None)
    groups.stop()


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
def test_a_run_goes_on_exactly_with_more_and_with_fewer_ranks(tmp_path, dataset, distributed):
    config = RunConfig(
        data=DataConfig(path=str(dataset), num_frames=9, crop_size=16, num_streams=4, global_batch_size=4),
        optim=dataclasses.replace(OPTIM, use_distributed_optimizer=distributed),
    )
    for world_size, steps in ((2, range(2)), (4, range(2, 3)), (1, range(3, STEPS))):
        arguments = (world_size, steps, config, free_port(), tmp_path)
        start_ranks(go_on_with_ranks, arguments, world_size)
    trained = load_tokenizer(RunFolder(tmp_path).checkpoint(STEPS)).state_dict()
    for name, weight in plain_torch()[0].state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6)
