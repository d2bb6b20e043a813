"""Ranks without a sign of life: noticed by the supervisor's own clock, with a limit learned from what was seen."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cosmos_hpc.config.cluster_schema import HangConfig
from cosmos_hpc.config.rank_reports import Heartbeat
from cosmos_hpc.config.run_folder import RunFolder

STACKS_S = 10.0
"""How long ranks have to print their stacks."""

PY_SPY_S = 10.0
"""How long py-spy may take for one rank."""

QUIET_S = 1.0
"""Logs that have not grown for so long hold what will come."""

DUMP = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+[^\n]*\(most recent call first\):\n(?:  [^\n]*\n?)*")
"""One thread's stack as faulthandler prints it."""

FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')


class Vigil:
    """Watches the heartbeat of one attempt."""

    def __init__(
        self,
        limits: HangConfig,
        longest_silence_s: dict[str, float],
        *,
        num_hangs: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the start of the ranks.

        Args:
            limits: from the settings.
            longest_silence_s: by phase that the run has been through to its end; kept up to date here.
            num_hangs: since the last new checkpoint. Each doubles the limits: it may have been slowness.
            clock: seconds; never goes back, and stands still with the machine.
        """
        self._limits = limits
        self._patience = 2**num_hangs
        self._longest_silence_s = longest_silence_s
        self._clock = clock
        self._last_sign = clock()
        self._beats: int | None = None
        self._longest_in_phase_s = 0.0
        self.newest = Heartbeat()
        """What was heard last of this attempt."""

    @property
    def has_heard(self) -> bool:
        """Whether there was a heartbeat of this attempt."""
        return self._beats is not None

    @property
    def silence_s(self) -> float:
        """Since the last sign of life, or the start."""
        return self._clock() - self._last_sign

    @property
    def limit_s(self) -> float:
        """Silence that the present phase may have."""
        seen_s = self._longest_silence_s.get(self.newest.phase)
        if seen_s is None:
            return self._patience * self._limits.first_limit_s
        return self._patience * max(self._limits.least_limit_s, self._limits.factor * seen_s)

    @property
    def is_hung(self) -> bool:
        """Whether the silence is longer than it may be."""
        return self.silence_s > self.limit_s

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which this process stood still itself: a suspended job, a file system that hung."""
        self._last_sign += seconds

    def hear(self, beat: Heartbeat | None) -> None:
        """Take in the newest heartbeat of the attempt; the silence before it belongs to the phase it began in."""
        if beat is None:
            return
        if self._beats is None or beat.beats > self._beats:
            self._longest_in_phase_s = max(self._longest_in_phase_s, self.silence_s)
            # Only a phase that was left has shown its longest silence: a start shows life before it loads a checkpoint
            if beat.phase != self.newest.phase or self.newest.phase in self._longest_silence_s:
                self._learn(self._longest_in_phase_s)
            if beat.phase != self.newest.phase:
                self._longest_in_phase_s = 0.0
            self._last_sign = self._clock()
            self._beats = beat.beats
        self.newest = beat

    def _learn(self, silence_s: float) -> None:
        phase = self.newest.phase
        self._longest_silence_s[phase] = max(silence_s, self._longest_silence_s.get(phase, 0.0))

    def describe(self, frames: Sequence[str]) -> str:
        """The hang in one line."""
        where = f"no sign of life for {self.silence_s:.0f} s in phase {self.newest.phase}"
        return f"{where} ({'; '.join(frames)})" if frames else where


@dataclass(frozen=True)
class Stacks:
    """Where the ranks stood, by their own words."""

    folder: RunFolder
    attempt: int
    sizes: dict[Path, int]
    """Of the ranks' logs before they were asked."""

    @classmethod
    def before(cls, folder: RunFolder, attempt: int) -> "Stacks":
        """Remember where the logs end now; then ask the ranks by SIGUSR1."""
        return cls(folder, attempt, {log: log.stat().st_size for log in folder.rank_logs(attempt)})

    def wait(self, is_over: Callable[[], bool]) -> list[str]:
        """Each rank's innermost frame of its main thread, once the logs have come to rest, or all ranks are gone."""
        deadline = time.monotonic() + STACKS_S
        texts, since = self._texts(), time.monotonic()
        while time.monotonic() < deadline and not is_over():
            time.sleep(0.1)
            if (now := self._texts()) != texts:
                texts, since = now, time.monotonic()
            elif any(texts.values()) and time.monotonic() - since > QUIET_S:
                break
        return [f"{log.stem.replace('_', ' ')} {innermost_frame(text)}" for log, text in texts.items()]

    def _texts(self) -> dict[Path, str]:
        return {log: _read_from(log, size) for log, size in self.sizes.items()}


def innermost_frame(text: str) -> str:
    """Such as `in all_reduce (distributed_c10d.py:2500)`; of the main thread, which faulthandler prints last."""
    stacks = DUMP.findall(text)
    frame = FRAME.search(stacks[-1]) if stacks else None
    if frame is None:
        return "did not answer: stopped, or stuck in the kernel"
    return f"in {frame['function']} ({Path(frame['file']).name}:{frame['line']})"


def dump_with_py_spy(pids: Sequence[int], output: IO[str]) -> None:
    """Native stacks as well, where py-spy is installed and may look."""
    if tool := shutil.which("py-spy"):
        for pid in pids:
            command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, stdout=output, stderr=output, timeout=PY_SPY_S, check=False)


def _read_from(log: Path, size: int) -> str:
    with log.open("rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace")
