"""What the cluster allows, asked once, so that a run that can never start is refused before anything is sent."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.controller import cluster_settings

SINFO = ("sinfo", "--noheader", "--format=%P|%l|%D|%c|%G")


@dataclass(frozen=True)
class Partition:
    """The most that a job may ask for."""

    name: str
    """As sinfo prints it."""

    is_default: bool
    """Whether jobs go there that name none."""

    time_limit_min: float
    """Minutes; infinite where there is no limit."""

    num_nodes: int
    """Nodes, of whatever kind."""

    cpus_per_node: int
    """Of the largest node."""

    gpus_per_node: int
    """Of the node that has the most."""

    gpu_types: tuple[str, ...] = ()
    """Their names, as the cluster calls them."""


class Misfit(NamedTuple):
    """What a run asks for and its partition does not have."""

    limit: str
    """`partition`, `time limit`, `nodes`, `GPUs` or `CPUs`."""

    message: str
    """With the setting, what the partition allows, and the mend."""


def partitions() -> dict[str, Partition]:
    """The cluster's partitions by name.

    Raises:
        ConfigError: if sinfo does not answer.
    """
    try:
        text = subprocess.run(SINFO, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise ConfigError("cluster.executor is slurm, but there is no sinfo here: set `cluster: local`") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"sinfo failed: {' '.join(error.stderr.split())}: see `scontrol ping`") from None
    found: dict[str, Partition] = {}
    for line in text.splitlines():  # one for each kind of node
        name, limit, nodes, cpus, gpus = line.strip().split("|")
        row = Partition(
            name.rstrip("*"), name.endswith("*"), _minutes(limit), int(nodes), int(cpus.rstrip("+")), _gpus(gpus),
            tuple(re.findall(r"gpu:([^,:()]+):\d", gpus)),
        )  # fmt: skip
        found[row.name] = _larger(found.get(row.name, row), row) if row.name in found else row
    return found


def check_fits(runs: Sequence[RunConfig]) -> None:
    """Refuse runs that ask for more than their partition has.

    Args:
        runs: all for SLURM.

    Raises:
        ConfigError: with the setting, what the partition allows, and the mend.
    """
    for misfit in misfits(runs, partitions()):
        raise ConfigError(misfit.message)


def misfits(runs: Sequence[RunConfig], there: dict[str, Partition]) -> Iterator[Misfit]:
    """All that runs ask for beyond what their partitions have, each thing once.

    Args:
        runs: all for SLURM.
        there: from `partitions`.
    """
    for run in {(run.cluster.partition, run.cluster.time_limit_min, run.trainer.num_nodes, _gpus_of(run),
                 run.trainer.devices, run.cluster.cpus_per_task): run for run in runs}.values():  # fmt: skip
        rows, missing = chosen_partitions(run, there)
        yield from missing
        if not missing:
            yield from _beyond(run, rows)


def chosen_partitions(run: RunConfig, there: dict[str, Partition]) -> tuple[list[Partition], list[Misfit]]:
    """The partitions that a run may start in, or why there is none."""
    partition = run.cluster.partition
    names = partition.split(",") if partition else [row.name for row in there.values() if row.is_default]
    mend = f"set {' or '.join(there)}"
    if not names:
        return [], [Misfit("partition", f"cluster.partition is not set, and this cluster has no default: {mend}")]
    if any(name not in there for name in names):
        lacks = f"cluster.partition is {partition}, which this cluster does not have: {mend}"
        return [], [Misfit("partition", lacks)]
    return [there[name] for name in names], []


def largest_array() -> int:
    """Elements that an array of this cluster may have.

    Raises:
        ConfigError: if the controller does not answer.
    """
    return max(1, int(cluster_settings().get("MaxArraySize", 1001)))  # 0: no arrays; 1001: SLURM's own default


def _beyond(run: RunConfig, rows: Sequence[Partition]) -> Iterator[Misfit]:
    cluster, trainer, gpus = run.cluster, run.trainer, _gpus_of(run)
    name = " and ".join(row.name for row in rows)
    most = max(row.time_limit_min for row in rows)
    if cluster.time_limit_min > most:
        yield Misfit("time limit", f"cluster.time_limit_min is {cluster.time_limit_min}, but partition {name} allows "
                     f"{most:g}: set that or less, a run goes on in its next job")  # fmt: skip
    most = max(row.num_nodes for row in rows)
    if trainer.num_nodes > most:
        asked = f"trainer.num_nodes is {trainer.num_nodes}"
        yield Misfit("nodes", f"{asked}, but partition {name} has {most}: set fewer")
    most = max(row.gpus_per_node for row in rows)
    if gpus > most:
        mend = f"{most} or less" if most else "cluster.gpus_per_node=0, or another partition"
        yield Misfit("GPUs", f"trainer.devices (cluster.gpus_per_node) asks for {gpus} GPUs a node, but nodes of "
                     f"partition {name} have {most}: set {mend}")  # fmt: skip
    most, per_task = max(row.cpus_per_node for row in rows), cluster.cpus_per_task or 1
    if trainer.devices * per_task > most:
        yield Misfit("CPUs", f"trainer.devices x cluster.cpus_per_task = {trainer.devices} x {per_task}, but nodes of "
                     f"partition {name} have {most} CPUs: set fewer")  # fmt: skip


def _gpus_of(run: RunConfig) -> int:
    return run.trainer.devices if run.cluster.gpus_per_node is None else run.cluster.gpus_per_node


def _larger(one: Partition, other: Partition) -> Partition:
    return Partition(
        one.name,
        one.is_default,
        max(one.time_limit_min, other.time_limit_min),
        one.num_nodes + other.num_nodes,
        max(one.cpus_per_node, other.cpus_per_node),
        max(one.gpus_per_node, other.gpus_per_node),
        tuple(dict.fromkeys(one.gpu_types + other.gpu_types)),
    )


def _minutes(limit: str) -> float:
    """Minutes of `infinite`, `30:00`, `4:00:00` or `2-00:00:00`."""
    days, _, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts):
        return inf
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 24 * 60 + seconds / 60


def _gpus(gres: str) -> int:
    """GPUs of a node in what sinfo says, such as `gpu:h100:8(S:0-1),gpu:a100:2`; 0 of `(null)`."""
    return sum(int(number) for number in re.findall(r"gpu(?::[^,:()]+)?:(\d+)", gres))
