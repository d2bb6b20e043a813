"""What the probe job leaves in its folder, and the findings that this becomes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from cosmos_hpc.config.run_folder import read_json, write_atomically
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.doctor.estimates import checkpoint_bytes
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned
from cosmos_hpc.doctor.image import wrong_packages
from cosmos_hpc.job.health import NodeReport, judge

SLOW_NCCL = 5e9
"""Bytes a second between nodes that InfiniBand exceeds, and Ethernet or NCCL's fall-back to sockets rarely do."""

AGREED = ("time_limit", "preempted")
"""How ranks leave that heard the signal of the time limit; the second where the controller sends it for both."""


@dataclass
class RankReport:
    """What one rank saw before it trained."""

    rank: int
    host: str
    packages: dict[str, str]
    """Versions of what it imports, by name."""

    gpus: int
    """That torch sees on the node."""

    gpu: str = ""
    """Their name."""

    backend: str = "gloo"
    """What carries the all-reduce: `nccl` on GPUs."""

    latency_s: float = 0.0
    """All-reduce of eight bytes."""

    bytes_per_s: float = 0.0
    """All-reduce of many, as the bandwidth that each rank's link had to carry."""

    write_s: float = 0.0
    """For its part of the bytes that all ranks wrote at the same time."""

    written: int = 0
    """Those bytes."""


@dataclass
class JobReport:
    """What the job itself saw, on its first node and outside the container; written after each stage."""

    stage: str = "start"
    """What it does now; `done` at its end."""

    python: str = ""
    """Version of the host's Python."""

    hosts: list[str] = field(default_factory=list)
    """Its nodes."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    """`NodeReport` of each that answered."""

    step_s: float | None = None
    """Wall seconds of the last training step."""

    save_s: float | None = None
    """From the request to the checkpoint."""

    leave_s: float | None = None
    """From the signal to the end of all ranks, with a checkpoint."""

    outcome: str | None = None
    """As the ranks agreed on it."""

    error: str | None = None
    """Why the ranks ended otherwise, with rank and log."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From a probe's folder; as at the start where nothing is there yet."""
        told = read_json(_file(folder))
        return cls(**{item.name: told[item.name] for item in fields(cls) if item.name in told})

    def write(self, folder: Path) -> None:
        """Replace the file as a whole."""
        write_atomically(_file(folder), json.dumps(asdict(self)))


def write_rank(folder: Path, report: RankReport) -> None:
    """Into a probe's folder."""
    write_atomically(folder / "probe" / f"rank_{report.rank}.json", json.dumps(asdict(report)))


def read_ranks(folder: Path) -> list[RankReport]:
    """Of the ranks that came so far, in their order."""
    found = [RankReport(**read_json(file)) for file in (folder / "probe").glob("rank_*.json")]
    return sorted(found, key=lambda report: report.rank)


def findings(run: RunConfig, job: JobReport, ranks: Sequence[RankReport], grace_s: int) -> Iterator[Finding]:
    """What the reports of a probe say.

    Args:
        run: the probe's settings.
        job: the job's report.
        ranks: those of its ranks.
        grace_s: seconds that the runs themselves will have between the signal and the end.
    """
    yield from _of_nodes(run, job)
    if len(ranks) < run.trainer.world_size:
        said = job.error or f"{len(ranks)} of {run.trainer.world_size} ranks came to the probe, then the job ended"
        yield failed("ranks start", f"{said}: see its logs")
        return
    where = f"in {run.container.image} ({run.container.mode})" if run.container.mode != "none" else "on the host"
    yield passed("ranks start", f"{len(ranks)} ranks on {', '.join(job.hosts)}, {where}")
    yield from _of_ranks(run, ranks)
    yield _throughput(run, ranks, grace_s)
    yield from _of_training(job, grace_s)


def _of_nodes(run: RunConfig, job: JobReport) -> Iterator[Finding]:
    reports = [NodeReport(**report) for report in job.nodes]
    silent = [host for host in job.hosts if host not in {report.host for report in reports}]
    if silent:
        yield failed("host Python", f"{', '.join(silent)} did not answer: the Python and the code of this command "
                     "have to be there at the same paths, see the job's log")  # fmt: skip
    elif reports:
        yield passed("host Python", f"{job.python} on {', '.join(job.hosts)}")
    answered = [report.host for report in reports]
    problems = judge(answered, reports, run.cluster.health_check_s) if reports else []
    yield from (failed("nodes", f"{problem}: have it drained, or name it in cluster.exclude") for problem in problems)
    hidden = reports[0].folder if reports and all(report.folder for report in reports) else []  # no matter of one node
    if hidden:
        yield failed("shared folders", f"{hidden[0]}, nor from any other node: set COSMOS_HPC_RUNS to a folder that "
                     "all of them share")  # fmt: skip
    clocks = [abs(report.clock_s) for report in reports if report.clock_s is not None]
    if clocks and not any("clock" in problem.what for problem in problems):
        yield passed("clocks", f"within {max(clocks):.3f} s of each other")
    if reports and not problems and not hidden:
        yield passed("shared folders", "code and run folder are there on every node, which can write the latter")


def _of_ranks(run: RunConfig, ranks: Sequence[RankReport]) -> Iterator[Finding]:
    first = ranks[0]
    wrong = list(wrong_packages(first.packages))
    told = ", ".join(f"{name} {version}" for name, version in first.packages.items())
    if wrong:
        yield failed("packages", f"ranks find a Python that {', and '.join(wrong)}: mend the image or the environment")
    else:
        yield passed("packages", told)
    if run.cluster.gpus_per_node != 0:
        blind = sorted({report.host for report in ranks if report.gpus < run.trainer.devices})
        if blind:
            seen = min(report.gpus for report in ranks)
            yield failed("GPUs seen", f"torch sees {seen} of {run.trainer.devices} on {', '.join(blind)}: in a "
                         "container that takes libnvidia-container on the node, else set "
                         "cluster.gpus_per_node=0 to train on the CPU")  # fmt: skip
        else:
            yield passed("GPUs seen", f"{first.gpus} x {first.gpu} on each node")
    slowest = min(report.bytes_per_s for report in ranks)
    network = (f"{first.backend}: {slowest / 1e9:.2f} GB/s, {1e6 * max(report.latency_s for report in ranks):.0f} us "
               f"over {len(ranks)} ranks")  # fmt: skip
    if len(ranks) == 1:
        yield passed("all-reduce", "one rank has nobody to talk to")
    elif first.backend == "nccl" and run.trainer.num_nodes > 1 and slowest < SLOW_NCCL:
        yield warned("all-reduce", f"{network}, as over sockets: set NCCL_IB_HCA or NCCL_SOCKET_IFNAME in "
                     "cluster.environment; NCCL_DEBUG=INFO tells what it took")  # fmt: skip
    else:
        yield passed("all-reduce", network)


def _throughput(run: RunConfig, ranks: Sequence[RankReport], grace_s: int) -> Finding:
    speed = sum(report.written for report in ranks) / max(report.write_s for report in ranks)
    save_s = checkpoint_bytes(run) / speed
    disk = f"{speed / 1e6:.0f} MB/s written by all ranks together: a checkpoint takes about {save_s:.0f} s"
    if save_s > grace_s:
        return warned("throughput", f"{disk}, longer than cluster.grace_s: set that higher, or COSMOS_HPC_RUNS to a "
                      "faster file system")  # fmt: skip
    return passed("throughput", disk)


def _of_training(job: JobReport, grace_s: int) -> Iterator[Finding]:
    error = job.error or "the job ended before"
    if job.step_s is None:
        yield failed("training step", f"{error}: see its logs")
        return
    yield passed("training step", f"{job.step_s:.2f} s, not compiled")
    if job.save_s is None:
        yield failed("checkpoint", f"{error}: see its logs")
        return
    yield passed("checkpoint", f"{job.save_s:.1f} s")
    if job.outcome not in AGREED or job.leave_s is None:
        yield failed("signal", f"{job.error or 'the ranks did not leave'}: USR2 has to reach them, see its logs")
    elif job.leave_s > grace_s:
        yield failed("signal", f"ranks took {job.leave_s:.0f} s to leave with a checkpoint: set "
                     f"cluster.grace_s={int(2 * job.leave_s) + 1}")  # fmt: skip
    else:
        yield passed("signal", f"ranks left {job.leave_s:.1f} s after USR2, with a checkpoint")


def _file(folder: Path) -> Path:
    return folder / "probe" / "job.json"
