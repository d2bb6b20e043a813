"""A healthy job on a cluster whose commands are doubles that print files: a test plants one fault at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

SINFO = "gpu*|4:00:00|4|16|gpu:h100:8(S:0-1)\nlong|infinite|2|16|gpu:a100:8\n"

CONFIG = """\
KillWait                = 30 sec
JobRequeue              = 1
MaxArraySize            = 1001
MaxJobCount             = 10000
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
"""

PARTITION = "PartitionName=gpu State=UP PreemptMode=REQUEUE GraceTime=120 MaxTime=04:00:00\n"

SCRIPTS = {
    "sinfo": 'case "$*" in *--Node*) cat {nodes};; *) cat {sinfo};; esac',
    "scontrol": 'case "$2" in config) cat {config};; partition) cat {partition};; esac',
    "sbatch": "cat {refusal} >&2; test ! -s {refusal} && echo 7",
    "squeue": "",
    "sacct": "",
    "sacctmgr": "echo 'cluster|00:00:00'",
}
"""Bash behind each command; names in braces are files of `Clinic.says`."""


@dataclass
class Clinic:
    """The job, and everything around it that can be broken."""

    root: Path
    """Holds all else; a container can see it."""

    job: Path
    """Experiment file."""

    data: Path
    """Its dataset."""

    image: Path
    """Its squashfs, a double that only begins like one."""

    weights: Path
    """File with its starting weights, a double."""

    def says(self, what: str) -> Path:
        """What a command of the cluster prints."""
        return self.root / "cluster" / what

    def change(self, file: Path, old: str, new: str) -> None:
        """Replace words in a file, which has them."""
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    def write_manifest(self, **changed: object) -> None:
        """As an import leaves it."""
        packages = {"torch": "2.6.0a0+ecf3bae40a.nv25.2", "megatron-core": "0.16.1", "megatron-energon": "7.4.1",
                    "decord": "0.6.0"}  # fmt: skip
        told = {"name": "nvcr.io/nvidia/nemo:25.02", "digest": f"sha256:{'0' * 64}", "size": self.image.stat().st_size,
                "imported": "2026-01-01T00:00:00", "made_by": "a double", "packages": packages}  # fmt: skip
        self.image.with_name(f"{self.image.name}.json").write_text(json.dumps({**told, **changed}))


def install_cluster(clinic: Clinic) -> None:
    texts = {"sinfo": SINFO, "config": CONFIG, "partition": PARTITION, "nodes": "n1\nn2\nn3\nn4\n", "refusal": ""}
    for folder in ("bin", "cluster"):
        (clinic.root / folder).mkdir()
    for name, text in texts.items():
        clinic.says(name).write_text(text)
    for name, script in SCRIPTS.items():
        double = clinic.root / "bin" / name
        double.write_text(f"#!/bin/bash\n{script.format(**{each: clinic.says(each) for each in texts})}\n")
        double.chmod(0o755)
