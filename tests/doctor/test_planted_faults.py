"""Each fault is planted into a job that is well, and has to be found by the check that is named for it."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from clinic import Clinic
from small_registry import served

from cosmos_hpc.config.load import load_experiment, resolve, to_yaml
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.doctor import Finding, Verdict, examine

Plant = Callable[[Clinic, pytest.MonkeyPatch], object]


class Fault(NamedTuple):
    """What is wrong, and what has to be said of it."""

    name: str
    check: str
    verdict: str
    words: str
    overrides: tuple[str, ...] = ()
    plant: Plant = lambda clinic, patch: None


def swept(text: str) -> Plant:
    return lambda clinic, _: clinic.job.write_text(f"{clinic.job.read_text()}sweep: {text}\n")


def said(what: str, old: str, new: str) -> Plant:
    return lambda clinic, _: clinic.change(clinic.says(what), old, new)


def refused(words: str) -> Plant:
    return lambda clinic, _: clinic.says("refusal").write_text(f"sbatch: error: {words}\n")


def manifest(**changed: object) -> Plant:
    return lambda clinic, _: clinic.write_manifest(**changed)


def cut(file: Callable[[Clinic], Path], size: int = 512) -> Plant:
    return lambda clinic, _: os.truncate(file(clinic), size)


def removed(file: Callable[[Clinic], Path]) -> Plant:
    return lambda clinic, _: file(clinic).unlink()


def environment(name: str, value: str | None) -> Plant:
    return lambda _, patch: patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)


def both(*plants: Plant) -> Plant:
    return lambda clinic, patch: [plant(clinic, patch) for plant in plants]


def silent(clinic: Clinic, _: pytest.MonkeyPatch) -> None:
    (clinic.root / "bin" / "sinfo").write_text("#!/bin/bash\necho no >&2\nexit 1\n")


def unindexed(clinic: Clinic, _: pytest.MonkeyPatch) -> None:
    for file in (clinic.data / ".nv-meta").iterdir():
        file.unlink()


def measured(step_s: float, save_s: float) -> Plant:
    """An earlier run with the same settings took so long."""

    def plant(clinic: Clinic, _: pytest.MonkeyPatch) -> None:
        folder = RunFolder(clinic.root / "runs" / "earlier" / "000-01234567")
        folder.path.mkdir(parents=True)
        folder.config.write_text(to_yaml(resolve(load_experiment(clinic.job, []), {})))
        folder.metrics.write_text((json.dumps({"step_time_s": step_s, "clips_per_s": 1.0}) + "\n") * 9)
        RunState(longest_silence_s={"save": save_s}).write(folder.state)

    return plant


def without_inodes(_: Clinic, patch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    patch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real(path)[:7], 10, *real(path)[8:])))


def shard(clinic: Clinic) -> Path:
    return min(clinic.data.glob("val/*.tar"))


def grey_noise(clinic: Clinic, _: pytest.MonkeyPatch) -> None:
    """The shard keeps its size and its time, and its videos become bytes without sense."""
    for tar in clinic.data.glob("val/*.tar"):
        times, raw = tar.stat(), bytearray(tar.read_bytes())
        while (start := raw.find(b"ftyp")) > 0:
            raw[start - 4 : start + 996] = bytes(range(250)) * 4
        tar.write_bytes(raw)
        os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))


PREEMPTED = measured(step_s=40.0, save_s=90.0)

FAULTS = (
    Fault("a setting that is none", "settings", "fail", "did you mean optim.lr?", ("optim.lrr=1",)),
    Fault("a value that can't work", "settings", "fail", "num_frames is 10, .* set 9 or 17", ("data.num_frames=10",)),
    Fault(
        "a secret in the profile", "settings", "fail", "sets WANDB_API_KEY", ("cluster.environment={WANDB_API_KEY: x}",)
    ),
    Fault(
        "a sweep that repeats itself",
        "sweep",
        "fail",
        "the same run twice",
        plant=swept("{list: [{trainer.seed: 1}, {trainer.seed: 1}]}"),
    ),
    Fault(
        "a secret in an option",
        "secrets",
        "fail",
        "sets HF_TOKEN, which all",
        ("cluster.directives={export: 'ALL,HF_TOKEN=x'}",),
    ),
    Fault("a silent controller", "partition", "fail", "sinfo failed: no", plant=silent),
    Fault("another cluster's partition", "partition", "fail", "set gpu or long", ("cluster.partition=h100",)),
    Fault("more time than there is", "time limit", "fail", "partition gpu allows 240", ("cluster.time_limit_min=241",)),
    Fault(
        "more nodes than there are",
        "nodes",
        "fail",
        "gpu has 4",
        ("trainer.num_nodes=5", "data.global_batch_size=20", "data.num_workers=0"),
    ),
    Fault("more GPUs than a node has", "GPUs", "fail", "asks for 9", ("cluster.gpus_per_node=9",)),
    Fault("more cores than a node has", "CPUs", "fail", "is 18, .* 16 CPUs", ("cluster.cpus_per_task=9",)),
    Fault(
        "nodes that are drained",
        "nodes up",
        "warn",
        "1 nodes of gpu are up, 2 are needed",
        plant=said("nodes", "n2\nn3\nn4\n", ""),
    ),
    Fault(
        "a closed partition",
        "nodes up",
        "warn",
        "partition gpu is DRAIN",
        plant=said("partition", "State=UP", "State=DRAIN"),
    ),
    Fault(
        "more jobs than a queue holds",
        "arrays",
        "fail",
        "3 runs, .* holds 2",
        plant=both(said("config", "= 10000", "= 2"), swept("{grid: {trainer.seed: [1, 2, 3]}}")),
    ),
    Fault(
        "a job that does not come back", "requeue", "fail", "--requeue away", ("cluster.directives={no_requeue: true}",)
    ),
    Fault(
        "preemption that cancels",
        "preempt mode",
        "warn",
        "does not come back",
        plant=said("partition", "Mode=REQUEUE", "Mode=CANCEL"),
    ),
    Fault(
        "preemption that suspends",
        "preempt mode",
        "warn",
        "keeps its GPU memory",
        plant=said("partition", "Mode=REQUEUE", "Mode=SUSPEND"),
    ),
    Fault(
        "a grace shorter than a step and a save",
        "grace",
        "warn",
        r"120 s \(GraceTime\), but .* 40.0 \+ 90.0 s \(as measured in earlier/000",
        plant=PREEMPTED,
    ),
    Fault(
        "no grace, and a short kill wait",
        "grace",
        "warn",
        r"30 s \(KillWait\)",
        plant=both(said("partition", "GraceTime=120", "GraceTime=0"), PREEMPTED),
    ),
    Fault("a warning that comes too late", "warning time", "fail", "set cluster.grace_s=261", plant=PREEMPTED),
    Fault(
        "a warning before the start",
        "warning time",
        "warn",
        "jobs last only 300 s",
        ("cluster.time_limit_min=5", "cluster.grace_s=290"),
    ),
    Fault(
        "an account that may not",
        "sbatch",
        "fail",
        "Invalid account .*: set cluster.account",
        plant=refused("Invalid account or account/partition combination"),
    ),
    Fault(
        "something that is not there to wait for", "after", "fail", "pack_roads is no experiment", ("after=pack_roads",)
    ),
    Fault(
        "a folder that can't be written",
        "run folders",
        "fail",
        "/proc can't be written",
        plant=environment("COSMOS_HPC_RUNS", "/proc/runs"),
    ),
    Fault("a disk that is too small", "room", "fail", "set checkpoint.keep lower", ("checkpoint.keep=1000000000",)),
    Fault("no more files", "inodes", "fail", "10 may still be created", plant=without_inodes),
    Fault(
        "runs that a container can't see",
        "inside the container",
        "fail",
        "the run folder lies in /tmp/runs/quick",
        plant=environment("COSMOS_HPC_RUNS", "/tmp/runs"),
    ),
    Fault(
        "a mount of nothing",
        "inside the container",
        "fail",
        "container.mounts names /no/such",
        ("container.mounts=['/no/such:/scratch']",),
    ),
    Fault("no image", "image", "fail", "which is no file", plant=removed(lambda clinic: clinic.image)),
    Fault(
        "an image that was never imported",
        "image",
        "fail",
        "`cosmos-hpc image import 127.0.0.1:9/nvidia/nemo:25.04`",
        ("container.image=127.0.0.1:9/nvidia/nemo:25.04",),
    ),
    Fault("half an image", "image", "fail", "has 512 bytes, 4100 when", plant=cut(lambda clinic: clinic.image)),
    Fault(
        "an image that is none",
        "image",
        "fail",
        "is no squashfs",
        plant=lambda clinic, _: clinic.image.write_bytes(b"\x7fELF" + bytes(4096)),
    ),
    Fault("an image of another digest", "image", "fail", "is of sha256:0000", (f"container.digest=sha256:{'1' * 64}",)),
    Fault(
        "an image without Megatron",
        "image contents",
        "fail",
        "lacks megatron-core",
        plant=manifest(packages={"torch": "2.6.0", "decord": "0.6.0"}),
    ),
    Fault(
        "an image with an old torch",
        "image contents",
        "fail",
        r"has torch 2.5.1, >=2.6 is needed",
        plant=manifest(packages={"torch": "2.5.1", "decord": "0.6.0"}),
    ),
    Fault(
        "an image of unknown contents",
        "image contents",
        "warn",
        "nothing is written beside",
        plant=removed(lambda clinic: clinic.root / "nemo.sqsh.json"),
    ),
    Fault(
        "no weights",
        "weights",
        "fail",
        "jit_ckpt_pth is /no/such, which does not exist",
        ("model.jit_ckpt_pth=/no/such",),
    ),
    Fault(
        "weights that were not fetched",
        "weights",
        "fail",
        "`cosmos-hpc fetch acme/none`",
        ("model.jit_ckpt_pth=acme/none",),
    ),
    Fault(
        "half a file of weights",
        "weights",
        "fail",
        "autoencoder.jit is damaged",
        plant=cut(lambda clinic: clinic.weights),
    ),
    Fault(
        "no loss network",
        "loss networks",
        "fail",
        r"loss.lpips.weights is .*/vgg16.pth, which does not exist",
        plant=removed(lambda clinic: clinic.root / "vgg16.pth"),
    ),
    Fault("no dataset", "dataset", "fail", "data.path is /no/such, which is not there", ("data.path=/no/such",)),
    Fault(
        "a dataset without an index", "dataset", "fail", "no Energon index: run `cosmos-hpc prepare", plant=unindexed
    ),
    Fault(
        "fewer videos than workers",
        "dataset",
        "fail",
        "8 training videos, .* = 12: set data.num_workers to 2",
        ("data.num_workers=3",),
    ),
    Fault("a lost shard", "shards", "fail", r"can't be read \(No such file", plant=removed(shard)),
    Fault("half a shard", "shards", "fail", r"has 512 bytes, but samples are indexed up to \d+", plant=cut(shard)),
    Fault(
        "a shard that was changed",
        "shards",
        "fail",
        "changed after it was indexed",
        plant=lambda clinic, _: os.utime(shard(clinic)),
    ),
    Fault("videos that can't be decoded", "clips", "fail", "val: no clip of 9 frames can be had", plant=grey_noise),
    Fault("videos that are too short", "clips", "fail", "it has 17 frames, 25 are needed", ("data.num_frames=25",)),
    Fault(
        "clips that no card can hold",
        "memory",
        "fail",
        "h100 has 96 GB: set data.micro_batch_size",
        (
            "model.channels=128",
            "data.num_frames=17",
            "data.crop_size=1024",
            "data.micro_batch_size=5",
            "data.global_batch_size=20",
        ),
    ),
    Fault(
        "clips for the larger card of a name",
        "memory",
        "warn",
        "a100 has 40 GB",
        (
            "cluster.partition=long",
            "model.channels=128",
            "data.num_frames=17",
            "data.crop_size=960",
            "data.micro_batch_size=2",
            "data.num_workers=0",
        ),
    ),
    Fault(
        "tracking without a key",
        "wandb",
        "fail",
        "WANDB_API_KEY is not set",
        ("wandb.mode=online",),
        environment("WANDB_API_KEY", None),
    ),
    Fault(
        "tracking without a network",
        "wandb",
        "warn",
        "can't be reached from here",
        ("wandb.mode=online",),
        both(environment("WANDB_API_KEY", "x"), environment("WANDB_BASE_URL", "http://127.0.0.1:9")),
    ),
)


def bad(found: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in found if finding.verdict is not Verdict.PASS}


EXPECTED_HERE = {"shared folders", "host Python"}
"""Warnings that a test on one machine can't be without: its file systems are of this machine."""


@pytest.fixture(autouse=True)
def quiet_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights of whoever runs the tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_a_job_that_is_well_passes_every_check(clinic):
    found, _ = examine(clinic.job)
    assert bad(found).keys() <= EXPECTED_HERE
    titles = {"settings", "partition", "nodes up", "arrays", "requeue", "preempt mode", "grace", "warning time",
              "sbatch", "run folders", "inside the container", "room", "image", "image contents", "weights",
              "loss networks", "dataset", "shards", "clips", "memory", "wandb"}  # fmt: skip
    assert titles <= {finding.check for finding in found}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_by_its_name(clinic, monkeypatch, fault):
    fault.plant(clinic, monkeypatch)
    found = bad(examine(clinic.job, fault.overrides)[0])
    assert fault.check in found, found
    assert found[fault.check].verdict == fault.verdict
    assert re.search(fault.words, found[fault.check].message), found[fault.check].message


def test_the_faults_are_told_apart():
    assert len(FAULTS) >= 20
    assert len({(fault.check, fault.words) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    ("line", "mode", "words"),
    [
        (None, 0o600, r"wants a login for lab/base: write `machine 127.0.0.1:\d+ login USER password KEY`"),
        ("machine 127.0.0.1 login $oauthtoken password stale", 0o600, "refuses the login"),
        ("machine 127.0.0.1 login $oauthtoken password key-of-a-test", 0o644, "can be read by others: chmod 600"),
        ("machine 127.0.0.1 key-of-a-test", 0o600, "line 1: write `machine HOST login USER password KEY`"),
    ],
)
def test_credentials_of_an_image_that_is_to_be_imported(clinic, monkeypatch, line, mode, words):
    config = clinic.root / "enroot"
    config.mkdir()
    monkeypatch.setenv("ENROOT_CONFIG_PATH", str(config))
    monkeypatch.setenv("ENROOT_ALLOW_HTTP", "yes")
    if line is not None:
        (config / ".credentials").write_text(f"{line}\n")
        (config / ".credentials").chmod(mode)
    with served() as registry:
        registry.push("lab/base:1.0", {"hello": b"x"})
        registry.wants_login = True
        found = bad(examine(clinic.job, [f"container.image={registry.host}/lab/base:1.0"])[0])
    assert found["credentials"].verdict is Verdict.FAIL
    assert re.search(words, found["credentials"].message), found["credentials"].message
    assert "key-of-a-test" not in str(found)
