"""Kill it anywhere: it goes on by itself, and what comes out is what an unbroken run gives, bit for bit.

`make test` strikes once with each class of faults, `make test-faults` 25 times and `make test-faults-all` 200 times.
"""

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from faults import LIMIT_S, Victim, choose, small_disk
from forked_run import start_supervisor

from cosmos_hpc.config.load import load_experiment
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, Ending, RunState, Status
from cosmos_hpc.config.sweep import expand
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.launch.status import run_status
from cosmos_hpc.tokenizer import load_tokenizer

COUNT = int(os.environ.get("COSMOS_HPC_FAULTS", "8"))
STEPS = 4 * COUNT + 24
DISK_MIB = 96


def laid_out(root: Path, dataset: Path, *overrides: str) -> RunFolder:
    """A run of two ranks, ready for its supervisor; laid out again with other overrides, it is the same run."""
    root.mkdir(exist_ok=True)
    job = root / "faults.yaml"
    job.write_text(
        f"""\
name: faults
model: {{channels: 4}}
data: {{path: {dataset}, num_frames: 9, crop_size: 16, micro_batch_size: 2, global_batch_size: 4, num_workers: 1}}
trainer: {{max_steps: {STEPS}, devices: 2, precision: 32, val_check_interval: 7}}
optim: {{lr: 1e-3, warmup_steps: 4}}
loss: {{lpips: {{weight: 0}}}}
checkpoint: {{every_n_steps: 3}}
cluster:
  executor: local
  restarts: {{backoff_s: 0.01, lost_ranks: 9, killed: 9, hang: 9, disk_full: 9, code_fault: 9, supervisor_killed: 9}}
  hang: {{first_limit_s: 20, least_limit_s: 15}}
"""
    )
    (run,) = (planned.config for planned in expand(load_experiment(job, overrides)))
    experiment = ExperimentFolder(root / "runs" / run.name)
    (folder,) = experiment.place([run])
    lay_out(run, folder)
    experiment.max_parallel.write_text("1")
    return folder


def metrics(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def steps_lost(attempts: list[AttemptRecord]) -> int:
    """Steps that were trained more than once."""
    lost, last = 0, 0
    for attempt in attempts:
        if attempt.resumed_step is not None:  # it came as far as its checkpoint
            lost += last - attempt.resumed_step
            last = attempt.step or attempt.resumed_step
    return lost


@pytest.fixture(autouse=True)
def path_of_the_fork_server(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.skipif(os.geteuid() != 0, reason="the full disk is a file system of its own, which only root can mount")
def test_a_run_that_is_struck_again_and_again_ends_as_the_unbroken_one(tmp_path, dataset):
    unbroken = laid_out(tmp_path, dataset)
    supervisor = start_supervisor(unbroken.path, tmp_path / "no plan")
    generator, wait_s = random.Random(1), []
    with small_disk(tmp_path / "disk", DISK_MIB) as disk:
        struck = laid_out(disk, dataset)
        victim = Victim(struck, disk, generator)
        try:
            for fault in choose(COUNT, generator):
                attempt = victim.wait_for_steps(generator.randint(1, 3))
                began = time.monotonic()
                fault.strike(victim)
                if fault.ending is not None:
                    victim.wait_for_recovery(attempt)
                    assert victim.ending(attempt) is fault.ending, (fault.name, victim.said[-2000:])
                if fault.ending is Ending.TIME_LIMIT:
                    assert "exitcode" not in struck.launcher_log(attempt).read_text(), "a rank did not exit 0"
                wait_s.append(time.monotonic() - began)
                print(f"{fault.name} at step {victim.step}: trains again after {wait_s[-1]:.1f} s", flush=True)
            victim.supervisor.join()
            supervisor.join()
        finally:
            supervisor.kill()
            victim.supervisor.kill()
        state = RunState.read(struck.state)
        lost = steps_lost(state.attempts)
        print(f"{COUNT} faults, {lost} steps lost, {sum(wait_s):.0f} s lost, {len(state.attempts)} attempts")
        assert state.status is Status.FINISHED
        expected, got = metrics(unbroken), metrics(struck)
        assert [line["step"] for line in got] == list(range(STEPS + 1))
        assert [line.get("loss") for line in got] == [line.get("loss") for line in expected]
        assert [line.get("val_psnr") for line in got] == [line.get("val_psnr") for line in expected]
        for ema in (False, True):
            weights = load_tokenizer(unbroken.path, ema=ema).state_dict()
            assert all(
                value.equal(weights[name]) for name, value in load_tokenizer(struck.path, ema=ema).state_dict().items()
            )


def test_a_run_goes_on_with_one_rank_and_then_with_two_again(tmp_path, dataset):
    def start(number_of_ranks: int) -> BaseProcess:
        settings = ["trainer.max_steps=12", "data.num_streams=2", f"trainer.devices={number_of_ranks}"]
        assert laid_out(tmp_path, dataset, *settings) == folder
        return start_supervisor(folder.path, tmp_path / "plan")

    def stop_at(step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(metrics(folder) if folder.metrics.exists() else []) <= step:
            assert time.monotonic() < deadline, (tmp_path / "plan.log").read_text()
            time.sleep(0.01)
        folder.cancel_mark.touch()
        os.kill(supervisor.pid, signal.SIGTERM)
        supervisor.join()
        folder.cancel_mark.unlink()

    unbroken = laid_out(tmp_path / "unbroken", dataset, "trainer.max_steps=12", "data.num_streams=2")
    start_supervisor(unbroken.path, tmp_path / "no plan").join()
    folder = laid_out(tmp_path, dataset, "trainer.max_steps=12", "data.num_streams=2")
    supervisor = start(2)
    stop_at(2)
    supervisor = start(1)
    stop_at(metrics(folder)[-1]["step"] + 2)
    supervisor = start(2)
    supervisor.join()
    state = RunState.read(folder.state)
    assert [attempt.outcome for attempt in state.attempts] == ["cancelled", "cancelled", "finished"]
    expected, got = metrics(unbroken), metrics(folder)
    assert [line["step"] for line in got] == list(range(13))
    assert [line.get("consumed_samples") for line in got] == [line.get("consumed_samples") for line in expected]
    assert [line["loss"] for line in got[1:]] == pytest.approx([line["loss"] for line in expected[1:]], rel=1e-3)


def told(folder: RunFolder, plan: Path) -> str:
    start_supervisor(folder.path, plan).join()
    status = run_status(folder)
    assert status.status == "failed"
    return status.message


def test_a_fault_of_one_rank_is_told_with_that_ranks_words(tmp_path, dataset):
    message = told(laid_out(tmp_path, dataset, "data.num_frames=25"), tmp_path / "plan")  # the films have 17
    assert "data.num_frames" in message
    assert "rank_" in message
    assert "gloo" not in message


def test_a_run_that_can_not_start_is_failed_with_the_reason(tmp_path, dataset):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "autoencoder.jit").write_bytes(b"no weights at all")
    folder = laid_out(tmp_path, dataset, f"model.jit_ckpt_pth={weights}")
    assert str(weights) in told(folder, tmp_path / "plan")
    assert folder.newest_checkpoint() is None
