"""What the poller says of jobs, in one call for all of them."""

import json
import resource
import time

import pytest
from runs import cosmos_hpc
from slurm_cluster import wait_until

from cosmos_hpc.config.cluster_schema import ClusterConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.queue import _accounted, cancel_jobs, job_statuses, requeue_own_job

pytestmark = pytest.mark.slurm


def test_jobs_are_told_from_queue_and_accounting_through_requeue_and_cancel(slurm_cluster, tmp_path):
    array = slurm_cluster.sbatch("sleep 60", "--array=0-3%2", "--requeue", output=tmp_path / "array.out")
    done = slurm_cluster.sbatch("exit 3", output=tmp_path / "done.out")
    elements = [f"{array}_{index}" for index in range(4)]
    slurm_cluster.wait_for_state(done, "FAILED")
    slurm_cluster.wait_for_state(elements[0], "RUNNING")
    slurm_cluster.wait_for_state(elements[1], "RUNNING")
    found = job_statuses([*elements, done, "999999"])
    assert [found[job].state for job in elements] == ["RUNNING", "RUNNING", "PENDING", "PENDING"]
    assert found[elements[2]].reason == "JobArrayTaskLimit"
    assert found[elements[0]].nodes in slurm_cluster.nodes
    assert (found["999999"].state, found["999999"].is_over) == ("UNKNOWN", True)
    assert (found[done].state, found[done].is_over) == ("FAILED", True)

    assert requeue_own_job(elements[0])
    assert not requeue_own_job(elements[0]), "it was not RUNNING any more"
    again = job_statuses(elements)
    assert again[elements[0]].state in ("COMPLETING", "PENDING")
    assert [again[job].state for job in elements[1:]] == ["RUNNING", "PENDING", "PENDING"]
    assert not any(status.is_over for status in again.values())

    cancel_jobs([array])
    wait_until(
        lambda: all(job_statuses(elements)[job].state == "CANCELLED" for job in elements),
        "the cancel",
        30,
        lambda: job_statuses(elements),
    )
    assert all(status.is_over for status in job_statuses(elements).values())


def test_a_thousand_pending_runs_are_told_in_one_call(slurm_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = slurm_cluster.sbatch("sleep 60", "--array=0-999%1", "--hold", output=tmp_path / "array.out")
    settings = to_yaml(RunConfig(cluster=ClusterConfig(executor="slurm")))
    for index in range(1000):
        folder = RunFolder(tmp_path / "runs" / "thousand" / f"{index:03d}-{index:08x}")
        folder.path.mkdir(parents=True)
        folder.config.write_text(settings)
        folder.pending_mark.write_text(f"{array}_{index}")
    began, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = json.loads(cosmos_hpc("status", "thousand", "--json"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    print(f"{len(rows)} runs in {time.monotonic() - began:.2f} s, {own_s:.2f} s of them on the processor")
    assert [row["status"] for row in rows] == ["pending"] * 1000
    assert {row["job"]["state"] for row in rows} == {"PENDING"}
    assert {row["job"]["reason"] for row in rows} == {"JobHeldUser"}


def test_a_controller_that_does_not_answer_is_an_error_and_not_an_empty_queue(slurm_cluster, tmp_path, monkeypatch):
    conf = slurm_cluster.folder / "etc" / "slurm.conf"
    elsewhere = tmp_path / "slurm.conf"
    elsewhere.write_text(conf.read_text().replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1"))
    monkeypatch.setenv("SLURM_CONF", str(elsewhere))
    with pytest.raises(ConfigError, match=r"squeue failed: .*scontrol ping"):
        job_statuses(["1"])


def test_what_the_queue_has_forgotten_is_told_by_the_accounting(slurm_cluster, tmp_path):
    array = slurm_cluster.sbatch("exit 3", "--array=0-3%1", "--hold", output=tmp_path / "array.out")
    slurm_cluster.call("scontrol", "release", f"{array}_1")
    slurm_cluster.wait_for_state(f"{array}_1", "FAILED")
    slurm_cluster.call("scancel", array)
    elements = [f"{array}_{index}" for index in range(4)]
    wait_until(lambda: states(_accounted, elements) == ["CANCELLED", "FAILED", "CANCELLED", "CANCELLED"],
               "the accounting", 30, lambda: _accounted(elements))  # fmt: skip
    assert states(_accounted, elements) == states(job_statuses, elements)


def states(asked, jobs: list[str]) -> list[str]:
    found = asked(jobs)
    return [found[job].state for job in jobs if job in found]
