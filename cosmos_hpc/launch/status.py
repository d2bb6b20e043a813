"""How the runs of an experiment stand, read from their folders."""

import json
import os
import signal
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import peek
from cosmos_hpc.config.rank_reports import Heartbeat, last_lines
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.run_state import Ending, Goodput, RunState, Status
from cosmos_hpc.launch.local import is_locked
from cosmos_hpc.launch.marks import is_pending, newest_job, settle
from cosmos_hpc.launch.queue import JobStatus, cancel_jobs, job_statuses

STRAGGLES = 1.3
"""A rank's own time for a step over the median of all, from which on it is named."""


RECENT = 20
"""Steps that tell the present pace."""


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

    causes: dict[str, int]
    """How the ended ones among them ended, and how often."""

    last_outcome: Ending | None
    """How the attempt before ended."""

    message: str | None
    """Why the last attempt failed."""

    memory_gib: float | None = None
    """Most memory that rank 0 held."""

    goodput: float | None = None
    """Productive over allocated seconds, in [0, 1]; none before anything was allocated."""

    seconds: Goodput | None = None
    """Where the seconds of all attempts went."""

    data_wait: float | None = None
    """Share of the last steps' time that was spent waiting for clips, in [0, 1]."""

    time_left_s: float | None = None
    """Until the last step, at the pace of the last ones; none where nothing runs."""

    nodes: str = ""
    """Host list that it runs on, or ran on last."""

    stragglers: tuple[Straggler, ...] = ()
    """Of a running run, the slowest first."""

    compilation: str | None = None
    """Of a running run: whether it computes `compiled` or `eager`, with figures or the reason."""

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

    Returns:
        What happens now, for the user.

    Raises:
        ConfigError: if SLURM refuses.
    """
    return cancel_all([folder])[folder]


def cancel_all(folders: Sequence[RunFolder]) -> dict[RunFolder, str]:
    """End runs for good, with one question and one order to SLURM for all of them.

    The marks are there before anything is signalled, so that each supervisor knows who asked and never requeues.

    Returns:
        What happens now to each, for the user.

    Raises:
        ConfigError: if SLURM refuses.
    """
    said = dict.fromkeys(folders, "not running")
    jobs = []
    for folder, status in zip(folders, run_statuses(folders), strict=True):
        if status.is_over or status.status == "unsupervised":
            continue
        read = _read(folder)
        if isinstance(read, _Read) and read.job == "":  # a job that SLURM gets later would be newer than the mark
            said[folder] = "is being sent at this moment: cancel it again"
            continue
        folder.cancel_mark.touch()
        if isinstance(read, _Read) and read.job is not None:  # the supervisor's process id is another machine's
            jobs.append(read.job)
            said[folder] = "will not start" if status.status == "pending" else "asked to save and stop"
        elif (
            status.status in ("pending", "starting")
            or not isinstance(read, _Read)
            or not (read.state and read.state.pid)
        ):
            said[folder] = "will not start"
        else:
            os.kill(read.state.pid, signal.SIGTERM)
            said[folder] = "asked to save and stop"
    cancel_jobs(jobs)
    return said


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
    max_steps: int
    is_local: bool
    state: RunState | None
    job: str | None
    """SLURM's id; none where the run is a process of this machine."""


def _read(folder: RunFolder) -> "_Read | RunStatus":
    try:
        max_steps, executor = peek(folder.config)
    except ConfigError as error:
        return _unreadable(folder, str(error))
    state = RunState.read(folder.state)
    job = newest_job(folder, state) if executor == "slurm" else None
    return _Read(folder, max_steps, executor == "local", state, job)


def _told(read: _Read, job: JobStatus | None) -> RunStatus:
    folder, max_steps, is_local, state, _ = read
    recent, validated = _last_metrics(folder.metrics)
    last = recent[-1] if recent else {}
    ended = [attempt for attempt in state.attempts if attempt.outcome] if state else []
    status = _local_status(folder, state) if is_local else _slurm_status(folder, state, job)
    attempt = state.attempts[-1].attempt if state and state.attempts and status == Status.RUNNING else None
    beat = None if attempt is None else Heartbeat.of_attempt(folder, attempt)
    return RunStatus(
        run=folder.label,
        status=status,
        step=last.get("step", 0),
        max_steps=max_steps,
        loss=last.get("loss"),
        val_psnr=validated.get("val_psnr"),
        val_psnr_ema=validated.get("val_psnr_ema"),
        clips_per_s=last.get("clips_per_s"),
        attempts=len(state.attempts) if state else 0,
        causes=dict(Counter(str(attempt.outcome) for attempt in ended)),
        last_outcome=ended[-1].outcome if ended else None,
        message=ended[-1].message if ended else None,
        memory_gib=last.get("memory_gib"),
        goodput=state.goodput.share if state else None,
        seconds=state.goodput if state else None,
        data_wait=_data_wait(recent),
        time_left_s=_time_left_s(recent, max_steps) if status == Status.RUNNING else None,
        nodes=(job.nodes if job else "") or (state.attempts[-1].nodes if state and state.attempts else None) or "",
        stragglers=stragglers(beat.step_times_s) if beat else (),
        compilation=beat.compilation if beat else None,
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
        return Status.CANCELLED if folder.cancel_mark.exists() or job.state == "CANCELLED" else "died"
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
        causes={},
        last_outcome=None,
        message=why,
    )


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


def _data_wait(recent: Sequence[dict[str, Any]]) -> float | None:
    spent_s = sum(line.get("step_time_s", 0.0) for line in recent)
    return sum(line.get("data_time_s", 0.0) for line in recent) / spent_s if spent_s > 0 else None


def _time_left_s(recent: Sequence[dict[str, Any]], max_steps: int) -> float | None:
    paces_s = [line["step_time_s"] for line in recent if "step_time_s" in line]
    return statistics.median(paces_s) * (max_steps - recent[-1]["step"]) if paces_s else None


def _last_metrics(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last lines, and the last one that holds a validation; from the end, as the file may be long."""
    for size in (2**13, 2**17, 2**40):
        lines = _parsed(last_lines(path, size), is_whole=not path.exists() or path.stat().st_size <= size)
        validated = next((line for line in reversed(lines) if "val_psnr" in line), None)
        if validated is not None or len(lines) == 0:
            break
    return lines[-RECENT:], validated or {}


def _parsed(text: str, *, is_whole: bool) -> list[dict[str, Any]]:
    """The lines that are whole: the first may be cut off, the last is being written at this moment."""
    lines = text.splitlines(keepends=True)[0 if is_whole else 1 :]
    return [json.loads(line) for line in lines if line.endswith("\n")]
