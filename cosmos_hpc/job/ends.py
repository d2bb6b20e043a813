"""Why an attempt ended: from the outcome file, then failure files, then the launcher's words, exit codes and logs."""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmos_hpc.config.rank_reports import AgreedEnd, Failure, last_lines
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import Ending
from cosmos_hpc.job.disk import is_full

SIGNS: tuple[tuple[Ending, re.Pattern[str]], ...] = (
    (Ending.USER_ERROR, re.compile(r"^ConfigError: |^error: ")),
    (Ending.NON_FINITE, re.compile(r"^(\w+\.)*NonFiniteError\b")),
    (Ending.DISK_FULL, re.compile(r"No space left on device|Disk quota exceeded")),
    (
        Ending.OUT_OF_MEMORY,
        re.compile(
            r"OutOfMemoryError|out of memory|MemoryError|Cannot allocate memory|can't allocate memory"
            r"|ALLOC_FAILED|DataLoader worker .* killed by signal: (Bus error|Killed)"
        ),
    ),
    (Ending.CODE_FAULT, re.compile(r"device-side assert")),  # an index out of range: the code's, though CUDA says it
    (Ending.GPU_ERROR, re.compile(r"\bXid\b|[Uu]ncorrectable|\bECC\b|fallen off the bus")),
    (
        Ending.LOST_RANKS,
        re.compile(
            r"\bgloo\b|NCCL|\bnccl|[Cc]onnection (closed|reset|refused)|Broken pipe|ChildFailedError"
            r"|Dist(Backend|Network|Store)Error|TCPStore|ProcessGroup"
        ),
    ),
    (Ending.GPU_ERROR, re.compile(r"CUDA (driver )?error|[Cc]uda failure|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error")),
)
"""What an error's line tells, the first that fits. NCCL's errors name CUDA as well, so they come before CUDA's."""

SCHEDULER_SIGNS: tuple[tuple[Ending, re.Pattern[str]], ...] = (
    (
        Ending.NODE_FAILURE,
        re.compile(r"^(?:srun|slurmstepd).*[Nn](?:ODE FAILURE|ode failure)(?: on (?P<host>[\w-]+))?.*", re.M),
    ),
    (Ending.OUT_OF_MEMORY, re.compile(r"^(?:srun|slurmstepd).*(?:oom.?kill|out.of.memory).*", re.M | re.I)),
    (Ending.NODE_FAILURE, re.compile(r"^error: no container on (?P<host>[\w-]+): .*", re.M)),
    (
        Ending.CODE_FAULT,  # a mount without its source, a hook that fails: most often the same on every node
        re.compile(r"^(?:\[ERROR\]|enroot-\w+: failed|(?:srun|slurmstepd): error: pyxis:).*", re.M),
    ),
)
"""What SLURM, and whoever starts the container, say in the launcher's log."""

ERROR_LINE = re.compile(r"(error|[\w.]*(Error|Exception|Interrupt)): ")
"""How a line begins that names an error: ours, or the last one of a traceback."""

TORCHRUN_DEATH = re.compile(
    r"Root Cause.*?^ *host *: (?P<host>\S+).*?^ *rank *: (?P<rank>\d+).*?^ *exitcode *: (?P<code>-?\d+)", re.M | re.S
)
SRUN_DEATH = re.compile(
    r"^srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)[-,\d]*: (?:Exited with exit code (?P<code>\d+)|(?P<how>.+))$",
    re.M,
)
SRUN_SIGNALS = {"Killed": signal.SIGKILL, "Terminated": signal.SIGTERM, "Aborted": signal.SIGABRT}
SRUN_SIGNALS |= {"Segmentation fault": signal.SIGSEGV, "Bus error": signal.SIGBUS}


@dataclass(frozen=True)
class Diagnosis:
    """How an attempt ended and where it began."""

    ending: Ending
    error: str = ""
    """One line."""
    step: int | None = None
    """Steps done by then, where a rank said so."""
    rank: int | None = None
    """The first one to fail, where that can be told."""
    host: str | None = None
    """Its node."""
    log: Path | None = None
    """Where more is to be read."""


@dataclass(frozen=True)
class _Death:
    """The first end of a rank that the launcher saw: its exit code, or minus the signal's number."""

    code: int
    rank: int | None = None
    host: str | None = None


def diagnose(folder: RunFolder, attempt: int, code: int) -> Diagnosis:
    """Class the end of an attempt whose ranks are all gone.

    Args:
        folder: the run.
        attempt: which start.
        code: exit status of the launcher, negative for a signal.
    """
    agreed = AgreedEnd.read(folder.outcome(attempt))
    if agreed is not None and agreed.outcome in {Ending.FINISHED, *(ending for ending in Ending if ending.is_agreed)}:
        return Diagnosis(Ending(agreed.outcome), step=agreed.step)
    return next(_evidence(folder, attempt, code))


def kind_of(error: str) -> Ending:
    """The class of an error's line."""
    return next((ending for ending, sign in SIGNS if sign.search(error)), Ending.CODE_FAULT)


def _evidence(folder: RunFolder, attempt: int, code: int) -> Iterator[Diagnosis]:
    """What may have been the cause, the surest first. That ranks lost each other explains nothing, so it comes late."""
    launcher = last_lines(folder.launcher_log(attempt))
    death = _first_death(launcher, code)
    told = [_of_failure(folder, attempt, failure) for failure in Failure.of_attempt(folder, attempt)]
    logged = list(_of_logs(folder, attempt, death))
    yield from (found for found in told if found.ending is not Ending.LOST_RANKS)
    yield from _of_scheduler(folder, attempt, launcher)
    if death.code == -signal.SIGKILL:
        yield _of_death(folder, attempt, death, Ending.KILLED)
    yield from (found for found in logged if found.ending is not Ending.LOST_RANKS)
    if is_full(folder):
        yield Diagnosis(Ending.DISK_FULL, "no room was left to say what ended it", log=folder.attempt_logs(attempt))
    if death.code < 0 and not (told or logged):  # NCCL's watchdog ends by SIGABRT, after it said what it lost
        ending = Ending.KILLED if death.code == -signal.SIGTERM else Ending.CODE_FAULT
        yield _of_death(folder, attempt, death, ending)
    yield from told
    yield from logged
    yield _of_death(folder, attempt, death, Ending.USER_ERROR if death.code == 2 else Ending.CODE_FAULT)


def _of_failure(folder: RunFolder, attempt: int, failure: Failure) -> Diagnosis:
    log = folder.rank_log(attempt, failure.rank)
    return Diagnosis(kind_of(failure.error), failure.error, failure.step, failure.rank, failure.host, log)


def _of_scheduler(folder: RunFolder, attempt: int, launcher: str) -> Iterator[Diagnosis]:
    for ending, sign in SCHEDULER_SIGNS:
        if found := sign.search(launcher):
            yield Diagnosis(ending, found[0], host=found.groupdict().get("host"), log=folder.launcher_log(attempt))


def _of_death(folder: RunFolder, attempt: int, death: _Death, ending: Ending) -> Diagnosis:
    how = f"ended with exit code {death.code}" if death.code >= 0 else f"ended by {signal.Signals(-death.code).name}"
    own_log = None if death.rank is None else folder.rank_log(attempt, death.rank)
    log = own_log if own_log is not None and own_log.exists() else folder.launcher_log(attempt)
    return Diagnosis(ending, how, rank=death.rank, host=death.host, log=log)


def _of_logs(folder: RunFolder, attempt: int, death: _Death) -> Iterator[Diagnosis]:
    """The error that each rank's log ends with, that of the rank which died first in front."""
    first = None if death.rank is None else folder.rank_log(attempt, death.rank)
    for log in sorted(folder.rank_logs(attempt), key=lambda log: log != first):
        if error := _last_error(last_lines(log)):
            rank = int(log.stem.rpartition("_")[2])
            yield Diagnosis(kind_of(error), error, rank=rank, host=death.host if log == first else None, log=log)


def _last_error(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if ERROR_LINE.match(line)), None)


def _first_death(launcher: str, code: int) -> _Death:
    """Shells and srun report a signal as 128 and its number."""
    if found := TORCHRUN_DEATH.search(launcher):
        return _Death(int(found["code"]), int(found["rank"]), found["host"])
    if found := SRUN_DEATH.search(launcher):
        died_by = next((number for word, number in SRUN_SIGNALS.items() if word in (found["how"] or "")), None)
        own = -died_by if died_by else int(found["code"] or code)
        return _Death(_signal_below_zero(own), int(found["rank"]), found["host"])
    return _Death(_signal_below_zero(code))


def _signal_below_zero(code: int) -> int:
    return 128 - code if 128 < code <= 128 + signal.NSIG else code
