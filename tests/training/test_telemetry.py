import json

import pytest

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig, WandbConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.training.telemetry import StepMetrics, Telemetry


def metrics(step: int, val_psnr: float | None = None) -> StepMetrics:
    return StepMetrics(step, 0.5 / step, 0.5 / step, 1e-3, 1.0, 0.2, 0.05, 40.0, 8 * step, val_psnr)


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
    first.resume_at(0)
    first.log_start(7.5)
    for step in range(1, 6):
        first.log(metrics(step))
    first.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "loss": 0.1')  # the line that a kill tore
    second = telemetry(folder, attempt=1)
    second.resume_at(3)
    for step in range(4, 7):
        second.log(metrics(step, val_psnr=20.0 if step == 6 else None))
    second.close()
    written = lines(folder)
    assert [line["step"] for line in written] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["attempt"] for line in written] == [0, 0, 0, 0, 1, 1, 1]
    assert written[0] == {"step": 0, "val_psnr": 7.5, "attempt": 0}
    assert "val_psnr" not in written[5]
    assert written[6]["val_psnr"] == 20.0
    assert written[2]["clips_per_s"] == 40.0


def test_only_rank_0_writes(folder):
    other = telemetry(folder, rank=1)
    other.resume_at(0)
    other.phase("train", 1)
    other.log(metrics(1))
    other.close()
    assert list(folder.path.iterdir()) == []


def test_heartbeat_tells_phase_and_step_and_is_written_seldom(folder):
    voice = telemetry(folder)
    voice.phase("train", 1)
    voice.phase("save", 2)
    beat = json.loads(folder.heartbeat.read_text())
    assert (beat["phase"], beat["step"]) == ("train", 1)


def test_wandb_offline_keeps_a_run_in_the_folder(folder, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    voice = telemetry(folder, wandb="offline")
    voice.resume_at(0)
    voice.log(metrics(1))
    voice.close()
    assert list(folder.path.glob("wandb/offline-run-*/*.wandb"))
