"""What the cluster allows, asked once, so that a run that can never start is refused before anything is sent."""

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """`partition`, or a field of `Partition`."""

    message: str
    """With the setting, what the partition allows, and the mend."""


COMPARED: dict[str, tuple[Callable[[RunConfig], int], str]] = {
    "time_limit_min": (
        lambda run: run.cluster.time_limit_min,
        "cluster.time_limit_min is {wanted}, but {name} allows {most:g}: set that or less, runs go on in the next job",
    ),
    "num_nodes": (lambda run: run.trainer.num_nodes, "trainer.num_nodes is {wanted}, but {name} has {most}: set fewer"),
    "gpus_per_node": (
        lambda run: run.gpus_per_node,
        "trainer.devices (cluster.gpus_per_node) asks for {wanted} GPUs a node, but nodes of {name} have {most}: set "
        "that or less (cluster.gpus_per_node=0: none), or another partition",
    ),
    "cpus_per_node": (
        lambda run: run.trainer.devices * (run.cluster.cpus_per_task or 1),
        "trainer.devices x cluster.cpus_per_task is {wanted}, but nodes of {name} have {most} CPUs: set fewer",
    ),
}
"""Each limit of a partition: what of a run is compared with it, and what is said where that is more."""


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
    there = partitions()
    for misfit in (misfit for run in runs for misfit in misfits(run, there)):
        raise ConfigError(misfit.message)


def misfits(run: RunConfig, there: Mapping[str, Partition]) -> Iterator[Misfit]:
    """All that a run asks for beyond what its partition has, or the largest of those that it may start in.

    Args:
        run: for SLURM.
        there: from `partitions`.
    """
    asked, mend, names = run.cluster.partition, f"set {' or '.join(there)}", partition_names(run, there)
    if not names:
        yield Misfit("partition", f"cluster.partition is not set, and this cluster has no default: {mend}")
    elif not set(names) <= set(there):
        yield Misfit("partition", f"cluster.partition is {asked}, which this cluster does not have: {mend}")
    else:
        for limit, (wanted, words) in COMPARED.items():
            most = max(getattr(there[name], limit) for name in names)
            if wanted(run) > most:
                name = f"partition {' and '.join(names)}"
                yield Misfit(limit, words.format(wanted=wanted(run), most=most, name=name))


def partition_names(run: RunConfig, there: Mapping[str, Partition]) -> list[str]:
    """The partitions that a run may start in: its own, else the default; they need not be there."""
    asked = run.cluster.partition
    return asked.split(",") if asked else [row.name for row in there.values() if row.is_default]


def largest_array() -> int:
    """Elements that an array of this cluster may have.

    Raises:
        ConfigError: if the controller does not answer.
    """
    return max(1, int(cluster_settings().get("MaxArraySize", 1001)))  # 0: no arrays; 1001: SLURM's own default


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
