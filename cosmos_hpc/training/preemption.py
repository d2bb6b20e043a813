"""Being asked to stop: a handler that only sets a flag, which the ranks read at a step boundary (`agreement.py`)."""

import os
import signal
from enum import StrEnum
from types import FrameType


class Outcome(StrEnum):
    """How an attempt ended; rank 0 writes it, the supervisor acts on it."""

    FINISHED = "finished"
    """All steps are done."""

    PREEMPTED = "preempted"
    """Asked by SIGTERM to give the nodes back; a checkpoint is left behind."""

    TIME_LIMIT = "time_limit"
    """Told by SIGUSR2 that the wall clock ends; a checkpoint is left behind."""

    INTERRUPTED = "interrupted"
    """Ctrl-C; a checkpoint is left behind."""


STOP_SIGNALS = {
    signal.SIGTERM: Outcome.PREEMPTED,
    signal.SIGUSR2: Outcome.TIME_LIMIT,
    signal.SIGINT: Outcome.INTERRUPTED,
}
"""What each signal asks for."""

OUTCOMES = [None, Outcome.INTERRUPTED, Outcome.TIME_LIMIT, Outcome.PREEMPTED]
"""Codes that ranks exchange; the largest wins."""


class StopRequest:
    """Remembers that somebody asked this rank to stop."""

    def __init__(self) -> None:
        self.code = 0
        """Index in OUTCOMES of what this rank was asked for so far."""

        self._pid = os.getpid()

    def install(self) -> None:
        """Catch the stop signals from here on. Forked workers inherit the handler, but it does nothing there."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self.code = max(self.code, OUTCOMES.index(STOP_SIGNALS[signal.Signals(number)]))
