"""What follows updates that were left out because loss or gradient was not finite: skip, roll back, stop."""

import math
from enum import Enum, auto
from typing import TYPE_CHECKING

from cosmos_hpc.config.schema import TrainerConfig
from cosmos_hpc.training.telemetry import StepMetrics

if TYPE_CHECKING:
    from cosmos_hpc.training.loop import TrainState

MEND = "lower optim.lr, lengthen optim.warmup_steps, or set trainer.precision to 32"
"""What a user can do against it."""


class NonFiniteError(RuntimeError):
    """Training can't go on: loss or gradient stays NaN or infinite."""


class Verdict(Enum):
    """What to do after a step."""

    GO_ON = auto()
    ROLL_BACK = auto()


class NonFiniteGuard:
    """Decides after updates that were left out; all ranks see the same numbers and so decide the same."""

    def __init__(self, trainer: TrainerConfig) -> None:
        self._max_skipped = trainer.max_skipped_steps
        self._max_rollbacks = trainer.max_rollbacks
        self._num_rollbacks = 0

    def judge(self, state: "TrainState", metrics: StepMetrics) -> Verdict:
        """What to do, now that a step's numbers are known; counts in `state.skipped_in_a_row`.

        Raises:
            NonFiniteError: if the roll-backs are used up.
        """
        if not metrics.skipped:
            state.skipped_in_a_row = 0
            return Verdict.GO_ON
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row <= self._max_skipped:
            return Verdict.GO_ON
        if self._num_rollbacks == self._max_rollbacks:
            raise NonFiniteError(_diagnosis(metrics, state.skipped_in_a_row, self._num_rollbacks))
        state.skipped_in_a_row = 0
        self._num_rollbacks += 1
        return Verdict.ROLL_BACK

    def nothing_to_go_back_to(self, step: int) -> NonFiniteError:
        """The error of a run that has no checkpoint yet."""
        return NonFiniteError(f"loss or gradient was not finite up to step {step}, before the first checkpoint: {MEND}")


def _diagnosis(metrics: StepMetrics, count: int, num_rollbacks: int) -> str:
    what = "gradient" if math.isfinite(metrics.loss) else "loss"
    return (
        f"the {what} was not finite in {count} updates up to step {metrics.step} (loss {metrics.loss}, gradient norm "
        f"{metrics.grad_norm}, lr {metrics.lr:.2e}), also after {num_rollbacks} roll-backs: {MEND}"
    )
