"""What is read from sinfo, on clusters that the tests' own one is not like; the refusals are in tests/cluster."""

from math import inf
from pathlib import Path

import pytest

from cosmos_hpc import api
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.launch.limits import Partition, check_fits, partitions

SAID = """\
debug|30:00|2|64|(null)
gpu*|2-00:00:00|4|96|gpu:h100:8(S:0-1)
gpu*|2-00:00:00|16|128+|gpu:a100:4(S:0),gpu:a100_1g:2,shard:8
long|infinite|1|8|gpu:2
"""


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of sinfo that says what is written above."""
    double = tmp_path / "sinfo"
    double.write_text(f"#!/bin/bash\ncat <<'END'\n{SAID}END\n")
    double.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def check(*overrides: str) -> None:
    size = ["data.global_batch_size=64", "cluster.executor=slurm"]
    check_fits([resolve(load_experiment(None, [*size, *overrides]), {})])


def test_partitions_of_several_kinds_of_nodes_are_their_largest(sinfo):
    assert partitions() == {
        "debug": Partition("debug", False, 30, 2, 64, 0),
        "gpu": Partition("gpu", True, 2 * 24 * 60, 20, 128, 8, ("h100", "a100", "a100_1g")),
        "long": Partition("long", False, inf, 1, 8, 2),
    }


def test_what_fits_passes_in_the_default_partition_and_in_one_of_several(sinfo):
    check("trainer.devices=8", "trainer.num_nodes=8", "cluster.time_limit_min=2880")
    check("cluster.partition='debug,gpu'", "trainer.devices=8")
    check("cluster.partition=long", "cluster.time_limit_min=100000", "trainer.devices=2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.time_limit_min=2881"], "time_limit_min is 2881, but partition gpu allows 2880"),
        (
            ["cluster.partition=debug", "cluster.time_limit_min=30"],
            r"have 0: set that or less \(cluster.gpus_per_node=0",
        ),
        (["cluster.partition=gold"], "which this cluster does not have: set debug or gpu or long"),
        (["cluster.partition=long", "trainer.devices=2", "cluster.cpus_per_task=8"], "is 16, .* have 8 CPUs"),
    ],
)
def test_what_does_not_fit_is_told_with_the_setting_and_the_limit(sinfo, overrides, words):
    with pytest.raises(ConfigError, match=words):
        check(*overrides)


def test_a_plan_warns_of_all_that_a_submission_would_refuse_and_plans_without_slurm_too(
    sinfo, quick_job, tmp_path, monkeypatch
):
    asked = ["cluster={executor: slurm, partition: long, cpus_per_task: 5}", "trainer.num_nodes=2"]
    ((nodes, cpus, *advice),) = api.plan(quick_job, [*asked, "data.micro_batch_size=1"]).warnings()
    assert nodes == "trainer.num_nodes is 2, but partition long has 1: set fewer"
    assert cpus.startswith("trainer.devices x cluster.cpus_per_task is 10, but nodes of partition long have 8 CPUs")
    with pytest.raises(ConfigError, match=nodes):
        check(*asked)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert api.plan(quick_job, ["cluster={executor: slurm}"]).warnings() == [
        ["cluster.executor is slurm, but there is no sinfo here: set `cluster: local`", *advice]
    ]
    assert api.plan(quick_job).warnings() == [advice]


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sinfo here: set `cluster: local`"):
        check()
