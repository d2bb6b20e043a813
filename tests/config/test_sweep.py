import re

import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment
from cosmos_hpc.config.schema import OptimConfig, TrainerConfig
from cosmos_hpc.config.sweep import expand


def runs(tmp_path, sweep: str, *overrides: str):
    job = tmp_path / "job.yaml"
    job.write_text(f"data: {{path: /x}}\nsweep: {sweep}\n")
    return [run.config for run in expand(load_experiment(job, overrides))]


def test_grid_varies_its_last_key_fastest(tmp_path):
    made = runs(tmp_path, "{grid: {optim.lr: [1e-4, 3e-4], trainer.seed: [0, 1]}}")
    assert [(run.optim.lr, run.trainer.seed) for run in made] == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1)]


def test_zip_walks_its_lists_side_by_side_within_each_grid_point(tmp_path):
    made = runs(tmp_path, "{grid: {optim.lr: [1e-4, 3e-4]}, zip: {data.num_frames: [9, 17], data.crop_size: [64, 32]}}")
    chosen = [(run.optim.lr, run.data.num_frames, run.data.crop_size) for run in made]
    assert chosen == [(1e-4, 9, 64), (1e-4, 17, 32), (3e-4, 9, 64), (3e-4, 17, 32)]


def test_rows_of_a_list_may_name_different_settings(tmp_path):
    made = runs(tmp_path, "{list: [{optim.lr: 1e-4}, {optim.lr: 3e-4, trainer.seed: 5}, {trainer.seed: 6}]}")
    lr, seed = OptimConfig().lr, TrainerConfig().seed
    assert [(run.optim.lr, run.trainer.seed) for run in made] == [(1e-4, seed), (3e-4, 5), (lr, 6)]


def test_forms_multiply_the_last_one_varying_fastest(tmp_path):
    sweep = (
        "{grid: {trainer.seed: [0, 1]}, zip: {optim.lr: [1e-4, 3e-4], optim.warmup_steps: [10, 30]}, "
        "list: [{optim.weight_decay: 0}, {optim.eps: 1e-6}], random: {count: 2, settings: {trainer.max_steps: [5, 6]}}}"
    )
    job = tmp_path / "job.yaml"
    job.write_text(f"data: {{path: /x}}\nsweep: {sweep}\n")
    chosen = [run.choices for run in expand(load_experiment(job, ["sweep.random.seed=1"]))]
    assert len(chosen) == 2 * 2 * 2 * 2
    drawn = [row["trainer.max_steps"] for row in chosen]
    assert drawn == drawn[:2] * 8, "each combination meets the same draws"
    keys = ("trainer.seed", "optim.lr", "optim.warmup_steps")
    rows = [(*(row[key] for key in keys), "optim.eps" in row) for row in chosen[::2]]
    assert rows == [
        (seed, lr, warmup, is_second)
        for seed in (0, 1) for lr, warmup in ((1e-4, 10), (3e-4, 30)) for is_second in (False, True)
    ]  # fmt: skip


DRAWN = (
    "{optim.lr: {log_uniform: [1e-5, 1e-2]}, optim.weight_decay: {uniform: [0, 0.5]}, trainer.seed: {integers: [1, 3]}}"
)


def test_draws_are_the_same_each_time_and_a_larger_count_keeps_them(tmp_path):
    few, again, more, other = (
        [(run.optim.lr, run.optim.weight_decay, run.trainer.seed) for run in
         runs(tmp_path, f"{{random: {{count: {count}, seed: {seed}, settings: {DRAWN}}}}}")]
        for count, seed in ((20, 0), (20, 0), (400, 0), (20, 1))
    )  # fmt: skip
    assert few == again == more[:20]
    assert not set(few) & set(other)
    rates, decays, seeds = zip(*more, strict=True)
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 100 < sum(rate < 1e-4 for rate in rates) < 167, "a third of them in each power of ten"
    assert all(0 <= decay <= 0.5 for decay in decays)
    assert 160 < sum(decay < 0.25 for decay in decays) < 240
    assert set(seeds) == {1, 2, 3}


def test_another_setting_beside_them_does_not_change_draws(tmp_path):
    alone = runs(tmp_path, "{random: {count: 5, settings: {optim.lr: {uniform: [0.1, 0.2]}}}}")
    beside = runs(tmp_path, "{random: {count: 5, settings: {trainer.seed: [1, 2], optim.lr: {uniform: [0.1, 0.2]}}}}")
    assert [run.optim.lr for run in alone] == [run.optim.lr for run in beside]


def test_an_override_takes_its_key_out_of_list_and_random(tmp_path):
    sweep = "{list: [{optim.lr: 1e-4, trainer.seed: 1}, {optim.lr: 3e-4, trainer.seed: 2}]}"
    assert [(run.optim.lr, run.trainer.seed) for run in runs(tmp_path, sweep, "optim.lr=7e-4")] == [
        (7e-4, 1),
        (7e-4, 2),
    ]
    assert len(runs(tmp_path, "{random: {count: 3, settings: {optim.lr: [1e-4]}}}", "optim.lr=7e-4")) == 1


def test_values_that_fit_only_together_are_checked_together(tmp_path):
    made = runs(tmp_path, "{zip: {data.num_frames: [9, 10], trainer.seed: [0, 1]}}", "data.num_frames=9")
    assert len(made) == 2
    model = (
        "{zip: {model.model: [Cosmos-0.1-Tokenizer-CV4x8x8, Cosmos-0.1-Tokenizer-CV8x8x8], data.num_frames: [5, 9]}}"
    )
    assert [run.data.num_frames for run in runs(tmp_path, model)] == [5, 9]


def test_without_a_sweep_there_is_one_run(tmp_path):
    assert len(runs(tmp_path, "{}")) == 1


def test_an_override_takes_its_key_out_of_the_sweep(tmp_path):
    made = runs(tmp_path, "{grid: {optim.lr: [1e-4, 3e-4], trainer.seed: [0, 1]}}", "optim.lr=7e-4")
    assert [(run.optim.lr, run.trainer.seed) for run in made] == [(7e-4, 0), (7e-4, 1)]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("{grid: {optim.lrr: [1, 2]}}", "did you mean optim.lr?"),
        ("{grid: {optim.lr: []}}", "has no values"),
        ("{zip: {optim.lr: [1, 2], trainer.seed: [1]}}", "make them equal"),
        ("{grid: {optim.lr: [1]}, zip: {optim.lr: [2]}}", "keep one"),
        ("{grid: {optim.lr: [1e-4, 1e-4]}}", "the same run twice"),
        ("{grid: {trainer.num_nodes: [1, 2, 1]}}", "the same run twice"),
        ("{grid: {data.num_frames: [9, 10]}}", "data.num_frames is 10"),
        ("{max_parallel: 0}", "sweep.max_parallel is 0"),
        ("{grid: {optim.lr: [fast]}}", "optim.lr: Value 'fast'"),
        ("{list: [{optim.lrr: 1}]}", "did you mean optim.lr?"),
        ("{list: [{}]}", "empty row"),
        ("{list: {optim.lr: 1}}", "sweep.list"),
        ("{list: [{optim.lr: 1}], grid: {optim.lr: [2]}}", "optim.lr in grid and in list: keep one"),
        ("{random: {count: 3}}", "count 3 and 0 settings"),
        ("{random: {settings: {optim.lr: [1]}}}", "count 0 and 1 settings"),
        ("{random: {count: 2, settings: {optim.lr: 1}}}", "optim.lr is 1: give a list, or a range"),
        ("{random: {count: 2, settings: {optim.lr: {log: [1, 2]}}}}", "take log_uniform?"),
        ("{random: {count: 2, settings: {optim.lr: {uniform: [2, 1]}}}}", "the lower one first"),
        ("{random: {count: 2, settings: {optim.lr: {log_uniform: [0, 1]}}}}", "begins above 0"),
        ("{random: {count: 2, settings: {trainer.seed: {integers: [0, 1.5]}}}}", "two whole numbers"),
        ("{random: {count: 2, settings: {trainer.sed: [1]}}}", "trainer.seed?"),
    ],
)
def test_impossible_sweep_is_refused_with_the_mend(tmp_path, sweep, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        runs(tmp_path, sweep)
