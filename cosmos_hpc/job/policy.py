"""What follows the end of an attempt: go on here, go back to the queue, or stop with a diagnosis and the mend."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from cosmos_hpc.config.cluster_schema import RestartConfig
from cosmos_hpc.config.run_state import AttemptRecord, Ending

BAD_NODE = (Ending.NODE_FAILURE, Ending.GPU_ERROR)
"""Faults after which the allocation is not to be trusted."""

DETERMINISTIC = (Ending.CODE_FAULT, Ending.OUT_OF_MEMORY)
"""Faults that come again if they came twice at the same step."""

MENDS = {
    Ending.NODE_FAILURE: "have the node drained, then submit again",
    Ending.GPU_ERROR: "have the node's GPUs checked (nvidia-smi -q, dmesg), exclude it, then submit again",
    Ending.LOST_RANKS: "check the network (NCCL_DEBUG=INFO in cluster.environment tells more), then submit again",
    Ending.OUT_OF_MEMORY: "lower data.micro_batch_size (GPU) or data.num_workers (host), then submit again",
    Ending.NON_FINITE: "lower optim.lr or look at the clips of that step, then submit again",
    Ending.DISK_FULL: "make room or have the quota raised, then submit again",
    Ending.HANG: "read the stacks in the ranks' logs, or raise cluster.hang.first_limit_s, then submit again",
    Ending.KILLED: "see who killed it (dmesg tells if the kernel did, for memory), then submit again",
    Ending.USER_ERROR: "mend it, then submit again",
    Ending.CODE_FAULT: "read the log and mend the code or the data, then submit again",
    Ending.SUPERVISOR_KILLED: "see who killed it (memory of the first node?), then submit again",
}
"""What a person can do."""

DOUBLINGS = 6
"""The back-off grows no further than this."""


class Action(Enum):
    """What the supervisor does next."""

    STOP = auto()
    RESTART = auto()
    REQUEUE = auto()


@dataclass(frozen=True)
class Verdict:
    """What follows an attempt."""

    action: Action
    delay_s: float = 0.0
    """Before a restart."""
    diagnosis: str | None = None
    """Why it stops, and the mend; for faults only."""


def what_follows(
    attempts: Sequence[AttemptRecord], restarts: RestartConfig, *, is_slurm: bool, can_shrink: bool = False
) -> Verdict:
    """Decide after the end of the newest attempt.

    Budgets count the faults of this job since its last progress, a newer checkpoint than any before: a run that moves
    on has its budget back, and so has one that a person submits again.

    Args:
        attempts: of the run, oldest first; all have ended.
        restarts: the budgets.
        is_slurm: there is a queue to go back to.
        can_shrink: the run may go on with the nodes that are left of its job.
    """
    last = attempts[-1]
    assert last.outcome is not None, "it has ended"
    if not last.outcome.is_fault:
        leave = Action.REQUEUE if is_slurm else Action.RESTART
        return Verdict(leave if last.outcome.is_agreed else Action.STOP)
    of_this_job = [record for record in attempts if record.job_id == last.job_id]
    if (reason := _why_stop(of_this_job, last.outcome, restarts)) is not None:
        return Verdict(Action.STOP, diagnosis=f"{last.message}; {reason}: {MENDS[last.outcome]}")
    if is_slurm and last.outcome in BAD_NODE and not can_shrink:
        return Verdict(Action.REQUEUE)
    doublings = min(DOUBLINGS, len(faults_since_progress(of_this_job)) - 1)
    return Verdict(Action.RESTART, delay_s=restarts.backoff_s * 2**doublings)


def faults_since_progress(attempts: Sequence[AttemptRecord]) -> list[Ending]:
    """The faults, newest first, back to the attempt that left a newer checkpoint than all before it."""
    faults = []
    for index in reversed(range(len(attempts))):
        record = attempts[index]
        if record.outcome is not None and record.outcome.is_fault:
            faults.append(record.outcome)
        if (record.saved_step or 0) > max((before.saved_step or 0 for before in attempts[:index]), default=0):
            break
    return faults


def out_of_room(record: AttemptRecord, waited_s: float) -> str:
    """The diagnosis where a full disk stays full."""
    return f"{record.message}; no room for a checkpoint in {waited_s:.0f} s: {MENDS[Ending.DISK_FULL]}"


def _why_stop(attempts: Sequence[AttemptRecord], ending: Ending, restarts: RestartConfig) -> str | None:
    if ending in (Ending.USER_ERROR, Ending.NON_FINITE):
        return "it would come again"
    if ending in DETERMINISTIC and _came_twice(attempts):
        return "the same came twice at this step"
    budget: int = getattr(restarts, ending)  # its fields are named as the endings
    spent = faults_since_progress(attempts).count(ending)
    return f"it is number {spent} without a new checkpoint (cluster.restarts.{ending})" if spent > budget else None


def _came_twice(attempts: Sequence[AttemptRecord]) -> bool:
    """Whether the newest fault is the one before it again: the same error at the same step."""
    faults = [record for record in attempts if record.outcome is not None and record.outcome.is_fault]
    marks = [(record.outcome, record.step, (record.error or "").partition(":")[0]) for record in faults[-2:]]
    return len(marks) == 2 and marks[0] == marks[1]
