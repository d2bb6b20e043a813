"""Faults of ranks and nodes, several runs side by side; ranks are stand-ins that start at once."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import cosmos_hpc, job_id, outcomes, steps, story, submit, wait_for_end, wait_for_step
from slurm_cluster import SlurmCluster, wait_until

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, RunState
from cosmos_hpc.launch.status import run_status

pytestmark = pytest.mark.slurm

STAND_IN = Path(__file__).parent / "stand_in"


class Fault(NamedTuple):
    """What the stand-in is told to do."""

    ending: str
    """What the supervisor has to make of it."""

    name: str
    """In the table of events."""


FAULTS = {
    "die": Fault("killed", "a rank is killed"),
    "hang": Fault("hang", "a rank hangs (found after 10 s of silence)"),
    "quota": Fault("disk_full", "disk quota"),
}

BAD_GPU = """#!/bin/sh
# A double of nvidia-smi: one node has a GPU that lost data
count=0; [ "$SLURMD_NODENAME" = {node} ] && count=2
echo "0, GPU-0, $count, No, No"
"""


def job(quick_job: Path, **cluster: object) -> Path:
    """A job of two stand-ins on two nodes that count 30 steps in some 6 s."""
    settings = {"executor": "slurm", "partition": "low", "time_limit_min": 30, **cluster}
    environment = {"PYTHONPATH": str(STAND_IN), **settings.pop("environment", {})}
    text = quick_job.read_text().replace("cluster: local", f"cluster: {settings | {'environment': environment}}")
    text = text.replace("devices: 2", "devices: 1, num_nodes: 2").replace("max_steps: 24", "max_steps: 30")
    path = quick_job.with_name("faults.yaml")
    path.write_text(text)
    return path


def attempts(folder: RunFolder) -> list[AttemptRecord]:
    return RunState.read(folder.state).attempts


def test_a_rank_that_dies_hangs_or_meets_a_quota_is_told_and_starts_again_in_its_job(slurm_cluster, quick_job, events):
    settings = {"restarts": {"backoff_s": 0.2}, "hang": {"first_limit_s": 10.0}}
    runs = {
        fault: submit(job(quick_job, environment={"STAND_IN_FAULT": fault}, **settings), fault)[0] for fault in FAULTS
    }
    refusing = job(quick_job, environment={"STAND_IN_FAULT": "refuse"})
    (refused,) = submit(refusing, "refused")
    wait_for_end(slurm_cluster, refused, "COMPLETED", "FAILED")
    assert (outcomes(refused), run_status(refused).status) == (["user_error"], "failed"), story(slurm_cluster, refused)
    ended = slurm_cluster.job(job_id(refused))
    assert (ended.state, ended.exit_code) == ("FAILED", "1:0"), "the supervisor's own end is the job's"
    assert "sent 0 of 1 runs, 1 failed" in cosmos_hpc("submit", refusing, "name=refused")
    assert "sent 1 of 1" in cosmos_hpc("submit", refusing, "name=refused", "--retry", "failed")
    for fault, folder in runs.items():
        wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
        assert outcomes(folder) == [FAULTS[fault].ending, "finished"], story(slurm_cluster, folder)
        assert (steps(folder)[-1], slurm_cluster.job(job_id(folder)).restarts) == (30, 0)
        events.note(slurm_cluster, folder, FAULTS[fault].name)
    dead, full = attempts(runs["die"])[0], attempts(runs["quota"])[0]
    assert (dead.failed_rank, dead.failed_host) == (1, slurm_cluster.nodes[1])
    assert full.failed_rank == 1
    told = cosmos_hpc("explain", "die")
    assert f"ended: killed on rank 1 of {slurm_cluster.nodes[1]}" in told
    assert "then: went on in the same job" in told
    wait_until(lambda: "SLURM's accounts: " in cosmos_hpc("explain", "die"), "the accounting", 30)
    assert "OSError: [Errno 122] Disk quota exceeded" in cosmos_hpc("explain", "quota")
    assert re.search(
        r"hang.*rank 0 in fail \(train.py:\d+\); rank 1 in leave_together \(train.py", attempts(runs["hang"])[0].message
    )
    for rank, frame in enumerate(("in fail", "in leave_together")):
        stacks = runs["hang"].rank_log(0, rank).read_text()
        assert frame in stacks
        assert "in main" in stacks, "down to where it began"
    wait_for_end(slurm_cluster, refused, "COMPLETED", "FAILED")
    assert outcomes(refused) == ["user_error", "finished"], story(slurm_cluster, refused)


def test_a_node_with_a_bad_gpu_is_found_before_the_start_and_avoided_from_then_on(slurm_cluster, quick_job, tmp_path):
    bad = slurm_cluster.nodes[0]
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(BAD_GPU.format(node=bad))
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}:{slurm_cluster.environment['PATH']}"
    (folder,) = submit(job(quick_job, environment={"PATH": path}), "bad_gpu")
    wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
    assert outcomes(folder) == ["gpu_error", "finished"], story(slurm_cluster, folder)
    first, second = attempts(folder)
    assert first.message == f"gpu error: {bad}: GPU 0 has ecc.errors.uncorrected.volatile.total = 2"
    assert (first.bad_nodes, first.followed) == ([bad], f"back to the queue, without {bad}")
    assert excluded(slurm_cluster, folder) == bad
    assert second.nodes == slurm_cluster.call("scontrol", "show", "hostlist", ",".join(slurm_cluster.nodes[1:3]))
    assert slurm_cluster.job(job_id(folder)).restarts == 1


def test_a_node_without_power_and_a_time_limit_that_is_hit_twice(slurm_cluster, quick_job, events):
    """Runs of which some lose a node, and one that knows nothing of it on two others."""
    lost, aside = slurm_cluster.nodes[1], ",".join(slurm_cluster.nodes[2:])
    own = {"time_limit_min": 1, "grace_s": 30, "directives": {"nodelist": aside}}
    (limited,) = submit(job(quick_job, **own), "limited", "trainer.max_steps=400")
    settings = job(quick_job, restarts={"backoff_s": 0.2})
    (elastic,) = submit(settings, "elastic", "trainer.min_nodes=1", "trainer.max_steps=300")
    (moved,) = submit(settings, "moved", "trainer.max_steps=300")
    settings = job(quick_job, restarts={"backoff_s": 0.2}, exclude=f"{slurm_cluster.nodes[0][:-1]}[1]")
    (headless,) = submit(settings, "headless", "trainer.min_nodes=1", "trainer.max_steps=300")
    for folder in (elastic, moved, headless):
        wait_for_step(slurm_cluster, folder, 12)
    assert attempts(headless)[0].host == lost
    assert {attempts(folder)[0].nodes for folder in (elastic, moved)} == {slurm_cluster.job(job_id(moved)).nodes}
    ask_for_a_checkpoint(slurm_cluster, limited)
    with (
        events.event(
            slurm_cluster, headless, "the first node loses its power, with trainer.min_nodes", ranks="stand-in"
        ),
        events.event(slurm_cluster, moved, "a node loses its power (noticed after 10 s)", ranks="stand-in"),
        events.event(slurm_cluster, elastic, "a node loses its power, with trainer.min_nodes", ranks="stand-in"),
    ):
        slurm_cluster.power_off(lost)
    assert attempts(elastic)[-1].nodes == slurm_cluster.nodes[0], story(slurm_cluster, elastic)
    slurm_cluster.wait_for_restart(job_id(limited), 2, limit_s=240)
    slurm_cluster.call("scontrol", "update", f"JobId={job_id(limited)}", "TimeLimit=30")
    for folder in (elastic, moved, headless):
        wait_for_end(slurm_cluster, folder, "COMPLETED", "FAILED")
        assert (outcomes(folder)[0], outcomes(folder)[-1]) == ("node_failure", "finished"), story(slurm_cluster, folder)
        assert steps(folder)[-1] == 300
    assert slurm_cluster.job(job_id(elastic)).restarts == 0
    assert [slurm_cluster.job(job_id(folder)).restarts for folder in (moved, headless)] == [1, 1]
    assert lost not in attempts(moved)[-1].nodes
    assert "NODE_FAIL" in [row.state for row in slurm_cluster.accounting(job_id(moved))]
    states = [row.state for row in slurm_cluster.accounting(job_id(headless))]
    assert ("RESIZING" in states, "NODE_FAIL" in states) == (True, False), "SLURM went on without its first node"
    aside = slurm_cluster.call("scontrol", "show", "hostlist", ",".join(slurm_cluster.nodes[2:]))
    assert attempts(headless)[-1].nodes == aside, "as many as asked for, again"
    assert "node failure: the job lost a node" in cosmos_hpc("explain", "headless")
    wait_for_end(slurm_cluster, limited, "COMPLETED", "FAILED")
    assert set(outcomes(limited)[:-1]) == {"time_limit"}, story(slurm_cluster, limited)
    assert steps(limited) == list(range(1, 401))
    assert slurm_cluster.job(job_id(limited)).restarts == len(outcomes(limited)) - 1
    for attempt in range(2):
        events.note(slurm_cluster, limited, "time limit (1 minute)", attempt)


def ask_for_a_checkpoint(cluster: SlurmCluster, folder: RunFolder) -> None:
    wait_for_step(cluster, folder, 3)
    attempt = folder.next_attempt()
    said = cosmos_hpc("checkpoint-now", folder.label, "--wait")
    assert "saved in " in said or folder.next_attempt() > attempt, said  # its time limit may have come meanwhile


def excluded(cluster: SlurmCluster, folder: RunFolder) -> str:
    return re.search(r"ExcNodeList=(\S+)", cluster.call("scontrol", "show", "job", "--oneliner", job_id(folder)))[1]
