"""Send runs to the scheduler, each once: finished and living runs are left alone."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import read_run_config, to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, write_atomically
from cosmos_hpc.config.run_state import RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.directives import directives
from cosmos_hpc.launch.local import is_locked
from cosmos_hpc.launch.provenance import provenance
from cosmos_hpc.launch.queue import JobStatus, job_statuses
from cosmos_hpc.launch.status import is_pending, newest_job
from cosmos_hpc.launch.step import CALLERS_GPUS

if TYPE_CHECKING:  # takes half a second
    import submitit

MakeJob = Callable[[Path], Callable[[], None]]
"""Turns a run folder into the callable that the scheduler runs."""

YEAR_MIN = 365 * 24 * 60
"""A local machine has no wall clock."""


@dataclass(frozen=True)
class PlacedRun:
    """A run, its folder, and what a submission would do with it."""

    config: RunConfig
    folder: RunFolder
    action: str
    """`start`, `resume`, `skip: finished`, `skip: running` or `skip: pending`."""

    @property
    def is_sent(self) -> bool:
        """Whether a submission sends it."""
        return not self.action.startswith("skip")


def place(runs: Sequence[RunConfig], experiment: ExperimentFolder) -> list[PlacedRun]:
    """Give each run its folder and see what is left to do for it. Writes nothing."""
    folders = experiment.place(list(runs))
    jobs = job_statuses(job for folder in folders if (job := _slurm_job(folder)))
    return [
        PlacedRun(run, folder, _action(folder, jobs.get(_slurm_job(folder) or "")))
        for run, folder in zip(runs, folders, strict=True)
    ]


def lay_out(run: RunConfig, folder: RunFolder, start: dict[str, Any] | None = None) -> RunConfig:
    """Make the run folder with its settings and provenance, or bring an existing one up to date.

    The number of sample streams is fixed by the first start that saved something, so that a resume is the same run.

    Args:
        run: its settings.
        folder: where it goes.
        start: from `provenance`, which takes a while and is the same for all runs of a submission; none: taken now.

    Returns:
        The settings as written.

    Raises:
        ConfigError: if the newest checkpoint can't be resumed with these settings.
    """
    streams: int | None = run.num_streams
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        _check_resume(run, folder)
        streams = read_run_config(folder.config).data.num_streams
    fixed = dataclasses.replace(run, data=dataclasses.replace(run.data, num_streams=streams))
    write_atomically(folder.config, to_yaml(fixed))
    starts = json.loads(folder.provenance.read_text()) if folder.provenance.exists() else []
    write_atomically(folder.provenance, json.dumps([*starts, start or provenance()], indent=1))
    return fixed


def submit(
    placed: Sequence[PlacedRun], experiment: ExperimentFolder, max_parallel: int | None, make_job: MakeJob
) -> dict[str, str]:
    """Send the runs that are left to do, as one array.

    Args:
        placed: from `place`.
        experiment: where submitit's files and the table of submissions go.
        max_parallel: runs at the same time; none: no limit on a cluster, one on a local machine.
        make_job: the supervisor of a run folder.

    Returns:
        Job id of each run sent, by the run's label.

    Raises:
        ConfigError: if the scheduler refuses; its words are passed on.
    """
    sent = [run for run in placed if run.is_sent]
    if not sent:
        return {}
    start = provenance()
    for run in sent:
        lay_out(run.config, run.folder, start)
    write_atomically(experiment.max_parallel, str(max_parallel or 1))
    _note(experiment, {"time": time.time(), "runs": [run.folder.label for run in sent]})
    ids: dict[str, str] = {}
    for array in _arrays(sent, max_parallel):
        for run in array:
            run.folder.cancel_mark.unlink(missing_ok=True)
            run.folder.pending_mark.touch()
        try:
            jobs = _send([make_job(run.folder.path) for run in array], array[0].config, experiment, max_parallel)
        except BaseException:
            for run in array:
                run.folder.pending_mark.unlink(missing_ok=True)
            raise
        for run, job in zip(array, jobs, strict=True):
            run.folder.pending_mark.write_text(job)
            ids[run.folder.label] = job
    _note(experiment, {"time": time.time(), "jobs": ids})
    return ids


def sbatch_scripts(placed: Sequence[PlacedRun], experiment: ExperimentFolder, max_parallel: int | None) -> list[str]:
    """The text that `submit` would hand to sbatch, one for each array. Writes nothing.

    Raises:
        ConfigError: if nothing is left to send, or the runs are processes of this machine.
    """
    sent = [run for run in placed if run.is_sent]
    if not sent:
        raise ConfigError(f"{experiment.name} has nothing to send: see `cosmos-hpc status {experiment.name}`")
    if sent[0].config.cluster.executor == "local":
        raise ConfigError(f"{experiment.name} runs on this machine, without sbatch: name a profile, see slurm/*.yaml")
    scripts = []
    for array in _arrays(sent, max_parallel):
        executor = _executor(array[0].config, experiment, max_parallel)._executor
        if len(array) > 1:
            executor.parameters["map_count"] = len(array)  # as submitit does for a batch
        scripts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return scripts


def _arrays(sent: Sequence[PlacedRun], max_parallel: int | None) -> list[list[PlacedRun]]:
    """Runs that ask for the same of the scheduler, together."""
    groups: dict[str, list[PlacedRun]] = {}
    for run in sent:
        groups.setdefault(json.dumps(directives(run.config, max_parallel), sort_keys=True), []).append(run)
    return list(groups.values())


def _check_resume(run: RunConfig, folder: RunFolder) -> None:
    """Refuse before anything is written what the ranks would refuse after their start."""
    streams, ranks = read_run_config(folder.config).num_streams, run.trainer.world_size
    if streams and streams % ranks:
        fitting = ", ".join(str(number) for number in range(1, streams + 1) if streams % number == 0)
        raise ConfigError(
            f"{folder.label} shares its data among {streams} streams since its first start, which {ranks} ranks "
            f"(trainer.devices x trainer.num_nodes) can't divide evenly: use {fitting}"
        )


def _slurm_job(folder: RunFolder) -> str | None:
    """The newest job of a run that was sent to SLURM; its settings may name another executor by now."""
    job = newest_job(folder)
    return job if job and read_run_config(folder.config).cluster.executor == "slurm" else None


def _action(folder: RunFolder, job: JobStatus | None) -> str:
    state = RunState.read(folder.state)
    if job is not None and not job.is_over:
        return "skip: pending" if job.state == "PENDING" else "skip: running"
    if is_locked(folder.supervisor_lock):
        return "skip: running"
    if job is None and is_pending(folder):
        return "skip: pending"
    if state is not None and state.status == Status.FINISHED:
        return "skip: finished"
    return "start" if folder.newest_checkpoint() is None else "resume"


def _send(
    jobs: Sequence[Callable[[], None]], run: RunConfig, experiment: ExperimentFolder, max_parallel: int | None
) -> list[str]:
    import submitit

    executor = _executor(run, experiment, max_parallel)
    shield = shielded() if run.cluster.executor == "local" else contextlib.nullcontext()
    try:
        with shield, executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"sbatch refused {run.name}: {' '.join(str(error).split())}") from None
    return [job.job_id for job in submitted]


def _executor(run: RunConfig, experiment: ExperimentFolder, max_parallel: int | None) -> "submitit.AutoExecutor":
    """Submitit with the options of a run; it makes no folder before it sends."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=experiment.submitit, cluster=run.cluster.executor)
    except RuntimeError as error:
        raise ConfigError(f"cluster.executor is slurm, but {error} Set `cluster: local` for this machine") from None
    if run.cluster.executor == "local":
        executor.update_parameters(name=run.name, timeout_min=YEAR_MIN)
    else:
        executor.update_parameters(**directives(run, max_parallel))
    return executor


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside outlive Ctrl-C and the closing of the terminal, as jobs of a cluster do.

    They learn which GPUs the caller sees by another name, since submitit overwrites the usual one.
    """
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        os.environ[CALLERS_GPUS] = os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        yield
    finally:
        os.environ.pop(CALLERS_GPUS, None)
        for number, handler in kept.items():
            signal.signal(number, handler)


def _note(experiment: ExperimentFolder, line: dict[str, object]) -> None:
    experiment.submissions.parent.mkdir(parents=True, exist_ok=True)
    with experiment.submissions.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
