import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment
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
        ("{grid: {data.num_workers: [1, 2]}}", "the same run twice"),
        ("{grid: {data.num_frames: [9, 10]}}", "data.num_frames is 10"),
        ("{max_parallel: 0}", "sweep.max_parallel is 0"),
    ],
)
def test_impossible_sweep_is_refused_with_the_mend(tmp_path, sweep, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        runs(tmp_path, sweep)
