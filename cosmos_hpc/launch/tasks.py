"""Work on data as an array of tasks, by the launcher that also sends training: one core and up, no GPU."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.launch.directives import NO_LIMIT, task_directives
from cosmos_hpc.launch.submit import YEAR_MIN, shielded

if TYPE_CHECKING:  # takes half a second
    import submitit


@dataclass(frozen=True)
class ResumableTask:
    """A task that, called again, goes on: at the time limit and at preemption it goes back to the queue."""

    task: Callable[[], None]

    def __call__(self) -> None:
        """Do it; SLURM's warning, which goes to all processes of a step, is left to this one."""
        os.register_at_fork(after_in_child=_ignore_warning)
        self.task()

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit sends again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def send_tasks(name: str, tasks: Sequence[Callable[[], None]], folder: Path, cluster: str | None) -> list[str]:
    """Send tasks as one array.

    Args:
        name: Of the job.
        tasks: Picklable.
        folder: For submitit's files and the logs.
        cluster: Name of a profile such as slurm/cpu.yaml, or `local` for processes of this machine; none: as `submit`
            does without one, SLURM where there is sbatch.

    Returns:
        Job ids.

    Raises:
        ConfigError: if the profile is not there or the scheduler refuses.
    """
    import submitit

    profile = [] if cluster is None else [f"cluster={cluster}"]
    run = resolve(load_experiment(None, [f"name={name}", *profile]), {})
    if run.cluster.executor == "local":
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(name=name, timeout_min=YEAR_MIN)
    else:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=NO_LIMIT)
        executor.update_parameters(**task_directives(run))
    try:
        with shielded(), executor.batch():
            jobs = [executor.submit(ResumableTask(task)) for task in tasks]
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"sbatch refused {name}: {' '.join(str(error).split())}") from None
    return [job.job_id for job in jobs]
