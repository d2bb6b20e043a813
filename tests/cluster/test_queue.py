"""What the poller says of jobs, in one call for all of them."""

import time

import pytest
from slurm_cluster import wait_until

from cosmos_hpc.config.errors import ConfigError
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


def test_a_thousand_pending_runs_are_told_in_one_call(slurm_cluster, tmp_path):
    array = slurm_cluster.sbatch("sleep 60", "--array=0-999%1", output=tmp_path / "array.out")
    elements = [f"{array}_{index}" for index in range(1000)]
    started = time.monotonic()
    found = job_statuses(elements)
    print(f"{len(found)} runs in {time.monotonic() - started:.2f} s")
    assert sum(status.state == "PENDING" for status in found.values()) >= 999


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
