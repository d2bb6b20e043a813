"""Images that were imported to squashfs files on the shared file system, and what is written beside each."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.config.errors import ConfigError

DOCKER_HUB = "registry-1.docker.io"

SUFFIXES = (".sqsh", ".squashfs")

PACKAGES = ("torch", "megatron-core", "megatron-energon", "decord", "cosmos-hpc")
"""What an image has to bring, checked by `doctor`; the last one comes with the jobs' own copy of the code as well."""

_NAME = re.compile(
    r"(?:docker://)?(?:(?P<user>[^@/#]+)@(?!sha256:))?"
    r"(?:(?P<registry>[^/#@\s]+)[/#])?(?P<repository>[a-z0-9][a-z0-9._/-]*)"
    r"(?::(?P<tag>[\w][\w.-]*))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class ImageName:
    """An image in a registry."""

    registry: str
    """Host, with its port where it has one."""

    repository: str
    """Such as nvidia/nemo."""

    tag: str
    """Such as 25.02."""

    digest: str | None = None
    """sha256:... where it is pinned."""

    user: str | None = None
    """Login to use, where enroot's file of credentials has several for the registry."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Read a name as people write it: with `/` or enroot's `#` behind the registry, with docker:// or without.

        Raises:
            ConfigError: if it can't be an image's name.
        """
        found = _NAME.fullmatch(text)
        if found is None:
            raise ConfigError(f"{text!r} names no image: write one such as nvcr.io/nvidia/nemo:25.02")
        registry, repository = found["registry"] or "", found["repository"]
        if registry and not re.search(r"[.:]|^localhost$", registry) and "#" not in text:
            registry, repository = "", f"{registry}/{repository}"  # an organisation on Docker Hub
        registry = DOCKER_HUB if registry in ("", "docker.io", "index.docker.io") else registry
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(registry, repository, found["tag"] or "latest", found["digest"], found["user"])

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}:{self.tag}"

    @property
    def reference(self) -> str:
        """Tag or, where it is pinned, digest: what a registry is asked for."""
        return self.digest or self.tag

    @property
    def enroot_uri(self) -> str:
        """Enroot parts registry and image by `#`; with `:` before a digest, all of its versions know it for one."""
        user = f"{self.user}@" if self.user else ""
        return f"docker://{user}{self.registry}#{self.repository}:{self.reference}"

    @property
    def file_stem(self) -> str:
        """Of its squashfs file: tag for people, digest since tags move."""
        parts = [self.registry, *self.repository.split("/"), self.tag]
        digits = (self.digest or "").removeprefix("sha256:")[:12]
        return "+".join(part.replace(":", "-") for part in parts) + (f"@{digits}" if digits else "")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a squashfs file, written beside it when it was made."""

    name: str
    """The image as `str(ImageName)` writes it; for one that was built, what its recipe calls it."""

    digest: str | None
    """The registry's name of the content; none of an image that was built here."""

    size: int
    """Bytes of the file."""

    imported: str
    """When, in ISO 8601."""

    made_by: str
    """Version of enroot."""

    packages: dict[str, str] = field(default_factory=dict)
    """Versions of the Python packages inside, by their normalised names; empty where they could not be listed."""


def images_folder() -> Path:
    """Where imported images lie: the environment variable COSMOS_HPC_IMAGES, else images/ in the working folder."""
    return Path(os.environ.get("COSMOS_HPC_IMAGES", "images")).resolve()


def manifest_file(squashfs: Path) -> Path:
    """Beside the squashfs file."""
    return squashfs.with_name(f"{squashfs.name}.json")


def to_json(manifest: Manifest) -> str:
    """The text that `read_manifest` reads."""
    return json.dumps(dataclasses.asdict(manifest), indent=1)


def read_manifest(squashfs: Path) -> Manifest | None:
    """What was written beside a squashfs file.

    Returns:
        None where nothing was, or nothing that this version can read.
    """
    try:
        told = json.loads(manifest_file(squashfs).read_text(encoding="utf-8"))
        return Manifest(**{item.name: told[item.name] for item in dataclasses.fields(Manifest)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def imported(folder: Path | None = None) -> list[tuple[Path, Manifest]]:
    """Images in a folder, `images_folder()` where none is named, with what is known of each, oldest first."""
    files = sorted((folder or images_folder()).glob("*.sqsh"))
    found = [(file, manifest) for file in files if (manifest := read_manifest(file)) is not None]
    return sorted(found, key=lambda pair: pair[1].imported)


def squashfs_of(container: ContainerConfig) -> Path | None:
    """Where the image of some settings lies.

    Returns:
        The file that `container.image` names, which need not be there, if not here then in `images_folder()`; or the
        one that was last imported under that name, with the digest where one is set; none if there is no such one.

    Raises:
        ConfigError: if `container.image` can be neither.
    """
    image = container.image or ""
    if image.endswith(SUFFIXES):
        ours = images_folder() / Path(image).name
        return ours if ours.is_file() and not Path(image).is_file() else Path(image).resolve()
    name = ImageName.of(image)
    wanted = container.digest or name.digest
    fitting = [
        file
        for file, manifest in imported()
        if manifest.name == str(name) and wanted in (None, manifest.digest)
    ]  # fmt: skip
    return fitting[-1] if fitting else None
