"""What ranks write for the supervisor and for `status`: heartbeat, agreed end, failures. Here they are read."""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cosmos_hpc.config.run_folder import RunFolder, read_json


@dataclass(frozen=True)
class _Report:
    """A JSON object; what another version writes besides is passed over."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The report in a file; none where there is none, or where its writer died over it."""
        try:
            written = read_json(path)
        except ValueError:
            return None
        names = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in written.items() if name in names}) if written else None


@dataclass(frozen=True)
class Heartbeat(_Report):
    """heartbeat.json, by rank 0."""

    attempt: int = -1
    """Start of the ranks that it tells of."""

    time: float = 0.0
    """Unix seconds on rank 0's clock."""

    phase: str = "start"
    """`start`, `first_step`, `train`, `validate`, `save` or `leave`."""

    step: int = 0
    """Steps done."""

    beats: int = 0
    """Grows with each sign of life."""

    resumed_step: int | None = None
    """Step that the attempt started from."""

    saved_step: int | None = None
    """Step of the newest checkpoint."""

    compilation: str | None = None
    """Whether the attempt computes `compiled` or `eager`, with figures or the reason."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds of the attempt by what rank 0 did: `start`, `train` (without the wait for data), `data`,
    `validate`, `save`."""

    step_times_s: list[float] = field(default_factory=list)
    """Busy seconds of the last step, by rank."""

    @classmethod
    def of_attempt(cls, folder: RunFolder, attempt: int) -> "Heartbeat | None":
        """The newest heartbeat, if it is of this attempt."""
        beat = cls.read(folder.heartbeat)
        return beat if beat is not None and beat.attempt == attempt else None


@dataclass(frozen=True)
class AgreedEnd(_Report):
    """outcome.json, by rank 0 when all ranks leave together."""

    outcome: str = ""
    """`finished`, `preempted`, `time_limit` or `interrupted`."""

    step: int | None = None
    """Steps done, all saved."""

    seconds: dict[str, float] = field(default_factory=dict)
    """As in the heartbeat."""

    resumed_step: int | None = None
    """Step that the attempt started from."""


@dataclass(frozen=True)
class Failure(_Report):
    """failure_rank_<n>.json, by a rank that ends by an exception."""

    rank: int = 0
    """Global index."""

    host: str = ""
    """Node of the rank."""

    time: float = 0.0
    """Unix seconds on the rank's clock."""

    type: str = ""
    """Class of the exception."""

    message: str = ""
    """Its text."""

    step: int | None = None
    """Steps done by then."""

    @property
    def error(self) -> str:
        """One line, as at the end of a traceback."""
        return " ".join(f"{self.type}: {self.message}".split())

    @classmethod
    def of_attempt(cls, folder: RunFolder, attempt: int) -> "list[Failure]":
        """All ranks' failures in one attempt, the earliest first."""
        found = [cls.read(path) for path in folder.failures(attempt)]
        return sorted((failure for failure in found if failure is not None), key=lambda failure: failure.time)


def last_lines(log: Path, size: int = 2**16) -> str:
    """The end of a log, which may be long; empty where there is none."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors="replace")
    return ""
