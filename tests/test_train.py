"""The guide's own line: torchrun, dotted settings, `--yes`; Ctrl-C; the same line again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import starting_tokenizer
from cosmos_hpc.tokenizer.weights import export_jit

SMALL = [
    "model.channels=4",
    "loss.lpips.weight=0",
    "data.micro_batch_size=2",
    "data.global_batch_size=4",
    "data.num_frames=9",
    "data.crop_size=32",
    "data.num_workers=1",
    "trainer.precision=32",
]


def torchrun(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "cosmos_hpc.train", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines() if line.endswith("}")]


def test_the_guides_line_trains_from_given_weights_and_goes_on_after_ctrl_c(tmp_path, dataset):
    start = starting_tokenizer(ModelConfig(channels=4), seed=7)
    export_jit(start, tmp_path / "weights")
    line = [
        "--yes",
        f"data.path={dataset}",
        f"model.jit_ckpt_pth={tmp_path / 'weights'}",
        "model.model=Cosmos-1.0-Tokenizer-CV8x8x8",
        "trainer.max_steps=24",
        *SMALL,
        "data.micro_batch_size=auto",
    ]
    first = torchrun(tmp_path, *line)
    experiment = ExperimentFolder(tmp_path / "runs" / "train")
    deadline = time.monotonic() + 180
    while not (experiment.runs() and experiment.runs()[0].metrics.exists() and steps(experiment.runs()[0])[-1:] > [2]):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # what a terminal does on Ctrl-C: to every process of the line
    said, _ = first.communicate(timeout=120)
    (run,) = experiment.runs()
    saved = run.newest_checkpoint()
    assert saved is not None, said
    assert f"interrupted: step {int(saved.name[5:])} is saved" in said
    assert "the same command goes on from there" in said
    assert saved < run.checkpoint(24)
    chosen = read_run_config(run.config).data.micro_batch_size
    assert f"data.micro_batch_size is {chosen} from here on" in said

    second = torchrun(tmp_path, *line)
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert f"resumed from {saved}" in said
    assert "micro_batch_size" not in said, "it was measured before"
    assert read_run_config(run.config).data.micro_batch_size == chosen
    assert experiment.runs() == [run]
    starts = json.loads(run.provenance.read_text())
    assert [start["compilation"] for start in starts] == ["eager: there is no GPU"] * 2
    assert steps(run) == list(range(25))
    assert run.newest_checkpoint() == run.checkpoint(24)


def test_a_wrong_setting_on_the_guides_line_is_told_in_one_line(tmp_path, dataset):
    done = torchrun(tmp_path, f"data.path={dataset}", "trainer.max_stps=3")
    said, _ = done.communicate(timeout=120)
    assert done.returncode != 0
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: command line: trainer.max_stps is no setting: did you mean trainer.max_steps?"]
    assert not (tmp_path / "runs").exists()
