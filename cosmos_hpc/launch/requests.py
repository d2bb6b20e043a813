"""What a person asks of a living run by a file in its folder, which its ranks agree on at their next step.

A signal would reach the ranks of an array element only while they run, and was seen to hit the next start instead.
"""

import time
from collections.abc import Callable

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.launch.status import RunStatus, run_status


def checkpoint_now(folder: RunFolder) -> str:
    """Ask a run for a checkpoint after its next step.

    Returns:
        What happens now, for the user.
    """
    return _ask(folder, folder.save_request.touch, "asked to save after its next step")


def requeue(folder: RunFolder) -> str:
    """Ask a run to save after its next step and to start again: through the queue, where there is one.

    Returns:
        What happens now, for the user.
    """
    return _ask(folder, folder.requeue_request.touch, "asked to save and to start again")


def wait_for_save(folder: RunFolder, before: int, poll_s: float = 0.5) -> str:
    """Wait until the checkpoint that was asked for is there.

    Args:
        folder: the run.
        before: step of its newest checkpoint when it was asked.
        poll_s: between two looks.

    Returns:
        Where it lies, or why there is none, for the user.
    """
    while folder.save_request.exists():
        if (status := run_status(folder)).is_over:
            folder.save_request.unlink(missing_ok=True)
            return f"{status.status} before it could save"
        time.sleep(poll_s)
    while folder.newest_step() == before and folder.unfinished_checkpoints() and not run_status(folder).is_over:
        time.sleep(poll_s)
    newest = folder.newest_checkpoint()
    if newest is None or folder.newest_step() == before:
        return f"nothing newer than step {before} was saved: see `cosmos-hpc logs {folder.label}`"
    return f"saved in {newest}"


def _ask(folder: RunFolder, leave_request: Callable[[], None], what: str) -> str:
    status: RunStatus = run_status(folder)
    if status.status == "unsupervised" or status.is_over:
        return "not running"
    if status.status == "pending":
        return "waits in the queue already"
    leave_request()
    return what
