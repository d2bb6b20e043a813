"""What a run waits for: `after` in its settings, as SLURM's dependencies."""

from collections.abc import Sequence

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, runs_folder
from cosmos_hpc.launch.marks import newest_job
from cosmos_hpc.launch.queue import JobStatus, job_statuses, jobs_named
from cosmos_hpc.launch.status import RunStatus, run_statuses


def jobs_before(names: Sequence[str], *, is_local: bool) -> list[str]:
    """Jobs that still have to end well before a run may start; none where all of that is done.

    Args:
        names: experiments, or names or numbers of SLURM jobs.
        is_local: whether the run that waits is a process of this machine, which can't wait in a queue.

    Raises:
        ConfigError: for something that is not there, that failed, or that can't be waited for.
    """
    left = {name: _before(name, is_local) for name in names}
    for name in [name for name, jobs in left.items() if jobs and is_local]:
        raise ConfigError(f"after: {name} is not finished, and runs of this machine don't wait for others: submit "
                          f"again when `cosmos-hpc status {name} --watch` has ended")  # fmt: skip
    return [job for jobs in left.values() for job in jobs]


def _before(name: str, is_local: bool) -> list[str]:
    found = _of_experiment(name)
    return _of_scheduler(name, is_local) if found is None else found


def _of_experiment(name: str) -> list[str] | None:
    """Living jobs of an experiment's runs; none if there is no such experiment."""
    folders = ExperimentFolder(runs_folder() / name).runs()
    if not folders:
        return None
    left = [(folder, row) for folder, row in zip(folders, run_statuses(folders), strict=True) if not _is_done(row)]
    for _, row in left:
        if row.is_over:
            raise ConfigError(
                f"after: {row.run} is {row.status}: mend it and `cosmos-hpc submit` it again, or take it out of after"
            )
    return [newest_job(folder) or "" for folder, _ in left]


def _is_done(row: RunStatus) -> bool:
    return row.status == "finished"


def _of_scheduler(name: str, is_local: bool) -> list[str]:
    try:
        found = job_statuses([name]) if name.isdecimal() else jobs_named(name)
    except ConfigError:
        if not is_local:
            raise
        found = {}
    if not found or all(job.state == "UNKNOWN" for job in found.values()):
        raise ConfigError(f"after: {name} is no experiment in {runs_folder()} and no job: submit it first")
    failed = [f"{job} is {status.state}" for job, status in found.items() if _has_failed(status)]
    if failed:
        raise ConfigError(f"after: {name}: job {', '.join(failed)}: run it again, or take it out of after")
    return [job for job, status in found.items() if not status.is_over]


def _has_failed(status: JobStatus) -> bool:
    return status.is_over and status.state != "COMPLETED"
