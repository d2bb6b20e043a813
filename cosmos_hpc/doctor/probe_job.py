"""What the probe's batch script runs, on the first node and outside the container, as a supervisor does.

It asks the nodes, starts the ranks, waits for steps, asks for a checkpoint, sends the time limit's signal, and writes
down what came of each.
"""

import dataclasses
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.rank_reports import AgreedEnd
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.doctor.probe_report import JobReport, read_ranks
from cosmos_hpc.job.ends import diagnose
from cosmos_hpc.job.health import ask_nodes
from cosmos_hpc.job.meeting import meeting_port
from cosmos_hpc.launch.forecast import noted
from cosmos_hpc.launch.queue import host_names
from cosmos_hpc.launch.step import kill_step, signal_ranks, start_step, step_command, step_environment
from cosmos_hpc.ranks import set_up_logging

RANK = "cosmos_hpc.doctor.probe_rank"

STEPS = 3
"""Trained before anything is asked for: the first one compiles, and the queue of numbers is one behind."""

SPARE_S = 60.0
"""Before the job's limit at which the ranks are killed."""


def main(path: Path) -> None:
    """Go through the stages, in the folder that `probe` has laid out."""
    set_up_logging()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the time limit's own warning
    folder = RunFolder(path)
    run, report = read_run_config(folder.config), JobReport(python=platform.python_version())
    deadline = time.monotonic() + 60 * run.cluster.time_limit_min - SPARE_S
    log = folder.launcher_log(0)
    log.parent.mkdir(parents=True, exist_ok=True)

    def tell(stage: str) -> None:
        report.stage = stage
        report.write(path)

    report.hosts = host_names(os.environ["SLURM_JOB_NODELIST"])
    tell("asking the nodes")
    with log.open("a") as output, meeting_port() as port:
        report.nodes = [dataclasses.asdict(one) for one in ask_nodes(run, folder, report.hosts, output)]
        tell("starting the ranks")
        command = step_command(run, folder, 0, module=RANK)
        step = start_step(command, step_environment(run, socket.gethostname(), port), output)
        _train_save_and_leave(run, folder, step, report, tell, deadline)
        if step.poll() is None:
            kill_step(run, step)
            report.error = report.error or f"the ranks were still at it ({report.stage}) when the job's time was over"
    if report.outcome is None and report.error is None:
        report.error = _told(folder, step.returncode)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    tell("done")


def _train_save_and_leave(
    run: RunConfig,
    folder: RunFolder,
    step: "subprocess.Popen[bytes]",
    report: JobReport,
    tell: Callable[[str], None],
    deadline: float,
) -> None:
    """Until something does not happen, or all has."""

    def happens(what: Callable[[], bool]) -> bool:
        while not (came := what()) and step.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return came

    if not happens(lambda: bool(read_ranks(folder.path))):
        return
    tell("training")
    if not happens(lambda: len(noted(folder, "step_time_s")) >= STEPS):
        return
    report.step_s = noted(folder, "step_time_s")[-1]
    tell("saving a checkpoint")
    asked = time.monotonic()
    folder.save_request.touch()
    if not happens(lambda: folder.newest_checkpoint() is not None):
        return
    report.save_s = time.monotonic() - asked
    tell("sending the signal")
    asked = time.monotonic()
    signal_ranks(run, step.pid, signal.SIGUSR2)
    if not happens(lambda: step.poll() is not None):
        return
    report.leave_s = time.monotonic() - asked
    agreed = AgreedEnd.read(folder.outcome(0))
    report.outcome = None if agreed is None else str(agreed.outcome)


def _told(folder: RunFolder, code: int) -> str:
    found = diagnose(folder, 0, code)
    where = "" if found.rank is None else f" on rank {found.rank} of {found.host}"
    return f"{found.ending.replace('_', ' ')}{where}: {found.error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
