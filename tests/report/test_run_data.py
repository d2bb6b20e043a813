import os
from pathlib import Path

import pytest
from report_parts import WriteRun, attempt, run_config, step_lines

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.report.run_data import (
    best_run,
    differing_settings,
    num_validation_clips,
    read_metrics,
    read_run,
    settings_of,
)


def test_final_loss_is_the_mean_of_the_last_ten_steps(write_run: WriteRun) -> None:
    record = read_run(write_run(run_config("d"), step_lines(1, 12, attempt=0)))
    expected = (1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7 + 1 / 8 + 1 / 9 + 1 / 10 + 1 / 11 + 1 / 12) / 10
    assert record.final_loss == pytest.approx(expected)


def test_final_loss_of_a_short_run_is_the_mean_of_what_there_is(write_run: WriteRun) -> None:
    assert read_run(write_run(run_config("d"), step_lines(1, 2, attempt=0))).final_loss == pytest.approx(0.75)


def test_speed_is_the_median_which_one_slow_step_does_not_move(write_run: WriteRun) -> None:
    lines = step_lines(1, 5, attempt=0)  # 4 2 4 2 4
    lines[0]["clips_per_s"] = 0.01
    assert read_run(write_run(run_config("d"), lines)).clips_per_s == 2.0


def test_start_is_step_zero_and_end_is_the_newest_validation(write_run: WriteRun) -> None:
    lines = [
        {"step": 0, "val_psnr": 10.0, "attempt": 0},
        *step_lines(1, 1, 0, val_psnr=30.0),
        *step_lines(2, 2, 0, val_psnr=12.5),
        *step_lines(3, 3, 0),
    ]
    record = read_run(write_run(run_config("d"), lines))
    assert (record.at_start("val_psnr"), record.at_end("val_psnr"), record.last_step) == (10.0, 12.5, 3)


def test_run_validated_only_before_training_has_no_end(write_run: WriteRun) -> None:
    record = read_run(write_run(run_config("d"), [{"step": 0, "val_psnr": 10.0, "attempt": 0}]))
    assert (record.at_start("val_psnr"), record.at_end("val_psnr")) == (10.0, None)


def test_wall_time_leaves_out_the_wait_between_attempts(write_run: WriteRun) -> None:
    state = {
        "status": "finished",
        "attempts": [attempt(0, 1000.0, 1060.0, "preempted", step=20), attempt(1, 5000.0, 5030.0, "finished", step=40)],
    }
    assert read_run(write_run(run_config("d"), [], state)).wall_time_s == 90.0


def test_attempt_without_an_end_lasts_to_its_last_line_of_metrics(write_run: WriteRun) -> None:
    folder = write_run(
        run_config("d"), step_lines(1, 2, 0), {"status": "running", "attempts": [attempt(0, 1000.0, None, None)]}
    )
    os.utime(folder.metrics, (1025.0, 1025.0))
    assert read_run(folder).wall_time_s == 25.0


def test_interruptions_are_the_steps_between_attempts_and_the_stop_still_waiting(write_run: WriteRun) -> None:
    lines = [*step_lines(1, 20, attempt=0), *step_lines(21, 26, attempt=1), *step_lines(27, 30, attempt=2)]
    state = {
        "status": "waiting",
        "attempts": [
            attempt(0, 0.0, 1.0, "preempted", step=20),
            attempt(1, 2.0, 3.0, "killed", step=29),  # resumed from 26, its newest checkpoint
            attempt(2, 4.0, 5.0, "time_limit", step=30),
        ],
    }
    assert read_run(write_run(run_config("d"), lines, state)).interruptions == [20, 26, 30]


def test_failure_and_cancellation_are_no_interruptions(write_run: WriteRun) -> None:
    for seed, outcome in enumerate(("failed", "cancelled")):
        state = {"status": outcome, "attempts": [attempt(0, 0.0, 1.0, outcome, step=5)]}
        assert read_run(write_run(run_config("d", seed=seed), step_lines(1, 5, 0), state)).interruptions == []


def test_folder_with_settings_alone_is_a_run_that_has_not_started(write_run: WriteRun) -> None:
    record = read_run(write_run(run_config("d")))
    assert (record.status, record.attempts, record.steps, record.final_loss) == ("not started", (), (), None)


def test_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "val_psnr": 9.5, "attempt": 0}\n{"step": 1, "lo')
    assert [record.step for record in read_metrics(metrics)] == [0]


def test_malformed_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "val_psnr": 9.5, "attempt": 0}\n{"step": 1, "lo\n{"step": 2, "attempt": 0}\n')
    with pytest.raises(ConfigError, match=rf"^{metrics} line 2: .*: cut the file before it"):
        read_metrics(metrics)


def test_differing_settings_are_those_that_not_all_runs_share() -> None:
    runs = [run_config("d", lr=1e-4), run_config("d", lr=3e-4), run_config("d", lr=3e-4, seed=9)]
    assert differing_settings([settings_of(run) for run in runs]) == ["trainer.seed", "optim.lr"]


def test_best_run_is_none_until_one_is_validated_and_never_a_diverged_one(write_run: WriteRun) -> None:
    validated = [
        read_run(write_run(run_config("d", seed=seed), step_lines(1, 1, 0, val_psnr=value)))
        for seed, value in enumerate((float("nan"), 11.0, 13.0, 12.0))
    ]
    assert best_run(validated) is validated[2]
    assert best_run(validated[:1]) is None


def test_validation_clips_are_counted_from_the_index_and_the_limit(dataset: Path) -> None:
    assert num_validation_clips(run_config(dataset)) == 4  # 8 batches of 2 would be 16
    assert num_validation_clips(run_config(dataset / "elsewhere")) is None
