"""Which job a run was last sent as: the marks in run folders, and how they are brought in line with SLURM's queue."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.launch.batch import run_of
from cosmos_hpc.launch.local import is_alive, locked
from cosmos_hpc.launch.queue import own_jobs_by_script, submitted_at


def newest_job(folder: RunFolder, state: RunState | None = None) -> str | None:
    """The job that a run was last sent as, or last ran in; empty while it is being sent.

    Args:
        folder: of the run.
        state: its state, where the caller has read it already.
    """
    try:
        return folder.pending_mark.read_text()
    except FileNotFoundError:
        state = state or RunState.read(folder.state)
    return state.attempts[-1].job_id if state and state.attempts else None


def is_pending(folder: RunFolder) -> bool:
    """Whether a local run is sent and has not started yet."""
    try:
        job = folder.pending_mark.read_text()
    except FileNotFoundError:
        return False
    return not job or is_alive(int(job))  # empty: it is being sent at this moment


def mark_sent(folder: RunFolder, job: str) -> None:
    """Write down the job of a run, unless its supervisor has started and taken the mark away already."""
    try:
        with folder.pending_mark.open("r+") as mark:
            mark.write(job)
    except FileNotFoundError:
        return


def forget_earlier_cancel(folder: RunFolder, job: str) -> None:
    """Take away the mark of a cancel that is older than this job: somebody has sent the run again, by hand.

    Args:
        folder: of the run.
        job: the caller's own.
    """
    if folder.cancel_mark.exists() and folder.cancel_mark.stat().st_mtime < submitted_at(job) + 1:  # whole seconds
        folder.cancel_mark.unlink(missing_ok=True)


def settle(experiments: Iterable[ExperimentFolder]) -> None:
    """Bring the marks of experiments in line with SLURM's queue, which names the script of each job.

    A job that came of a submission killed before it wrote down the ids, or of `sbatch run.sh` by hand, is taken over;
    a run whose mark names no job never came to the queue, and is free to be sent again. Nothing is touched while a
    submission is at work, where SLURM does not answer, or in folders that are somebody else's.
    """
    found = [experiment for experiment in experiments if experiment.scripts.is_dir() or _unsure(experiment)]
    if not found:
        return
    with contextlib.suppress(ConfigError, PermissionError):
        queued = own_jobs_by_script() if any(experiment.scripts.is_dir() for experiment in found) else {}
        for experiment in found:
            with locked(experiment.submit_lock) as ours:
                if ours:
                    settle_locked(experiment, queued)


def settle_locked(experiment: ExperimentFolder, queued: Mapping[str, Path]) -> None:
    """The same for one experiment, whose `submit_lock` the caller holds.

    Args:
        experiment: whose marks they are.
        queued: from `own_jobs_by_script`.
    """
    jobs: dict[RunFolder, list[str]] = {}
    for job, script in queued.items():
        if script.is_relative_to(experiment.path) and (folder := run_of(script, job)):
            jobs.setdefault(folder, []).append(job)
    for folder, living in jobs.items():
        if newest_job(folder) not in living:
            folder.pending_mark.write_text(living[-1])
    for mark in _unsure(experiment):
        mark.unlink(missing_ok=True)


def _unsure(experiment: ExperimentFolder) -> list[Path]:
    """Marks of runs that were about to be sent when they were last touched."""
    return [mark for mark in experiment.path.glob("*-*/pending") if mark.stat().st_size == 0]
