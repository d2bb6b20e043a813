"""A job that is well, in a folder of its own."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clinic import Clinic, install_cluster


@pytest.fixture
def clinic(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clinic]:
    """Outside /tmp, which containers have of their own."""
    root = Path(tempfile.mkdtemp(prefix="cosmos-hpc-doctor-", dir="/var/tmp"))
    monkeypatch.chdir(root)
    clinic = Clinic(root, root / "quick.yaml", root / "data", root / "nemo.sqsh", root / "weights" / "autoencoder.jit")
    shutil.copytree(dataset, clinic.data)
    clinic.image.write_bytes(b"hsqs" + bytes(4096))
    clinic.write_manifest()
    clinic.weights.parent.mkdir()
    for archive in (clinic.weights, root / "vgg16.pth"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data", bytes(4096))
    clinic.job.write_text(f"""\
name: quick
model: {{channels: 4, jit_ckpt_pth: {clinic.weights.parent}}}
data: {{path: {clinic.data}, num_frames: 9, crop_size: 32, micro_batch_size: 2, global_batch_size: 8, num_workers: 1}}
trainer: {{max_steps: 24, num_nodes: 2, devices: 2}}
loss: {{lpips: {{weights: {root / "vgg16.pth"}}}}}
cluster: {{executor: slurm, partition: gpu, time_limit_min: 60, grace_s: 120}}
container: {{mode: enroot, image: {clinic.image}}}
wandb: {{mode: disabled}}
""")
    install_cluster(clinic)
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    yield clinic
    shutil.rmtree(root)
