"""What the ranks tell each other once a step, behind the step's back: a reduction on the CPU that no GPU waits for."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.preemption import OUTCOMES, Outcome, StopRequest


class Agreed(NamedTuple):
    """What holds on every rank alike, as it stood at the start of the step."""

    stop: Outcome | None
    """Why to leave after this step, if anyone was asked to."""

    wants_save: bool
    """Whether a checkpoint is wanted after this step."""

    wants_validation: bool
    """Whether a validation is wanted after this step."""

    is_writing: bool
    """Whether a rank still writes the checkpoint before."""

    busy_s: list[float]
    """Seconds that each rank worked in its step before, by rank."""


class Agreement:
    """One all-reduce a step: started before it, read after it."""

    def __init__(self, groups: Groups, stop: StopRequest) -> None:
        self._groups = groups
        self._stop = stop

    def start(self, *, wants_save: bool, wants_validation: bool, is_writing: bool, busy_s: float) -> None:
        """Say how this rank stands. Collective.

        Args:
            wants_save: whether this rank's clock asks for a checkpoint.
            wants_validation: whether it asks for a validation.
            is_writing: whether this rank still writes one.
            busy_s: seconds that its last step took without waiting for the others.
        """
        rank = self._groups.rank
        own = torch.tensor([self._stop.code, wants_save, wants_validation, is_writing], dtype=torch.float64)
        self._values = torch.cat([own, torch.zeros(rank.world_size, dtype=torch.float64)])
        self._values[len(own) + rank.rank] = busy_s
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self._groups.on_cpu, async_op=True)

    def read(self) -> Agreed:
        """What came out; waits for the slowest rank's `start`."""
        self._work.wait()
        code, wants_save, wants_validation, is_writing, *busy_s = self._values.tolist()
        return Agreed(OUTCOMES[int(code)], bool(wants_save), bool(wants_validation), bool(is_writing), busy_s)
