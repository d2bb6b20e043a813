"""state.json: what the supervisor knows of its run. One writer, true at every instant."""

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from cosmos_hpc.config.run_folder import read_json, write_atomically


class Status(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"
    """A supervisor lives or is to start again, but no ranks: it waits for a place, the queue or a restart."""

    RUNNING = "running"
    """Ranks are starting, training or leaving."""

    FINISHED = "finished"
    """All steps are done."""

    CANCELLED = "cancelled"
    """Ended by a person; `submit` goes on from the newest checkpoint."""

    FAILED = "failed"
    """Ended by an error; `submit` tries again from the newest checkpoint."""


class Ending(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    """All steps are done."""

    PREEMPTED = "preempted"
    """The nodes were asked back; saved."""

    TIME_LIMIT = "time_limit"
    """The wall clock of the job was about to end; saved."""

    REQUEUED = "requeued"
    """Given back to the queue by `cosmos-hpc requeue`; saved."""

    INTERRUPTED = "interrupted"
    """Ctrl-C; saved."""

    CANCELLED = "cancelled"
    """By `cosmos-hpc cancel`; saved."""

    NODE_FAILURE = "node_failure"
    """A node was lost."""

    GPU_ERROR = "gpu_error"
    """A GPU failed: Xid, uncorrectable ECC, CUDA error."""

    LOST_RANKS = "lost_ranks"
    """Ranks lost each other (NCCL, gloo), and none of them says why."""

    OUT_OF_MEMORY = "out_of_memory"
    """Of a host or a GPU."""

    NON_FINITE = "non_finite"
    """The loss stayed infinite or not a number although ranks had skipped steps and rolled back."""

    DISK_FULL = "disk_full"
    """Full disk or quota."""

    HANG = "hang"
    """No sign of life for too long; killed by the supervisor."""

    KILLED = "killed"
    """A rank was killed from outside."""

    USER_ERROR = "user_error"
    """Refused for a setting, a path or data that the user can mend."""

    CODE_FAULT = "code_fault"
    """Any other error."""

    SUPERVISOR_KILLED = "supervisor_killed"
    """The supervisor died, and the ranks with it."""

    @classmethod
    def _missing_(cls, value: object) -> "Ending | None":
        """What earlier versions wrote."""
        return {"failed": cls.CODE_FAULT, "supervisor killed": cls.SUPERVISOR_KILLED}.get(str(value))

    @property
    def is_agreed(self) -> bool:
        """Whether the ranks left together, with a checkpoint, and the run is to go on."""
        return self in (Ending.PREEMPTED, Ending.TIME_LIMIT, Ending.REQUEUED, Ending.INTERRUPTED)

    @property
    def is_fault(self) -> bool:
        """Whether it is none of the ends that a person or a scheduler asked for."""
        return not self.is_agreed and self not in (Ending.FINISHED, Ending.CANCELLED)


@dataclass
class Goodput:
    """Where the seconds of an attempt went. All but the queue add up to the allocated ones."""

    allocated_s: float = 0.0
    """Seconds in which the nodes were the run's."""

    productive_s: float = 0.0
    """Steps that count."""

    startup_s: float = 0.0
    """From the start of the launcher to the first step."""

    data_s: float = 0.0
    """Waiting for clips."""

    validation_s: float = 0.0
    """Validating."""

    checkpoint_s: float = 0.0
    """The loop held by a save."""

    lost_s: float = 0.0
    """Steps that had to be trained again, since no checkpoint held them."""

    backoff_s: float = 0.0
    """Between the end of the attempt before and the start of this one, on the same nodes."""

    silence_s: float = 0.0
    """From the last sign of life to the end: a hang, a slow exit."""

    queue_s: float = 0.0
    """Waiting for nodes before the attempt; not allocated."""

    def __add__(self, other: "Goodput") -> "Goodput":
        names = [item.name for item in dataclasses.fields(self)]
        return Goodput(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def share(self) -> float | None:
        """Productive over allocated seconds, in [0, 1]; none before anything was allocated."""
        return self.productive_s / self.allocated_s if self.allocated_s > 0 else None


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

    outcome: Ending | None = None
    """How it ended; none while it lives."""

    step: int | None = None
    """Last step it finished, or at which it failed; while it lives, as last heard."""

    message: str | None = None
    """Why it failed: rank, host, step, error, log."""

    error: str | None = None
    """The error itself, one line."""

    resumed_step: int | None = None
    """Step it started from; none where it did not come that far."""

    saved_step: int | None = None
    """Step of the newest checkpoint at its end; 0 before the first."""

    goodput: Goodput | None = None
    """Where its seconds went; none in files of earlier versions."""

    nodes: str | None = None
    """Host list of the ranks; none for a local run."""

    failed_rank: int | None = None
    """The first one to fail, where that can be told."""

    failed_host: str | None = None
    """Its node."""

    failed_log: str | None = None
    """Where more is to be read, below the run folder."""

    bad_nodes: list[str] = field(default_factory=list)
    """Nodes that the run avoids from here on, in this job."""

    followed: str | None = None
    """What was done after it."""


@dataclass
class RunState:
    """The whole file."""

    status: Status = Status.WAITING
    """Where the run stands."""

    pid: int | None = None
    """Process of the supervisor on its host."""

    attempts: list[AttemptRecord] = field(default_factory=list)
    """Oldest first."""

    longest_silence_s: dict[str, float] = field(default_factory=dict)
    """Phase that the run has been through to the longest time in it between two signs of life."""

    @property
    def goodput(self) -> Goodput:
        """Over all attempts."""
        return sum((attempt.goodput for attempt in self.attempts if attempt.goodput), start=Goodput())

    @classmethod
    def read(cls, path: Path) -> "RunState | None":
        """The state in a file; none before a supervisor has first written it."""
        written = read_json(path)
        if not written:
            return None
        attempts = [_attempt(attempt) for attempt in written["attempts"]]
        return cls(Status(written["status"]), written["pid"], attempts, written.get("longest_silence_s", {}))

    def write(self, path: Path) -> None:
        """Replace the file as a whole."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1))


def _attempt(written: dict[str, Any]) -> AttemptRecord:
    record = AttemptRecord(**written)
    record.outcome = None if record.outcome is None else Ending(record.outcome)
    record.goodput = Goodput(**written["goodput"]) if written.get("goodput") else None
    return record
