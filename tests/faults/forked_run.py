"""A supervised run whose processes are forked from one that has torch loaded: a start takes a second in place of ten.

Supervisor, ranks and everything below are the real ones. The double stands for torch's elastic launcher: it forks the
ranks, and where one dies it ends the others with SIGTERM and says so in torchrun's words.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import IO

import planned_death

from cosmos_hpc import train
from cosmos_hpc.job import Supervisor
from cosmos_hpc.ranks import die_with_parent

RANKS_GRACE_S = 3.0
"""How long the others have to leave after SIGTERM."""


def start_supervisor(folder: Path, plan: Path) -> multiprocessing.process.BaseProcess:
    """What `submit` does on a local machine, by way of the fork server.

    Args:
        folder: the run.
        plan: where a death of a rank may be planned; beside it, with the suffix .log, is what the supervisor says.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["preloaded"])
    supervisor = server.Process(target=_supervise, args=(folder, plan, dict(os.environ)))
    supervisor.start()
    return supervisor


def _supervise(folder: Path, plan: Path, environment: dict[str, str]) -> None:
    from cosmos_hpc.job import attempt

    os.environ.update(environment)
    os.setsid()
    attempt.start_step = ForkedLauncher
    planned_death.PLAN = plan
    with plan.with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    Supervisor(folder)()


class ForkedLauncher:
    """Stands for `torchrun`, and for the subprocess.Popen that the supervisor holds of it."""

    def __init__(self, command: list[str], environment: dict[str, str], output: IO[str]) -> None:
        self.returncode: int | None = None
        supervisor = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            die_with_parent(supervisor)
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            os.closerange(3, 1024)  # the supervisor's lock above all, as subprocess.Popen does
            os.environ.clear()
            os.environ.update(environment)
            os._exit(_launch(command))

    def poll(self) -> int | None:
        """As subprocess.Popen."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _launch(command: list[str]) -> int:
    (count,) = (int(word.partition("=")[2]) for word in command if word.startswith("--nproc-per-node="))
    arguments = command[command.index("cosmos_hpc.train") + 1 :]
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ranks = {_fork_rank(rank, count, arguments): rank for rank in range(count)}
    failed = 0
    deadline = None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code, time.monotonic() + RANKS_GRACE_S
                words = f"Root Cause (first observed failure):\n  host : here\n  rank : {rank}\n  exitcode : {code}\n"
                os.write(2, words.encode())
                _end(list(ranks), signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            _end(list(ranks), signal.SIGKILL)
        time.sleep(0.01)
    return 1 if failed else 0


def _end(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _fork_rank(rank: int, count: int, arguments: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        os.environ |= {"TORCHELASTIC_RUN_ID": "forked"}
        sys.argv = ["train", *arguments]
        planned_death.prepare(rank)
        train.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
