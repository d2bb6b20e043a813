"""A real run on four ranks of two nodes, each in a container of plain enroot, on a real scheduler."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import container_root
import pytest
import small_registry
from runs import cosmos_hpc, job_id, losses, outcomes, steps_of_attempt, story, submit, wait_for_end
from slurm_cluster import SlurmCluster, wait_until

from cosmos_hpc.config.run_folder import RunFolder

pytestmark = pytest.mark.slurm

STEPS = 40
START_LIMIT_S = 300
CLUSTER = "{executor: slurm, partition: low, time_limit_min: 60, grace_s: 60}"
SECRET = "hush-this-is-a-key-of-a-test"


@pytest.fixture
def shared(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that plays the shared file system, since containers have a /tmp of their own."""
    reason = container_root.what_is_missing()
    if reason is not None and container_root.REQUIRED in os.environ:
        pytest.fail(f"{container_root.REQUIRED} is set, but {reason}")
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cosmos-hpc-shared-", dir="/var/tmp"))
    monkeypatch.setenv("COSMOS_HPC_RUNS", str(folder / "runs"))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("PATH", f"{container_root.enroot().parent}:{os.environ['PATH']}")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def four_rank_job(shared: Path, quick_job: Path, dataset: Path) -> Path:
    """The quick job as two ranks on each of two nodes, with its data there."""
    shutil.copytree(dataset, shared / "data")
    text = (
        quick_job.read_text().replace("cluster: local", f"cluster: {CLUSTER}").replace(str(dataset), f"{shared}/data")
    )
    text = text.replace("devices: 2", "devices: 2, num_nodes: 2").replace("micro_batch_size: 2", "micro_batch_size: 1")
    text = text.replace("max_steps: 24", f"max_steps: {STEPS}").replace("interval: 12", "interval: 60")
    quick_job.write_text(text)
    return quick_job


@pytest.fixture
def container(shared: Path) -> str:
    """Settings of the container; its configuration script takes down every start."""
    (shared / "scratch").mkdir()
    (shared / "hooks.sh").write_text(f'hooks() {{ echo "$(hostname) $ENROOT_ROOTFS" >> {shared}/starts; }}\n')
    mounts = ", ".join(f"'{folder}:{folder}'" for folder in container_root.python_mounts())
    return (
        f"container={{mode: enroot, image: {container_root.root_squashfs()}, python: {sys.executable}, "
        f"scratch: {shared}/scratch, hooks: {shared}/hooks.sh, mounts: [{mounts}]}}"
    )


def test_a_run_in_containers_is_preempted_and_repeats_the_losses_of_one_on_the_host(
    slurm_cluster, four_rank_job, container, shared, tmp_path
):
    (outside,) = submit(four_rank_job, "outside")
    wait_for_end(slurm_cluster, outside, "COMPLETED", "FAILED")
    (inside,) = submit(four_rank_job, "inside", container)
    wait_for_steps(slurm_cluster, inside, 3)
    told_by_processes = "".join(command_lines())
    high = slurm_cluster.sbatch("true", "--partition=high", "--nodes=4", "--exclusive", output=tmp_path / "high.out")
    slurm_cluster.wait_for_state(high, "COMPLETED", limit_s=120)
    wait_for_end(slurm_cluster, inside, "COMPLETED", "FAILED")

    assert outcomes(inside) == ["preempted", "finished"], story(slurm_cluster, inside)
    assert losses(inside) == losses(outside)
    assert [step for step, _ in losses(inside)] == list(range(1, STEPS + 1))
    starts = [line.split() for line in (shared / "starts").read_text().splitlines()]
    assert len(starts) == 8, "four ranks, twice"
    assert all(Path(root).is_relative_to(shared / "scratch") for _, root in starts)
    used = {host for host, _ in starts}
    logs = "".join(inside.launcher_log(attempt).read_text() for attempt in range(2))
    assert logs.count("unpacking") == len(used), "once on each node"

    assert f"cosmos_hpc.train --run-folder {inside.path}" in told_by_processes.replace("\0", " ")
    written = [file.read_bytes() for file in shared.rglob("*") if file.is_file() and file.suffix != ".distcp"
               and "scratch" not in file.parts]  # fmt: skip
    told_by_slurm = slurm_cluster.call("scontrol", "show", "job", job_id(inside))
    assert not [text for text in written if SECRET.encode() in text]
    assert SECRET not in told_by_processes + told_by_slurm


def test_runs_that_a_container_would_not_see_are_refused_before_anything_is_sent(
    slurm_cluster, four_rank_job, container, monkeypatch, tmp_path
):
    monkeypatch.setenv("COSMOS_HPC_RUNS", str(tmp_path / "runs"))
    with pytest.raises(
        AssertionError, match=r"error: the run folder lies in /tmp/\S+, but a container has /tmp for itself"
    ):
        submit(four_rank_job, "hidden", container)
    assert slurm_cluster.call("squeue", "--noheader") == ""
    assert not list((tmp_path / "runs").glob("hidden/*-*"))


def test_an_image_is_imported_by_a_job_of_its_own(slurm_cluster, shared, monkeypatch):
    for name in ("TEMP", "CACHE", "DATA", "CONFIG", "RUNTIME"):
        (shared / name).mkdir()
        monkeypatch.setenv(f"ENROOT_{name}_PATH", str(shared / name))
    monkeypatch.setenv("ENROOT_ALLOW_HTTP", "yes")
    monkeypatch.setenv("COSMOS_HPC_IMAGES", str(shared / "images"))
    profile = shared / "cpu.yaml"
    profile.write_text("executor: slurm\npartition: low\ntime_limit_min: 30\n")
    with small_registry.served() as registry:
        name = f"{registry.host}/lab/base:1.0"
        sent = json.loads(cosmos_hpc("image", "import", name, "--cluster", profile, "--json"))
        slurm_cluster.wait_for_state(sent["job"], "COMPLETED", "FAILED", limit_s=120)
        logs = "".join(file.read_text() for file in (shared / "images" / "import_logs").glob("*_log.*"))
        (row,) = json.loads(cosmos_hpc("image", "list", "--json"))
        again = json.loads(cosmos_hpc("image", "import", name, "--cluster", profile, "--json"))
    assert (row["file"], row["digest"], row["name"]) == (sent["file"], sent["digest"], name), logs
    assert "GiB)" in logs
    assert again == {**sent, "job": None}, "it is there already"


def test_the_probe_of_the_doctor_runs_in_the_containers(slurm_cluster, four_rank_job, container, shared):
    told = cosmos_hpc("doctor", four_rank_job, container, "cluster.gpus_per_node=0", "--on-cluster", "--json")
    found = {row["check"]: row for row in json.loads(told)}
    checks = ("inside the container", "ranks start", "packages", "training step", "signal")
    assert {name: found[name]["verdict"] for name in checks} == dict.fromkeys(checks, "pass")
    assert f"in {container_root.root_squashfs()} (enroot)" in found["ranks start"]["message"]
    assert len((shared / "starts").read_text().splitlines()) == 4


def wait_for_steps(cluster: SlurmCluster, folder: RunFolder, count: int) -> None:
    wait_until(
        lambda: len(steps_of_attempt(folder, folder.next_attempt() - 1)) >= count,
        f"{count} steps", START_LIMIT_S, lambda: story(cluster, folder),
    )  # fmt: skip


def command_lines() -> Iterator[str]:
    """What any user of this machine may see of all processes, those of the nodes included."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_text(errors="replace")
        except OSError:
            continue
