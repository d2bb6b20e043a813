"""The prefix of mode enroot: a script that unpacks an image once on a node and becomes a rank in it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.launch.container import container_environment, container_prefix

SECRET = "hush-this-is-a-key"
WEEK_S = 7 * 24 * 3600


class Node:
    """A node as one rank's srun sees it: starts commands in the container behind the prefix."""

    def __init__(self, enroot, image, scratch, workdir):
        self.enroot, self.image, self.scratch, self.workdir = enroot, image, scratch, workdir
        for folder in (scratch, workdir):
            folder.mkdir(exist_ok=True)

    @property
    def home(self):
        """Where the script keeps its things."""
        return next(self.scratch.glob("cosmos-hpc-*/*"))

    def containers(self):
        return sorted(path.name for path in (self.home / "containers").iterdir())

    def popen(self, *command, mounts=(), names=(), environment=None, **settings):
        container = ContainerConfig(
            **{"mode": "enroot", "image": str(self.image), "scratch": str(self.scratch)} | settings
        )
        mounts = [f"{self.workdir}:{self.workdir}", *mounts]
        prefix = container_prefix(container, mounts, self.workdir, names)
        assert prefix.srun_flags == []
        host = {"PATH": self.enroot.environment["PATH"], "HOME": self.enroot.environment["HOME"]}
        given = container_environment(container, "/snapshot", has_gpus=False)
        return subprocess.Popen(
            [*prefix.command, *command],
            env={**host, **given, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command, **settings):
        """What a command prints; its own words, if it fails."""
        process = self.popen(*command, **settings)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out

    def refusal(self, **settings):
        """The line by which the script refuses to start."""
        process = self.popen("true", **settings)
        line = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 1, line
        assert line.startswith("error: no container on "), "the supervisor looks for this"
        return line


@pytest.fixture(scope="session")
def node(enroot, image, tmp_path_factory):
    """With the image unpacked already."""
    folder = tmp_path_factory.mktemp("node")
    node = Node(enroot, image, folder / "scratch", folder / "run")
    node.run("true")
    return node


@pytest.fixture
def fresh(enroot, image, tmp_path):
    """A node that knows no image yet."""
    return Node(enroot, image, tmp_path / "scratch", tmp_path / "run")


def test_ranks_of_a_node_unpack_an_image_once_and_the_next_start_finds_it(fresh):
    ranks = [fresh.popen("sh", "-c", f"echo rank {rank}") for rank in range(3)]
    told = [rank.communicate() for rank in ranks]
    assert [out for out, _ in told] == [f"rank {rank}\n" for rank in range(3)]
    assert sum(err.count("unpacking") for _, err in told) == 1
    again = fresh.popen("true").communicate()[1]
    assert "unpacking" not in again
    assert len(fresh.containers()) == 1


def test_a_kill_while_unpacking_costs_nothing_but_the_time(fresh):
    first = fresh.popen("true")
    assert "unpacking" in first.stderr.readline()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    leftover = fresh.home / "containers" / "of_another_image"
    leftover.mkdir(parents=True)
    assert fresh.run("sh", "-c", "echo $IMAGE_SAYS; ls -d /usr/lib/python3*").splitlines()[0] == "hello"
    assert not leftover.exists()
    assert len(fresh.containers()) == 1


def test_what_nobody_used_for_a_week_is_removed_unless_a_rank_lives_in_it(fresh, image, tmp_path):
    rank = fresh.popen("sh", "-c", "echo ready; exec sleep 600")
    assert rank.stdout.readline() == "ready\n"
    (lived_in,) = fresh.containers()
    abandoned = lived_in.replace(image.stem, "abandoned")
    (fresh.home / "containers" / abandoned).mkdir()
    for name in (lived_in, abandoned):
        mark = fresh.home / "marks" / f"{name}.ready"
        mark.touch()
        os.utime(mark, (time.time() - 1.5 * WEEK_S,) * 2)
    newer = tmp_path / "newer.sqsh"
    os.link(image, newer)
    fresh.image = newer
    fresh.run("true")
    assert abandoned not in fresh.containers()
    assert lived_in in fresh.containers()

    os.killpg(rank.pid, signal.SIGKILL)
    rank.communicate()
    mark = fresh.home / "marks" / f"{lived_in}.ready"
    os.utime(mark, (time.time() - 1.5 * WEEK_S,) * 2)
    newest = tmp_path / "newest.sqsh"
    newer.rename(newest)
    fresh.image = newest
    fresh.run("true")
    assert [name.partition("-")[0] for name in fresh.containers()] == ["newer", "newest"]


def test_the_rank_is_the_process_that_srun_started_and_hears_its_signals(node):
    script = "trap 'echo heard; exit 5' USR2; echo $$; while :; do sleep 0.1; done"
    rank = node.popen("sh", "-c", script)
    assert int(rank.stdout.readline()) == rank.pid
    rank.send_signal(signal.SIGUSR2)
    assert (rank.communicate()[0], rank.returncode) == ("heard\n", 5)


def test_what_a_rank_needs_is_passed_in_and_the_hosts_own_installation_is_not(node):
    host = {
        "SLURM_PROCID": "3",
        "MASTER_ADDR": "c1",
        "NCCL_DEBUG": "WARN",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "WANDB_API_KEY": SECRET,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "MY_OWN": "two words",
        "A": "x=y",
    }
    hidden = {"CUDA_HOME": "/usr/local/cuda", "PYTHONPATH": "/host", "LD_LIBRARY_PATH": "/host"}  # fmt: skip
    told = node.run("env", names=["MY_OWN"], environment={**host, **hidden})
    seen = dict(line.split("=", 1) for line in told.splitlines())
    assert {name: seen.get(name) for name in host} == {**host, "A": None}
    assert not {"CUDA_HOME", "LD_LIBRARY_PATH"} & seen.keys()
    assert seen["PYTHONPATH"] == "/snapshot"
    assert seen["NVIDIA_VISIBLE_DEVICES"] == "void", "the run has no GPUs"
    assert seen["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert seen["MELLANOX_VISIBLE_DEVICES"] in ("all", "void")


def test_the_images_own_python_path_stays_behind_the_codes(node, tmp_path):
    (tmp_path / "conf").write_text("environ() { echo PYTHONPATH=/opt/megatron; }\n")
    told = node.run("printenv", "PYTHONPATH", hooks=str(tmp_path / "conf"))
    assert told == "/snapshot:/opt/megatron\n"


def test_a_rank_starts_in_its_folder_without_the_users_home_unless_asked_for(node):
    (Path(node.enroot.environment["HOME"]) / "private").touch()
    assert node.run("sh", "-c", "pwd; echo $HOME; touch $HOME/cache") == f"{node.workdir}\n/tmp\n"
    home = node.enroot.environment["HOME"]
    assert node.run("sh", "-c", "echo $HOME; ls $HOME", mount_home=True) == f"{home}\nprivate\n"


def test_mounts_scratch_and_the_image_can_be_written_as_the_settings_say(node, tmp_path):
    (tmp_path / "data").mkdir()
    options = {"mounts": [f"{tmp_path}/data:/data:ro"]}
    script = "touch /data/x; touch $TMPDIR/mine; touch /srv/x; true"
    process = node.popen("sh", "-c", script, **options)
    assert process.communicate()[1].count("Read-only file system") == 2
    assert (node.scratch / "mine").exists()
    node.run("touch", "/srv/x", writable=True)


def test_no_list_of_processes_shows_a_secret(fresh):
    rank = fresh.popen("sh", "-c", "test $WANDB_API_KEY = " + SECRET[:4] + "$REST && echo found", names=["REST"],
                       environment={"WANDB_API_KEY": SECRET, "REST": SECRET[4:]})  # fmt: skip
    shown = 0
    while rank.poll() is None:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            shown += b"WANDB_" in words
            assert SECRET.encode() not in words
    out, err = rank.communicate()
    assert out == "found\n", err
    assert SECRET not in err
    assert shown > 0, "it was looked at while it started"


@pytest.fixture
def shims(tmp_path):
    """A folder of commands in front of all others."""
    (tmp_path / "shims").mkdir()

    def shim(name, script):
        (tmp_path / "shims" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "shims" / name).chmod(0o755)
        return str(tmp_path / "shims")

    return shim


def test_what_the_node_lacks_is_told_in_one_line_with_the_mend(fresh, node, shims, tmp_path):
    assert "there is no enroot in PATH" in fresh.refusal(environment={"PATH": "/usr/bin:/bin"})
    gone = fresh.refusal(image="/nowhere/image.sqsh")
    assert "container.image /nowhere/image.sqsh can't be read from here" in gone
    assert "container.scratch /nowhere can't be written" in fresh.refusal(
        scratch="/nowhere", environment={"TMPDIR": "/"}
    )
    path = shims("df", "echo Avail; echo 1048576")
    full = fresh.refusal(environment={"PATH": f"{path}:{fresh.enroot.environment['PATH']}"})
    assert f"{fresh.scratch} has 1 MiB left, too little to unpack" in full
    assert "set container.scratch to a larger disk" in full
    assert fresh.run("true") == ""
