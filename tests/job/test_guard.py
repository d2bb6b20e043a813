"""When the other nodes give a job back to the queue, by what doubles of squeue and scontrol tell them."""

import os
import subprocess
from pathlib import Path

import pytest

from cosmos_hpc.job.guard import SCRIPT

SQUEUE = """#!/bin/bash
echo "squeue $*" >> asked
answer=$(head -n 1 answers); sed -i 1d answers
[ "$answer" = "fails" ] && exit 1
[ "$answer" = "over" ] && kill $PPID
echo "$answer"
"""

SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && { echo "scontrol $*" >> asked; exit; }
[ "$3" = unknown ] && exit 1
tr , "\\n" <<< "$3"
"""


@pytest.fixture
def orders(tmp_path: Path):
    """What the script orders after these answers of squeue, for job 7_2 whose first node is n1."""
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}

    def given(*answers: str) -> list[str]:
        (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in (*answers, "over")))
        (tmp_path / "asked").write_text("")
        script = ["bash", "-c", SCRIPT, "guard", "7_2", "n1", "0"]
        subprocess.run(script, cwd=tmp_path, env=environment, check=False, timeout=60)
        return [line for line in (tmp_path / "asked").read_text().splitlines() if "requeue" in line]

    return given


def test_a_job_without_its_first_node_goes_back_to_the_queue_by_the_elements_own_id(orders):
    assert orders("n1,n2,n3", "n2,n3") == ["scontrol requeue Incomplete 7_2"]
    assert orders("n11,n2") == ["scontrol requeue Incomplete 7_2"], "another node whose name begins alike"


def test_what_is_not_known_or_not_running_is_left_alone(orders):
    assert orders("n1,n2", "n2,n1", "fails", "", "unknown") == []
