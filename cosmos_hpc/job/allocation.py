"""The nodes of a SLURM job as its supervisor sees them: which are well, until when they are ours, how they go back."""

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import IO, TypeVar

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, Ending
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.job.guard import start_guard
from cosmos_hpc.job.health import Problem, check_nodes
from cosmos_hpc.job.policy import BAD_NODE
from cosmos_hpc.launch.queue import (
    OwnJob,
    host_names,
    job_runs,
    keep_away,
    num_partition_nodes,
    own_job,
    requeue_own_job,
)
from cosmos_hpc.launch.step import host_step, slurm_job_id

logger = logging.getLogger(__name__)


T = TypeVar("T")

PATIENCE_S = 24 * 3600.0
"""How long a controller that does not answer is asked again; the job's own time limit ends it before."""


PROLOG_S = 300.0
"""How long the cluster's prolog may take on a node."""

ENDS = {"NODE_FAIL": Ending.NODE_FAILURE, "PREEMPTED": Ending.PREEMPTED, "TIMEOUT": Ending.TIME_LIMIT}
"""What SLURM's accounts say of a run of the job that its supervisor did not live to close."""


class JobEnd(Enum):
    """What became of a job that was to go back to the queue."""

    REQUEUED_BY_US = auto()
    REQUEUED = auto()
    OVER_TIME = auto()
    ENDED = auto()


@dataclass
class Place:
    """Where the ranks of one attempt start."""

    config: RunConfig
    """The run's settings, with as many nodes as there are."""

    chosen: tuple[str, ...]
    """The nodes to name to srun; empty for the whole job."""

    warn_at: float | None
    """Unix seconds at which the ranks must know of the time limit."""

    def is_time_short(self) -> bool:
        """Whether the ranks should have been told by now; the limit may have been moved meanwhile."""
        if self.warn_at is None or time.time() < self.warn_at:
            return False
        with contextlib.suppress(ConfigError):  # asked again at the next look
            self.warn_at = _warn_at(self.config, own_job(slurm_job_id()))
            return self.warn_at is not None and time.time() >= self.warn_at
        return False


class Allocation:
    """The job of this supervisor."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self._folder = folder
        self._config = config
        self._bad: set[str] = set()
        self._is_woken = False
        self._guard: subprocess.Popen[bytes] | None = None

    def prepare(self, record: AttemptRecord) -> Place | None:
        """Ask the nodes how they are before the ranks start.

        Args:
            record: of the attempt; learns its nodes and which of them are bad, and is closed where too few are left.

        Returns:
            Where to start; none where the attempt is over before it began.
        """
        own = _own()
        if own.was_requeued:  # and runs again elsewhere already: SLURM had lost this node
            logger.warning("%s has been started again elsewhere: nothing to do", self._folder.label)
            raise SystemExit(0)
        there = host_names(own.nodes)
        nodes = [node for node in there if node not in self._bad]
        problems = self._check(record, nodes)
        self._bad |= {problem.host for problem in problems}
        record.bad_nodes = sorted({problem.host for problem in problems})
        nodes = [node for node in nodes if node not in self._bad]
        record.nodes = own.nodes if nodes == there else ",".join(nodes)
        config = self._fit(nodes)
        if config is None:
            self._close(record, problems, len(nodes))
            return None
        if config.trainer.num_nodes < self._config.trainer.num_nodes:
            logger.warning("%s goes on with %d nodes", self._folder.label, config.trainer.num_nodes)
        is_whole = config.trainer.num_nodes == len(there)
        chosen = () if is_whole else tuple(nodes[: config.trainer.num_nodes])
        self._stand_guard([node for node in there if node != _own_node()])
        return Place(config, chosen, _warn_at(self._config, own))

    def judge(self, record: AttemptRecord) -> None:
        """Take down the node that an attempt failed for, and what the ranks can't know of their stop.

        Where the controller has `preempt_send_user_signal`, a preemption comes as the signal of the time limit.
        """
        if record.outcome is Ending.TIME_LIMIT and _own().is_preempted:
            record.outcome = Ending.PREEMPTED
        if record.outcome in BAD_NODE and record.failed_host is not None:
            node = next((node for node in host_names(record.nodes or "") if _is_named(node, record.failed_host)), None)
            if node is not None:
                self._bad.add(node)
                record.bad_nodes = [node]

    def has_enough_nodes(self) -> bool:
        """Whether the run may go on in this job with the nodes that are left."""
        return self._fit([node for node in host_names(_own().nodes) if node not in self._bad]) is not None

    def end_before(self, record: AttemptRecord) -> Ending | None:
        """Why the run of this job ended in which an attempt was torn; none where its supervisor was killed alone."""
        ended = [run for run in job_runs(slurm_job_id()) if run.end is not None]
        if not ended:
            return None
        first = host_names(record.nodes or "")[:1]
        is_without = self._config.trainer.min_nodes is not None and not {*first} <= {*host_names(ended[-1].nodes)}
        return Ending.NODE_FAILURE if is_without else ENDS.get(ended[-1].state)

    def is_time_short(self) -> bool:
        """Whether another start would not be worth it."""
        warn_at = _warn_at(self._config, _own())
        return warn_at is not None and time.time() > warn_at

    def worth_excluding(self, attempts: Sequence[AttemptRecord]) -> list[str]:
        """The bad nodes of this job, unless the partition would have too few others."""
        job = slurm_job_id()
        bad = sorted({node for record in attempts if record.job_id == job for node in record.bad_nodes})
        if not bad:
            return []
        others = _patiently(lambda: num_partition_nodes(self._config.cluster.partition, besides=bad))
        if others >= self._config.trainer.num_nodes:
            return bad
        logger.warning("%s: the partition has too few nodes beside %s", self._folder.label, ", ".join(bad))
        return []

    def give_back(self, excluded: Sequence[str]) -> JobEnd:
        """Requeue the job, which must not come back to some nodes, unless somebody was faster."""
        if _patiently(lambda: requeue_own_job(slurm_job_id())):
            if excluded:
                _patiently(lambda: keep_away(slurm_job_id(), excluded))
            return JobEnd.REQUEUED_BY_US
        own = _own()
        if own.was_requeued or own.is_preempted:
            return JobEnd.REQUEUED
        return JobEnd.OVER_TIME if own.is_over_time else JobEnd.ENDED

    def _check(self, record: AttemptRecord, nodes: Sequence[str]) -> list[Problem]:
        if not self._config.cluster.health_check_s:
            return []
        log = self._folder.launcher_log(record.attempt)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            if not self._is_woken:
                self._wake(nodes, output)
            problems = check_nodes(self._config, self._folder, nodes, output)
            for problem in problems:
                print(f"health gate: {problem}", file=output)
                logger.warning("%s: %s", self._folder.label, problem)
        return problems

    def _wake(self, nodes: Sequence[str], output: IO[str]) -> None:
        """Start something on every node once: SLURM may run its prolog before a job's first step, and that is slow."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # the gate will tell which
            command = [*host_step(self._config, nodes), "true"]
            subprocess.run(command, stdout=output, stderr=output, timeout=PROLOG_S, check=False)
        self._is_woken = True

    def _stand_guard(self, others: Sequence[str]) -> None:
        """Before the ranks start, whose step is the newest one then."""
        if (
            self._config.trainer.min_nodes is not None
            and others
            and (self._guard is None or self._guard.poll() is not None)
        ):
            self._guard = start_guard(self._config, _own_node(), others)

    def _fit(self, nodes: Sequence[str]) -> RunConfig | None:
        """The settings for the most of these nodes that the batch and the sample streams can be shared among."""
        trainer = self._config.trainer
        if len(nodes) >= trainer.num_nodes:
            return self._config
        if trainer.min_nodes is None or _own_node() not in nodes:
            return None
        for num_nodes in range(len(nodes), trainer.min_nodes - 1, -1):
            try:
                fewer = dataclasses.replace(trainer, num_nodes=num_nodes, min_nodes=None)
                return dataclasses.replace(self._config, trainer=fewer)
            except ConfigError:  # not a divisor
                continue
        return None

    def _close(self, record: AttemptRecord, problems: Sequence[Problem], num_left: int) -> None:
        record.ended, record.saved_step = time.time(), self._folder.newest_step()
        record.outcome = problems[0].ending if problems else Ending.NODE_FAILURE
        record.failed_host = problems[0].host if problems else None
        needed = self._config.trainer.min_nodes or self._config.trainer.num_nodes
        record.error = "; ".join(map(str, problems)) or f"{num_left} nodes are left, {needed} are needed"
        record.message = f"{record.outcome.replace('_', ' ')}: {record.error}"


def _own() -> OwnJob:
    return _patiently(lambda: own_job(slurm_job_id()))


def _patiently(ask: Callable[[], T]) -> T:
    """What the controller says; it may be down for minutes, and the run need not notice."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except ConfigError as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("%s; asking again", error)
            time.sleep(5.0)


def _warn_at(config: RunConfig, own: OwnJob) -> float | None:
    return None if own.ends_at is None else own.ends_at - config.cluster.grace_s


def _own_node() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _is_named(node: str, host: str) -> bool:
    """A rank tells its host's name, which may be longer than the node's."""
    return host == node or host.partition(".")[0] == node
