import csv
import math
from pathlib import Path

import numpy as np
import pytest
from report_parts import evaluation_set

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.report.scores import (
    Evaluation,
    LatentDrift,
    bootstrap,
    read_evaluation,
    summary,
    write_evaluation,
)


def test_interval_is_about_two_standard_errors_wide_to_both_sides() -> None:
    values = np.random.default_rng(1).normal(30.0, 2.0, size=400)
    found = bootstrap(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert found.low < found.mean < found.high
    assert bootstrap(values) == found


def test_one_video_has_no_interval() -> None:
    found = bootstrap(np.array([30.0]))
    assert found.mean == 30.0
    assert math.isnan(found.low)


def test_gain_is_of_pairs_so_that_hard_videos_do_not_widen_it() -> None:
    before = list(np.linspace(20.0, 40.0, 41))
    found = evaluation_set(
        Evaluation("old", {"psnr": before}), Evaluation("new", {"psnr": [value + 0.5 for value in before]})
    )
    gain = found.gain(found.evaluations[1], "psnr")
    assert gain is not None
    assert (gain.mean, gain.half_width) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))
    score = found.evaluations[1].score("psnr")
    assert score is not None
    assert score.mean.half_width > 1.0


def test_worst_of_twenty_comes_from_the_side_that_is_bad() -> None:
    values = [float(value) for value in range(101)]
    found = Evaluation("new", {"psnr": values, "lpips": values})
    assert found.score("psnr").worst5 == 5.0  # type: ignore[union-attr]
    assert found.score("lpips").worst5 == 95.0  # type: ignore[union-attr]
    assert found.worst(2) == [0, 1]


def test_videos_without_a_value_count_neither_in_means_nor_in_gains() -> None:
    nothing = math.nan
    found = evaluation_set(
        Evaluation("old", {"psnr": [1.0, 2.0, 3.0], "psnr_inside": [10.0, nothing, 20.0]}),
        Evaluation("new", {"psnr": [1.0, 2.0, 3.0], "psnr_inside": [11.0, nothing, 23.0]}),
    )
    assert found.evaluations[0].score("psnr_inside").mean.mean == 15.0  # type: ignore[union-attr]
    assert found.gain(found.evaluations[1], "psnr_inside").mean == 2.0  # type: ignore[union-attr]
    assert found.evaluations[0].score("psnr_inside", [1]) is None
    assert found.metrics() == ["psnr", "psnr_inside"]


def test_slices_have_scores_of_their_own_in_the_table_for_scripts(tmp_path: Path) -> None:
    found = evaluation_set(
        Evaluation("old", {"psnr": [20.0, 30.0, 22.0]}),
        Evaluation("new", {"psnr": [21.0, 30.5, 23.0]}),
        slices={"night": ["true", "false", "true"]},
    )
    assert found.by_slice("night") == {"false": [1], "true": [0, 2]}
    assert found.gain(found.evaluations[1], "psnr", [0, 2]).mean == 1.0  # type: ignore[union-attr]
    night = summary(found)["evaluations"][1]["slices"]["night"]["true"]["psnr"]
    assert (night["mean"], night["worst5"]) == (22.0, pytest.approx(21.1))
    write_evaluation(found, tmp_path)
    with (tmp_path / "slices.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["value"], row["videos"], row["weights"], row["mean"]) for row in rows] == [
        ("false", "1", "old", "30"),
        ("false", "1", "new", "30.5"),
        ("true", "2", "old", "21"),
        ("true", "2", "new", "22"),
    ]


def test_files_hold_a_line_for_each_video_and_can_be_read_again(tmp_path: Path) -> None:
    drift = LatentDrift(is_unchanged=False, mean_shift=(0.1, -0.25), std_ratio=(1.0, 0.5))
    found = evaluation_set(
        Evaluation("old", {"psnr": [20.0, 30.0]}, is_start=True, step=0),
        Evaluation("new, and better", {"psnr": [21.0, math.nan]}, "000-abc", 40, False, {"frechet": 3.5}, drift),
        left_out=[("video 7", "it is damaged")],
    )
    write_evaluation(found, tmp_path)
    with (tmp_path / "videos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["video"], row["weights"], row["psnr"]) for row in rows] == [
        ("video 0", "old", "20"),
        ("video 1", "old", "30"),
        ("video 0", "new, and better", "21"),
        ("video 1", "new, and better", ""),
    ]
    again = read_evaluation(tmp_path / "evaluation.json")
    assert again.evaluations[0] == found.evaluations[0]
    assert again.left_out == found.left_out
    assert again.evaluations[1].latents == drift
    assert drift.largest_shift == 0.25
    assert math.isnan(again.evaluations[1].per_video["psnr"][1])


def test_evaluation_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"rows": []}')
    with pytest.raises(ConfigError, match=r"no evaluation of this version.*evaluate"):
        read_evaluation(tmp_path / "evaluation.json")
