"""How runs are put into arrays, and what of a script can be read back."""

import os
from pathlib import Path

import pytest

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.batch import Batch, batches, run_of, single_scripts

CODE = Path("/shared/runs/my roads/code/0123abcd")


@pytest.fixture(autouse=True)
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitit writes scripts only where there is such a command; it is never called."""
    double = tmp_path / "bin" / "srun"
    double.parent.mkdir()
    double.touch(0o755)
    monkeypatch.setenv("PATH", f"{double.parent}:{os.environ['PATH']}")


def run(**choices: object) -> RunConfig:
    return resolve(load_experiment(None, ["cluster.executor=slurm", "data.global_batch_size=64"]), choices)


def folder(index: int) -> RunFolder:
    return RunFolder(Path(f"/shared/runs/my roads/{index:03d}-0123abcd"))


def sent(*configs: RunConfig, max_parallel: int | None = None, largest: int = 1001, num_living: int = 0) -> list[Batch]:
    runs = [(config, folder(index)) for index, config in enumerate(configs)]
    return batches(runs, CODE, max_parallel, largest=largest, num_living=num_living)


def limits(*sizes: int, max_parallel: int | None, num_living: int = 0) -> list[tuple[int | None, bool]]:
    """Of arrays of these sizes, each of which asks for a time limit of its own."""
    configs = [run(**{"cluster.time_limit_min": 60 + group}) for group, size in enumerate(sizes) for _ in range(size)]
    found = sent(*configs, max_parallel=max_parallel, num_living=num_living)
    assert [len(batch.runs) for batch in found] == list(sizes)
    return [(batch.max_parallel, batch.follows) for batch in found]


def test_arrays_share_the_places_or_follow_each_other():
    assert limits(4, 4, max_parallel=None) == [(None, False)] * 2
    assert limits(4, 4, max_parallel=8) == [(None, False)] * 2, "all of them fit at once"
    assert limits(4, 4, 4, max_parallel=8) == [(3, False), (3, False), (2, False)]
    assert limits(4, 4, max_parallel=1) == [(1, False), (1, True)]
    assert limits(4, 4, max_parallel=2, num_living=1) == [(2, True), (2, True)]
    assert limits(1, max_parallel=2, num_living=1) == [(None, False)]


def test_an_array_is_cut_where_the_cluster_ends_it():
    found = sent(*[run()] * 7, largest=3, max_parallel=2)
    assert [len(batch.runs) for batch in found] == [3, 3, 1]
    assert ["#SBATCH --array=0-2%2" in batch.text for batch in found] == [True, True, False]
    assert [batch.follows for batch in found] == [False, True, True]
    assert [folder.path.name[:3] for batch in found for folder in batch.runs] == [f"{index:03d}" for index in range(7)]


def test_ids_are_those_of_the_elements():
    alone, (array,) = sent(run())[0], sent(run(), run())
    assert alone.ids("7") == {"my roads/000-0123abcd": "7"}
    assert array.ids("7") == {"my roads/000-0123abcd": "7_0", "my roads/001-0123abcd": "7_1"}


def test_a_script_tells_which_run_is_whose(tmp_path):
    (array,), (alone,) = sent(run(), run(), run()), sent(run())
    script = tmp_path / "array.sh"
    script.write_text(array.text)
    assert [run_of(script, f"12_{index}") for index in range(4)] == [*array.runs, None]
    single = tmp_path / "alone.sh"
    single.write_text(alone.text)
    assert run_of(single, "12") == folder(0)
    assert run_of(tmp_path / "gone.sh", "12") is None
    other = tmp_path / "other.sh"
    other.write_text("#!/bin/bash\nsleep 60\n")
    assert run_of(other, "12") is None


def test_the_same_runs_make_the_same_script_and_others_another_one():
    assert sent(run())[0].script == sent(run())[0].script
    assert sent(run())[0].script != sent(run(**{"cluster.time_limit_min": 30}))[0].script


def test_run_sh_is_the_script_of_that_run_alone():
    runs = [(run(), folder(0)), (run(), folder(1)), (run(**{"cluster.time_limit_min": 30}), folder(2))]
    texts = single_scripts(runs, CODE)
    assert texts == {one: batches([(config, one)], CODE, None, largest=9)[0].text for config, one in runs}


@pytest.mark.parametrize("number", [1, 2])
def test_jobs_run_the_snapshot_whatever_folder_sbatch_was_called_in(number):
    (batch,) = sent(*[run()] * number)
    lines = batch.text.splitlines()
    start = next(index for index, line in enumerate(lines) if "-m cosmos_hpc.job " in line)
    assert f"export PYTHONPATH='{CODE}'${{PYTHONPATH:+:$PYTHONPATH}}" in lines[:start]
    assert any(line.startswith("export PYTHONSAFEPATH=1") for line in lines[:start])
