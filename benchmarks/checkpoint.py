"""What a checkpoint costs: this kit's against plain torch.save and Megatron-Core's own, alternating in one run.

python benchmarks/checkpoint.py [--channels 128] [--rounds 3]
torchrun --nproc-per-node 2 benchmarks/checkpoint.py      # with more ranks

Weights, their average and Adam's moments of a CV8x8x8 after one update. `stall`: seconds for which training stands
still; `total`: until the checkpoint is whole on disk (this kit's is synced and has a SHA-256 of each file).

Then, in processes of their own, the seconds from the start of a process to its first step, cold and resumed, beside a
plain script that takes the same step after torch.load: no launcher, groups, checksums, data or validation.
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import CheckpointConfig, ModelConfig, OptimConfig, RunConfig
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import write_mp4
from cosmos_hpc.ranks import current_rank
from cosmos_hpc.tokenizer import starting_tokenizer
from cosmos_hpc.training.checkpoint import CheckpointStore
from cosmos_hpc.training.ema import WeightAverage
from cosmos_hpc.training.loop import TrainState
from cosmos_hpc.training.optimizer import Optimizer
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
        "Megatron-Core, asynchronous": lambda path: _megatron_asynchronous(state, groups, path),
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
    groups.stop()
    if groups.rank.is_first:
        _time_starts(root / "starts", arguments.channels, arguments.rounds)
        if arguments.out is None:
            shutil.rmtree(root)


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

    _make_folder(groups, path)
    started = _now(groups)
    with cuda_calls_on(groups.device):
        dist_checkpointing.save(_parts(state), str(path))
    return _cost(started, _now(groups), path)


def _megatron_asynchronous(state: TrainState, groups: Groups, path: Path) -> Cost:
    """As Megatron-Core's own training loop does it, with the queue that this kit replaces."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    _make_folder(groups, path)
    calls = AsyncCallsQueue()
    with cuda_calls_on(groups.device), mock.patch.object(filesystem_async, "_results_queue", _own_queue()):
        started = _now(groups)
        calls.schedule_async_request(dist_checkpointing.save(_parts(state), str(path), async_sharded_save=True))
        stall_s = time.perf_counter() - started
        while True:  # training would go on here
            time.sleep(0.005)
            finishing = time.perf_counter()
            if calls.maybe_finalize_async_calls(blocking=False):
                break
        ended = time.perf_counter()
    calls.close()
    return _cost(started, ended, path)._replace(stall_s=stall_s + ended - finishing)


@functools.cache
def _own_queue() -> Any:
    """Of the process that Megatron-Core starts once for the writers' accounts."""
    return multiprocessing.get_context("spawn").Manager().Queue()


def _make_folder(groups: Groups, path: Path) -> None:
    if groups.rank.is_first:
        path.mkdir(parents=True)
    groups.barrier()


def _parts(state: TrainState) -> dict[str, Any]:
    from megatron.core.transformer.utils import sharded_state_dict_default

    model = sharded_state_dict_default(state.module, prefix="model.")
    average = sharded_state_dict_default(state.average.module, prefix="ema.")  # type: ignore[union-attr]
    return {"model": model, "ema": average, **state.optimizer.sharded_state(model, is_loading=False)}


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


PLAIN = """
import copy, sys, torch
from pathlib import Path
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import starting_tokenizer
path, device = Path(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
module = starting_tokenizer(ModelConfig(channels=int(sys.argv[2])), 0).to(device)
average = copy.deepcopy(module)
adam = torch.optim.AdamW(module.parameters(), fused=True)
if path.exists():
    state = torch.load(path, map_location=device)
    module.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    adam.load_state_dict(state["optimizer"])
clips = torch.rand(1, 3, 9, 64, 64, device=device) * 2 - 1
with torch.autocast(device, torch.bfloat16):
    loss = (module(clips).reconstructions.float() - clips).abs().mean()
loss.backward()
adam.step()
print(loss.item(), flush=True)
if not path.exists():
    torch.save({"model": module.state_dict(), "ema": average.state_dict(), "optimizer": adam.state_dict()}, path)
"""
"""A step of the same network on a clip of the same size, by torch alone."""


def _time_starts(root: Path, channels: int, rounds: int) -> None:
    """Start this kit's run and the plain script in turn, first from nothing and then from what they saved."""
    _make_dataset(root)
    seconds: dict[str, list[tuple[float, float]]] = {"cold start": [], "resume": []}
    for number in range(rounds + 1):
        both = _start_kit(root, channels), _start_plain(root / "plain.pt", channels)
        seconds["resume" if number else "cold start"].append(both)
    steps = [line["step"] for line in _step_lines(root)]
    assert steps == list(range(1, len(steps) + 1)), f"a resume went wrong: {steps}"
    table = Table(title=f"from process start to the first step, width {channels}, medians")
    for column in ("start", "this kit s", "plain torch s", "of plain torch's"):
        table.add_column(column, justify="left" if column == "start" else "right")
    for name, pairs in seconds.items():
        kit, plain = (statistics.median(each) for each in zip(*pairs, strict=True))
        table.add_row(name, f"{kit:.1f}", f"{plain:.1f}", f"{kit / plain:.2f}")
    Console().print(table)


def _start_kit(root: Path, channels: int) -> float:
    """By torchrun's own line, until the first step's line is there; then it is asked to save and leave."""
    settings = [f"data.path={root}/shards", f"model.channels={channels}", "data.num_frames=9", "data.crop_size=64"]
    settings += ["data.global_batch_size=1", "data.num_workers=1", "trainer.limit_val_batches=1"]
    settings += ["trainer.val_check_interval=5000", "loss.lpips.weight=0", "trainer.compile=off"]  # as the plain script
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "cosmos_hpc.train", *settings]
    before, started = len(_step_lines(root)), time.perf_counter()
    with (root / "log").open("w") as log:
        runs = {"COSMOS_HPC_RUNS": str(root / "runs")}
        process = subprocess.Popen(command, env={**_clean_environment(), **runs}, stdout=log, stderr=log)
    while len(_step_lines(root)) == before:
        if process.poll() is not None:
            raise RuntimeError((root / "log").read_text())
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    (heartbeat,) = (root / "runs").glob("*/*/heartbeat.json")
    os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGTERM)
    process.wait()
    return seconds


def _start_plain(path: Path, channels: int) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-c", PLAIN, str(path), str(channels)]
    with subprocess.Popen(command, env=_clean_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"the plain script failed: {process.wait()}")
        return time.perf_counter() - started


def _clean_environment() -> dict[str, str]:
    """Without what torchrun has told this process of itself."""
    own = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def _step_lines(root: Path) -> list[dict[str, Any]]:
    """Whole lines of steps that are done."""
    written = [path.read_text().rpartition("\n")[0] for path in (root / "runs").glob("*/*/metrics.jsonl")]
    lines = [json.loads(line) for text in written for line in text.splitlines()]
    return [line for line in lines if "loss" in line]


def _make_dataset(root: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        (root / "videos" / split).mkdir(parents=True)
        for index in range(count):
            frames = generator.integers(0, 255, (20, 160, 160, 3), dtype=np.uint8)
            write_mp4(root / "videos" / split / f"{split}{index}.mp4", list(frames), fps=24)
        pack([root / "videos" / split], root / "shards" / split)
    prepare(root / "shards", num_workers=1)


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
