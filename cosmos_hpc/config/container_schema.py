"""The container that ranks run in: image, mounts, environment, node-local scratch."""

import re
from dataclasses import dataclass, field

from cosmos_hpc.config.fields import expands, require

SECRET = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIALS?)$", re.IGNORECASE)
"""Ends of names of variables whose values must not be written down."""


def refuse_secrets(environment: dict[str, str], setting: str) -> None:
    """Refuse variables whose names say that config.yaml, logs and the provenance must not keep their values.

    Raises:
        ConfigError: with the name of such a variable.
    """
    for name in environment:
        require(
            SECRET.search(name) is None,
            f"{setting} sets {name}, and run folders would keep it: export it before the submission instead",
        )


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """The image that the ranks run in. Named in YAML by a file under enroot/."""

    mode: str = "none"
    """`none` (the ranks run on the host), `pyxis` (flags of srun) or `enroot` (the plain command)."""

    image: str | None = expands(None, is_path=True, may_be_repository=True)
    """Squashfs file on the shared file system, or the name of an image that `cosmos-hpc image import` has brought, such
    as nvcr.io/nvidia/nemo:25.02."""

    digest: str | None = None
    """sha256:... that the image must have; none: the one that was imported last under its name."""

    python: str = expands("python")
    """Python inside the image, or one that a mount brings along."""

    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET[:ro] (or :ro+nosuid) of further folders; package, run folder, data and weights are there."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables set inside the container; secrets are exported before the submission instead."""

    writable: bool = False
    """Whether the image's own files can be written; the next start may find them as they were."""

    mount_home: bool = False
    """Whether the user's home is there; if not, HOME is /tmp."""

    scratch: str | None = expands(None)
    """Folder on a disk of each node, such as /raid: there for the ranks as TMPDIR, and where plain enroot unpacks
    images to two or three times their size; none: /tmp for these, and for the ranks a /tmp in memory."""

    hooks: str | None = expands(None, is_path=True)
    """Configuration script in enroot's form (functions environ, mounts, hooks) that each start reads; not with pyxis,
    where the cluster's own hooks run."""

    def __post_init__(self) -> None:
        require(
            self.mode in ("none", "pyxis", "enroot"),
            f"container.mode is {self.mode!r}: set none, pyxis or enroot",
        )
        require(
            self.mode == "none" or self.image is not None,
            f"container.mode is {self.mode}, but container.image is not set: name a squashfs file",
        )
        require(
            self.digest is None or re.fullmatch(r"sha256:[0-9a-f]{64}", self.digest) is not None,
            f"container.digest is {self.digest!r}: set sha256: and 64 digits, as `cosmos-hpc image list` shows it",
        )
        for mount in self.mounts:
            source, colon, rest = mount.partition(":")
            require(
                bool(colon) and source.startswith("/") and rest.startswith("/") and not re.search(r"[\s,]", mount),
                f"container.mounts has {mount!r}: write SOURCE:TARGET or SOURCE:TARGET:ro, both whole paths",
            )
        require(
            self.scratch is None or self.scratch.startswith("/"),
            f"container.scratch is {self.scratch!r}: set a whole path, such as /raid",
        )
        require(
            self.hooks is None or self.mode != "pyxis",
            "container.hooks is for mode enroot: under pyxis the cluster's own hooks run",
        )
        refuse_secrets(self.environment, "container.environment")
