"""What SLURM's commands are given and what is made of their words, by doubles of them that print what they are told."""

import os
from pathlib import Path

import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch.queue import own_job, submitted_at
from cosmos_hpc.launch.submit import outside_of_a_job, sbatch, shielded


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a shell script in the place of a command."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("said", "job"),
    [("4711", "4711"), ("4711;lab", "4711"), ("Welcome to lab, 3 nodes are down\n4711;lab\nBye", "4711")],
)
def test_the_number_is_found_among_a_wrappers_words(tool, said, job):
    tool("sbatch", f"cat <<'END'\n{said}\nEND")
    assert sbatch("run.sh") == job


def test_words_without_a_number_are_passed_on(tool):
    tool("sbatch", "echo Your job is queued")
    with pytest.raises(ConfigError, match=r"'Your job is queued' and no job's number: see `squeue --me`"):
        sbatch("run.sh")


OUTER = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_MEM_PER_NODE": "9",
         "SBATCH_EXPORT": "NONE", "SUBMITIT_EXECUTOR": "slurm"}  # fmt: skip


def test_a_job_that_is_sent_from_inside_another_one_is_not_told_of_it(tool, monkeypatch, tmp_path):
    tool("sbatch", f"env > {tmp_path}/told; echo 8")
    for name, value in {**OUTER, "HARMLESS": "yes"}.items():
        monkeypatch.setenv(name, value)
    assert sbatch("run.sh") == "8"
    told = (tmp_path / "told").read_text().splitlines()
    assert f"SLURM_CONF={os.devnull}" in told
    assert "HARMLESS=yes" in told
    assert not [line for line in told if line.partition("=")[0] in OUTER]
    with shielded():
        assert not OUTER.keys() & os.environ.keys()
        assert os.environ["HARMLESS"] == "yes"
    assert OUTER.items() <= os.environ.items()


def test_outside_of_a_job_nothing_is_held_back(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SBATCH_ACCOUNT", "vision")
    assert outside_of_a_job() == dict(os.environ)


def test_how_the_caller_likes_times_and_queues_to_be_shown_does_not_count(tool, monkeypatch):
    for name, value in {"SLURM_TIME_FORMAT": "relative", "SQUEUE_PARTITION": "mine", "SQUEUE_FORMAT": "%i"}.items():
        monkeypatch.setenv(name, value)
    refuse = '[ "$SLURM_TIME_FORMAT$SQUEUE_PARTITION$SQUEUE_FORMAT" = standard ] || exit 1'
    tool("squeue", f"{refuse}; echo 2026-01-01T10:00:00")
    tool("scontrol", f"{refuse}; echo JobState=RUNNING Restarts=0 StartTime=2026-01-01T10:00:00 TimeLimit=01:00:00")
    assert submitted_at("7") > 0
    assert own_job("7").state == "RUNNING"


@pytest.mark.parametrize(("restarts", "is_ours"), [(0, True), (1, False)])
def test_a_job_that_runs_again_is_not_its_earlier_starts_any_more(tool, monkeypatch, restarts, is_ours):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    tool("scontrol", f"echo JobState=RUNNING Restarts={restarts}")
    assert own_job("7").is_ours == is_ours
