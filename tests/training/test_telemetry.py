import errno
import json
import os
import time

import pytest

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig, WandbConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.training import heartbeat
from cosmos_hpc.training.telemetry import StepMetrics, Telemetry, ValidationScores


def metrics(step: int, **changes: object) -> StepMetrics:
    return StepMetrics(step, 0.5 / step, 0.5 / step, 1e-3, 1.0, 0.2, 0.05, 40.0, 8 * step)._replace(**changes)


def telemetry(folder: RunFolder, rank: int = 0, attempt: int = 0, wandb: str = "disabled") -> Telemetry:
    return Telemetry(folder, RunConfig(wandb=WandbConfig(mode=wandb)), Rank(rank, rank, 2), attempt)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    path = tmp_path / "quick" / "000-abc"
    path.mkdir(parents=True)
    return RunFolder(path)


def lines(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_each_step_is_written_once_when_a_resume_goes_back(folder):
    first = telemetry(folder)
    first.resume_at(0, 0)
    first.log_start(ValidationScores(7.5))
    for step in range(1, 6):
        first.log(metrics(step))
        if step == 3:
            length = first.metrics_bytes
    first.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "loss": 0.1')  # the line that a kill tore
    second = telemetry(folder, attempt=1)
    second.resume_at(3, length)
    for step in range(4, 7):
        second.log(metrics(step, validation=ValidationScores(20.0, val_psnr_ema=21.0)) if step == 6 else metrics(step))
    second.close()
    written = lines(folder)
    assert [line["step"] for line in written] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["attempt"] for line in written] == [0, 0, 0, 0, 1, 1, 1]
    assert written[0] == {"step": 0, "val_psnr": 7.5, "attempt": 0}
    assert "val_psnr" not in written[5]
    assert (written[6]["val_psnr"], written[6]["val_psnr_ema"]) == (20.0, 21.0)
    assert "validation" not in written[6]
    assert written[2]["clips_per_s"] == 40.0
    cut = folder.cut_metrics(1).read_text().splitlines()
    assert [json.loads(line)["step"] for line in cut[:2]] == [4, 5], "what was cut off is lost"
    assert cut[2] == '{"step": 6, "loss": 0.1'


def test_a_roll_back_cuts_the_lines_of_the_steps_that_come_again(folder):
    voice = telemetry(folder)
    voice.resume_at(0, 0)
    voice.log(metrics(1))
    length = voice.metrics_bytes
    voice.log(metrics(2, loss=float("nan"), grad_norm=float("inf"), skipped=True))
    assert lines(folder)[1]["skipped"] is True
    assert "loss" not in lines(folder)[1]
    voice.roll_back_to(1, length)
    voice.log(metrics(2))
    voice.close()
    assert [(line["step"], "skipped" in line) for line in lines(folder)] == [(1, False), (2, False)]


def test_only_rank_0_writes(folder):
    other = telemetry(folder, rank=1)
    other.resume_at(0, 0)
    other.phase("train", 1)
    other.log(metrics(1))
    other.close()
    assert list(folder.path.iterdir()) == []


def test_heartbeat_tells_what_goes_on_and_where_time_went(folder):
    voice = telemetry(folder)
    voice.resume_at(3, 0)
    voice.phase("train", 3)
    voice.note_step_times([0.5, 1.5], 3)
    while not folder.heartbeat.exists():  # a thread writes it
        time.sleep(0.01)
    before = json.loads(folder.heartbeat.read_text())
    voice.log(metrics(4, data_time_s=100.0))
    voice.phase("save", 4)
    voice.tick()
    facts = voice.facts(4)
    voice.close()
    beat = json.loads(folder.heartbeat.read_text())
    assert (beat["phase"], beat["step"], beat["step_times_s"]) == ("save", 4, [0.5, 1.5])
    assert (beat["resumed_step"], beat["saved_step"]) == (3, 4)
    assert beat["beats"] > before["beats"]
    assert facts["seconds"]["data"] == 100.0
    assert facts["seconds"]["train"] < 0, "the wait for clips counts twice"
    assert facts["seconds"] == beat["seconds"]


def test_a_disk_that_was_full_for_a_while_does_not_end_the_signs_of_life(folder, monkeypatch):
    def full(path, text):
        tried.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tried: list = []
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)
    with monkeypatch.context() as disk:
        disk.setattr(heartbeat, "write_atomically", full)
        voice = telemetry(folder)
        voice.phase("train", 3)
        while len(tried) < 3:
            time.sleep(0.01)
    while not folder.heartbeat.exists():  # there is room again, and nothing new to say
        time.sleep(0.01)
    assert json.loads(folder.heartbeat.read_text())["phase"] == "train"
    voice.close()
