"""The recipe of the kit's own image, run as a user runs it, against the enroot under test.

Its base is the tests' small root with pip, a package that calls itself torch, and entries of all else that is needed,
as if it had been installed: that would take minutes.
"""

import ensurepip
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cosmos_hpc
from cosmos_hpc.launch.images import read_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(enroot, image, tmp_path):
    """An image with Python, pip and a torch."""
    assert enroot("create", "--force", "--name", "basis", image).returncode == 0
    packages = enroot.data / "basis" / "usr" / "lib" / "python3" / "dist-packages"
    (pip,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    zipfile.ZipFile(pip).extractall(packages)
    (packages / "torch.py").write_text("__version__ = '2.7.1+cu128'\n")
    here = {
        one.name: one.version for one in importlib.metadata.distributions() if one.name not in ("pip", "cosmos-hpc")
    }
    for name, version in {**here, "torch": "2.7.1+cu128"}.items():
        entry = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        entry.mkdir()
        (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert enroot("export", "--output", tmp_path / "base.sqsh", "basis").returncode == 0
    enroot("remove", "--force", "basis")
    return tmp_path / "base.sqsh"


def build(enroot, *arguments):
    path = f"{Path(sys.executable).parent}:{enroot.environment['PATH']}"
    return subprocess.run(
        ["bash", "enroot/build.sbatch", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **enroot.environment, "PATH": path, "PIP_BREAK_SYSTEM_PACKAGES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_recipe_installs_this_package_beside_the_bases_torch_and_says_what_is_inside(enroot, base, tmp_path):
    done = build(enroot, base, tmp_path / "out" / "own.sqsh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch 2.7.1+cu128, megatron-core {importlib.metadata.version('megatron-core')}" in done.stdout
    manifest = read_manifest(tmp_path / "out" / "own.sqsh")
    assert manifest.packages["cosmos-hpc"] == cosmos_hpc.__version__
    assert enroot("create", "--force", "--name", "own", tmp_path / "out" / "own.sqsh").returncode == 0
    told = enroot("start", "own", "python3", "-c", "import cosmos_hpc; print(cosmos_hpc.__version__)")
    assert told.stdout == f"{cosmos_hpc.__version__}\n", told.stderr
    enroot("remove", "--force", "own")


def test_a_recipe_that_fails_leaves_the_image_that_was_there(enroot, image, tmp_path):
    (tmp_path / "own.sqsh").write_text("older")
    done = build(enroot, image, tmp_path / "own.sqsh")
    assert (done.returncode, "BASE has no torch" in done.stderr) == (2, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own.sqsh"]
    assert (tmp_path / "own.sqsh").read_text() == "older"
    assert "name a base image" in build(enroot).stderr
