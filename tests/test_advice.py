"""What `plan` warns of."""

import json
import subprocess
import sys

import pytest

from cosmos_hpc.advice import advice
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder


def warnings(folder, *overrides: str) -> str:
    return "\n".join(advice(resolve(load_experiment(None, overrides), {}), RunFolder(folder)))


@pytest.mark.parametrize(
    ("trainable", "is_warned_of"),
    [
        ("all", True),
        ("encoder", True),
        ("decoder", False),
        ("[decoder.up.*, post_quant_conv.*]", False),
        ("[decoder.*, quant_conv.*]", True),
        ("['*.conv_out.*']", True),
    ],
)
def test_an_encoder_that_moves_is_warned_of(tmp_path, trainable, is_warned_of):
    assert ("released Cosmos world models" in warnings(tmp_path, f"model.trainable={trainable}")) == is_warned_of


def test_validation_by_the_clock_keeps_to_its_share_by_itself(tmp_path):
    assert "validation" not in warnings(tmp_path, "trainer.limit_val_batches=1000")


def test_validation_by_steps_that_takes_too_long_is_warned_of_with_what_would_do(tmp_path):
    often = ["trainer.val_check_interval=100", "trainer.devices=8", "data.global_batch_size=8", "data.num_streams=8"]
    assert "validation" not in warnings(tmp_path, *often, "trainer.limit_val_batches=1")
    # eight batches of one clip, seen by two networks at half a step each: eight steps in 108
    told = warnings(tmp_path, *often)
    assert "every 100 steps (trainer.val_check_interval) takes about 7% of the time: set 267 or more" in told
    assert "14% of the time" in warnings(tmp_path, *often, "data.general_path=/x")


def test_what_the_run_measured_counts_more_than_what_was_estimated(tmp_path):
    lines = [{"step": step, "step_time_s": 2.0} for step in (1, 2, 3)]
    lines[1]["validation_time_s"] = 20.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = warnings(tmp_path, "trainer.val_check_interval=90")
    assert "takes about 10% of the time, as measured in this run: set 333 or more" in told


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ("container.image=some.sqsh", "container.image is some.sqsh, but cluster.executor is local"),
        ("container.mode=enroot", "container.mode is enroot, but cluster.executor is local"),
    ],
)
def test_a_container_that_a_local_run_does_without_is_told(tmp_path, container, words):
    image = "container.image=some.sqsh"
    assert words in warnings(tmp_path, "cluster=local", image, container)
    assert "container" not in warnings(tmp_path, "cluster=local")


def test_plan_tells_of_data_that_submit_would_refuse_and_that_is_not_still_to_come(quick_job):
    def told(*overrides):
        command = [sys.executable, "-m", "cosmos_hpc.cli", "plan", quick_job, *overrides]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    assert "warning: data.path is /not/there" in told("data.path=/not/there")
    assert "/not/there" not in told("data.path=/not/there", "after=pack_roads")


def test_plan_prints_each_warning_once(quick_job):
    command = [sys.executable, "-m", "cosmos_hpc.cli", "plan", quick_job, "sweep.grid={optim.lr: [1e-3, 1e-4]}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert [line.partition(":")[0] for line in told.splitlines()] == ["warning", "warning"]
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [len(row["warnings"]) for row in rows] == [2, 2]
