"""What the cluster allows, asked once, so that a run that can never start is refused before anything is sent."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.fields import require
from cosmos_hpc.config.schema import RunConfig

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
            name.rstrip("*"), name.endswith("*"), _minutes(limit), int(nodes), int(cpus.rstrip("+")), _gpus(gpus)
        )
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
    for run in dict.fromkeys((run.cluster.partition, run.cluster.time_limit_min, run.trainer.num_nodes, _gpus_of(run),
                              run.trainer.devices, run.cluster.cpus_per_task) for run in runs):  # fmt: skip
        _check_fits(*run, there)


def largest_array() -> int:
    """Elements that an array of this cluster may have.

    Raises:
        ConfigError: if the controller does not answer.
    """
    try:
        text = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise ConfigError("scontrol does not answer: run this on a node of the cluster, see `scontrol ping`") from None
    said = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return int(said[1]) if said else 1001  # SLURM's own default


def _check_fits(
    partition: str | None,
    time_limit_min: int,
    num_nodes: int,
    gpus: int,
    devices: int,
    cpus_per_task: int | None,
    there: dict[str, Partition],
) -> None:
    names = partition.split(",") if partition else [row.name for row in there.values() if row.is_default]
    unknown = [name for name in names if name not in there]
    require(not unknown, f"cluster.partition is {partition}, which this cluster does not have: "
            f"set {' or '.join(there)}")  # fmt: skip
    require(bool(names), f"cluster.partition is not set, and this cluster has no default: set {' or '.join(there)}")
    rows = [there[name] for name in names]
    name = " and ".join(names)
    most = max(row.time_limit_min for row in rows)
    require(
        time_limit_min <= most,
        f"cluster.time_limit_min is {time_limit_min}, but partition {name} allows {most:g}: "
        f"set that or less, a run goes on in its next job",
    )
    most = max(row.num_nodes for row in rows)
    require(num_nodes <= most, f"trainer.num_nodes is {num_nodes}, but partition {name} has {most}: set fewer")
    most = max(row.gpus_per_node for row in rows)
    require(
        gpus <= most,
        f"trainer.devices (cluster.gpus_per_node) asks for {gpus} GPUs a node, but nodes of partition {name} have "
        f"{most}: set {f'{most} or less' if most else 'cluster.gpus_per_node=0, or another partition'}",
    )
    most = max(row.cpus_per_node for row in rows)
    require(
        devices * (cpus_per_task or 1) <= most,
        f"trainer.devices x cluster.cpus_per_task = {devices} x {cpus_per_task or 1}, but nodes of partition {name} "
        f"have {most} CPUs: set fewer",
    )


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
