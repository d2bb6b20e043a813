"""What SLURM knows of jobs, from one call of squeue and one of sacct for all of them, and the orders it is given."""

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError

OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
"""States of the queue's memory after which nothing comes: a job that will run again is PENDING there at once."""

ALIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
)
"""States of jobs that run or will."""

FORGOTTEN = "UNKNOWN"
"""State of a job that neither the queue nor the accounting knows."""


@dataclass(frozen=True)
class JobStatus:
    """A job, or one element of an array."""

    state: str
    """SLURM's word, such as PENDING, RUNNING, NODE_FAIL; `UNKNOWN` where SLURM has forgotten the job."""

    is_over: bool
    """Whether it will not run again. The queue decides: the accounts say NODE_FAIL or PREEMPTED between two runs, and
    REQUEUED for ever of a job that was cancelled before it could start again."""

    nodes: str = ""
    """Host list of the newest run."""

    reason: str = ""
    """Why it is pending."""

    time_left: str = ""
    """Until the time limit, as [days-]hours:minutes:seconds."""

    expected_start: str = ""
    """When a pending job is expected to start; N/A where SLURM can't tell."""


def job_statuses(jobs: Iterable[str]) -> dict[str, JobStatus]:
    """How jobs stand, each by its id.

    Args:
        jobs: ids, `A_T` for an element of an array.

    Raises:
        ConfigError: if the queue can't be asked.
    """
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    found = _queued(wanted)
    forgotten = [job for job in wanted if job not in found]
    found |= _accounted(forgotten) if forgotten else {}
    return {job: found.get(job, JobStatus(FORGOTTEN, is_over=True)) for job in wanted}


def own_jobs_by_script() -> dict[str, Path]:
    """The caller's jobs that wait or run, with the script of each.

    Raises:
        ConfigError: if the queue can't be asked.
    """
    asked = ["--me", "--noheader", "--array", f"--states={','.join(ALIVE)}", "--format=%i|%o"]
    rows = (line.strip().partition("|") for line in _asked("squeue", *asked).splitlines())
    return {job: Path(script) for job, _, script in rows}


def submitted_at(job: str) -> float:
    """When a job that waits or runs was sent, in Unix seconds.

    Raises:
        ConfigError: if the queue can't be asked.
    """
    return datetime.fromisoformat(_asked("squeue", "--noheader", "--format=%V", f"--jobs={job}").strip()).timestamp()


def jobs_named(name: str) -> dict[str, JobStatus]:
    """The caller's jobs of a name that wait or run; where there is none, the one that ended last.

    Raises:
        ConfigError: if the queue can't be asked.
    """
    queued = _asked("squeue", "--me", "--noheader", "--array", "--states=all", f"--name={name}", "--format=%A|%i|%T")
    rows = sorted((row.strip().split("|") for row in queued.splitlines()), key=lambda row: int(row[0]))
    living = [job for _, job, state in rows if state not in OVER]
    if living or rows:
        return job_statuses(living or [rows[-1][1]])
    ended = _asked("sacct", "--noheader", "--allocations", "--parsable2", f"--name={name}",
                   "--starttime=now-30days", "--format=JobID").split()  # fmt: skip
    return job_statuses(ended[-1:])


def cancel_jobs(jobs: Sequence[str]) -> None:
    """End jobs for good: their tasks get SIGTERM, and SIGKILL after the cluster's KillWait.

    Raises:
        ConfigError: if scancel refuses.
    """
    if jobs:
        _asked("scancel", *jobs)


def requeue_own_job(job: str) -> bool:
    """Give the job that this process is a part of back to the queue, which will end this process.

    Args:
        job: `A_T` for an element of an array, never the raw id: the last element's is the whole array's.

    Returns:
        False if the job is not RUNNING: somebody has ended or requeued it already.

    Raises:
        ConfigError: if scontrol refuses.
    """
    if _asked("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip() != "RUNNING":
        return False
    _asked("scontrol", "requeue", job)
    return True


def _queued(jobs: Sequence[str]) -> dict[str, JobStatus]:
    """Living jobs, and those that ended within the controller's MinJobAge."""
    asked = ["--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r|%L|%S"]
    found: dict[str, JobStatus] = {}
    for line in _asked("squeue", *asked, f"--jobs={_whole_jobs(jobs)}").splitlines():
        row, state, nodes, reason, time_left, start = line.strip().split("|")
        status = JobStatus(state, state in OVER, nodes, reason, time_left, start)
        found |= dict.fromkeys(_elements(row), status)
    return {job: found[job] for job in jobs if job in found}


def _accounted(jobs: Sequence[str]) -> dict[str, JobStatus]:
    """The newest run of each job that the queue has forgotten; nothing where the cluster keeps no accounts."""
    asked = ["--allusers", "--allocations", "--parsable2", "--noheader", "--format=JobID,State,NodeList"]
    try:
        text = _asked("sacct", *asked, f"--jobs={_whole_jobs(jobs)}")
    except ConfigError:
        return {}
    found: dict[str, JobStatus] = {}
    for line in sorted(text.splitlines(), key=lambda line: "[" not in line):  # an element's own row counts
        job, state, nodes = line.split("|")
        state = state.partition(" ")[0]  # "CANCELLED by 0"
        status = JobStatus(state, True, "" if nodes == "None assigned" else nodes)
        found |= dict.fromkeys(_elements(job), status)
    return {job: found[job] for job in jobs if job in found}


def _elements(job: str) -> Iterator[str]:
    """The jobs of a row: `7_[1,3-5%2]` are the elements of array 7 that never started."""
    array, bracket, indices = job.rstrip("]").partition("_[")
    if not bracket:
        yield job
        return
    for part in indices.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        yield from (f"{array}_{index}" for index in range(int(first), int(last or first) + 1))


def _whole_jobs(jobs: Sequence[str]) -> str:
    """An array once, whatever number of its elements is asked for."""
    return ",".join(sorted({job.partition("_")[0] for job in jobs}))


def _asked(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no {command[0]} here: run this on a node of the SLURM cluster") from None
    if done.returncode and "Invalid job id specified" not in done.stderr:  # one that the queue has forgotten
        raise ConfigError(f"{command[0]} failed: {' '.join(done.stderr.split())}: see `scontrol ping`")
    return done.stdout
