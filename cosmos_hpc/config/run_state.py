"""state.json: what the supervisor knows of its run. One writer, true at every instant."""

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cosmos_hpc.config.run_folder import read_json, write_atomically


class Status(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"
    """A supervisor lives, but other runs hold all places that max_parallel allows."""

    RUNNING = "running"
    """Ranks are starting, training or leaving."""

    FINISHED = "finished"
    """All steps are done."""

    CANCELLED = "cancelled"
    """Ended by a person; `submit` goes on from the newest checkpoint."""

    FAILED = "failed"
    """Ended by an error; `submit` tries again from the newest checkpoint."""


@dataclass
class AttemptRecord:
    """One start of the ranks and how it ended."""

    attempt: int
    """Counted from 0."""

    started: float
    """Unix seconds."""

    host: str
    """First node."""

    job_id: str
    """Job of the scheduler."""

    ended: float | None = None
    """Unix seconds; none while it lives, or where the supervisor died with it."""

    outcome: str | None = None
    """One of training's outcomes, or `cancelled`."""

    step: int | None = None
    """Last step it finished."""

    message: str | None = None
    """Why it failed."""


@dataclass
class RunState:
    """The whole file."""

    status: Status = Status.WAITING
    """Where the run stands."""

    pid: int | None = None
    """Process of the supervisor on its host."""

    attempts: list[AttemptRecord] = field(default_factory=list)
    """Oldest first."""

    @classmethod
    def read(cls, path: Path) -> "RunState | None":
        """The state in a file; none before a supervisor has first written it."""
        written = read_json(path)
        if not written:
            return None
        attempts = [AttemptRecord(**attempt) for attempt in written["attempts"]]
        return cls(status=Status(written["status"]), pid=written["pid"], attempts=attempts)

    def write(self, path: Path) -> None:
        """Replace the file as a whole."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1))
