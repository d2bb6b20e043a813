"""A real run on four real ranks of two nodes, under the events of a real scheduler."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from events import Events
from runs import job_id, losses, on_node, outcomes, steps_of_attempt, story, submit, wait_for_end
from slurm_cluster import SlurmCluster, wait_until

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.tokenizer.checkpoint_file import read_checkpoint_tensors

pytestmark = pytest.mark.slurm

STEPS = 120
CLUSTER = "{executor: slurm, partition: low, time_limit_min: 60, grace_s: 60, restarts: {backoff_s: 0.2}}"
START_LIMIT_S = 300


@pytest.fixture
def four_rank_job(quick_job: Path) -> Path:
    """The quick job as two ranks on each of two nodes."""
    text = quick_job.read_text().replace("cluster: local", f"cluster: {CLUSTER}")
    text = text.replace("devices: 2", "devices: 2, num_nodes: 2").replace("micro_batch_size: 2", "micro_batch_size: 1")
    quick_job.write_text(text.replace("max_steps: 24", f"max_steps: {STEPS}").replace("interval: 12", "interval: 60"))
    return quick_job


def test_a_run_through_preemptions_and_faults_repeats_losses_and_weights_of_an_unbroken_one(
    slurm_cluster, four_rank_job, tmp_path, events
):
    (unbroken,) = submit(four_rank_job, "unbroken")
    wait_for_end(slurm_cluster, unbroken, "COMPLETED", "FAILED")
    assert outcomes(unbroken) == ["finished"], story(slurm_cluster, unbroken)
    assert [step for step, _ in losses(unbroken)] == list(range(1, STEPS + 1))

    (broken,) = submit(four_rank_job, "broken")
    wait_for_steps_of_newest_attempt(slurm_cluster, broken, 3)
    for number in range(3):
        high = tmp_path / f"high_{number}.out"
        happens(slurm_cluster, broken, events, "preemption", lambda high=high: preempt(slurm_cluster, high))
    assert outcomes(broken) == ["preempted"] * 3 + [None], story(slurm_cluster, broken)
    happens(slurm_cluster, broken, events, "a rank is killed", lambda: kill_rank(slurm_cluster, broken))
    happens(slurm_cluster, broken, events, "the supervisor is killed", lambda: kill_supervisor(slurm_cluster, broken))
    lost = nodes(slurm_cluster, broken)[1]
    happens(slurm_cluster, broken, events, "a node loses its power", lambda: slurm_cluster.power_off(lost))
    wait_for_end(slurm_cluster, broken, "COMPLETED", "FAILED")

    told = outcomes(broken)
    assert told[:4] == ["preempted"] * 3 + ["killed"], story(slurm_cluster, broken)
    assert told[4] in ("supervisor_killed", "preempted"), "the requeue may reach the ranks first, and then they save"
    assert (told[5] in ("lost_ranks", "node_failure", "supervisor_killed"), told[-1]) == (True, "finished"), told
    states = [row.state for row in slurm_cluster.accounting(job_id(broken)) if row.job == job_id(broken)]
    assert states[:3] == ["PREEMPTED"] * 3 or states.count("PREEMPTED") + states.count("REQUEUED") >= 3, states
    weights, expected = (read_checkpoint_tensors(folder.checkpoint(STEPS)) for folder in (broken, unbroken))
    is_equal = losses(broken) == losses(unbroken)
    events.judge(broken, is_equal)
    assert is_equal
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def happens(cluster: SlurmCluster, folder: RunFolder, events: Events, name: str, what: Callable[[], object]) -> None:
    """Let something happen, and wait for a few steps after it."""
    with events.event(cluster, folder, name):
        what()
    wait_for_steps_of_newest_attempt(cluster, folder, 3)


def wait_for_steps_of_newest_attempt(cluster: SlurmCluster, folder: RunFolder, count: int) -> None:
    wait_until(
        lambda: len(steps_of_attempt(folder, folder.next_attempt() - 1)) >= count,
        f"{count} steps", START_LIMIT_S, lambda: story(cluster, folder),
    )  # fmt: skip


def nodes(cluster: SlurmCluster, folder: RunFolder) -> list[str]:
    return cluster.call("scontrol", "show", "hostnames", RunState.read(folder.state).attempts[-1].nodes).split()


def preempt(cluster: SlurmCluster, output: Path) -> None:
    high = cluster.sbatch("true", "--partition=high", "--nodes=4", "--exclusive", output=output)
    cluster.wait_for_state(high, "COMPLETED", limit_s=120)


def kill_rank(cluster: SlurmCluster, folder: RunFolder) -> None:
    """The first rank on the second node."""
    on_node(
        cluster,
        job_id(folder),
        nodes(cluster, folder)[1],
        "pkill",
        "-KILL",
        "-o",
        "-f",
        f"train --run-folder {folder.path} ",
    )


def kill_supervisor(cluster: SlurmCluster, folder: RunFolder) -> None:
    state = RunState.read(folder.state)
    on_node(cluster, job_id(folder), state.attempts[-1].host, "kill", "-KILL", str(state.pid))
