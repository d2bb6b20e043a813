"""What the checks look at: the runs of an experiment file, and what the cluster says of itself, asked once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.after import jobs_before
from cosmos_hpc.launch.controller import cluster_settings, partition_settings
from cosmos_hpc.launch.limits import Partition, partition_names, partitions


@dataclass(frozen=True, eq=False)  # hashed as the object that it is
class Case:
    """An experiment that is examined."""

    runs: Sequence[RunConfig]
    """Settings of each run, with weights as paths where these are there."""

    experiment: ExperimentFolder
    """Where the runs lie, or will."""

    max_parallel: int | None = None
    """Runs at the same time."""

    @property
    def first(self) -> RunConfig:
        """Stands for all where a sweep doesn't vary what is looked at."""
        return self.runs[0]

    @property
    def is_on_slurm(self) -> bool:
        """Whether jobs go to a scheduler."""
        return self.first.cluster.executor == "slurm"

    def distinct(self, key: Callable[[RunConfig], Any]) -> list[RunConfig]:
        """One run for each value of some settings: a sweep has a thousand runs, and few of these."""
        return list({repr(key(run)): run for run in reversed(self.runs)}.values())[::-1]

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """What sinfo says.

        Raises:
            ConfigError: if it says nothing.
        """
        return partitions()

    @cached_property
    def cluster(self) -> dict[str, str]:
        """What `scontrol show config` says.

        Raises:
            ConfigError: if it says nothing.
        """
        return cluster_settings()

    @property
    def rows(self) -> list[Partition]:
        """The partitions that the first run may start in, as far as they are there."""
        names = partition_names(self.first, self.partitions)
        return [self.partitions[name] for name in names if name in self.partitions]

    @cached_property
    def chosen(self) -> dict[str, dict[str, str]]:
        """What `scontrol show partition` says of each partition that the first run may start in.

        Raises:
            ConfigError: if it says nothing.
        """
        return {row.name: partition_settings(row.name) for row in self.rows}

    @cached_property
    def jobs_before(self) -> list[str]:
        """Jobs that still have to end well before the runs may start.

        Raises:
            ConfigError: for something that can't be waited for.
        """
        return jobs_before(self.first.after, is_local=not self.is_on_slurm)
