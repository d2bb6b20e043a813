"""The container as a prefix of the ranks' command, in three forms: pyxis, plain enroot, none."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch.images import SUFFIXES, images_folder

ENROOT_START = Path(__file__).with_name("enroot_start.sh")

PASSED_IN = (
    "SLURM_.*|PMI_.*|PMIX_.*|MASTER_.*|NCCL_.*|TORCH_.*|GLOO_.*|UCX_.*|FI_.*|OMP_.*|CUDA_.*|NVIDIA_.*|MELLANOX_.*"
    "|WANDB_.*|HF_.*|AWS_.*|MSC_.*|COSMOS_HPC_.*|TMPDIR|PYTHONUNBUFFERED|PYTHONSAFEPATH|(HTTPS?|NO|https?|no)_(PROXY|proxy)"
)
"""Variables that a rank may need, as an extended regular expression: plain enroot passes none by itself."""

LEFT_OUT = r"(CUDA|NCCL|NVIDIA|TORCH|UCX)_(HOME|PATH|ROOT|DIR|VERSION).*"
"""Of these, what tells of the host's own installation."""

NVIDIA, INFINIBAND = Path("/dev/nvidiactl"), Path("/dev/infiniband/rdma_cm")
"""What a node with such devices has. Asked for where they are not, enroot's hooks refuse to start anything."""

OWN_INSIDE = ("/tmp", "/run", "/var/run", "/var/lock", "/proc", "/sys", "/dev")
"""Where a container sees folders of its own."""

CODE = "COSMOS_HPC_PYTHONPATH"
"""Passed in for PYTHONPATH: the image may have one of its own, which Megatron-Core may hang on."""

ENTER = f'export PYTHONPATH="${CODE}${{PYTHONPATH:+:$PYTHONPATH}}"; cd "$0"; exec "$@"'
"""What a shell inside does before it becomes the rank."""


class ContainerPrefix(NamedTuple):
    """What stands before the ranks' command."""

    srun_flags: list[str]
    """Further options of srun."""

    command: list[str]
    """Words between srun's options and the ranks' command."""


def container_prefix(
    container: ContainerConfig, mounts: Iterable[str], workdir: Path, names: Iterable[str] = ()
) -> ContainerPrefix:
    """How the ranks' command enters the image; every process on the way is replaced by the next one, at last the rank.

    No value of a variable is part of it: `container_environment` is expected in the environment of srun.

    Args:
        container: the image, a squashfs file, and how it is run.
        mounts: SOURCE:TARGET of what every rank needs, beside the mounts of the settings.
        workdir: where the rank starts, inside.
        names: variables that are passed in whatever they are called, and win over the image's own.
    """
    if container.mode == "none":
        return ContainerPrefix([], [])
    home = "" if container.mount_home else "export HOME=/tmp; "
    enter = ["sh", "-c", home + ENTER, str(workdir)]
    all_mounts = [*mounts, *([f"{container.scratch}:{container.scratch}"] if container.scratch else [])]
    all_mounts += container.mounts
    passed = [name for name in dict.fromkeys([*names, *container.environment]) if name != "PYTHONPATH"]
    if container.mode == "pyxis":
        return ContainerPrefix(_pyxis_flags(container, all_mounts, workdir, passed), enter)
    return ContainerPrefix([], [*_enroot_start(container, all_mounts, passed), *enter])


def container_environment(container: ContainerConfig, pythonpath: str, *, has_gpus: bool) -> dict[str, str]:
    """Variables of srun and the ranks by which the container gets devices, scratch and code; called on a node.

    Args:
        container: its settings, whose own environment wins.
        pythonpath: where Python finds the code of the job.
        has_gpus: whether the job asked for any.
    """
    if container.mode == "none":
        return {}
    return {
        # All that SLURM gave to the job; unset, there are none, and NCCL falls back to sockets.
        "NVIDIA_VISIBLE_DEVICES": "all" if has_gpus and NVIDIA.exists() else "void",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",  # enroot's own default can't compute
        "MELLANOX_VISIBLE_DEVICES": "all" if INFINIBAND.exists() else "void",
        "ENROOT_MOUNT_HOME": "yes" if container.mount_home else "no",
        "TMPDIR": container.scratch or "/tmp",  # the host's may be a folder that is not there inside
        CODE: pythonpath,
        **container.environment,
    }


def check_container(container: ContainerConfig, paths: dict[str, Path]) -> None:
    """Refuse what can't work before anything is sent.

    Args:
        container: its settings.
        paths: what the ranks need of the shared file system, by what the user calls it.

    Raises:
        ConfigError: for the first thing that is not there, or would not be there inside.
    """
    if container.mode == "none":
        return
    if (missing := missing_image(container)) is not None:
        raise ConfigError(missing)
    if container.hooks is not None and not Path(container.hooks).is_file():
        raise ConfigError(f"container.hooks is {container.hooks}, which is no file: check the path")
    check_visible(paths)


def check_visible(paths: dict[str, Path]) -> None:
    """Refuse what a container would not see, since it has such folders for itself.

    Args:
        paths: what the ranks need of the shared file system, by what the user calls it.

    Raises:
        ConfigError: for the first one.
    """
    for name, path in paths.items():
        for place in (path, path.resolve()):
            own = next((own for own in OWN_INSIDE if place.is_relative_to(own)), None)
            if own is not None:
                mend = "set COSMOS_HPC_RUNS to a folder there" if name == "the run folder" else "put it there"
                raise ConfigError(
                    f"{name} lies in {place}, but a container has {own} for itself: only the shared file system is the "
                    f"same inside and outside, {mend}"
                )
        if re.search(r"[\s,:]", str(path)):
            raise ConfigError(f"{name} is {path}, but mounts of a container allow no space, comma or colon: rename it")


def missing_image(container: ContainerConfig) -> str | None:
    """What is told of an image that is not there, with the mend; none where it is."""
    image = Path(container.image or "")
    if image.suffix not in SUFFIXES:
        name = f"{container.image}@{container.digest}" if container.digest else container.image
        return (
            f"container.image is {name}, which is not in {images_folder()} (COSMOS_HPC_IMAGES): run `cosmos-hpc image "
            f"import {name}` first"
        )
    if not image.is_file():
        return f"container.image is {image}, which is no file: check the path, or see `cosmos-hpc image list`"
    return None


def _pyxis_flags(container: ContainerConfig, mounts: Sequence[str], workdir: Path, names: Sequence[str]) -> list[str]:
    """Options of srun; `+` parts the options of a mount there, since the comma parts mounts."""
    mounts = [_mount(mount, "+") for mount in mounts]
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={workdir}",
        "--container-writable" if container.writable else "--container-readonly",
        "--container-mount-home" if container.mount_home else "--no-container-mount-home",
        f"--container-env={','.join([CODE, *names])}",
    ]


def _enroot_start(container: ContainerConfig, mounts: Sequence[str], names: Sequence[str]) -> list[str]:
    """The script that unpacks the image where that is still to be done, and becomes enroot."""
    options = ["--rw"] if container.writable else []
    options += ["--conf", container.hooks] if container.hooks else []
    options += [word for mount in mounts for word in ("--mount", _mount(mount, ",", "rbind,x-create=auto"))]
    wanted = "|".join([PASSED_IN, *map(re.escape, names)])
    script = ["bash", str(ENROOT_START), container.image or "", container.scratch or "/tmp", wanted, LEFT_OUT]
    return [*script, *options, "--"]


def _mount(mount: str, separator: str, always: str = "") -> str:
    """SOURCE:TARGET[:OPTIONS] as the tool wants it; with options, enroot leaves out what it does by itself without."""
    source, target, *options = mount.split(":")
    words = re.split(r"[,+]", options[0]) if options else []
    words = [*(always.split(",") if words and always else []), *words]
    return ":".join([source, target, *([separator.join(words)] if words else [])])
