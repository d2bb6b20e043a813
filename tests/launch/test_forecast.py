"""What `plan` predicts, from runs as they lie in their folders."""

import json
import os
from pathlib import Path

import pytest

from cosmos_hpc.config.load import load_experiment, resolve, to_yaml
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.forecast import Forecast, forecasts

SIZE = ["trainer.devices=4", "trainer.num_nodes=2", "data.global_batch_size=16", "trainer.max_steps=1000"]


def run(*overrides: str) -> RunConfig:
    return resolve(load_experiment(None, ["cluster.executor=slurm", *SIZE, *overrides]), {})


def write(folder: RunFolder, config: RunConfig, *speeds: float, age_s: float = 0) -> None:
    """A run that has trained; its checkpoint has 1,000 bytes."""
    checkpoint = folder.checkpoint(len(speeds))
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(1000))
    folder.config.write_text(to_yaml(config))
    lines = [json.dumps({"step": step, "clips_per_s": speed}) for step, speed in enumerate(speeds, start=1)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 9')
    written = folder.metrics.stat().st_mtime - age_s
    os.utime(folder.metrics, (written, written))


@pytest.fixture
def new(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "roads" / "000-0123abcd")


def test_time_and_size_follow_from_the_last_measurement_of_the_same_settings(tmp_path, new):
    write(RunFolder(tmp_path / "old" / "000-a"), run(), *[4.0] * 6, age_s=60)
    write(RunFolder(tmp_path / "newer" / "000-b"), run("optim.lr=1e-5"), 0.1, 8.0, 8.0, 8.0, 9.0)
    write(RunFolder(tmp_path / "other" / "000-c"), run("data.crop_size=128"), *[90.0] * 6)
    (found,) = forecasts([run("optim.lr=3e-5", "loss.lpips.weight=0.3")], [new], tmp_path)
    # 1,000 steps x 16 clips at 8 clips/s on 2 x 4 GPUs; three checkpoints and the best one
    assert found == Forecast(8.0, "newer/000-b", 2000.0, 2000 / 3600 * 8, 4000)


def test_steps_that_a_run_has_saved_are_not_counted_again(tmp_path, new):
    write(new, run(), *[8.0] * 6)
    new.checkpoint(750).mkdir()
    (found,) = forecasts([run()], [new], tmp_path)
    assert found.wall_s == 500.0


@pytest.mark.parametrize(
    "other",
    ["trainer.devices=8", "data.crop_size=128", "data.micro_batch_size=2", "loss.lpips.weight=0", "model.channels=64",
     "trainer.precision=32", "cluster.partition=a100", "cluster.executor=local"],
)  # fmt: skip
def test_other_settings_that_decide_the_speed_say_nothing(tmp_path, new, other):
    write(RunFolder(tmp_path / "old" / "000-a"), run(other), *[4.0] * 6)
    (found,) = forecasts([run()], [new], tmp_path)
    assert (found.clips_per_s, found.wall_s, found.gpu_hours) == (None, None, None)


def test_a_run_that_measures_its_micro_batch_will_be_as_fast_as_one_that_has(tmp_path, new):
    write(RunFolder(tmp_path / "old" / "000-a"), run("data.micro_batch_size=2"), *[4.0] * 6, age_s=60)
    write(RunFolder(tmp_path / "newer" / "000-b"), run("data.micro_batch_size=1"), *[8.0] * 6)
    found = forecasts([run("data.micro_batch_size=auto"), run("data.micro_batch_size=2")], [new, new], tmp_path)
    assert [each.clips_per_s for each in found] == [8.0, 4.0]


def test_too_few_steps_and_a_broken_folder_say_nothing(tmp_path, new):
    write(RunFolder(tmp_path / "old" / "000-a"), run(), *[4.0] * 4)
    broken = RunFolder(tmp_path / "old" / "001-b")
    write(broken, run(), *[4.0] * 6)
    broken.config.write_text("trainer: {}: 3\n")
    (found,) = forecasts([run()], [new], tmp_path)
    assert (found.wall_s, found.checkpoint_bytes) == (None, 4000)
