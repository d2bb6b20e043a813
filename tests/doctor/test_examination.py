"""The command's words and exit codes, the quick part in `submit`, and what a probe's reports become."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_hpc import api
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import runs_folder
from cosmos_hpc.config.schema import ModelConfig, RunConfig
from cosmos_hpc.doctor import Finding, examine
from cosmos_hpc.doctor.estimates import Gpu, checkpoint_bytes, gpu_named, memory_gb, num_parameters
from cosmos_hpc.doctor.probe_report import JobReport, RankReport, findings
from cosmos_hpc.doctor.storage import file_system
from cosmos_hpc.job.health import NodeReport


def doctor(*words: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "cosmos_hpc.cli", "doctor", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_table_and_exit_code_0_where_nothing_fails(quick_job):
    code, out, err = doctor(quick_job)
    assert (code, err) == (0, "")
    assert "settings" in out
    assert "0 failed" in out
    assert not runs_folder().exists(), "nothing is written that stays"


def test_exit_code_1_where_something_fails_with_all_of_it_as_json(quick_job):
    code, out, _ = doctor(quick_job, "data.path=/no/such", "wandb.mode=online", "WANDB=1", "--json")
    assert (code, [row["check"] for row in json.loads(out)]) == (1, ["settings"]), "WANDB is no setting"
    code, out, _ = doctor(quick_job, "data.path=/no/such", "--json")
    failed = {row["check"]: row["message"] for row in json.loads(out) if row["verdict"] == "fail"}
    assert (code, failed.keys()) == (1, {"dataset"})
    assert failed["dataset"].startswith("data.path is /no/such, which is not there: name a folder")


def test_exit_code_2_where_there_is_no_such_file(quick_job):
    code, out, err = doctor("quik.yaml")
    assert (code, out) == (2, "")
    assert "quik.yaml is no file: did you mean quick.yaml?" in err


def test_submit_stops_at_the_first_failure_of_the_quick_part_unless_that_is_left_out(clinic):
    clinic.change(clinic.says("partition"), "GraceTime=120", "GraceTime=0")
    clinic.change(clinic.says("config"), "30 sec", "0 sec")
    clinic.write_manifest(packages={"torch": "2.6.0"})
    warnings: list[str] = []
    with pytest.raises(ConfigError, match=r"image contents: .*lacks megatron-core.*nothing was sent \(--no-doctor"):
        api.submit(clinic.job, on_warning=warnings.append)
    assert not list(runs_folder().glob("*/*/config.yaml"))
    assert warnings == []
    clinic.write_manifest()
    sent = api.submit(clinic.job, on_warning=warnings.append)
    assert len(sent.jobs) == 1
    assert [warning.partition(":")[0] for warning in warnings] == ["grace"]
    clinic.write_manifest(packages={"torch": "2.6.0"})
    assert len(api.submit(clinic.job, ["trainer.seed=2"], examines=False).jobs) == 1


@pytest.mark.parametrize("model", ["CV8x8x8", "CV8x16x16", "CV4x8x8", "DV8x16x16", "DV4x8x8"])
def test_the_number_of_parameters_is_near_the_networks_own(model):
    import torch

    from cosmos_hpc.tokenizer.build import build_tokenizer

    with torch.device("meta"):
        for channels, error in ((128, 0.001), (32, 0.05)):
            config = ModelConfig(model=model, channels=channels)
            count = sum(parameter.numel() for parameter in build_tokenizer(config).parameters())
            assert num_parameters(config) == pytest.approx(count, rel=error)


def released(*overrides: str) -> RunConfig:
    return resolve(load_experiment(None, ["data.path=/x", "data.global_batch_size=32", *overrides]), {})


@pytest.mark.parametrize(("clips", "gb"), [(1, 6.1), (4, 14.0)])
def test_memory_is_what_was_measured_at_one_clip_and_is_assumed_at_four(clips, gb):
    assert memory_gb(released(f"data.micro_batch_size={clips}")) == pytest.approx(gb, rel=0.05)


def test_a_checkpoint_of_the_released_size_is_what_was_measured():
    assert checkpoint_bytes(released()) / 2**20 == pytest.approx(1614, rel=0.01)  # benchmarks/README.md


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["h100&ib"], Gpu("h100", 80, 96)),
        (["nvidia_a100-sxm4-40gb"], Gpu("a100", 40, 40)),
        (["a100_80g"], Gpu("a100", 80, 80)),
        (["h100", "a100"], Gpu("a100", 40, 80)),
        (["1g.10gb"], Gpu("a slice of 10 GB", 10, 10)),
        (["gh200"], Gpu("gh200", 96, 144)),
        (["fast", None], None),
    ],
)
def test_cards_are_known_by_what_clusters_call_them(words, found):
    assert gpu_named(*words) == found


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount():
    assert file_system(Path("/proc/self/nothing/here")) == "proc"
    assert file_system(Path("/dev/shm/none")) == "tmpfs"


NODES = [dataclasses.asdict(NodeReport(host, 0.01, [], [], [], True, True)) for host in ("n1", "n2")]
JOB = JobReport("done", "3.11.7", ["n1", "n2"], NODES, 0.5, 2.0, 3.0, "time_limit")
PACKAGES = {"torch": "2.6.0", "megatron-core": "0.16.1", "megatron-energon": "7.4.1", "decord": "0.6.0"}
RANKS = [RankReport(rank, f"n{1 + rank // 2}", PACKAGES, 2, "NVIDIA H100", "nccl", 3e-5, 4e10, 0.1, 2**26)
         for rank in range(4)]  # fmt: skip


def told(job: JobReport = JOB, ranks: list[RankReport] = RANKS, **of_ranks: object) -> dict[str, Finding]:
    """The findings that are no pass, of two nodes with two GPUs each."""
    run = released("trainer.num_nodes=2", "trainer.devices=2", "cluster.executor=slurm")
    ranks = [dataclasses.replace(rank, **of_ranks) for rank in ranks]  # type: ignore[arg-type]  # fields by name
    return {finding.check: finding for finding in findings(run, job, ranks, 60) if finding.verdict != "pass"}


def changed(**fields: object) -> JobReport:
    return dataclasses.replace(JOB, **fields)  # type: ignore[arg-type]  # fields by name


def test_a_probe_in_which_all_was_well_has_nothing_to_say():
    assert told() == {}


@pytest.mark.parametrize(
    ("found", "check", "words"),
    [
        (told(changed(nodes=NODES[:1])), "host Python", "n2 did not answer"),
        (told(changed(nodes=[NODES[0], {**NODES[1], "clock_s": -40.0}])), "nodes", "n2: its clock is -40 s off"),
        (told(changed(nodes=[NODES[0], {**NODES[1], "folder": ["/runs can't be written from here"]}])),
         "nodes", "n2: /runs can't be written from here: have it drained"),
        (told(changed(nodes=[{**node, "folder": ["/runs can't be written from here"]} for node in NODES])),
         "shared folders", "from here, nor from any other node: set COSMOS_HPC_RUNS"),
        (told(changed(error="code fault on rank 2 of n2: no such image"), RANKS[:2]), "ranks start", "no such image"),
        (told(gpus=0), "GPUs seen", "torch sees 0 of 2 on n1, n2"),
        (told(packages={"torch": "2.6.0"}), "packages", "lacks megatron-core"),
        (told(bytes_per_s=1.1e9), "all-reduce", "1.10 GB/s.* as over sockets: set NCCL_IB_HCA"),
        (told(write_s=20.0), "throughput", "longer than cluster.grace_s"),
        (told(changed(step_s=None, error="out of memory on rank 0")), "training step", "out of memory on rank 0"),
        (told(changed(save_s=None, error="disk full")), "checkpoint", "disk full"),
        (told(changed(outcome=None, leave_s=None, error="killed on rank 3")), "signal", "USR2 has to reach them"),
        (told(changed(leave_s=70.0)), "signal", "set cluster.grace_s=141"),
    ],
)  # fmt: skip
def test_what_a_probe_found_wrong_is_told_by_its_name(found, check, words):

    assert list(found) == [check]
    assert re.search(words, found[check].message), found[check].message


def test_an_examination_tells_its_progress(quick_job):
    steps: list[tuple[str, int, int]] = []
    examine(quick_job, on_check=lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == list(range(steps[-1][2] + 1))
