"""Real runs on real ranks of two nodes, under the events of a real scheduler."""

from pathlib import Path

import pytest
import torch
from runs import job_id, losses, outcomes, story, submit, wait_for_end, wait_for_step

from cosmos_hpc.tokenizer.checkpoint_file import read_checkpoint_tensors

pytestmark = pytest.mark.slurm

CLUSTER = "{executor: slurm, partition: low, time_limit_min: 30, grace_s: 60}"


@pytest.fixture
def two_node_job(quick_job: Path) -> Path:
    """The quick job as one rank on each of two nodes."""
    text = quick_job.read_text().replace("cluster: local", f"cluster: {CLUSTER}")
    quick_job.write_text(text.replace("devices: 2", "devices: 1, num_nodes: 2"))
    return quick_job


def test_a_run_preempted_on_two_nodes_repeats_losses_and_weights_of_an_unbroken_one(
    slurm_cluster, two_node_job, tmp_path
):
    (unbroken,) = submit(two_node_job, "unbroken")
    wait_for_end(slurm_cluster, unbroken, "COMPLETED", "FAILED")
    assert outcomes(unbroken) == ["finished"], story(slurm_cluster, unbroken)
    assert [step for step, _ in losses(unbroken)] == list(range(1, 25))

    (preempted,) = submit(two_node_job, "preempted")
    for restart, step in ((1, 3), (2, 13)):
        wait_for_step(slurm_cluster, preempted, step)
        high = slurm_cluster.sbatch(
            "true", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / f"high_{restart}.out"
        )
        slurm_cluster.wait_for_state(high, "COMPLETED")
        slurm_cluster.wait_for_restart(job_id(preempted), restart)
    wait_for_end(slurm_cluster, preempted, "COMPLETED", "FAILED")
    assert outcomes(preempted) == ["preempted", "preempted", "finished"], story(slurm_cluster, preempted)
    assert losses(preempted) == losses(unbroken)
    weights, expected = (read_checkpoint_tensors(folder.checkpoint(24)) for folder in (preempted, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
