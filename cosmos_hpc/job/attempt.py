"""One start of the ranks: wait for their end, pass on stop requests, end a hang, and write down what happened."""

import json
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import IO

from cosmos_hpc.config.rank_reports import AgreedEnd, Heartbeat, last_lines
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, Ending, Goodput, RunState
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.job.allocation import Place
from cosmos_hpc.job.ends import Diagnosis, diagnose
from cosmos_hpc.job.goodput import account, settle_lost_steps
from cosmos_hpc.job.hang import Stacks, Vigil, dump_with_py_spy
from cosmos_hpc.job.meeting import meeting_port
from cosmos_hpc.job.policy import faults_since_progress
from cosmos_hpc.launch.local import children
from cosmos_hpc.launch.step import kill_step, signal_ranks, start_step, step_command, step_environment

logger = logging.getLogger(__name__)

LISTEN_S = 1.0
"""Between two looks at the heartbeat."""

STOOD_STILL_S = 30.0
"""Time between two looks that shows that this process stood still, and the ranks perhaps with it."""

REFRESH_S = 30.0
"""Between two updates of a living attempt's record."""


class Attempt:
    """The newest attempt of a run while it lives."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        state: RunState,
        asked: Callable[[], signal.Signals | None],
        place: Place | None = None,
    ) -> None:
        """Take over the newest record of the state.

        Args:
            folder: the run.
            config: its settings.
            state: kept up to date; `save` of the supervisor writes it.
            asked: the signal that the supervisor got, to be passed on locally; none so far.
            place: the nodes that the ranks start on; none locally.
        """
        self._folder = folder
        self._config = config
        self._state = state
        self._asked = asked
        self._place = place
        self._record = state.attempts[-1]
        of_this_job = [record for record in state.attempts if record.job_id == self._record.job_id]
        num_hangs = faults_since_progress(of_this_job).count(Ending.HANG)
        if config.container.mode != "none":  # a node that has the image unpacked already tells nothing of the next one
            state.longest_silence_s.pop(Heartbeat().phase, None)
        self._vigil = Vigil(config.cluster.hang, state.longest_silence_s, num_hangs=num_hangs)
        self._begun = time.monotonic()
        self._before = self._record.goodput or Goodput()

    def run(self, save: Callable[[], None]) -> None:
        """Start the ranks, wait for their end and close the record.

        Args:
            save: writes the state.
        """
        number = self._record.attempt
        command = step_command(self._config, self._folder, number, self._place.chosen if self._place else ())
        log = self._folder.launcher_log(number)
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s attempt %d: %s", self._folder.label, number, " ".join(command))
        with log.open("a") as output, meeting_port() as port:
            environment = step_environment(self._config, socket.gethostname(), port)
            step = start_step(command, environment, output)
            hang = self._wait(step, output, save)
        self._listen()
        self._close(step.returncode, hang)

    def _wait(self, step: "subprocess.Popen[bytes]", output: IO[str], save: Callable[[], None]) -> str | None:
        """Until the ranks are gone; what is said of a hang, if they had to be killed for one."""
        is_passed_on = self._place is not None
        is_told_time = False
        listened = saved = time.monotonic()
        while step.poll() is None:
            asked = self._asked()
            if asked is not None and not is_passed_on and self._all_listen():
                is_passed_on = True
                signal_ranks(self._config, step.pid, asked)
            if (since := time.monotonic() - listened) >= LISTEN_S:
                listened = time.monotonic()
                if since > STOOD_STILL_S:
                    self._vigil.forgive(since)
                self._listen()
                if self._vigil.is_hung:
                    return self._end_hang(step, output)
                if self._place is not None and not is_told_time and self._place.is_time_short():
                    is_told_time = True  # SLURM tells the ranks itself, but once, and only those that are there then
                    signal_ranks(self._config, step.pid, signal.SIGUSR2)
            if time.monotonic() - saved >= REFRESH_S:
                saved = time.monotonic()
                self._note_progress()
                save()
            time.sleep(0.1)
        return None

    def _all_listen(self) -> bool:
        """A rank opens its log after it has set its signal handlers."""
        ranks = range(self._config.trainer.world_size)
        return all(self._folder.rank_log(self._record.attempt, rank).exists() for rank in ranks)

    def _listen(self) -> None:
        self._vigil.hear(Heartbeat.of_attempt(self._folder, self._record.attempt))

    def _end_hang(self, step: "subprocess.Popen[bytes]", output: IO[str]) -> str:
        """Have every rank print its stacks, then kill the step."""
        logger.error("%s: %s: asking for stacks", self._folder.label, self._vigil.describe([]))
        stacks = Stacks.before(self._folder, self._record.attempt)
        signal_ranks(self._config, step.pid, signal.SIGUSR1)
        if self._config.cluster.executor == "local":
            dump_with_py_spy(children(step.pid), output)
        said = self._vigil.describe(stacks.wait(lambda: step.poll() is not None))
        kill_step(self._config, step)
        return said

    def _note_progress(self) -> None:
        """Bring the record up to date with what was heard."""
        record, beat = self._record, self._vigil.newest
        record.step = last_step(self._folder, record.attempt, beat if self._vigil.has_heard else None)
        record.resumed_step = beat.resumed_step
        self._account(beat.seconds)
        settle_lost_steps(self._state.attempts)

    def _close(self, code: int, hang: str | None) -> None:
        record, number = self._record, self._record.attempt
        self._note_progress()
        found = diagnose(self._folder, number, code)
        if hang is not None and found.ending.is_fault:
            found = Diagnosis(Ending.HANG, hang, log=self._folder.attempt_logs(number))
        if found.step is not None:
            record.step = found.step
        if found.ending.is_fault:
            record.error, record.message = found.error, self._message(found)
            record.failed_rank, record.failed_host = found.rank, found.host
            record.failed_log = None if found.log is None else str(found.log.relative_to(self._folder.path))
        elif (agreed := AgreedEnd.read(self._folder.outcome(number))) is not None and agreed.seconds:
            record.resumed_step = agreed.resumed_step
            self._account(agreed.seconds)
        record.ended = time.time()
        record.outcome = found.ending
        record.saved_step = self._folder.newest_step()
        settle_lost_steps(self._state.attempts)

    def _account(self, seconds: dict[str, float]) -> None:
        self._record.goodput = account(
            seconds,
            run_s=time.monotonic() - self._begun,  # of the record's own times, one may lie before a jump of the clock
            silence_s=self._vigil.silence_s if self._vigil.has_heard else 0.0,
            before=self._before,
        )

    def _message(self, found: Diagnosis) -> str:
        """What, and where: rank, host, step, error, log."""
        place = "" if found.rank is None else f" on rank {found.rank}"
        place += f" of {found.host}" if found.host else ""
        place += "" if self._record.step is None else f" at step {self._record.step}"
        log = "" if found.log is None else f" (see {found.log.relative_to(self._folder.path)})"
        return f"{found.ending.replace('_', ' ')}{place}: {found.error}{log}"


def close_torn(folder: RunFolder, record: AttemptRecord, by_slurm: Ending | None = None) -> None:
    """Close an attempt that its supervisor did not live to close: it ended when it was last heard.

    Args:
        folder: the run.
        record: of the attempt.
        by_slurm: why SLURM ended the job then, if it did.
    """
    beat = Heartbeat.of_attempt(folder, record.attempt) or Heartbeat()
    agreed = AgreedEnd.read(folder.outcome(record.attempt))
    record.ended = max(record.started, beat.time)
    record.saved_step = folder.newest_step()
    record.step = last_step(folder, record.attempt, beat)
    record.resumed_step = beat.resumed_step
    seconds = agreed.seconds if agreed else beat.seconds
    before = record.goodput or Goodput()
    record.goodput = account(seconds, run_s=record.ended - record.started, silence_s=0.0, before=before)
    if agreed is not None and agreed.outcome in list(Ending):
        record.outcome = Ending(agreed.outcome)
        return
    if by_slurm is not None:
        record.outcome, record.followed = by_slurm, "went back to the queue"
        record.message = None if by_slurm.is_agreed else f"{by_slurm.replace('_', ' ')}: the job lost a node"
        return
    record.outcome = Ending.SUPERVISOR_KILLED
    record.error = record.message = "the supervisor was killed, and the ranks with it"


def last_step(folder: RunFolder, attempt: int, beat: Heartbeat | None) -> int | None:
    """The last step of an attempt; the heartbeat may be seconds behind metrics.jsonl. None before the first sign."""
    for line in reversed(last_lines(folder.metrics).splitlines()):
        try:
            written = json.loads(line)
        except ValueError:  # cut off at the beginning of the tail, or being written
            continue
        if written.get("attempt") == attempt:
            return int(written["step"])
        break
    return None if beat is None else beat.step
