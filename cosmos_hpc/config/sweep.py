"""One experiment file to an ordered list of runs."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import Experiment, resolve_all
from cosmos_hpc.config.run_folder import run_hashes
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.config.sweep_schema import RandomSweepConfig, SweepConfig


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment and what the sweep chose for it."""

    config: RunConfig
    """Its settings."""

    choices: dict[str, Any]
    """Dotted setting to value; empty where nothing varies."""


def expand(experiment: Experiment) -> list[PlannedRun]:
    """All runs of an experiment, in the order of `choices`.

    Raises:
        ConfigError: for a value that can't work in one of the runs, or two runs with the same settings.
    """
    rows = choices(experiment.sweep)
    runs = [PlannedRun(run, chosen) for run, chosen in zip(resolve_all(experiment, rows), rows, strict=True)]
    seen: dict[str, PlannedRun] = {}
    for run, digits in zip(runs, run_hashes([run.config for run in runs]), strict=True):
        twin = seen.setdefault(digits, run)
        if twin is not run:
            raise ConfigError(
                f"{experiment.source}: the sweep makes the same run twice, as {twin.choices} and {run.choices} "
                "are the same settings: drop one"
            )
    return runs


def choices(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Dotted setting to value for each run; one empty choice without a sweep.

    Each combination of the grid, its last key varying fastest, with each row of zip, with each of list, with each
    draw of random: the draws are the same ones everywhere, so that the runs beside them can be compared.
    """
    grid = [[{key: value} for value in values] for key, values in sweep.grid.items()]
    zipped = [dict(zip(sweep.zip, values, strict=True)) for values in zip(*sweep.zip.values(), strict=True)]
    forms = [*grid, *(rows for rows in (zipped, sweep.list, _draws(sweep.random)) if rows)]
    return [{key: value for row in rows for key, value in row.items()} for rows in itertools.product(*forms)]


def _draws(sweep: RandomSweepConfig) -> list[dict[str, Any]]:
    """Each setting has a stream of its own: another one beside it, or a larger count, changes none of its values."""
    streams = {key: random.Random(f"{sweep.seed}:{key}") for key in sweep.settings}
    return [
        {key: _drawn(source, streams[key].random()) for key, source in sweep.settings.items()}
        for _ in range(sweep.count)
    ]


def _drawn(source: Any, share: float) -> Any:
    """A value from a list or a range.

    Args:
        source: as in `RandomSweepConfig.settings`.
        share: in [0, 1).
    """
    if isinstance(source, list):
        return source[int(share * len(source))]
    ((form, (low, high)),) = source.items()
    if form == "integers":
        return low + int(share * (high - low + 1))
    drawn = low * (high / low) ** share if form == "log_uniform" else low + share * (high - low)
    return min(high, max(low, float(f"{drawn:.4g}")))  # four digits are enough to tell runs apart, and can be read
