"""How the runs of an experiment stand, read from their folders."""

import json
import os
import signal
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.rank_reports import Heartbeat
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.run_state import Ending, Goodput, RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.local import is_locked
from cosmos_hpc.launch.marks import is_pending, newest_job, settle
from cosmos_hpc.launch.queue import JobStatus, cancel_jobs, job_statuses

STRAGGLES = 1.3
"""A rank's own time for a step over the median of all, from which on it is named."""


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    """Global index."""

    step_time_s: float
    """Its own busy time in the last step."""

    ratio: float
    """Over the median of all ranks."""


@dataclass(frozen=True)
class RunStatus:
    """One row of `status`."""

    run: str
    """<experiment>/<index>-<hash>."""

    status: str
    """A status of state.json; `pending` until a supervisor starts, `died` where it is gone without a word,
    `unsupervised` for a run that torchrun's own line started, and `unreadable` where config.yaml is."""

    step: int
    """Steps done."""

    max_steps: int
    """Steps of the whole run."""

    loss: float | None
    """Of the last step."""

    val_psnr: float | None
    """Of the last validation, in dB."""

    val_psnr_ema: float | None
    """The same of the averaged weights."""

    clips_per_s: float | None
    """Of the last step, over all ranks."""

    attempts: int
    """Starts of the ranks so far."""

    last_outcome: Ending | None
    """How the attempt before ended."""

    message: str | None
    """Why the last attempt failed."""

    goodput: float | None = None
    """Productive over allocated seconds, in [0, 1]; none before anything was allocated."""

    seconds: Goodput | None = None
    """Where the seconds of all attempts went."""

    stragglers: tuple[Straggler, ...] = ()
    """Of a running run, the slowest first."""

    job: JobStatus | None = None
    """What SLURM says of the newest job; none for a local run, and where SLURM does not answer."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens without a person, as far as a supervisor knows."""
        return self.status in (Status.FINISHED, Status.CANCELLED, Status.FAILED, "died", "unsupervised", "unreadable")


def run_status(folder: RunFolder) -> RunStatus:
    """Where one run stands now; for several, `run_statuses` asks the scheduler once."""
    return run_statuses([folder])[0]


def run_statuses(folders: Sequence[RunFolder]) -> list[RunStatus]:
    """Where runs stand now; a run whose settings can't be read spoils its own row only.

    Where SLURM does not answer, as on a machine that only has a copy of the folders, these alone tell.
    """
    settle({folder.experiment for folder in folders})
    read = [_read(folder) for folder in folders]
    try:
        jobs = job_statuses(one.job for one in read if isinstance(one, _Read) and one.job)
    except ConfigError:
        jobs = {}
    return [one if isinstance(one, RunStatus) else _told(one, jobs.get(one.job or "")) for one in read]


def cancel(folder: RunFolder) -> str:
    """End a run for good; its ranks save before they leave.

    The mark is there before anything is signalled, so that the supervisor knows who asked and never requeues.

    Returns:
        What happens now, for the user.

    Raises:
        ConfigError: if SLURM refuses.
    """
    status = run_status(folder)
    if status.is_over or status.status == "unsupervised":
        return "not running"
    folder.cancel_mark.touch()
    read = _read(folder)
    if isinstance(read, _Read) and read.job is not None:  # the supervisor's process id is another machine's
        cancel_jobs([read.job] if read.job else [])
        return "will not start" if status.status == "pending" else "asked to save and stop"
    state = RunState.read(folder.state)
    if status.status in ("pending", "starting") or state is None or state.pid is None:
        return "will not start"
    os.kill(state.pid, signal.SIGTERM)
    return "asked to save and stop"


def find_runs(name: str, root: Path) -> list[RunFolder]:
    """The runs that a command line names: an experiment, <experiment>/<run> or its beginning, or a folder's path.

    Args:
        name: as typed.
        root: folder of the experiments.

    Raises:
        ConfigError: if nothing fits.
    """
    path = Path(name)
    if (path / "config.yaml").is_file():
        return [RunFolder(path.resolve())]
    experiment, _, run = name.strip("/").partition("/")
    runs = ExperimentFolder(root / experiment).runs()
    found = [folder for folder in runs if folder.path.name.startswith(run)]
    if not found:
        known = [f"{experiment}/{folder.path.name}" for folder in runs] or sorted(
            folder.name for folder in root.glob("*") if ExperimentFolder(folder).runs()
        )
        raise ConfigError(f"{name} is no run or experiment in {root}: there are {', '.join(known) or 'none yet'}")
    return found


class _Read(NamedTuple):
    """What a run's own folder says."""

    folder: RunFolder
    config: RunConfig
    state: RunState | None
    job: str | None
    """SLURM's id; none where the run is a process of this machine."""


def _read(folder: RunFolder) -> "_Read | RunStatus":
    try:
        config = read_run_config(folder.config)
    except ConfigError as error:
        return _unreadable(folder, str(error))
    state = RunState.read(folder.state)
    job = newest_job(folder, state) if config.cluster.executor == "slurm" else None
    return _Read(folder, config, state, job)


def _told(read: _Read, job: JobStatus | None) -> RunStatus:
    folder, config, state, _ = read
    last, validated = _last_metrics(folder.metrics)
    ended = [attempt for attempt in state.attempts if attempt.outcome] if state else []
    is_local = config.cluster.executor == "local"
    status = _local_status(folder, state) if is_local else _slurm_status(folder, state, job)
    return RunStatus(
        run=folder.label,
        status=status,
        step=last.get("step", 0),
        max_steps=config.trainer.max_steps,
        loss=last.get("loss"),
        val_psnr=validated.get("val_psnr"),
        val_psnr_ema=validated.get("val_psnr_ema"),
        clips_per_s=last.get("clips_per_s"),
        attempts=len(state.attempts) if state else 0,
        last_outcome=ended[-1].outcome if ended else None,
        message=ended[-1].message if ended else None,
        goodput=state.goodput.share if state else None,
        seconds=state.goodput if state else None,
        stragglers=_stragglers(folder, state) if state and status == Status.RUNNING else (),
        job=job,
    )


def _local_status(folder: RunFolder, state: RunState | None) -> str:
    has_supervisor = is_locked(folder.supervisor_lock)
    if not has_supervisor and folder.pending_mark.exists():
        return "pending" if is_pending(folder) else "died"
    if state is None:
        return "starting" if has_supervisor else "unsupervised"
    if state.status in (Status.RUNNING, Status.WAITING) and not has_supervisor:
        return "died"
    return state.status


def _slurm_status(folder: RunFolder, state: RunState | None, job: JobStatus | None) -> str:
    """The queue knows whether the run's job lives, also between two starts; another node's lock may be out of sight."""
    is_new = folder.pending_mark.exists()  # the newest job's supervisor has not started yet
    if job is None:
        return "pending" if is_new else state.status if state else "unsupervised"
    if job.is_over:
        if not is_new and state and state.status in (Status.FINISHED, Status.FAILED, Status.CANCELLED):
            return state.status
        return Status.CANCELLED if folder.cancel_mark.exists() else "died"
    if job.state == "PENDING":
        return "pending"
    return "starting" if is_new or state is None else state.status


def _unreadable(folder: RunFolder, why: str) -> RunStatus:
    """What can be told without the settings; a supervisor that has read them before goes on."""
    state = RunState.read(folder.state)
    lives = state is not None and is_locked(folder.supervisor_lock)
    return RunStatus(
        run=folder.label,
        status=state.status if state is not None and lives else "unreadable",
        step=0,
        max_steps=0,
        loss=None,
        val_psnr=None,
        val_psnr_ema=None,
        clips_per_s=None,
        attempts=0,
        last_outcome=None,
        message=why,
    )


def _stragglers(folder: RunFolder, state: RunState) -> tuple[Straggler, ...]:
    beat = Heartbeat.of_attempt(folder, state.attempts[-1].attempt) if state.attempts else None
    return stragglers(beat.step_times_s) if beat else ()


def stragglers(step_times_s: Sequence[float]) -> tuple[Straggler, ...]:
    """The ranks that are well slower than the median, the slowest first.

    Args:
        step_times_s: one number a rank.
    """
    median = statistics.median(step_times_s) if step_times_s else 0.0
    if median <= 0:
        return ()
    found = [Straggler(rank, own, own / median) for rank, own in enumerate(step_times_s) if own > STRAGGLES * median]
    return tuple(sorted(found, key=lambda straggler: -straggler.ratio))


def _last_metrics(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last line, and the last one that holds a validation."""
    last: dict[str, Any] = {}
    for line in _lines_backwards(path):
        last = last or line
        if "val_psnr" in line:
            return last, line
    return last, {}


def _lines_backwards(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in reversed(path.read_text().splitlines()):
        try:
            yield json.loads(line)
        except ValueError:  # the line that is being written at this moment
            continue
