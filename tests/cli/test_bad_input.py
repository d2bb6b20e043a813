"""What a user gets wrong is one line on standard error, exit code 2, and nothing is started."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


def cosmos_hpc(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cosmos_hpc.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def refused(*arguments: str, cwd: Path) -> str:
    done = cosmos_hpc(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(cwd.glob("runs/*")), "something was started"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_stps=3"], "did you mean trainer.max_steps?"),
        (["data.num_frames=12"], "takes 1 + 8k: set 9 or 17"),
        (["data.global_batch_size=3"], "set 4"),
        (["sweep.grid={optim.speed: [1]}"], "optim.speed is no setting: there are optim.lr, "),
        (["data.path=/no/such/folder"], "/no/such/folder"),
        (["data.path=null"], "data.path is not set"),
        (
            ["data.num_workers=8"],
            "has 8 training videos, fewer than data.num_workers x ranks = 16: set data.num_workers",
        ),
        (["sweep.grid=3"], "takes lists by setting"),
        (["sweep.grid={name: [a, b]}"], "take it out"),
        (["optim.betas=[0.5]"], "optim.betas: "),
        (["model.jit_ckpt_pth=/no/weights"], "model.jit_ckpt_pth is /no/weights, which does not exist"),
    ],
)
def test_submit_refuses_before_anything_starts(quick_job, overrides, words):
    assert words in refused("submit", str(quick_job), *overrides, cwd=quick_job.parent)


def test_an_empty_split_and_a_folder_that_is_not_prepared_are_refused_with_the_mend(quick_job, dataset, tmp_path):
    no_val = tmp_path / "no_val"
    shutil.copytree(dataset, no_val)
    split = no_val / ".nv-meta" / "split.yaml"
    parts = yaml.safe_load(split.read_text())
    parts["split_parts"]["val"] = []
    split.write_text(yaml.safe_dump(parts))
    assert "val" in refused("submit", str(quick_job), f"data.path={no_val}", cwd=quick_job.parent)
    raw = tmp_path / "raw"
    raw.mkdir()
    assert "cosmos-hpc prepare" in refused("submit", str(quick_job), f"data.path={raw}", cwd=quick_job.parent)


@pytest.mark.parametrize("verb", ["status", "cancel", "logs", "report"])
def test_an_unknown_run_is_refused_with_those_that_there_are(tmp_path, verb):
    assert "is no run or experiment" in refused(verb, "roads/000", cwd=tmp_path)


def test_commands_on_files_that_are_not_there_are_refused(tmp_path, dataset):
    assert "nothing.mp4" in refused("pack", "nothing.mp4", "--out", "x", cwd=tmp_path)
    assert "nowhere" in refused("prepare", "nowhere", cwd=tmp_path)
    assert "takes three numbers" in refused("prepare", str(dataset), "--split", "9:1", cwd=tmp_path)
    (tmp_path / "weights").mkdir()
    assert "weights" in refused("export", "weights", "--out", "x", cwd=tmp_path)
    assert "weights" in refused("evaluate", "weights", "--data", str(dataset), cwd=tmp_path)


def test_plan_sends_nothing_and_prints_json_for_scripts(quick_job):
    import json

    done = cosmos_hpc("plan", str(quick_job), "--json", cwd=quick_job.parent)
    (row,) = json.loads(done.stdout)
    assert (row["steps"], row["ranks"], row["action"]) == (24, 2, "start")
    assert not (quick_job.parent / "runs").exists()


def test_help_and_version_answer(tmp_path):
    for arguments in (["--help"], ["submit", "--help"], ["--version"]):
        done = cosmos_hpc(*arguments, cwd=tmp_path)
        assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr
