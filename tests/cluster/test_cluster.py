"""The cluster that the other tests stand on: nodes, preemption, accounting, the power switch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import APT_LINE, SlurmCluster, wait_until

pytestmark = pytest.mark.slurm

HEARS_TERM = """
echo started $SLURM_RESTART_COUNT
srun bash -c 'trap "echo heard TERM; exit 0" TERM; for i in {1..600}; do sleep 0.1; done'
sleep 60
"""


def test_four_nodes_run_tasks_side_by_side_under_their_own_names(slurm_cluster):
    said = slurm_cluster.call("srun", "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", "-c",
                              "echo $(hostname) $CUDA_VISIBLE_DEVICES")  # fmt: skip
    assert sorted(said.splitlines()) == sorted(f"{node} 0,1" for node in slurm_cluster.nodes for _ in range(2))


def test_a_job_of_high_preempts_one_of_low_which_comes_back_by_itself(slurm_cluster, tmp_path):
    output = tmp_path / "low.out"
    low = slurm_cluster.sbatch(HEARS_TERM, "--nodes=4", "--exclusive", "--requeue", "--open-mode=append", output=output)
    slurm_cluster.wait_for_state(low, "RUNNING")
    wait_until(lambda: "started" in output.read_text(), "the low job's script", 30)
    high = slurm_cluster.sbatch("sleep 1", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "high.out")
    slurm_cluster.wait_for_state(high, "COMPLETED")
    slurm_cluster.wait_for_restart(low, 1)
    wait_until(lambda: "started 1" in output.read_text(), "the second start", 30, output.read_text)
    assert "heard TERM" in output.read_text()
    wait_until(
        lambda: [row.state for row in slurm_cluster.accounting(low) if row.job == low] == ["PREEMPTED", "RUNNING"],
        "both runs in the accounting", 30, lambda: slurm_cluster.accounting(low),
    )  # fmt: skip


def test_a_node_without_power_loses_its_tasks_and_its_job_moves_on(slurm_cluster, tmp_path):
    job = slurm_cluster.sbatch("hostname; sleep 600", "--requeue", output=tmp_path / "job.out")
    node = slurm_cluster.wait_for_state(job, "RUNNING").nodes
    wait_until(lambda: node in (tmp_path / "job.out").read_text(), "the script", 30)
    slurm_cluster.power_off(node)
    assert slurm_cluster.wait_for_restart(job, 1, limit_s=90).nodes != node
    slurm_cluster.power_on(node)
    slurm_cluster.call("scancel", job)
    slurm_cluster.calm()


def test_a_killed_test_session_leaves_no_daemon_and_the_next_one_removes_its_folder(slurm_cluster):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from slurm_cluster import *\n" \
           "cluster = SlurmCluster(Flavor(), num_nodes=1); cluster.start()\n" \
           "print(cluster.folder, flush=True); input()"  # fmt: skip
    session = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = Path(session.stdout.readline().strip())
    assert named(folder), "no daemon was started"
    session.kill()
    session.wait()
    wait_until(lambda: not named(folder), "the end of all daemons", 10, lambda: named(folder))
    assert folder.exists()
    again = SlurmCluster(slurm_cluster.flavor, num_nodes=1)
    again.start()
    again.stop()
    assert not folder.exists()
    assert not again.folder.exists()
    assert not Path("/dev/shm", folder.name).exists()


@pytest.mark.parametrize(
    ("required", "code", "words"),
    [({}, 0, "1 skipped"), ({"COSMOS_HPC_REQUIRES_CLUSTER": "1"}, 1, "COSMOS_HPC_REQUIRES_CLUSTER is set, but no ")],
)
def test_a_machine_without_the_packages_skips_with_what_installs_them_and_ci_fails(tmp_path, required, code, words):
    (tmp_path / "bare.py").write_text("import slurm_cluster\nslurm_cluster.PATH = '/nowhere'\n")
    here = Path(__file__)
    paths = os.pathsep.join([str(tmp_path), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "COSMOS_HPC_REQUIRES_CLUSTER": "", "PYTHONPATH": paths}
    environment = {name: value for name, value in environment.items() if value} | required
    command = [sys.executable, "-m", "pytest", "-rs", "-m", "slurm", "-p", "bare", str(here), "-k", "four_nodes"]
    done = subprocess.run(command, env=environment, cwd=here.parents[2], capture_output=True, text=True, check=False)
    told = done.returncode, words in done.stdout, APT_LINE in done.stdout
    assert told == (code, True, True), done.stdout + done.stderr


def named(folder: Path) -> list[str]:
    """Processes whose command or environment holds a folder's path."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes() + (process / "cmdline").read_bytes():
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found
