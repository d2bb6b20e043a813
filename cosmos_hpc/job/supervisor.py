"""The supervisor: one per job, on the host, outside the container. It starts the ranks and decides what follows."""

import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, Ending, Goodput, RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.job.allocation import Allocation, JobEnd
from cosmos_hpc.job.attempt import Attempt, close_torn
from cosmos_hpc.job.disk import NO_ROOM, has_room
from cosmos_hpc.job.policy import BAD_NODE, Action, out_of_room, what_follows
from cosmos_hpc.launch.local import locked, place_among
from cosmos_hpc.launch.step import slurm_job_id
from cosmos_hpc.ranks import set_up_logging

logger = logging.getLogger(__name__)


EARLIER_SELF_S = 30.0
"""How long the lock of this job's earlier start is waited for, which SLURM may have lost without ending it."""


@dataclass(frozen=True)
class Supervisor:
    """What submitit pickles and runs: it holds a run folder and nothing else."""

    run_folder: Path

    def __call__(self) -> None:
        """Run the ranks until the run is finished, cancelled or failed.

        Raises:
            SystemExit: with 1 if the run failed, so that the scheduler records a failed job.
        """
        set_up_logging()
        folder = RunFolder(self.run_folder)
        is_again = _began_in_this_job(folder)
        with locked(folder.supervisor_lock, patience_s=EARLIER_SELF_S if is_again else 1.0) as is_only_one:
            if not is_only_one and not is_again:
                logger.warning("%s has a living supervisor already: nothing to do", folder.label)
                return
            if not is_only_one:  # on a node that SLURM has lost: it has given the job to this process
                logger.warning("%s: the lock is still held by this job's earlier start: going on", folder.label)
            try:
                _Watch(folder).run()
            finally:
                folder.pending_mark.unlink(missing_ok=True)


def _began_in_this_job(folder: RunFolder) -> bool:
    """Whether the newest attempt was made by an earlier start of the job that this process is a part of."""
    state, job = RunState.read(folder.state), slurm_job_id()
    return bool(job) and state is not None and bool(state.attempts) and state.attempts[-1].job_id == job


class _Watch:
    """One supervisor at work."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._config: RunConfig = read_run_config(folder.config)
        self._is_slurm = self._config.cluster.executor == "slurm"
        self._state = RunState.read(folder.state) or RunState()
        self._state.pid = os.getpid()
        self._allocation = Allocation(self._folder, self._config) if self._is_slurm else None
        self._idle_since: float | None = None
        self._asked: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def run(self) -> None:
        for record in self._state.attempts:
            if record.ended is None:
                by_slurm = self._allocation.end_before(record) if self._allocation is not None else None
                close_torn(self._folder, record, by_slurm if record.job_id == slurm_job_id() else None)
        self._queued_at = _queued_at(self._folder, self._state)
        self._become(Status.WAITING)
        self._folder.pending_mark.unlink(missing_ok=True)
        if self._is_slurm:
            self._stop_crash_loop()
            self._attempts()
            return
        places = int(self._folder.experiment.max_parallel.read_text())
        with place_among(self._folder.experiment, places, gives_up=lambda: self._asked is not None) as has_place:
            if has_place:
                self._attempts()
            else:
                self._become(Status.CANCELLED)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)

    def _become(self, status: Status) -> None:
        self._state.status = status
        self._save()

    def _save(self) -> None:
        """Write the state; on a full disk it is written with the next change, once there is room."""
        try:
            self._state.write(self._folder.state)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.warning("%s can't be written: %s", self._folder.state, error.strerror)

    def _stop_crash_loop(self) -> None:
        """SLURM starts a killed supervisor again, and would for ever."""
        newest = self._state.attempts[-1] if self._state.attempts else None
        if newest is None or newest.outcome is not Ending.SUPERVISOR_KILLED or newest.job_id != slurm_job_id():
            return
        verdict = what_follows(self._state.attempts, self._config.cluster.restarts, is_slurm=True)
        if verdict.diagnosis is not None:
            self._fail(newest, verdict.diagnosis)

    def _attempts(self) -> None:
        while True:
            self._asked = None
            if self._folder.cancel_mark.exists():  # asked for before this supervisor could hear it
                self._become(Status.CANCELLED)
                return
            if not self._goes_on(self._attempt()):
                return

    def _attempt(self) -> AttemptRecord:
        if self._idle_since is None:
            waited = Goodput(queue_s=max(0.0, time.time() - self._queued_at))
        else:
            waited = Goodput(backoff_s=time.monotonic() - self._idle_since)
        record = AttemptRecord(
            attempt=self._folder.next_attempt(),
            started=time.time(),
            host=socket.gethostname(),
            job_id=os.environ.get("SUBMITIT_LOCAL_JOB_ID") or slurm_job_id(),
            goodput=waited,
        )
        self._state.attempts.append(record)
        self._become(Status.RUNNING)
        self._folder.requeue_request.unlink(missing_ok=True)  # this start is what it asked for
        self._run(record)
        self._idle_since = time.monotonic()
        return record

    def _run(self, record: AttemptRecord) -> None:
        """Start the ranks of an attempt, where enough nodes are well, and wait for their end."""
        if self._allocation is None:
            Attempt(self._folder, self._config, self._state, lambda: self._asked).run(self._save)
            return
        place = self._allocation.prepare(record)
        if place is not None and self._asked is not None:  # the nodes were asked back meanwhile
            record.ended, record.outcome, record.saved_step = time.time(), Ending.PREEMPTED, self._folder.newest_step()
        elif place is not None:
            self._save()
            Attempt(self._folder, place.config, self._state, lambda: self._asked, place).run(self._save)
            self._allocation.judge(record)

    def _goes_on(self, record: AttemptRecord) -> bool:
        """Write down what follows an attempt; true if the next one is to start here."""
        assert record.outcome is not None, "it has ended"
        if record.outcome is Ending.FINISHED:
            self._become(Status.FINISHED)
            return False
        if self._folder.cancel_mark.exists():
            record.outcome = Ending.CANCELLED if record.outcome.is_agreed else record.outcome
            self._become(Status.CANCELLED)
            return False
        allocation = self._allocation
        can_shrink = allocation is not None and record.outcome in BAD_NODE and allocation.has_enough_nodes()
        restarts = self._config.cluster.restarts
        verdict = what_follows(self._state.attempts, restarts, is_slurm=self._is_slurm, can_shrink=can_shrink)
        if verdict.diagnosis is not None:
            self._fail(record, verdict.diagnosis)
        record.followed = "went on in the same job"
        self._become(Status.WAITING)
        if verdict.action is Action.RESTART:
            self._pause(record, verdict.delay_s)
        is_asked_back = self._asked is not None
        if allocation is not None and (verdict.action is Action.REQUEUE or is_asked_back or allocation.is_time_short()):
            self._requeue(allocation, record)
            return False
        return True

    def _fail(self, record: AttemptRecord, diagnosis: str) -> NoReturn:
        record.message, record.followed = diagnosis, "stopped"
        self._become(Status.FAILED)
        logger.error("%s failed: %s", self._folder.label, diagnosis)
        raise SystemExit(1)

    def _pause(self, record: AttemptRecord, delay_s: float) -> None:
        """Back off before a restart; after a full disk, until there is room."""
        logger.warning("%s: %s: going on in %.1f s", self._folder.label, record.message or record.outcome, delay_s)
        goes_on = self._sleep(delay_s)
        if record.outcome is not Ending.DISK_FULL:
            return
        patience_s = self._config.cluster.restarts.disk_wait_s
        deadline = time.monotonic() + patience_s
        while goes_on and not has_room(self._folder):
            if time.monotonic() > deadline:
                self._fail(record, out_of_room(record, patience_s))
            goes_on = self._sleep(1.0)

    def _sleep(self, seconds: float) -> bool:
        """Wait; false if somebody asked to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._asked is not None or self._folder.cancel_mark.exists():
                return False
            time.sleep(0.05)
        return True

    def _requeue(self, allocation: Allocation, record: AttemptRecord) -> None:
        """Give the job back to the queue, unless somebody has ended or requeued it; SLURM ends this process then."""
        excluded = allocation.worth_excluding(self._state.attempts)
        without = f", without {', '.join(excluded)}" if excluded else ""
        record.followed = f"back to the queue{without}"
        self._become(Status.WAITING)
        end = allocation.give_back(excluded)
        if end is JobEnd.REQUEUED_BY_US:
            self._sleep_until_ended()
        elif end is JobEnd.REQUEUED:
            record.followed = "was requeued"
            self._become(Status.WAITING)
        elif end is JobEnd.OVER_TIME:
            why = "the job reached its time limit before all was saved: raise cluster.grace_s, then submit again"
            self._fail(record, why)
        else:
            assert record.outcome is not None, "it has ended"
            record.outcome = Ending.CANCELLED if record.outcome.is_agreed else record.outcome
            record.followed = "the job was ended by somebody"
            self._become(Status.CANCELLED)

    def _sleep_until_ended(self) -> None:
        """SLURM has been told to requeue, and sends SIGTERM."""
        deadline = time.monotonic() + 600
        while self._asked is None and time.monotonic() < deadline:
            time.sleep(0.05)


def _queued_at(folder: RunFolder, state: RunState) -> float:
    """When the job went to the queue: as it was submitted, or as its attempt before ended."""
    submitted = folder.pending_mark.stat().st_mtime if folder.pending_mark.exists() else 0.0
    ended = state.attempts[-1].ended if state.attempts else None
    return max(submitted, ended or 0.0) or time.time()
