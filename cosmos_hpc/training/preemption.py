"""Being asked for something, by a signal whose handler only sets a flag or by a file; ranks agree in `agreement.py`."""

import math
import os
import signal
import time
from enum import StrEnum
from pathlib import Path
from types import FrameType

LOOK_S = 1.0
"""Between two looks for a file."""


class Outcome(StrEnum):
    """How an attempt ended; rank 0 writes it, the supervisor acts on it."""

    FINISHED = "finished"
    """All steps are done."""

    PREEMPTED = "preempted"
    """Asked by SIGTERM to give the nodes back; a checkpoint is left behind."""

    TIME_LIMIT = "time_limit"
    """Told by SIGUSR2 that the wall clock ends; a checkpoint is left behind."""

    REQUEUED = "requeued"
    """Asked by `cosmos-hpc requeue` to start again; a checkpoint is left behind."""

    INTERRUPTED = "interrupted"
    """Ctrl-C; a checkpoint is left behind."""


STOP_SIGNALS = {
    signal.SIGTERM: Outcome.PREEMPTED,
    signal.SIGUSR2: Outcome.TIME_LIMIT,
    signal.SIGINT: Outcome.INTERRUPTED,
}
"""What each signal asks for."""

OUTCOMES = [None, Outcome.REQUEUED, Outcome.INTERRUPTED, Outcome.TIME_LIMIT, Outcome.PREEMPTED]
"""Codes that ranks exchange; the largest wins."""


class FileRequest:
    """A file by which a person asks for something; looked for once in a while, as it lies on a shared file system."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_there = False
        self._looked = -math.inf

    @property
    def is_there(self) -> bool:
        """Whether it was there at the last look."""
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._is_there = self._path.exists()
        return self._is_there

    def take(self) -> None:
        """It is being done."""
        self._path.unlink(missing_ok=True)
        self._is_there = False


class StopRequest:
    """Remembers that somebody asked this rank to stop."""

    def __init__(self) -> None:
        self._signalled = 0
        self._pid = os.getpid()
        self._file: FileRequest | None = None

    @property
    def code(self) -> int:
        """Index in OUTCOMES of what this rank was asked for so far."""
        if self._file is not None and self._file.is_there:
            return max(self._signalled, OUTCOMES.index(Outcome.REQUEUED))
        return self._signalled

    def look_for(self, request: Path) -> None:
        """From here on, the presence of this file asks to start again; one rank is enough to look."""
        self._file = FileRequest(request)

    def install(self) -> None:
        """Catch the stop signals from here on. Forked workers inherit the handler, but it does nothing there."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._signalled = max(self._signalled, OUTCOMES.index(STOP_SIGNALS[signal.Signals(number)]))
