"""A bar for whoever trains at a terminal, as with torchrun's own line. Log lines go by above it."""

import atexit
import logging
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from cosmos_hpc.training.telemetry import StepMetrics


class LiveBar:
    """Step, loss, clips/s, share of the time spent waiting for clips, memory, time left."""

    @classmethod
    def on_terminal(cls, title: str, max_steps: int) -> Self | None:
        """A bar where standard error is a terminal, else none."""
        return cls(title, max_steps) if sys.stderr.isatty() else None

    def __init__(self, title: str, max_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._streams = {
            handler: handler.stream
            for handler in logging.getLogger("cosmos_hpc").handlers
            if isinstance(handler, logging.StreamHandler)
        }
        numbers = TextColumn("{task.fields[numbers]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=max_steps, numbers="")
        self._progress.start()
        atexit.register(self._progress.stop)  # which shows the cursor again, also after an error
        for handler in self._streams:
            handler.setStream(sys.stderr)  # by now the bar's own, which prints above itself

    def show(self, metrics: "StepMetrics") -> None:
        """Move to a step."""
        self._progress.update(self._task, completed=metrics.step, numbers=numbers(metrics))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()
        for handler, stream in self._streams.items():
            handler.setStream(stream)


def numbers(metrics: "StepMetrics") -> str:
    """What the bar says of a step."""
    wait = metrics.data_time_s / metrics.step_time_s
    memory = "" if metrics.memory_gib is None else f", {metrics.memory_gib:.1f} GiB"
    return f"loss {metrics.loss:.4f}, {metrics.clips_per_s:.2f} clips/s, data wait {wait:.0%}{memory}"
