"""Real runs on two gloo ranks through submitit's local executor, with real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_hpc.config.load import load_experiment
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, runs_folder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.config.sweep import expand
from cosmos_hpc.job import Supervisor
from cosmos_hpc.launch.local import children, is_locked
from cosmos_hpc.launch.requests import checkpoint_now, requeue, wait_for_save
from cosmos_hpc.launch.status import cancel, run_status
from cosmos_hpc.launch.submit import submit

LIMIT_S = 180


def send(job: Path, *overrides: str) -> list[RunFolder]:
    """Submit as the command does; the folders of the runs that were sent."""
    experiment_file = load_experiment(job, overrides)
    runs = [run.config for run in expand(experiment_file)]
    experiment = ExperimentFolder(runs_folder() / runs[0].name)
    sent = submit(runs, experiment, experiment_file.sweep.max_parallel, Supervisor)
    return [run.folder for run in sent.placed if run.is_sent]


def wait_until(happened: Callable[[], bool], folder: RunFolder) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < deadline, (run_status(folder), words(folder))
        time.sleep(0.02)


def words(folder: RunFolder) -> str:
    return "\n".join(log.read_text()[-2000:] for log in folder.path.glob("logs/*/*.log"))


def wait_for_end(folder: RunFolder) -> None:
    wait_until(lambda: run_status(folder).is_over and not is_locked(folder.supervisor_lock), folder)


def wait_for_step(folder: RunFolder, step: int) -> None:
    wait_until(lambda: run_status(folder).step >= step, folder)
    assert not run_status(folder).is_over


def metrics(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(folder) if "loss" in line]


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [below for child in found for below in descendants(child)]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def outcomes(folder: RunFolder) -> list[str | None]:
    return [attempt.outcome for attempt in RunState.read(folder.state).attempts]


@pytest.fixture
def unbroken(quick_job) -> RunFolder:
    """The same run without a fault."""
    (folder,) = send(quick_job, "name=unbroken")
    wait_for_end(folder)
    assert outcomes(folder) == ["finished"], words(folder)
    return folder


def test_broken_runs_repeat_the_losses_of_an_unbroken_one(quick_job, unbroken):
    assert [step for step, _ in losses(unbroken)] == list(range(1, 25))
    assert metrics(unbroken)[0].keys() == {"step", "val_psnr", "val_ssim", "val_clips", "attempt"}
    assert [line["step"] for line in metrics(unbroken) if "val_psnr" in line] == [0, 12, 24]
    assert metrics(unbroken)[-1]["val_psnr"] > metrics(unbroken)[0]["val_psnr"] + 3, "it did not learn"
    assert "val_psnr_ema" in metrics(unbroken)[-1]
    best = max((line for line in metrics(unbroken)[1:] if "val_psnr" in line), key=lambda line: line["val_psnr"])
    assert (unbroken.checkpoints / "best").resolve() == unbroken.checkpoint(best["step"])

    (preempted,) = send(quick_job, "name=preempted")
    wait_for_step(preempted, 3)
    os.kill(RunState.read(preempted.state).pid, signal.SIGTERM)
    wait_for_end(preempted)
    assert outcomes(preempted) == ["preempted", "finished"], words(preempted)
    saved_at = RunState.read(preempted.state).attempts[0].step
    assert 3 <= saved_at < 24
    assert losses(preempted) == losses(unbroken)

    (asked,) = send(quick_job, "name=asked", "trainer.max_steps=50")
    wait_for_step(asked, 3)
    assert checkpoint_now(asked) == "asked to save after its next step"
    assert wait_for_save(asked, before=0).startswith("saved in ")
    assert len(RunState.read(asked.state).attempts) == 1, "it goes on after the checkpoint"
    assert requeue(asked) == "asked to save and to start again"
    wait_for_end(asked)
    assert outcomes(asked) == ["requeued", "finished"], words(asked)
    assert losses(asked)[:24] == losses(unbroken)
    assert not asked.requeue_request.exists()

    (killed,) = send(quick_job, "name=killed")
    wait_for_step(killed, 12)
    supervisor = RunState.read(killed.state).pid
    processes = descendants(supervisor)
    assert len(processes) >= 1 + 2 + 2, "launcher, ranks and their workers"
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: run_status(killed).status == "died", killed)
    wait_until(lambda: not any(is_alive(pid) for pid in processes), killed)
    (again,) = send(quick_job, "name=killed")
    assert again == killed
    wait_for_end(killed)
    assert outcomes(killed) == ["supervisor_killed", "finished"], words(killed)
    assert losses(killed) == losses(unbroken)


def test_ctrl_c_while_waiting_saves_and_submit_goes_on_from_there(quick_job):
    quick_job.write_text(quick_job.read_text().replace("max_steps: 24", "max_steps: 80"))  # it is not to be over first
    command = [sys.executable, "-m", "cosmos_hpc.cli", "submit", str(quick_job), "--wait"]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    experiment = ExperimentFolder(runs_folder() / "quick")
    deadline = time.monotonic() + LIMIT_S
    while not experiment.runs():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (folder,) = experiment.runs()
    wait_for_step(folder, 2)
    assert send(quick_job) == [], "a running run was sent twice"
    os.killpg(waiting.pid, signal.SIGINT)  # as a terminal does: to the command and all that it started
    said, _ = waiting.communicate(timeout=LIMIT_S)
    assert waiting.returncode == 130
    status = run_status(folder)
    assert f"{folder.label}: cancelled, saved in {folder.checkpoint(status.step)}" in said
    assert f"go on with: cosmos-hpc submit {quick_job}" in said
    assert (status.status, outcomes(folder)) == ("cancelled", ["cancelled"]), words(folder)
    assert folder.newest_checkpoint() == folder.checkpoint(status.step)

    assert send(quick_job) == [folder]
    wait_for_end(folder)
    assert run_status(folder).status == "finished", words(folder)
    assert [step for step, _ in losses(folder)] == list(range(1, 81))
    assert send(quick_job) == [], "a finished run was sent again"
    assert len(list(folder.checkpoints.glob("step_*"))) <= 4  # the last three, and the best


def test_a_cancel_before_the_start_is_heard(quick_job):
    (folder,) = send(quick_job)
    assert folder.experiment.max_parallel.read_text() == "1"
    assert cancel(folder) == "will not start"
    assert send(quick_job) == [], "a pending run was sent twice"
    wait_for_end(folder)
    assert run_status(folder).status == "cancelled"
    assert not folder.metrics.exists()
    assert cancel(folder) == "not running"
