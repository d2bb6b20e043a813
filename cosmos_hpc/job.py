"""The supervisor: one per job, on the host, outside the container. It starts the ranks and decides what follows."""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.run_folder import RunFolder, read_json
from cosmos_hpc.config.run_state import AttemptRecord, RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.local import children, locked, place_among
from cosmos_hpc.launch.step import step_command, step_environment
from cosmos_hpc.ranks import die_with_parent, set_up_logging

logger = logging.getLogger(__name__)

LEFT_TO_GO_ON = ("preempted", "time_limit", "interrupted")
"""Outcomes after which the same run goes on from its checkpoint."""

ERROR = re.compile(r"(error|[\w.]*(Error|Exception|Interrupt)): ")
"""How a line begins that names an error: ours, or the last one of a traceback."""

LOST_THE_OTHERS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|ChildFailedError|DistBackendError")
"""What a rank says when another one has died."""


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
        with locked(folder.supervisor_lock, patience_s=1.0) as is_only_one:
            if not is_only_one:
                logger.warning("%s has a living supervisor already: nothing to do", folder.label)
                return
            try:
                _Watch(folder).run()
            finally:
                folder.pending_mark.unlink(missing_ok=True)


class _Watch:
    """One supervisor at work."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._config: RunConfig = read_run_config(folder.config)
        self._state = RunState.read(folder.state) or RunState()
        self._state.pid = os.getpid()
        self._asked: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def run(self) -> None:
        self._close_torn_attempt()
        self._become(Status.WAITING)
        self._folder.pending_mark.unlink(missing_ok=True)
        if self._config.cluster.executor == "slurm":
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
        self._state.write(self._folder.state)

    def _close_torn_attempt(self) -> None:
        """An attempt that its supervisor did not live to close."""
        for record in self._state.attempts:
            if record.ended is None:
                record.ended, record.outcome = time.time(), "supervisor killed"

    def _attempts(self) -> None:
        while True:
            self._asked = None
            if self._folder.cancel_mark.exists():  # asked for before this supervisor could hear it
                self._become(Status.CANCELLED)
                return
            record = self._attempt()
            if record.outcome == "finished":
                self._become(Status.FINISHED)
                return
            if record.outcome not in LEFT_TO_GO_ON:
                self._become(Status.FAILED)
                logger.error("%s failed: %s", self._folder.label, record.message)
                raise SystemExit(1)
            if self._folder.cancel_mark.exists():
                record.outcome = "cancelled"
                self._become(Status.CANCELLED)
                return
            if self._config.cluster.executor == "slurm":
                self._requeue()
                return
            logger.info("%s was preempted at step %s: going on", self._folder.label, record.step)

    def _attempt(self) -> AttemptRecord:
        number = self._folder.next_attempt()
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID") or _slurm_job_id()
        record = AttemptRecord(attempt=number, started=time.time(), host=socket.gethostname(), job_id=job_id)
        self._state.attempts.append(record)
        self._become(Status.RUNNING)
        command = step_command(self._config, self._folder, number)
        log = self._folder.launcher_log(number)
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s attempt %d: %s", self._folder.label, number, " ".join(command))
        with log.open("a") as output:
            code = self._run_step(command, number, output)
        outcome = read_json(self._folder.outcome(number))
        record.ended = time.time()
        record.outcome = outcome.get("outcome", "failed")
        record.step = outcome.get("step")
        if record.outcome == "failed":
            record.message = self._last_words(number) or outcome.get("message") or f"the ranks ended with {code}"
        self._state.write(self._folder.state)
        return record

    def _run_step(self, command: list[str], number: int, output: IO[str]) -> int:
        """Start the ranks and wait for their end; locally, pass a stop request on to them once all can hear it."""
        environment = step_environment(self._config, socket.gethostname(), _port(number))
        step = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        is_passed_on = self._config.cluster.executor != "local"
        while step.poll() is None:
            if self._asked is not None and not is_passed_on and self._all_listen(number):
                is_passed_on = True
                for rank in children(step.pid):
                    with contextlib.suppress(ProcessLookupError):  # ended by itself just now
                        os.kill(rank, self._asked)
            time.sleep(0.1)
        return step.returncode

    def _all_listen(self, number: int) -> bool:
        """A rank opens its log after it has set its signal handlers."""
        ranks = range(self._config.trainer.world_size)
        return all(self._folder.rank_log(number, rank).exists() for rank in ranks)

    def _last_words(self, number: int) -> str | None:
        """The error that a rank's log ends with; that of a rank which lost the others only where there is no other."""
        logs = [*sorted(self._folder.attempt_logs(number).glob("rank_*.log")), self._folder.launcher_log(number)]
        words = {log.name: _last_error(log.read_text(errors="replace")) for log in logs}
        errors = [f"{log}: {error}" for log, error in words.items() if error]
        return next((error for error in errors if not LOST_THE_OTHERS.search(error)), errors[0] if errors else None)

    def _requeue(self) -> None:
        """Give the job back to the queue; SLURM ends this process in doing so."""
        self._become(Status.WAITING)
        subprocess.run(["scontrol", "requeue", _slurm_job_id()], check=True)
        time.sleep(600)


def _last_error(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if ERROR.match(line)), None)


def _slurm_job_id() -> str:
    """A_T for an array element: the raw id of the last element is the whole array's."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _port(attempt: int) -> int:
    """Another port for each job and attempt, below the range from which the kernel hands out its own."""
    job = int(os.environ.get("SLURM_JOB_ID", os.getpid()))
    return 20000 + (job * 7 + attempt) % 12000
