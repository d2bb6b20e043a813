"""Why each attempt of a run ended, what was done about it, and what it cost."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cosmos_hpc.config.rank_reports import last_lines
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, RunState
from cosmos_hpc.launch.queue import JobRun, job_runs
from cosmos_hpc.launch.status import RunStatus, run_status

TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*^\S.*$", re.M)
"""From its first line to the error's."""

STACK_LINES = 24
"""The innermost ones are shown."""

CLOCKS_S = 5.0
"""By which the supervisor's times and SLURM's may differ."""


@dataclass(frozen=True)
class Cost:
    """What the end of an attempt cost."""

    lost_steps: int
    """Trained again, or still to be."""

    lost_s: float
    """Seconds that these had taken."""

    queue_s: float
    """Until there were nodes again."""

    backoff_s: float
    """Waited on the same nodes."""

    startup_s: float
    """From the next start of the ranks to its first step."""


@dataclass(frozen=True)
class AttemptStory:
    """One attempt."""

    record: AttemptRecord
    """What the supervisor wrote down."""

    stack: list[str]
    """Of the rank that failed first, where it left one."""

    accounting: JobRun | None
    """What SLURM's accounts say of the job's run that it was part of."""

    cost: Cost | None
    """None while it lives, and where all was done."""


@dataclass(frozen=True)
class Explanation:
    """One run."""

    status: RunStatus
    """How it stands."""

    attempts: list[AttemptStory]
    """Oldest first."""


def explain(folder: RunFolder) -> Explanation:
    """Put together what the run folder and SLURM's accounts tell of a run."""
    state = RunState.read(folder.state) or RunState()
    runs = {job: job_runs(job) for job in {record.job_id for record in state.attempts if record.nodes is not None}}
    stories = [
        AttemptStory(record, _stack(folder, record), _run_of(record, runs.get(record.job_id, [])), _cost(record, after))
        for record, after in zip(state.attempts, [*state.attempts, None][1:], strict=True)
    ]
    return Explanation(run_status(folder), stories)


def page(found: Explanation) -> str:
    """The story of a run, as one page of text."""
    status, job = found.status, found.status.job
    lines = [f"{status.run}: {status.status} at step {status.step} of {status.max_steps}"]
    if job is not None and job.state == "PENDING":
        start = "SLURM can't tell when" if job.expected_start in ("", "N/A") else f"expected start {job.expected_start}"
        lines.append(f"waits in the queue: {job.reason or 'no reason given'}, {start}")
    elif job is not None:
        lines.append(f"SLURM: {job.state} {job.nodes}, {job.time_left} until its time limit".rstrip())
    if status.message and status.status in ("failed", "unreadable"):
        lines.append(status.message)
    for story in found.attempts:
        lines += ["", *_told(story)]
    return "\n".join(lines if found.attempts else [*lines, "it has not started yet"])


def _told(story: AttemptStory) -> list[str]:
    record, run = story.record, story.accounting
    lasted = "still lives" if record.ended is None else f"{duration(record.ended - record.started)}"
    where = f"on {record.nodes or record.host}" + (f", job {record.job_id}" if record.job_id else "")
    lines = [f"attempt {record.attempt}: {clock(record.started)}, {lasted}, {where}"]
    if record.outcome is not None:
        lines.append(f"  ended: {record.message or str(record.outcome).replace('_', ' ') + _at_step(record)}")
    lines += [f"    {line}" for line in story.stack]
    if run is not None:
        span = f"{clock(run.start)} to {clock(run.end)}"
        lines.append(f"  SLURM's accounts: {run.state}, exit code {run.exit_code}, {span}, {run.nodes}")
    if record.followed:
        lines.append(f"  then: {record.followed}")
    if story.cost is not None:
        lines.append(f"  cost: {_cost_told(story.cost)}")
    return lines


def _at_step(record: AttemptRecord) -> str:
    return "" if record.step is None else f" at step {record.step}"


def _cost_told(cost: Cost) -> str:
    waits = {"in the queue": cost.queue_s, "of back-off": cost.backoff_s, "to start": cost.startup_s}
    lost = f"{cost.lost_steps} steps lost" + (f" ({duration(cost.lost_s)})" if cost.lost_steps else "")
    return ", ".join([lost, *(f"{duration(seconds)} {what}" for what, seconds in waits.items() if seconds)])


def duration(seconds: float) -> str:
    """Such as `41 s`, `12 min`, `3 h 05 min`, `2 d 03 h`."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def clock(unix_s: float | None) -> str:
    """Local date and time; `now` where there is none."""
    return "now" if unix_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _stack(folder: RunFolder, record: AttemptRecord) -> list[str]:
    if record.outcome is None or not record.outcome.is_fault or record.failed_log is None:
        return []
    found = TRACEBACK.findall(last_lines(folder.path / record.failed_log))
    return found[-1].splitlines()[-STACK_LINES:] if found else []


def _run_of(record: AttemptRecord, runs: Sequence[JobRun]) -> JobRun | None:
    """The newest run of the job that had started by then."""
    started = [run for run in runs if run.start is not None and run.start <= record.started + CLOCKS_S]
    return started[-1] if started else None


def _cost(record: AttemptRecord, after: AttemptRecord | None) -> Cost | None:
    if record.ended is None or record.outcome == "finished":
        return None
    next_start = after.resumed_step if after is not None and after.resumed_step is not None else record.saved_step
    lost_steps = max(0, (record.step or 0) - (next_start or 0)) if record.step is not None else 0
    waits = after.goodput if after is not None else None
    return Cost(
        lost_steps=lost_steps,
        lost_s=record.goodput.lost_s if record.goodput else 0.0,
        queue_s=waits.queue_s if waits else 0.0,
        backoff_s=waits.backoff_s if waits else 0.0,
        startup_s=waits.startup_s if waits else 0.0,
    )
