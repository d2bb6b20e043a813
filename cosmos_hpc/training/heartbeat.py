"""Signs of life of a run, for the supervisor, `status` and the account of where time went."""

import json
import logging
import os
import socket
import threading
import time
from typing import Any

from cosmos_hpc.config.run_folder import RunFolder, write_atomically

logger = logging.getLogger(__name__)

EVERY_S = 5.0
"""Least seconds between two writes: a file system shared by thousands of runs feels each one."""


class Heartbeat:
    """What rank 0 is doing. A thread writes it down, so that a phase which hangs is seen with its name."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._phase = "start"
        self._step = 0
        self._beats = 0
        self._resumed_step: int | None = None
        self._saved_step: int | None = None
        self._step_times_s: list[float] = []
        self._compilation: str | None = None
        self._seconds = dict.fromkeys(("start", "train", "data", "validate", "save"), 0.0)
        self._entered = time.monotonic()
        self._written: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Note what begins now.

        Args:
            phase: `start`, `first_step`, `train`, `validate`, `save` or `leave`.
            step: updates done.
        """
        self._account()
        self._phase, self._step = phase, step
        self._beats += 1

    def tick(self) -> None:
        """A sign of life within a phase."""
        self._beats += 1

    def resume_at(self, step: int) -> None:
        """Note the step that this attempt starts from."""
        self._resumed_step = self._step = step

    def note_wait(self, seconds: float) -> None:
        """Of the time in this phase, so much was spent waiting for clips."""
        self._seconds["data"] += seconds
        self._seconds["train"] -= seconds

    def note_step_times(self, seconds: list[float], saved_step: int | None) -> None:
        """What each rank's last step took without waiting for the others, and the newest published checkpoint."""
        self._step_times_s, self._saved_step = seconds, saved_step

    def note_compilation(self, told: str) -> None:
        """Whether this attempt computes compiled or eager, and why."""
        self._compilation = told

    def facts(self, saved_step: int | None) -> dict[str, Any]:
        """Where this attempt began, what it has saved by now, and its seconds by what rank 0 did."""
        self._account()
        self._saved_step = saved_step
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        return {"resumed_step": self._resumed_step, "saved_step": self._saved_step, "seconds": seconds}

    def close(self) -> None:
        """Write the last one."""
        self._stopped.set()
        self._thread.join()
        self._try_to_write()

    def _account(self) -> None:
        """Charge the time since the last call to the phase."""
        now = time.monotonic()
        name = "train" if self._phase == "first_step" else self._phase
        if name in self._seconds:  # leaving counts as nothing of these
            self._seconds[name] += now - self._entered
        self._entered = now

    def _keep_writing(self) -> None:
        while True:
            self._try_to_write()
            if self._stopped.wait(EVERY_S):
                return

    def _try_to_write(self) -> None:
        """A full disk for a while is not to end the signs of life: the run would be taken for a hang."""
        beats = self._beats
        if self._written == beats:
            return
        try:
            self._write(beats)
        except OSError as error:
            logger.warning("%s can't be written: %s", self._folder.heartbeat, error)
        else:
            self._written = beats

    def _write(self, beats: int) -> None:
        beat = {
            "time": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "attempt": self._attempt,
            "phase": self._phase,
            "step": self._step,
            "beats": beats,
            "step_times_s": self._step_times_s,
            "resumed_step": self._resumed_step,
            "saved_step": self._saved_step,
            "compilation": self._compilation,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
        }
        write_atomically(self._folder.heartbeat, json.dumps(beat))
