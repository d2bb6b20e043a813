"""What a checkpoint costs: this kit's against plain torch.save and Megatron-Core's own, alternating in one run.

python benchmarks/checkpoint.py [--channels 128] [--rounds 3]
torchrun --nproc-per-node 2 benchmarks/checkpoint.py      # with more ranks

Weights, their average and Adam's moments of a CV8x8x8 after one update. `stall`: seconds for which training stands
still; `total`: until the checkpoint is whole on disk (this kit's is synced and has a SHA-256 of each file).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import CheckpointConfig, ModelConfig, OptimConfig, RunConfig
from cosmos_hpc.ranks import current_rank
from cosmos_hpc.tokenizer import starting_tokenizer
from cosmos_hpc.training.checkpoint import CheckpointStore
from cosmos_hpc.training.ema import WeightAverage
from cosmos_hpc.training.loop import TrainState
from cosmos_hpc.training.optimizer import SHARDING, Optimizer
from cosmos_hpc.training.parallel import Groups, cuda_calls_on


class Cost(NamedTuple):
    """Of one save."""

    stall_s: float
    total_s: float
    mib: float


class NoLoader:
    """Stands for the loader, whose position is small."""

    def state(self) -> None:
        """No position."""


def main() -> None:
    """Save in each way, some rounds, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128, help="width of the network; 128 is the released one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder on the file system to measure; a temporary one if left out")
    arguments = parser.parse_args()
    groups = Groups.start(current_rank())
    root = Path(groups.from_first(str(arguments.out or tempfile.mkdtemp(prefix="checkpoints-"))))
    state, config = _state(arguments.channels, groups)
    store = CheckpointStore(RunFolder(root / "kit"), config, groups)
    ways: dict[str, Callable[[Path], Cost]] = {
        "torch.save by rank 0": lambda path: _torch_save(state, groups, path),
        "Megatron-Core, synchronous": lambda path: _megatron(state, groups, path),
        "this kit": lambda path: _kit(state, store, root),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, save in ways.items():
            state.step += 1
            groups.barrier()
            cost = save(root / f"{number}-{len(name)}")
            if number:  # the first round warms up
                costs[name].append(cost)
    if groups.rank.is_first:
        _print(costs, groups)
        if arguments.out is None:
            shutil.rmtree(root)
    groups.stop()


def _state(channels: int, groups: Groups) -> tuple[TrainState, RunConfig]:
    model = ModelConfig(channels=channels)
    config = RunConfig(model=model, optim=OptimConfig(), checkpoint=CheckpointConfig(keep=1))
    module = starting_tokenizer(model, 0)
    ddp = groups.wrap(module)
    optimizer = Optimizer(ddp, config.optim, groups)
    average = WeightAverage(module, 0.999)
    state = TrainState(module, ddp, optimizer, average, NoLoader())  # type: ignore[arg-type]
    clips = torch.rand(1, 3, 1, 16, 16, device=groups.device) * 2 - 1
    optimizer.zero_grad()
    loss = (ddp(clips).reconstructions - clips).abs().mean()
    loss.backward()
    groups.finish_gradients(ddp)
    optimizer.step(loss.detach())
    return state, config


def _torch_save(state: TrainState, groups: Groups, path: Path) -> Cost:
    started = _now(groups)
    if groups.rank.is_first:
        (adam,) = (each.optimizer for each in state.optimizer.megatron.chained_optimizers)
        average = state.average.module.state_dict() if state.average else {}
        torch.save({"model": state.module.state_dict(), "ema": average, "optimizer": adam.state_dict()}, path)
    groups.barrier()
    return _cost(started, _now(groups), path)


def _megatron(state: TrainState, groups: Groups, path: Path) -> Cost:
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import sharded_state_dict_default

    if groups.rank.is_first:
        path.mkdir(parents=True)
    groups.barrier()
    started = _now(groups)
    with cuda_calls_on(groups.device):
        model = sharded_state_dict_default(state.module, prefix="model.")
        average = sharded_state_dict_default(state.average.module, prefix="ema.")  # type: ignore[union-attr]
        optimizer = state.optimizer.megatron.sharded_state_dict(model, metadata=dict(SHARDING))
        dist_checkpointing.save({"model": model, "ema": average, "optimizer": optimizer}, str(path))
    return _cost(started, _now(groups), path)


def _kit(state: TrainState, store: CheckpointStore, root: Path) -> Cost:
    started = time.perf_counter()
    store.begin(state, 0, None)
    stall_s = time.perf_counter() - started
    while store.is_writing:  # training would go on here
        time.sleep(0.005)
    finishing = time.perf_counter()
    store.finish(may_fail=False)
    ended = time.perf_counter()
    return Cost(stall_s + ended - finishing, ended - started, _mib(RunFolder(root / "kit").checkpoint(state.step)))


def _now(groups: Groups) -> float:
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _cost(started: float, ended: float, path: Path) -> Cost:
    size = _mib(path)
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    return Cost(ended - started, ended - started, size)


def _mib(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def _print(costs: dict[str, list[Cost]], groups: Groups) -> None:
    table = Table(title=f"{groups.rank.world_size} ranks on {groups.device.type}, medians")
    for column in ("way", "stall s", "of torch.save's", "total s", "of torch.save's", "MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    medians = {name: Cost(*map(statistics.median, zip(*each, strict=True))) for name, each in costs.items()}
    base = next(iter(medians.values()))
    for name, cost in medians.items():
        stall, total = cost.stall_s / base.stall_s, cost.total_s / base.total_s
        row = (f"{cost.stall_s:.3f}", f"{stall:.2f}", f"{cost.total_s:.3f}", f"{total:.2f}", f"{cost.mib:.0f}")
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
