"""The container as a prefix of the ranks' command, in three forms: pyxis, plain enroot, none."""

import shlex
from typing import NamedTuple

from cosmos_hpc.config.schema import ContainerConfig

PASSED_IN = ("SLURM_", "MASTER_", "NCCL_", "CUDA_", "NVIDIA_", "WANDB_", "HF_", "COSMOS_HPC_")
"""Beginnings of the variables that a rank needs; plain enroot passes none by itself."""


class ContainerPrefix(NamedTuple):
    """What stands before the ranks' command."""

    srun_flags: list[str]
    """Further options of srun."""

    command: list[str]
    """Words between srun's options and the ranks' command."""


def container_prefix(container: ContainerConfig, mounts: tuple[str, ...]) -> ContainerPrefix:
    """How the ranks' command enters the image; `container.environment` is expected in the environment of srun.

    Args:
        container: the image and how it is run.
        mounts: SOURCE:TARGET of the folders that every rank needs, beside those of the settings.
    """
    all_mounts = (*mounts, *container.mounts)
    if container.mode == "pyxis":
        flags = [f"--container-image={_image_uri(container.image or '')}", "--no-container-mount-home"]
        flags += [f"--container-mounts={','.join(all_mounts)}"] if all_mounts else []
        flags += [f"--container-env={','.join(container.environment)}"] if container.environment else []
        return ContainerPrefix(flags, [])
    if container.mode == "enroot":
        return ContainerPrefix([], _enroot_start(container, all_mounts))
    return ContainerPrefix([], [])


def _image_uri(image: str) -> str:
    """Enroot parts registry and image by `#`; a file keeps a slash, or pyxis would take it for an image's name."""
    if image.endswith(".sqsh"):
        return image if "/" in image else f"./{image}"
    registry, slash, rest = image.removeprefix("docker://").partition("/")
    return f"{registry}#{rest}" if slash and "." in registry and "#" not in image else image


def _enroot_start(container: ContainerConfig, mounts: tuple[str, ...]) -> list[str]:
    """A shell that names every variable to pass, then becomes enroot, which becomes the rank."""
    options = [word for mount in mounts for word in ("--mount", mount)]
    names = "|".join([*(f"{beginning}.*" for beginning in PASSED_IN), *container.environment])
    script = (
        f"exec enroot start $(compgen -e | grep -Ex '({names})' | sed 's/^/--env /') "
        f'{shlex.join(options)} {shlex.quote(container.image or "")} "$@"'
    )
    return ["bash", "-c", script, "enroot"]
