"""What `status` tells, from folders as the supervisor and rank 0 leave them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from cosmos_hpc.config.cluster_schema import ClusterConfig
from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.run_state import Ending, RunState
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch import status
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.status import Straggler, cancel, run_status, stragglers
from cosmos_hpc.tables import print_status


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "trial" / "000-0123abcd")
    run.path.mkdir(parents=True)
    run.config.write_text(to_yaml(RunConfig(cluster=ClusterConfig(executor="slurm"))))
    return run


def write_state(folder: RunFolder, *attempts: dict[str, Any], status: str = "running") -> None:
    first = {"attempt": 0, "started": 1.0, "host": "node1", "job_id": "7"}
    folder.state.write_text(json.dumps({"status": status, "pid": 1, "attempts": [{**first, **a} for a in attempts]}))


def test_goodput_is_over_all_attempts_and_its_parts_go_to_scripts(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    write_state(
        folder,
        {"goodput": {"allocated_s": 100.0, "productive_s": 30.0, "lost_s": 70.0}, "ended": 2.0, "outcome": "killed"},
        {"attempt": 1, "goodput": {"allocated_s": 300.0, "productive_s": 270.0, "data_s": 30.0}},
    )
    row = run_status(folder)
    assert (row.goodput, row.seconds.lost_s, row.last_outcome) == (0.75, 70.0, Ending.KILLED)
    print_status([row])
    assert " 75% " in capsys.readouterr().out


def test_a_rank_well_above_the_median_is_named(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(folder, {"attempt": 2})
    beat = {"attempt": 2, "phase": "train", "step": 9, "beats": 30, "step_times_s": [0.5, 0.6, 0.5, 1.0]}
    folder.heartbeat.write_text(json.dumps(beat))
    row = run_status(folder)
    assert row.stragglers == (Straggler(rank=3, step_time_s=1.0, ratio=1.0 / 0.55),)
    print_status([row])
    assert "trial/000-0123abcd: rank 3 takes 1.00 s a step, 1.8 x the median" in capsys.readouterr().out
    write_state(folder, {"attempt": 3})
    assert run_status(folder).stragglers == (), "a heartbeat of the attempt before"


def test_a_run_that_could_not_be_compiled_says_so(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(folder, {})
    folder.heartbeat.write_text(json.dumps({"attempt": 0, "compilation": "eager: rank 1: compiling failed: x"}))
    print_status([run_status(folder)])
    assert "trial/000-0123abcd: computes eager: rank 1: compiling failed: x" in capsys.readouterr().out
    folder.heartbeat.write_text(json.dumps({"attempt": 0, "compilation": "eager: there is no GPU"}))
    print_status([run_status(folder)])
    assert "computes" not in capsys.readouterr().out


def test_a_run_that_is_being_sent_is_not_cancelled_by_half(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.pending_mark.write_text("")  # until sbatch has told the job
    monkeypatch.setattr(status, "cancel_jobs", lambda jobs: None)
    with locked(folder.experiment.submit_lock):
        assert status.cancel_all([folder]) == {folder: "is being sent at this moment: cancel it again"}
    assert not folder.cancel_mark.exists()


@pytest.mark.parametrize("times", [[], [0.5], [0.0, 0.0], [0.5, 0.6, 0.55]])
def test_ranks_that_keep_step_are_not_named(times: list[float]) -> None:
    assert stragglers(times) == ()


def test_a_broken_settings_file_spoils_its_own_row_only(folder: RunFolder) -> None:
    broken = RunFolder(folder.path.with_name("001-4567cdef"))
    broken.path.mkdir()
    broken.config.write_text("data: {num_frames: twelve}\n")
    write_state(folder, {}, status="failed")
    rows = [run_status(run) for run in ExperimentFolder(folder.path.parent).runs()]
    assert [row.status for row in rows] == ["failed", "unreadable"]
    assert "data.num_frames" in rows[1].message
    assert rows[1].is_over
    assert cancel(broken) == "not running"
    write_state(broken, {})
    with locked(broken.supervisor_lock):
        assert run_status(broken).status == "running", "its supervisor read them before they broke"


def test_state_files_of_earlier_versions_are_read(folder: RunFolder) -> None:
    write_state(folder, {"ended": 2.0, "outcome": "supervisor killed"}, {"ended": 3.0, "outcome": "failed", "step": 4})
    state = RunState.read(folder.state)
    assert [attempt.outcome for attempt in state.attempts] == [Ending.SUPERVISOR_KILLED, Ending.CODE_FAULT]
    assert run_status(folder).goodput is None
    state.write(folder.state)
    assert RunState.read(folder.state) == state


@pytest.mark.parametrize(
    ("width", "left_out"), [(None, ()), (200, ()), (110, ("data wait", "goodput")), (80, ("SLURM", "loss"))]
)
def test_nothing_is_cut_in_a_narrow_terminal(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int | None,
    left_out: tuple[str, ...],
) -> None:  # fmt: skip
    ended = [
        {"attempt": number, "outcome": "node_failure", "ended": 2.0, "nodes": "gpu[001-004]"} for number in range(3)
    ]
    write_state(folder, *ended)
    folder.metrics.write_text(
        json.dumps({"step": 1200, "loss": 0.0312, "clips_per_s": 260.1, "val_psnr": 32.11}) + "\n"
    )
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: width is not None)
    print_status([run_status(folder)])
    out = Text.from_ansi(capsys.readouterr().out).plain
    assert max(map(len, out.splitlines()[:-1])) <= (width or 1000)
    for whole in ("trial/000-0123abcd", "1200/", "32.11 dB"):
        assert whole in out
    table, _, told = out.partition("left out, since the terminal is narrow: ")
    assert bool(told) == bool(left_out)
    for name in left_out:
        assert name in told
        assert name not in table
    assert "…" not in out
