"""What each rank of the probe runs: it measures the network and the disk, and then trains as any rank does."""

import os
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cosmos_hpc import train
from cosmos_hpc.doctor.probe_report import RankReport, write_rank
from cosmos_hpc.launch.images import PACKAGES

if TYPE_CHECKING:
    import torch

    from cosmos_hpc.training.parallel import Groups

WRITTEN = 2**26
"""Bytes that a rank writes."""

REDUCED = {"cpu": 2**24, "cuda": 2**28}
"""Bytes of a large all-reduce."""

REPEATS = 5


def measure(attempt: train.Attempt, groups: "Groups") -> None:
    """Leave a report beside those of the other ranks; all of them call it."""
    import torch

    folder, device = attempt.folder.path, groups.device

    def seconds(num_bytes: int) -> float:
        values = torch.zeros(num_bytes // 4, device=device)
        return median(_timed(lambda: groups.total(values), device) for _ in range(REPEATS))

    seconds(8)  # the first one opens connections
    report = RankReport(
        rank=groups.rank.rank,
        host=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        gpus=torch.cuda.device_count(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        backend="nccl" if device.type == "cuda" else "gloo",
        latency_s=seconds(8),
        bytes_per_s=0.0,
    )
    size, ranks = REDUCED[device.type], groups.rank.world_size
    report.bytes_per_s = 2 * (ranks - 1) / ranks * size / seconds(size)
    groups.barrier()
    report.written, report.write_s = WRITTEN, _write(folder / "probe" / f"rank_{report.rank}.partial")
    write_rank(folder, report)


def _timed(work: Callable[[], object], device: "torch.device") -> float:
    import torch

    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _write(file: Path) -> float:
    file.parent.mkdir(exist_ok=True)
    block, started = os.urandom(2**20), time.perf_counter()  # which no file system can make smaller
    with file.open("wb") as stream:
        for _ in range(WRITTEN // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    took = time.perf_counter() - started
    file.unlink()
    return took


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    train.main(measure)
