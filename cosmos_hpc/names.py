"""What users call runs and weights on the command line, and where these lie. Light: login verbs read it."""

from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_hpc.config.errors import ConfigError

if TYPE_CHECKING:
    from cosmos_hpc.config.run_folder import RunFolder


def runs_named(name: str | None) -> "list[RunFolder]":
    """The runs of an experiment, the one named EXPERIMENT/RUN or by its folder; none: those of all experiments."""
    from cosmos_hpc.api import runs

    return runs(name)


def weights_named(source: str) -> Path:
    """A path as it is, the folder of a run named EXPERIMENT/RUN, or what `fetch` brought of a repository."""
    found = weights_or_runs_named(source)
    if isinstance(found, Path):
        return found
    if len(found) > 1:
        raise ConfigError(f"{source} names {len(found)} runs: choose one of {', '.join(run.label for run in found)}")
    return found[0].path


def weights_or_runs_named(source: str) -> "Path | list[RunFolder]":
    """The same, and all runs where an experiment is named."""
    from cosmos_hpc.launch.fetch import cached

    if Path(source).exists():
        return Path(source)
    try:
        return runs_named(source)
    except ConfigError as no_run:
        try:
            return cached(source)
        except ConfigError:
            raise ConfigError(f"{no_run}; nor is it a file, or weights that `cosmos-hpc fetch` has brought") from None
