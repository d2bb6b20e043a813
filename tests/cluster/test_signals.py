"""Who ends and who comes back, under every way to track processes; ranks are stand-ins that start at once."""

import time
from pathlib import Path

import pytest
from runs import cosmos_hpc, job_id, outcomes, steps, story, submit, wait_for_end, wait_for_step
from slurm_cluster import Flavor, wait_until
from slurm_files import CRED_EXPIRE_S

from cosmos_hpc.config.run_folder import RunFolder, runs_folder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.launch.status import run_status

pytestmark = pytest.mark.slurm

FLAVORS = [Flavor(), Flavor("linuxproc"), Flavor(preempts_by_user_signal=True)]
ON_EACH_FLAVOR = pytest.mark.parametrize("slurm_cluster", FLAVORS, indirect=True, ids=str)
STAND_IN = Path(__file__).parent / "stand_in"

LONG = "trainer.max_steps=3000"
"""For runs that are ended before."""

SOME = "trainer.max_steps=90"
"""For runs that something happens to, on a busy machine as well."""


@pytest.fixture
def counting_job(quick_job: Path) -> Path:
    """A job of two ranks on two nodes that count 30 steps in some 6 s."""
    cluster = f"{{executor: slurm, partition: low, time_limit_min: 30, environment: {{PYTHONPATH: {STAND_IN}}}}}"
    text = quick_job.read_text().replace("cluster: local", f"cluster: {cluster}")
    quick_job.write_text(
        text.replace("devices: 2", "devices: 1, num_nodes: 2").replace("max_steps: 24", "max_steps: 30")
    )
    return quick_job


@ON_EACH_FLAVOR
def test_a_preempted_run_leaves_by_itself_and_goes_on_where_it_was(slurm_cluster, counting_job, tmp_path, events):
    (folder,) = submit(counting_job, "preempted", SOME)
    wait_for_step(slurm_cluster, folder, 3)
    with events.event(slurm_cluster, folder, "preemption", ranks="stand-in"):
        high = slurm_cluster.sbatch(
            "true", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "high.out"
        )
        slurm_cluster.wait_for_state(high, "COMPLETED")
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    assert outcomes(folder) == ["preempted", "finished"], story(slurm_cluster, folder)
    assert steps(folder) == list(range(1, 91))
    assert slurm_cluster.job(job_id(folder)).restarts == 1


@ON_EACH_FLAVOR
def test_runs_ended_by_cancel_or_by_somebodys_scancel_save_and_never_come_back(slurm_cluster, counting_job):
    (cancelled,), (ended,) = submit(counting_job, "cancelled", LONG), submit(counting_job, "ended", LONG)
    for folder in (cancelled, ended):
        wait_for_step(slurm_cluster, folder, 3)
    assert "asked to save and stop" in cosmos_hpc("cancel", "cancelled")
    slurm_cluster.call("scancel", job_id(ended))
    for folder in (cancelled, ended):
        wait_for_end(slurm_cluster, folder, "CANCELLED")
    time.sleep(CRED_EXPIRE_S + 5)  # until then a requeued job may not start
    for folder in (cancelled, ended):
        told = RunState.read(folder.state).status, outcomes(folder), run_status(folder).status
        assert told == ("cancelled", ["cancelled"], "cancelled"), story(slurm_cluster, folder)
        assert folder.newest_checkpoint() == folder.checkpoint(steps(folder)[-1])
        job = slurm_cluster.job(job_id(folder))
        assert (job.state, job.restarts) == ("CANCELLED", 0)


def test_a_run_is_pending_between_two_starts_and_is_not_sent_twice(slurm_cluster, counting_job, tmp_path):
    high = slurm_cluster.sbatch(
        "sleep 600", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "high.out"
    )
    slurm_cluster.wait_for_state(high, "RUNNING")
    (folder,) = submit(counting_job, "waiting", SOME)
    assert (run_status(folder).status, run_status(folder).job.state) == ("pending", "PENDING")
    assert "sent 0 of 1" in cosmos_hpc("submit", counting_job, "name=waiting", SOME)
    assert "waits in the queue: " in cosmos_hpc("explain", "waiting")
    assert "waits in the queue already" in cosmos_hpc("requeue", "waiting")
    assert "will not start" in cosmos_hpc("cancel", "waiting")
    wait_for_end(slurm_cluster, folder, "CANCELLED")
    assert run_status(folder).status == "cancelled"
    slurm_cluster.call("scancel", high)

    submit(counting_job, "waiting", SOME)
    wait_for_step(slurm_cluster, folder, 3)
    assert run_status(folder).status == "running"
    slurm_cluster.call("scontrol", "requeue", job_id(folder))  # by somebody else
    wait_until(lambda: run_status(folder).status == "pending", "the queue", 30, lambda: run_status(folder))
    assert not run_status(folder).is_over
    assert "sent 0 of 1" in cosmos_hpc("submit", counting_job, "name=waiting", SOME)
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    assert run_status(folder).status == "finished", story(slurm_cluster, folder)
    assert slurm_cluster.job(job_id(folder)).restarts == 1


def test_only_the_element_of_an_array_that_is_requeued_starts_again(slurm_cluster, counting_job):
    sweep = (
        "sweep: {zip: {trainer.seed: [0, 1, 2, 3, 4, 5], trainer.max_steps: [9, 9, 9, 9, 9, 60]}, max_parallel: 2}\n"
    )
    counting_job.write_text(counting_job.read_text() + sweep)
    planned = cosmos_hpc("plan", counting_job, "name=array", "--script")
    assert not (runs_folder() / "array").exists()
    assert "#SBATCH --array=0-5%2" in planned
    folders = submit(counting_job, "array")
    assert {file.read_text() for file in folders[0].experiment.scripts.glob("*.sh")} == {planned}
    last = folders[-1]  # its raw id is the array's
    wait_for_step(slurm_cluster, last, 3)
    assert "asked to save and to start again" in cosmos_hpc("requeue", last.label)
    for folder in folders:
        wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    told = {folder.label: (outcomes(folder), slurm_cluster.job(job_id(folder)).restarts) for folder in folders}
    expected = [(["finished"], 0)] * 6
    expected[-1] = (["requeued", "finished"], 1)
    assert list(told.values()) == expected, told
    assert most_at_once(folders) == 2


def most_at_once(folders: list[RunFolder]) -> int:
    """How many runs had living ranks at the same time."""
    spans = [(one.started, one.ended) for folder in folders for one in RunState.read(folder.state).attempts]
    return max(sum(begin <= start < end for begin, end in spans) for start, _ in spans)
