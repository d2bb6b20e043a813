"""What SLURM knows of jobs, from one call of squeue and one of sacct for all of them, and the orders it is given."""

import os
import re
import subprocess
import time
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

REQUEUE = ("requeue", "Incomplete")
"""Words of scontrol, for a job that runs: without the second, one that was cancelled a moment ago would come back."""

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


@dataclass(frozen=True)
class JobRun:
    """One run of a job, from start to requeue or end, as SLURM's accounts tell it."""

    state: str
    """Such as PREEMPTED, REQUEUED, NODE_FAIL, COMPLETED."""

    exit_code: str
    """status:signal of the batch script."""

    start: float | None
    """Unix seconds; none before it started."""

    end: float | None
    """Unix seconds; none while it runs."""

    nodes: str
    """Host list."""


def job_runs(job: str) -> list[JobRun]:
    """All runs of a job, oldest first; none where the cluster keeps no accounts. Seconds behind the job."""
    fields = "--format=State,ExitCode,Start,End,NodeList"
    try:
        text = _asked("sacct", "--duplicates", "--allocations", "--parsable2", "--noheader", fields, f"--jobs={job}")
    except ConfigError:
        return []
    rows = [line.split("|") for line in text.splitlines()]
    return [JobRun(state, code, _unix_s(start), _unix_s(end), nodes) for state, code, start, end, nodes in rows]


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


@dataclass(frozen=True)
class OwnJob:
    """The job that this process is a part of, as the controller sees it now."""

    state: str
    """SLURM's word. RUNNING until somebody ends or requeues it, then COMPLETING while its processes leave."""

    restarts: int
    """How often it was requeued, a requeue under way included."""

    nodes: str
    """Host list; a node that failed is no longer in it where the job goes on without (--no-kill)."""

    ends_at: float | None
    """Unix seconds of the time limit, or of the end of a preemption's grace; none without a limit."""

    is_preempted: bool
    """Whether it was asked to give its nodes back to another job."""

    is_over_time: bool = False
    """Whether it was left to run to its time limit."""

    excluded: str = ""
    """Host list of the nodes that it must not run on."""

    @property
    def is_ours(self) -> bool:
        """Whether nobody else has ended or requeued it; running again, it is its new supervisor's."""
        return self.state == "RUNNING" and not self.was_requeued

    @property
    def was_requeued(self) -> bool:
        """Whether it is on its way back to the queue."""
        return self.restarts > int(os.environ.get("SLURM_RESTART_COUNT", 0))


def own_job(job: str) -> OwnJob:
    """Ask the controller for the job that this process is a part of.

    Args:
        job: `A_T` for an element of an array.

    Raises:
        ConfigError: if the controller does not answer.
    """
    told = dict(re.findall(r"(\w+)=(\S*)", _asked("scontrol", "show", "job", "--oneliner", job)))
    start, end = _unix_s(told.get("StartTime")), _unix_s(told.get("EndTime"))
    limit = _seconds(told.get("TimeLimit", ""))
    full_end = None if start is None or limit is None else start + limit - 1
    state = told.get("JobState", FORGOTTEN)
    # Told a second before PreemptTime is; a job that was cancelled or requeued ends early as well, but no longer runs.
    is_cut_short = state == "RUNNING" and end is not None and full_end is not None and end < full_end
    return OwnJob(
        state=state,
        restarts=int(told.get("Restarts", 0)),
        nodes=_known(told.get("NodeList")),
        ends_at=end,
        is_preempted=_unix_s(told.get("PreemptTime")) is not None or is_cut_short,
        is_over_time=end is not None and full_end is not None and full_end <= end <= time.time(),
        excluded=_known(told.get("ExcNodeList")),
    )


def requeue_own_job(job: str) -> bool:
    """Give the job that this process is a part of back to the queue, which will end this process.

    Args:
        job: `A_T` for an element of an array, never the raw id: the last element's is the whole array's.

    Returns:
        False if the job is not RUNNING: somebody has ended or requeued it already.

    Raises:
        ConfigError: if scontrol refuses.
    """
    if not own_job(job).is_ours:
        return False
    _asked("scontrol", *REQUEUE, job)
    return True


def keep_away(job: str, nodes: Sequence[str]) -> None:
    """Have a job that waits start elsewhere than on these nodes, and on those that it avoids already.

    SLURM takes this only from a job that waits, and so after its requeue.

    Raises:
        ConfigError: if scontrol refuses.
    """
    avoided = filter(None, (own_job(job).excluded, *nodes))
    _asked("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(avoided)}")


def host_names(nodes: str) -> list[str]:
    """The nodes of a host list such as `gpu[1-3,7]`."""
    return _asked("scontrol", "show", "hostnames", nodes).split() if nodes else []


def num_partition_nodes(partition: str | None, besides: Iterable[str] = ()) -> int:
    """Nodes of a partition, or of all, that can be used, without some of them."""
    where = [f"--partition={partition}"] if partition else []
    states = "--states=alloc,comp,idle,mix,resv"
    return len(set(_asked("sinfo", "--noheader", "--Node", "--format=%N", states, *where).split()) - set(besides))


def _known(text: str | None) -> str:
    return "" if text in (None, "(null)") else str(text)


def _unix_s(text: str | None) -> float | None:
    """SLURM's local time; none for N/A, None, Unknown."""
    try:
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _seconds(text: str) -> int | None:
    """Of [days-]hours:minutes:seconds; none for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


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
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    environment |= {"SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}  # times as numbers, index lists uncut
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise ConfigError(f"there is no {command[0]} here: run this on a node of the SLURM cluster") from None
    if done.returncode and "Invalid job id specified" not in done.stderr:  # one that the queue has forgotten
        raise ConfigError(f"{command[0]} failed: {' '.join(done.stderr.split())}: see `scontrol ping`")
    return done.stdout
