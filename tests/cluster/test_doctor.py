"""`doctor` on a real SLURM: what it says of a job that is well, and its probe on two nodes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_until

from cosmos_hpc.config.run_folder import ExperimentFolder, runs_folder

pytestmark = pytest.mark.slurm

PROBED = ("host Python", "clocks", "shared folders", "ranks start", "packages", "all-reduce", "throughput",
          "training step", "checkpoint", "signal")  # fmt: skip


@pytest.fixture
def job(quick_job: Path) -> Path:
    """Two ranks on one node, without GPUs."""
    cluster = "{executor: slurm, partition: low, time_limit_min: 30, gpus_per_node: 0}"
    quick_job.write_text(quick_job.read_text().replace("cluster: local", f"cluster: {cluster}"))
    return quick_job


def doctor(job: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cosmos_hpc.cli", "doctor", str(job), *words, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def verdicts(doctor: "subprocess.Popen[str]", code: int) -> dict[str, tuple[str, str]]:
    """The worst of each check, once the command has ended with that code."""
    out, err = doctor.communicate(timeout=600)
    assert doctor.returncode == code, f"{doctor.returncode}: {out}{err}"
    order = ("pass", "warn", "fail")
    rows = sorted(json.loads(out), key=lambda row: order.index(row["verdict"]))
    return {row["check"]: (row["verdict"], row["message"]) for row in rows}


def test_a_job_that_is_well_passes_on_two_nodes_and_leaves_nothing(slurm_cluster: SlurmCluster, job: Path) -> None:
    found = verdicts(doctor(job, "--on-cluster"), code=0)
    print(json.dumps(found, indent=1))
    assert {name: found[name][0] for name in PROBED} == dict.fromkeys(PROBED, "pass")
    assert {name for name, (verdict, _) in found.items() if verdict != "pass"} <= {"grace"}
    assert "4 ranks on" in found["ranks start"][1]
    assert found["grace"][1].startswith("low gives a preempted job 15 s (GraceTime)")
    experiment = ExperimentFolder(runs_folder() / "quick")
    assert (list(experiment.doctor.iterdir()), experiment.runs()) == ([], [])
    assert not slurm_cluster.call("squeue", "--noheader")


def test_a_probe_whose_ranks_die_tells_why_and_where(slurm_cluster: SlurmCluster, job: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libcudart.so.12 is not in this image')\n")
    found = verdicts(doctor(job, "--on-cluster", f"cluster.environment={{PYTHONPATH: {tmp_path}/broken}}"), code=1)
    assert [name for name, (verdict, _) in found.items() if verdict == "fail"] == ["ranks start"]
    assert "libcudart.so.12 is not in this image" in found["ranks start"][1]
    (left,) = ExperimentFolder(runs_folder() / "quick").doctor.iterdir()
    assert str(left) in found["ranks start"][1]
    assert found["host Python"][0] == found["clocks"][0] == "pass"


def test_ctrl_c_cancels_the_probe(slurm_cluster: SlurmCluster, job: Path, tmp_path: Path) -> None:
    full = slurm_cluster.sbatch("sleep 600", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "f.out")
    slurm_cluster.wait_for_state(full, "RUNNING")
    waiting = doctor(job, "--on-cluster")
    wait_until(lambda: "quick-do" in slurm_cluster.call("squeue", "--noheader"), "the probe", 240, slurm_cluster.queue)
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=240)
    assert "the probe job is cancelled" in err
    assert waiting.returncode == 130
    assert "quick-do" not in slurm_cluster.call("squeue", "--noheader")


def test_faults_of_the_cluster_are_found_where_they_are_real(slurm_cluster: SlurmCluster, job: Path) -> None:
    faults = ("cluster.constraint=h100", "cluster.cpus_per_task=3", "cluster.grace_s=1800", "data.num_workers=5")
    found = verdicts(doctor(job, *faults), code=1)
    failed = {name: message for name, (verdict, message) in found.items() if verdict == "fail"}
    assert failed.keys() == {"CPUs", "sbatch", "warning time", "dataset"}
    assert "Invalid feature specification: set cluster.constraint" in failed["sbatch"]
