"""The health gate: before the ranks start, every node shows that it can be used, all at the same time, in seconds.

Each node runs `node_check.py` beside the container and reports to the supervisor: its GPUs are there and free of
errors, the run folder and its scratch have room, its clock is right, and it takes part in a small all-reduce over the
network. What it can't see is the fabric between GPUs, which NCCL needs seconds of imports for.
"""

import contextlib
import json
import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import Ending
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.job.disk import checkpoint_bytes
from cosmos_hpc.launch.step import host_step, start_step, step_environment

logger = logging.getLogger(__name__)

CLOCK_S = 10.0
"""A node's clock may be so far from the first node's; logs and heartbeats are compared by it."""

LEAVE_S = 2.0
"""What a finished check has to be gone in before srun is killed."""


@dataclass
class NodeReport:
    """What one node said of itself."""

    host: str
    """Its name."""

    clock_s: float | None = None
    """Its clock minus the first node's."""

    gpus: list[str] | None = None
    """Problems of its GPUs; none where it has no tool to tell."""

    folder: list[str] = field(default_factory=list)
    """Problems of the run folder as seen from it."""

    scratch: list[str] = field(default_factory=list)
    """Problems of its own disks."""

    has_told: bool = False
    """Whether it came so far as to tell these."""

    is_sum_right: bool = False
    """Whether it had the right sum at the end of the all-reduce."""


@dataclass(frozen=True)
class Problem:
    """Why a node must not be used."""

    host: str
    ending: Ending
    what: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}"


def check_nodes(run: RunConfig, folder: RunFolder, nodes: Sequence[str], output: IO[str]) -> list[Problem]:
    """Ask all nodes at once.

    Args:
        run: its settings; `cluster.health_check_s` is what a node has.
        folder: the run, whose folder every node must be able to write.
        nodes: where the ranks are to run, this node among them.
        output: what the checks print.

    Returns:
        The nodes that failed; empty where no node answered at all, which says more of the gate than of the nodes.
    """
    reports = ask_nodes(run, folder, nodes, output)
    if not reports:
        logger.warning("no node answered the health gate in %.0f s: going on without it", run.cluster.health_check_s)
        return []
    return judge(nodes, reports, run.cluster.health_check_s)


def ask_nodes(run: RunConfig, folder: RunFolder, nodes: Sequence[str], output: IO[str]) -> list[NodeReport]:
    """What those nodes say of themselves that answer; arguments as for `check_nodes`."""
    with _Gate(nodes, run.cluster.health_check_s) as gate:
        gpus = 0 if run.cluster.gpus_per_node == 0 else run.trainer.devices
        checks = {"gpus": gpus, "folder": str(folder.path), "room_bytes": checkpoint_bytes(folder)}
        script = Path(__file__).with_name("node_check.py")
        arguments = [socket.gethostname(), str(gate.port), gate.token, json.dumps({**checks, "nodes": len(nodes)})]
        command = [*host_step(run, nodes), sys.executable, "-I", "-S", str(script), *arguments]
        step = start_step(command, step_environment(run, socket.gethostname(), gate.port), output)
        reports = gate.hear(step)
        _end(step)
    return reports


def judge(nodes: Sequence[str], reports: Sequence[NodeReport], limit_s: float) -> list[Problem]:
    """The problems of all nodes, in their order.

    Args:
        nodes: that were asked.
        reports: of those that answered.
        limit_s: what they had.
    """
    by_host = {report.host: report for report in reports}
    has_tool = any(report.gpus is not None for report in reports if report.has_told)
    is_folder_bad_everywhere = all(report.folder for report in reports)  # then no other node would help
    are_whole = all(report.has_told for report in reports) and len(reports) == len(nodes)
    found = []
    for node in nodes:
        report = by_host.get(node)
        if report is None or not report.has_told or (are_whole and not report.is_sum_right):
            what = "did not answer the health gate" if report is None else "did not end the health gate"
            found.append(Problem(node, Ending.NODE_FAILURE, f"{what} in {limit_s:.0f} s"))
            continue
        if report.gpus is None and has_tool:
            found.append(Problem(node, Ending.GPU_ERROR, "has no nvidia-smi, as the other nodes have"))
        found += [Problem(node, Ending.GPU_ERROR, what) for what in report.gpus or []]
        disk = report.scratch + ([] if is_folder_bad_everywhere else report.folder)
        found += [Problem(node, Ending.NODE_FAILURE, what) for what in disk]
        if report.clock_s is not None and abs(report.clock_s) > CLOCK_S:
            found.append(Problem(node, Ending.NODE_FAILURE, f"its clock is {report.clock_s:+.0f} s off"))
    return found


class _Gate:
    """The supervisor's side: one thread for each node that connects."""

    def __init__(self, nodes: Sequence[str], limit_s: float) -> None:
        self._nodes = nodes
        self._deadline = time.monotonic() + limit_s
        self._barrier = threading.Barrier(len(nodes))
        self._shares: list[list[int]] = []
        self._reports: dict[str, NodeReport] = {}
        self._done = 0
        self.token = secrets.token_hex(8)
        """Known to this gate's checks alone."""

    def __enter__(self) -> "_Gate":
        self._server = socket.create_server(("", 0), backlog=len(self._nodes))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._barrier.abort()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._server.close()

    def hear(self, step: "subprocess.Popen[bytes]") -> list[NodeReport]:
        """Wait until all nodes are done, the checks have ended or the time is over."""
        while self._done < len(self._nodes) and time.monotonic() < self._deadline:
            if step.poll() is not None and step.returncode:
                break
            time.sleep(0.02)
        self._barrier.abort()
        return [self._reports[node] for node in self._nodes if node in self._reports]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        """With one node; whatever it breaks off by, its report stays as it is then."""
        connection.settimeout(max(0.1, self._deadline - time.monotonic()))
        with contextlib.suppress(OSError, ValueError, KeyError, threading.BrokenBarrierError), connection:
            stream = connection.makefile("rw")
            report = NodeReport(self._read(stream)["host"])
            self._reports[report.host] = report
            report.clock_s = min((self._clock(stream) for _ in range(3)), key=abs)
            told = self._read(stream)
            self._shares.append(told["share"])
            report.gpus, report.folder, report.scratch = told["gpus"], told["folder"], told["scratch"]
            report.has_told = True
            self._barrier.wait(max(0.1, self._deadline - time.monotonic()))
            stream.write(json.dumps([sum(column) for column in zip(*self._shares, strict=True)]) + "\n")
            stream.flush()
            report.is_sum_right = self._read(stream)["is_sum_right"]
            self._done += 1

    def _clock(self, stream: Any) -> float:
        before = time.time()
        stream.write("time\n")
        stream.flush()
        theirs = self._read(stream)["time"]
        return float(theirs) - (before + time.time()) / 2

    def _read(self, stream: Any) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(stream.readline())
        if said["token"] != self.token:
            raise ValueError("not of this gate")
        return said


def _end(step: "subprocess.Popen[bytes]") -> None:
    """A check on a dead node never ends: its srun is told to leave, then killed."""
    try:
        step.wait(LEAVE_S)
        return
    except subprocess.TimeoutExpired:
        step.terminate()
    try:
        step.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        step.kill()
        step.wait()
