"""Who ends and who comes back, under every way to track processes; ranks are stand-ins that start at once."""

import time
from pathlib import Path

import pytest
from runs import cosmos_hpc, job_id, outcomes, steps, story, submit, wait_for_end, wait_for_step
from slurm_cluster import Flavor, SlurmCluster, wait_until
from slurm_files import CRED_EXPIRE_S

from cosmos_hpc.config.run_folder import RunFolder, runs_folder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.launch.status import run_status

pytestmark = pytest.mark.slurm

FLAVORS = [Flavor(), Flavor("linuxproc"), Flavor(preempts_by_user_signal=True)]
ON_EACH_FLAVOR = pytest.mark.parametrize("slurm_cluster", FLAVORS, indirect=True, ids=str)
STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture
def counting_job(quick_job: Path) -> Path:
    """A job of two ranks on two nodes that count 60 steps in some 12 s."""
    cluster = f"{{executor: slurm, partition: low, time_limit_min: 30, environment: {{PYTHONPATH: {STAND_IN}}}}}"
    text = quick_job.read_text().replace("cluster: local", f"cluster: {cluster}")
    quick_job.write_text(
        text.replace("devices: 2", "devices: 1, num_nodes: 2").replace("max_steps: 24", "max_steps: 60")
    )
    return quick_job


@ON_EACH_FLAVOR
def test_a_preempted_run_leaves_by_itself_and_goes_on_where_it_was(slurm_cluster, counting_job, tmp_path):
    (folder,) = submit(counting_job, "preempted")
    wait_for_step(slurm_cluster, folder, 3)
    high = slurm_cluster.sbatch("sleep 1", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "high.out")
    slurm_cluster.wait_for_state(high, "COMPLETED")
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    first = "time_limit" if slurm_cluster.flavor.preempts_by_user_signal else "preempted"
    assert outcomes(folder) == [first, "finished"], story(slurm_cluster, folder)
    assert steps(folder) == list(range(1, 61))
    assert slurm_cluster.job(job_id(folder)).restarts == 1


@ON_EACH_FLAVOR
def test_a_cancelled_run_saves_and_never_comes_back(slurm_cluster, counting_job):
    (folder,) = submit(counting_job, "cancelled")
    wait_for_step(slurm_cluster, folder, 3)
    assert "asked to save and stop" in cosmos_hpc("cancel", "cancelled")
    wait_for_end(slurm_cluster, folder, "CANCELLED")
    assert run_status(folder).status == "cancelled", story(slurm_cluster, folder)
    assert outcomes(folder) == ["cancelled"], story(slurm_cluster, folder)
    assert folder.newest_checkpoint() == folder.checkpoint(steps(folder)[-1])
    assert slurm_cluster.job(job_id(folder)).restarts == 0


def test_a_run_that_somebody_ends_by_scancel_saves_and_never_comes_back(slurm_cluster, counting_job):
    (folder,) = submit(counting_job, "ended")
    wait_for_step(slurm_cluster, folder, 3)
    slurm_cluster.call("scancel", job_id(folder))
    wait_for_end(slurm_cluster, folder, "CANCELLED")
    time.sleep(CRED_EXPIRE_S + 5)  # until then a requeued job may not start
    assert (slurm_cluster.job(job_id(folder)).state, slurm_cluster.job(job_id(folder)).restarts) == ("CANCELLED", 0)
    assert folder.newest_checkpoint() == folder.checkpoint(steps(folder)[-1])
    assert run_status(folder).is_over


def test_a_run_is_pending_between_two_starts_and_is_not_sent_twice(slurm_cluster, counting_job, tmp_path):
    high = slurm_cluster.sbatch(
        "sleep 60", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "high.out"
    )
    slurm_cluster.wait_for_state(high, "RUNNING")
    (folder,) = submit(counting_job, "waiting")
    assert (run_status(folder).status, run_status(folder).job.state) == ("pending", "PENDING")
    assert "sent 0 of 1" in cosmos_hpc("submit", counting_job, "name=waiting")
    assert "will not start" in cosmos_hpc("cancel", "waiting")
    wait_for_end(slurm_cluster, folder, "CANCELLED")
    assert run_status(folder).status == "cancelled"
    slurm_cluster.call("scancel", high)

    submit(counting_job, "waiting")
    wait_for_step(slurm_cluster, folder, 3)
    assert run_status(folder).status == "running"
    slurm_cluster.call("scontrol", "requeue", job_id(folder))  # by somebody else
    wait_until(lambda: run_status(folder).status == "pending", "the queue", 30, lambda: run_status(folder))
    assert not run_status(folder).is_over
    assert "sent 0 of 1" in cosmos_hpc("submit", counting_job, "name=waiting")
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    assert run_status(folder).status == "finished", story(slurm_cluster, folder)
    assert slurm_cluster.job(job_id(folder)).restarts == 1


def test_only_the_element_that_was_requeued_starts_again(slurm_cluster, counting_job):
    counting_job.write_text(counting_job.read_text() + "sweep: {grid: {trainer.seed: [0, 1, 2]}, max_parallel: 3}\n")
    planned = cosmos_hpc("plan", counting_job, "name=array", "--script")
    assert not (runs_folder() / "array").exists()
    folders = submit(counting_job, "array")
    assert {file.read_text() for file in folders[0].experiment.scripts.glob("*.sh")} == {planned}
    assert "#SBATCH --array=0-2%3" in planned
    last = folders[-1]  # its raw id is the array's
    wait_for_step(slurm_cluster, last, 3)
    slurm_cluster.call("scancel", "--signal=USR2", job_id(last))
    for folder in folders:
        wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    told = {folder.label: (outcomes(folder), slurm_cluster.job(job_id(folder)).restarts) for folder in folders}
    assert list(told.values()) == [(["finished"], 0)] * 2 + [(["time_limit", "finished"], 1)], told


def test_a_killed_supervisor_comes_back_through_the_queue(slurm_cluster, counting_job):
    (folder,) = submit(counting_job, "killed")
    wait_for_step(slurm_cluster, folder, 3)
    kill_supervisor(slurm_cluster, folder)
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    assert outcomes(folder) == ["supervisor_killed", "finished"], story(slurm_cluster, folder)
    assert steps(folder)[-1] == 60


def kill_supervisor(cluster: SlurmCluster, folder: RunFolder) -> None:
    """From inside its node, since process ids are the node's own."""
    state = RunState.read(folder.state)
    inside = ["srun", f"--jobid={job_id(folder)}", "--overlap", "--mem=1", "--nodes=1", "--ntasks=1"]
    cluster.call(*inside, f"--nodelist={state.attempts[-1].host}", "kill", "-KILL", str(state.pid))
