"""Steps that the device may still be at: the host reads a step's numbers when the next one is queued behind it."""

import resource
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosmos_hpc.training.telemetry import StepMetrics


class LateCopy:
    """A copy that is started now and read later: `read` waits for it alone, and not for what was queued behind it."""

    def __init__(self, values: Tensor) -> None:
        """Start the copy.

        Args:
            values: [N], on any device.
        """
        self._event: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._host = values.clone()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]


class Stopwatch:
    """Seconds between two points of this rank's work: on the GPU's own clock where there is one."""

    def __init__(self, device: torch.device) -> None:
        """Start."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._started = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """Stop."""
        self._stopped = time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """What passed; waits for the second point."""
        if not self._events:
            return self._stopped - self._started
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


@dataclass(frozen=True)
class QueuedStep:
    """A step as the host knows it before its numbers arrive."""

    step: int
    """Updates done with it."""

    terms: tuple[str, ...]
    """Names of the loss terms of this step."""

    numbers: LateCopy
    """Loss, each of these terms, gradient norm, and 1.0 where the update was left out."""

    busy: Stopwatch
    """From the first clip to the last gradient of this rank."""

    started: float
    """On time.perf_counter."""

    data_time_s: float
    """Seconds spent waiting for clips."""

    lr: float
    """Learning rate."""

    num_clips: int
    """Over all ranks."""

    consumed_samples: int
    """Clips since step 0."""


class StepQueue:
    """At most two steps: the one that was queued last, and the one before."""

    def __init__(self) -> None:
        self._steps: deque[QueuedStep] = deque()
        self.busy_s = 0.0
        """Seconds that this rank worked in the last step that arrived."""

    def append(self, step: QueuedStep) -> None:
        """Queue a step."""
        self._steps.append(step)

    def clear(self) -> None:
        """Forget what is queued."""
        self._steps.clear()

    def arrived(self, *, everything: bool) -> Iterator[StepMetrics]:
        """Numbers of the steps before the last one, oldest first.

        Args:
            everything: of the last one as well, which waits for the device.
        """
        while len(self._steps) > (0 if everything else 1):
            step = self._steps.popleft()
            loss, *terms, grad_norm, skipped = step.numbers.read()
            self.busy_s = step.busy.seconds()
            ended = self._steps[0].started if self._steps else time.perf_counter()
            step_time_s = ended - step.started
            named: dict[str, Any] = dict(zip(step.terms, terms, strict=True))
            yield StepMetrics(
                step=step.step,
                loss=loss,
                **named,
                lr=step.lr,
                grad_norm=grad_norm,
                step_time_s=step_time_s,
                data_time_s=step.data_time_s,
                clips_per_s=step.num_clips / step_time_s,
                consumed_samples=step.consumed_samples,
                skipped=bool(skipped),
                memory_gib=_most_memory_gib(),
            )


def _most_memory_gib() -> float:
    """What torch held of the GPU at most, as it counts on the host; on a CPU, what this process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
