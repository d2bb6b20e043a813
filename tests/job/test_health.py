"""The health gate over real checks; srun, nvidia-smi and the nodes are doubles, on this machine."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from cosmos_hpc.config.cluster_schema import ClusterConfig
from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import Ending
from cosmos_hpc.config.schema import RunConfig, TrainerConfig
from cosmos_hpc.job import health
from cosmos_hpc.job.health import NodeReport, check_nodes, judge

SRUN = """#!{python} -S
# A double of srun: one process a node of --nodelist, with the variables of a task; DEAD names nodes without power.
import os, subprocess, sys, time
words = sys.argv[1:]
command = words[words.index({python!r}):]
nodes = [word for word in words if word.startswith("--nodelist=")][0].partition("=")[2].split(",")
tasks = []
for index, node in enumerate(nodes):
    if node not in os.environ.get("DEAD", "").split(","):
        own = dict(SLURMD_NODENAME=node, SLURM_PROCID=str(index), PATH=os.environ["PATH_OF_" + node])
        tasks.append(subprocess.Popen(command, env=dict(os.environ, **own)))
for task in tasks:
    task.wait()
if len(tasks) < len(nodes):
    time.sleep(600)
"""

SMI = """#!/bin/sh
# A double of nvidia-smi
{answer}
"""

WELL = "echo '0, GPU-a, 0, No, No'; echo '1, GPU-b, [N/A], [N/A], [N/A]'"
LIMIT_S = 60.0
"""Long, so that a busy machine is no bad node; a silent node is waited for so long."""


class Lab:
    """Nodes, each with tools of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._monkeypatch = root, monkeypatch
        tools = root / "bin"
        tools.mkdir()
        (tools / "srun").write_text(SRUN.format(python=sys.executable))
        (tools / "srun").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.folder = RunFolder(root / "runs" / "trial" / "000-0123abcd")
        self.folder.path.mkdir(parents=True)

    def node(self, name: str, nvidia_smi: str | None = WELL) -> None:
        """A node; `nvidia_smi` is the body of its tool, none where it has none."""
        tools = self._root / name
        tools.mkdir()
        if nvidia_smi is not None:
            (tools / "nvidia-smi").write_text(SMI.format(answer=nvidia_smi))
            (tools / "nvidia-smi").chmod(0o755)
        self._monkeypatch.setenv(f"PATH_OF_{name}", f"{tools}:/bin:/usr/bin")

    def problems(self, *nodes: str, limit_s: float = LIMIT_S) -> list[tuple[str, Ending, str]]:
        run = RunConfig(
            data=DataConfig(global_batch_size=2 * len(nodes)),
            trainer=TrainerConfig(devices=2, num_nodes=len(nodes)),
            cluster=ClusterConfig(executor="slurm", health_check_s=limit_s),
        )
        with (self._root / "gate.log").open("a") as output:
            found = check_nodes(run, self.folder, nodes, output)
        return [(problem.host, problem.ending, problem.what) for problem in found]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


def test_nodes_that_are_well_pass_and_leave_nothing_behind(lab: Lab) -> None:
    for name in ("node1", "node2", "node3"):
        lab.node(name)
    assert lab.problems("node1", "node2", "node3") == [], (lab._root / "gate.log").read_text()
    assert list(lab.folder.path.iterdir()) == []


def test_nodes_without_any_nvidia_smi_are_taken_for_nodes_without_gpus(lab: Lab) -> None:
    lab.node("node1", None)
    lab.node("node2", None)
    assert lab.problems("node1", "node2") == []


def test_bad_gpus_are_named_with_their_node(lab: Lab) -> None:
    lab.node("node1")
    lab.node("node2", "echo '0, GPU-a, 3, No, No'; echo '1, GPU-b, 0, Yes, No'")
    lab.node("node3", "echo '0, GPU-a, 0, No, No'")
    lab.node("node4", "echo 'Unable to determine the device handle for GPU 0000:1B:00.0: GPU is lost.'; exit 15")
    lab.node("node5", None)
    assert lab.problems("node1", "node2", "node3", "node4", "node5") == [
        ("node2", Ending.GPU_ERROR, "GPU 0 has ecc.errors.uncorrected.volatile.total = 3"),
        ("node2", Ending.GPU_ERROR, "GPU 1 has remapped_rows.pending = Yes"),
        ("node3", Ending.GPU_ERROR, "1 GPUs are there, 2 are needed"),
        ("node4", Ending.GPU_ERROR, "nvidia-smi says: Unable to determine the device handle for GPU 0000:1B:00.0: "
                                    "GPU is lost."),
        ("node5", Ending.GPU_ERROR, "has no nvidia-smi, as the other nodes have"),
    ]  # fmt: skip


def test_a_driver_that_knows_no_such_counters_is_asked_for_less(lab: Lab) -> None:
    lab.node("node1", 'case "$*" in *remapped*) echo "Field x is not a valid field to query."; exit 2;; esac; ' + WELL)
    assert lab.problems("node1") == []


def test_a_silent_node_is_bad_and_the_others_are_not(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("node1", "node2", "node3"):
        lab.node(name)
    monkeypatch.setenv("DEAD", "node2")
    assert lab.problems("node1", "node2", "node3", limit_s=8.0) == [
        ("node2", Ending.NODE_FAILURE, "did not answer the health gate in 8 s")
    ]


def test_where_no_node_answers_the_gate_itself_is_to_blame(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.node("node1")
    monkeypatch.setenv("DEAD", "node1")
    assert lab.problems("node1", limit_s=1.0) == []


def told(host: str, **more: object) -> NodeReport:
    return NodeReport(**{"host": host, "clock_s": 0.0, "has_told": True, "is_sum_right": True, **more})


def test_clock_scratch_and_sum_count_against_a_node_and_a_folder_that_is_bad_from_everywhere_does_not() -> None:
    full = ["/runs/a has no room for a checkpoint"]
    reports = [
        told("node1", folder=full),
        told("node2", folder=full, clock_s=-86400.0),
        told("node3", folder=full, scratch=["/dev/shm has 0 MiB left"]),
        told("node4", folder=full, is_sum_right=False),
    ]
    found = judge(["node1", "node2", "node3", "node4"], reports, 10.0)
    assert [(problem.host, problem.what) for problem in found] == [
        ("node2", "its clock is -86400 s off"),
        ("node3", "/dev/shm has 0 MiB left"),
        ("node4", "did not end the health gate in 10 s"),
    ]
    found = judge(["node1", "node2"], [told("node1", folder=full), told("node2")], 10.0)
    assert [problem.host for problem in found] == ["node1"], "node2 can write there"


def test_a_folder_that_can_not_be_written_from_one_node_is_told_by_that_node(lab: Lab) -> None:
    check = runpy.run_path(str(Path(health.__file__).with_name("node_check.py")))["folder_problems"]
    assert check("/gone", 0) == ["/gone can't be written from here: No such file or directory"]
    assert "/proc can't be written from here" in check("/proc", 0)[0]
    assert check(str(lab.folder.path), 0) == []
    assert check(str(lab.folder.path), 2**60) == [f"{lab.folder.path} has no room for a checkpoint"]
