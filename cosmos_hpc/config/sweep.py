"""One experiment file to an ordered list of runs."""

import itertools
from dataclasses import dataclass
from typing import Any

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import Experiment, resolve
from cosmos_hpc.config.run_folder import run_hash
from cosmos_hpc.config.schema import RunConfig, SweepConfig


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment and what the sweep chose for it."""

    config: RunConfig
    """Its settings."""

    choices: dict[str, Any]
    """Dotted setting to value; empty where nothing varies."""


def expand(experiment: Experiment) -> list[PlannedRun]:
    """All runs of an experiment: each combination of the grid with each row of the zip, rows varying fastest.

    Raises:
        ConfigError: for a value that can't work in one of the runs, or two runs with the same settings.
    """
    runs = [PlannedRun(resolve(experiment, chosen), chosen) for chosen in choices(experiment.sweep)]
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        twin = seen.setdefault(run_hash(run.config), run)
        if twin is not run:
            raise ConfigError(
                f"{experiment.source}: the sweep makes the same run twice, as {twin.choices} and {run.choices} "
                "change nothing in the result: drop one"
            )
    return runs


def choices(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Dotted setting to value for each run, the last key varying fastest; one empty choice without a sweep."""
    grid = [[(key, value) for value in values] for key, values in sweep.grid.items()]
    rows = [list(zip(sweep.zip, values, strict=True)) for values in zip(*sweep.zip.values(), strict=True)]
    return [dict([*chosen, *row]) for chosen in itertools.product(*grid) for row in rows or [[]]]
