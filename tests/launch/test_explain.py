"""The story of a run, from a folder as its supervisor leaves it; SLURM's commands are doubles."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cosmos_hpc import cli_operation
from cosmos_hpc.config.cluster_schema import ClusterConfig
from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.explain import duration, explain, page

LOG = """2026-01-01 rank 3@gpu2 INFO step 40
Traceback (most recent call last):
  File "old.py", line 1, in <module>
ValueError: caught long ago
Traceback (most recent call last):
  File "train.py", line 7, in step
    raise RuntimeError("CUDA error")
RuntimeError: CUDA error: uncorrectable ECC error encountered
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "runs" / "trial" / "000-0123abcd")
    run.path.mkdir(parents=True)
    run.config.write_text(to_yaml(RunConfig(cluster=ClusterConfig(executor="slurm"))))
    return run


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What squeue and sacct print: files to write."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("squeue", "sacct"):
        (tools / name).write_text(f"#!/bin/sh\ncat {tmp_path}/{name}\n")
        (tools / name).chmod(0o755)
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return {name: tmp_path / name for name in ("squeue", "sacct")}


def at(clock: str) -> float:
    return time.mktime(time.strptime(f"2026-01-01 {clock}", "%Y-%m-%d %H:%M:%S"))


def write_state(folder: RunFolder, *attempts: dict[str, Any], status: str = "running") -> None:
    first = {"host": "gpu1", "job_id": "7_3", "nodes": "gpu[1-2]"}
    records = [{"attempt": number, **first, **one} for number, one in enumerate(attempts)]
    folder.state.write_text(json.dumps({"status": status, "pid": 1, "attempts": records}))


def test_each_end_is_told_with_stack_accounts_consequence_and_cost(folder: RunFolder, slurm: dict[str, Path]) -> None:
    log = folder.rank_log(0, 3)
    log.parent.mkdir(parents=True)
    log.write_text(LOG)
    write_state(
        folder,
        {"started": at("10:00:10"), "ended": at("10:30:00"), "outcome": "gpu_error", "step": 45, "saved_step": 40,
         "failed_rank": 3, "failed_host": "gpu2", "failed_log": "logs/000/rank_3.log", "bad_nodes": ["gpu2"],
         "message": "gpu error on rank 3 of gpu2 at step 45: RuntimeError: CUDA error", "resumed_step": 0,
         "followed": "back to the queue, without gpu2", "goodput": {"lost_s": 25.0}},
        {"started": at("10:35:00"), "ended": at("11:00:00"), "outcome": "preempted", "step": 90, "saved_step": 90,
         "resumed_step": 40, "followed": "back to the queue", "nodes": "gpu[1,3]",
         "goodput": {"queue_s": 300.0, "startup_s": 14.0}},
        {"started": at("11:10:00"), "resumed_step": 90, "goodput": {"queue_s": 600.0, "startup_s": 12.0}},
    )  # fmt: skip
    slurm["squeue"].write_text("7_3|RUNNING|gpu[1,3]|None|2:50:00|2026-01-01T11:10:00\n")
    slurm["sacct"].write_text(
        "REQUEUED|0:0|2026-01-01T10:00:00|2026-01-01T10:30:01|gpu[1-2]\n"
        "PREEMPTED|0:15|2026-01-01T10:34:50|2026-01-01T11:00:02|gpu[1,3]\n"
        "RUNNING|0:0|2026-01-01T11:09:55|Unknown|gpu[1,3]\n"
    )
    text = page(explain(folder))
    assert "SLURM: RUNNING gpu[1,3], 2:50:00 until its time limit" in text
    first, second, third = text.split("\n\n")[1:]
    assert first.splitlines() == [
        "attempt 0: 2026-01-01 10:00:10, 30 min, on gpu[1-2], job 7_3",
        "  ended: gpu error on rank 3 of gpu2 at step 45: RuntimeError: CUDA error",
        "    Traceback (most recent call last):",
        '      File "train.py", line 7, in step',
        '        raise RuntimeError("CUDA error")',
        "    RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "  SLURM's accounts: REQUEUED, exit code 0:0, 2026-01-01 10:00:00 to 2026-01-01 10:30:01, gpu[1-2]",
        "  then: back to the queue, without gpu2",
        "  cost: 5 steps lost (25 s), 5 min in the queue, 14 s to start",
    ]
    assert "  ended: preempted at step 90" in second
    assert "  SLURM's accounts: PREEMPTED, exit code 0:15" in second
    assert "  cost: 0 steps lost, 10 min in the queue, 12 s to start" in second
    assert "still lives" in third
    assert "cost" not in third


def test_a_pending_run_is_told_by_slurms_reason_and_expected_start(
    folder: RunFolder, slurm: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder.pending_mark.write_text("7_3")
    slurm["squeue"].write_text("7_3|PENDING||Resources|4:00:00|2026-01-01T12:00:00\n")
    cli_operation.explain("trial")
    assert capsys.readouterr().out.splitlines() == [
        "trial/000-0123abcd: pending at step 0 of 5000",
        "waits in the queue: Resources, expected start 2026-01-01T12:00:00",
        "it has not started yet",
    ]
    cli_operation.explain("trial", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["status"]["job"]["reason"] == "Resources"


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (0.4, 119, 120, 3599, 3600, 86400, 200000)] == [
        "0 s", "119 s", "2 min", "1 h 00 min", "1 h 00 min", "24 h 00 min", "2 d 07 h"]  # fmt: skip
