import dataclasses
import json
import re
from pathlib import Path

import pytest

from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import WandbConfig
from cosmos_hpc.launch import container as container_module
from cosmos_hpc.launch.container import check_container, container_environment, container_prefix
from cosmos_hpc.launch.images import Manifest, manifest_file, to_json
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.launch.step import mounts, needed_paths, step_command, step_environment

PYXIS_OPTIONS = {
    "container-image": r"(?:[^@,\s]+@)?(?:[\w.:-]+#)?[a-z0-9/._-]+(?::[\w.-]+)?|/\S+\.sqsh",
    "container-mounts": r"/[^:,+\s]+:/[^:,+\s]+(?::\w+(?:\+\w+)*)?(?:,/[^:,+\s]+:/[^:,+\s]+(?::\w+(?:\+\w+)*)?)*",
    "container-workdir": r"/\S*",
    "container-name": r"\w+(?::\w+)?",
    "container-save": r"/\S+",
    "container-env": r"[A-Za-z_]\w*(?:,[A-Za-z_]\w*)*",
    "container-mount-home": None,
    "no-container-mount-home": None,
    "container-remap-root": None,
    "no-container-remap-root": None,
    "container-entrypoint": None,
    "no-container-entrypoint": None,
    "container-entrypoint-log": None,
    "container-writable": None,
    "container-readonly": None,
}
"""Options as `srun --help` prints them under pyxis 0.24, with what each may be set to; none: it takes no value."""

EXCLUSIVE = (
    {"container-mount-home", "no-container-mount-home"},
    {"container-remap-root", "no-container-remap-root"},
    {"container-entrypoint", "no-container-entrypoint"},
    {"container-writable", "container-readonly"},
)


def parsed(flags):
    """Flags as pyxis would read them.

    Raises:
        AssertionError: for one that it does not know, a malformed value, one given twice, two that exclude each other.
    """
    found = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        assert flag.startswith("--")
        assert name in PYXIS_OPTIONS, f"pyxis knows no {flag}"
        assert name not in found, f"{name} twice"
        form = PYXIS_OPTIONS[name]
        assert bool(equals) == (form is not None), flag
        assert form is None or re.fullmatch(form, value), flag
        found[name] = value
    assert all(len(pair & found.keys()) < 2 for pair in EXCLUSIVE)
    return found


@pytest.mark.parametrize(
    "bad",
    [
        ["--container-mounts=/a:/b:ro,nosuid"],
        ["--container-mount=/a:/b"],
        ["--container-env=A=b"],
        ["--container-writable", "--container-readonly"],
        ["--container-mount-home=yes"],
    ],
)
def test_the_parser_of_pyxis_options_refuses_what_pyxis_would(bad):
    with pytest.raises(AssertionError):
        parsed(bad)


@pytest.fixture
def run():
    """A function that makes a run on SLURM in a container."""

    def make(**container):
        settings = [f"container.{name}={value}" for name, value in container.items()]
        fixed = ["cluster.executor=slurm", "cluster.environment.NCCL_DEBUG=WARN", "data.path=/data/roads",
                 "loss.lpips.weight=0", "trainer.devices=2", "trainer.num_nodes=2"]  # fmt: skip
        return resolve(load_experiment(None, [*fixed, *settings]), {})

    return make


FOLDER = RunFolder(Path("/shared/runs/roads/000-12345678"))


def test_without_a_container_nothing_stands_before_the_command():
    assert container_prefix(ContainerConfig(), ("/data:/data",), Path("/run")) == ([], [])
    assert container_environment(ContainerConfig(), "", has_gpus=True) == {}


def test_pyxis_gets_every_flag_in_the_form_that_it_documents(run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    config = run(mode="pyxis", image="/shared/nemo.sqsh", scratch="/raid", mounts="['/models:/models:ro+nosuid']",
                 environment="{SPEED: fast}")  # fmt: skip
    command = step_command(config, FOLDER, 0)
    flags = parsed([word for word in command if "container" in word and word.startswith("--")])
    assert flags["container-image"] == "/shared/nemo.sqsh"
    package = Path(__file__).parents[2]
    assert flags["container-mounts"].split(",") == [
        f"{package}:{package}", f"{FOLDER.path}:{FOLDER.path}", "/data/roads:/data/roads", "/raid:/raid",
        "/models:/models:ro+nosuid",
    ]  # fmt: skip
    assert flags["container-workdir"] == str(FOLDER.path)
    assert {"container-readonly", "no-container-mount-home"} <= flags.keys()
    names = flags["container-env"].split(",")
    assert {"SPEED", "NCCL_DEBUG", "MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY", "COSMOS_HPC_PYTHONPATH",
            "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "MELLANOX_VISIBLE_DEVICES"} <= {*names}  # fmt: skip
    assert "PYTHONPATH" not in names, "the image's own would be lost"
    assert "hush" not in " ".join(command)
    assert command[command.index("sh") + 4 :][:3] == ["python", "-m", "cosmos_hpc.train"]


def test_pyxis_without_a_key_for_wandb_names_none(run, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    command = step_command(run(mode="pyxis", image="/shared/nemo.sqsh"), FOLDER, 0)
    assert "WANDB_API_KEY" not in " ".join(command)


def test_pyxis_takes_other_choices_as_flags_too(run):
    command = step_command(run(mode="pyxis", image="/shared/nemo.sqsh", writable=True, mount_home=True), FOLDER, 0)
    flags = parsed([word for word in command if "container" in word and word.startswith("--")])
    assert {"container-writable", "container-mount-home"} <= flags.keys()


def test_plain_enroot_gets_names_of_variables_and_never_their_values(run, monkeypatch):
    monkeypatch.setenv("MY_KEY", "hush")
    config = run(mode="enroot", image="/shared/nemo.sqsh", environment="{FLAVOR: plain-to-see}", writable=True,
                 mounts="['/models:/models:ro']", python="/opt/venv/bin/python")  # fmt: skip
    config = dataclasses.replace(config, wandb=WandbConfig(api_key_env="MY_KEY"))
    command = step_command(config, FOLDER, 0)
    script = command[command.index("bash") :]
    assert Path(script[1]).is_file()
    assert script[2:4] == ["/shared/nemo.sqsh", "/tmp"]
    wanted, unwanted = script[4:6]
    for name in ("SLURM_PROCID", "MASTER_ADDR", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "HF_HOME",
                 "COSMOS_HPC_PYTHONPATH", "FLAVOR", "MY_KEY", "https_proxy", "OMP_NUM_THREADS"):  # fmt: skip
        assert re.fullmatch(wanted, name), name
        assert not re.fullmatch(unwanted, name), name
    assert not re.fullmatch(wanted, "LD_LIBRARY_PATH")
    assert re.fullmatch(unwanted, "CUDA_HOME")
    options = script[6 : script.index("--")]
    assert options[0] == "--rw"
    assert "/models:/models:rbind,x-create=auto,ro" in options
    assert f"{FOLDER.path}:{FOLDER.path}" in options
    assert "hush" not in " ".join(command)
    assert "plain-to-see" not in " ".join(command)
    assert "/opt/venv/bin/python" in command


@pytest.mark.parametrize("has_devices", [True, False])
def test_devices_scratch_and_code_come_by_the_environment_and_the_settings_win(run, monkeypatch, tmp_path, has_devices):
    monkeypatch.setenv("PYTHONPATH", "/snapshot")
    for name in ("NVIDIA", "INFINIBAND"):
        monkeypatch.setattr(container_module, name, tmp_path if has_devices else tmp_path / "none")
    config = run(mode="enroot", image="/shared/nemo.sqsh", scratch="/raid",
                 environment="{NVIDIA_DRIVER_CAPABILITIES: 'compute,utility,video', PYTHONPATH: /mine}")  # fmt: skip
    seen = step_environment(config, "c1", 4000)
    devices = "all" if has_devices else "void"
    assert (seen["NVIDIA_VISIBLE_DEVICES"], seen["MELLANOX_VISIBLE_DEVICES"]) == (devices, devices)
    assert seen["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    assert (seen["TMPDIR"], seen["ENROOT_MOUNT_HOME"]) == ("/raid", "no")
    assert seen["COSMOS_HPC_PYTHONPATH"] == "/mine:/snapshot"


def test_the_whole_repository_of_cached_weights_is_mounted():
    snapshot = "/hub/models--nvidia--x/snapshots/abc"
    config = resolve(load_experiment(None, ["data.path=/data/roads", f"model.jit_ckpt_pth={snapshot}"]), {})
    assert "/hub/models--nvidia--x:/hub/models--nvidia--x" in mounts(config, FOLDER)
    assert needed_paths(config, FOLDER)["model.jit_ckpt_pth"] == Path("/hub/models--nvidia--x")


@pytest.fixture
def container(tmp_path):
    (tmp_path / "image.sqsh").touch()
    return ContainerConfig(mode="enroot", image=str(tmp_path / "image.sqsh"))


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        (
            "the run folder",
            "/tmp/runs/roads/000",
            "the run folder lies in /tmp/runs/roads/000, but a container has /tmp",
        ),
        ("the run folder", "/tmp/runs/roads/000", "set COSMOS_HPC_RUNS to a folder there"),
        ("data.path", "/dev/shm/data", "data.path lies in /dev/shm/data, but a container has /dev for itself"),
        ("data.path", "/data/my films", "data.path is /data/my films, but mounts of a container allow no space"),
    ],
)
def test_what_would_not_be_there_inside_is_refused_in_one_line(container, name, path, words):
    with pytest.raises(ConfigError) as refusal:
        check_container(container, {name: Path(path)})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    check_container(ContainerConfig(), {name: Path(path)})


def test_a_link_into_tmp_is_seen_through(container, tmp_path):
    link = Path("/var/tmp") / f"cosmos-hpc-link-{tmp_path.name}"
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"data.path lies in /tmp/"):
            check_container(container, {"data.path": link})
    finally:
        link.unlink()


def test_an_image_that_is_not_there_is_refused_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COSMOS_HPC_IMAGES", str(tmp_path))
    with pytest.raises(ConfigError, match=r"which is no file: check the path, or see `cosmos-hpc image list`"):
        check_container(ContainerConfig(mode="pyxis", image="/shared/gone.sqsh"), {})
    name = "nvcr.io/nvidia/nemo:25.02"
    with pytest.raises(ConfigError, match=rf"not in {tmp_path} .*run `cosmos-hpc image import {name}` first"):
        check_container(ContainerConfig(mode="pyxis", image=name), {})


def test_a_configuration_script_that_is_not_there_is_refused(container):
    with pytest.raises(ConfigError, match=r"container.hooks is /shared/gone.sh, which is no file"):
        check_container(dataclasses.replace(container, hooks="/shared/gone.sh"), {})


def test_provenance_names_the_image_with_its_digest(run, tmp_path):
    (tmp_path / "nemo.sqsh").write_bytes(b"hsqs")
    manifest = Manifest(name="nvcr.io/nvidia/nemo:25.02", digest="sha256:1", size=4, imported="2026", made_by="4.1.2")
    manifest_file(tmp_path / "nemo.sqsh").write_text(to_json(manifest))
    folder = RunFolder(tmp_path / "runs" / "roads" / "000-12345678")
    lay_out(run(mode="enroot", image=tmp_path / "nemo.sqsh"), folder, {"host": "login"})
    (start,) = json.loads(folder.provenance.read_text())
    assert (start["host"], start["image"]["digest"]) == ("login", "sha256:1")
    assert start["image"]["file"] == str(tmp_path / "nemo.sqsh")
