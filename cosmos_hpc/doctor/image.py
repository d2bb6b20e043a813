"""The container's image: there, with what must be inside, and with credentials where it has yet to be brought."""

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned
from cosmos_hpc.launch.container import missing_image
from cosmos_hpc.launch.images import PACKAGES, SUFFIXES, ImageName, read_manifest, squashfs_of
from cosmos_hpc.launch.registry import look_up

MAGIC = b"hsqs"
"""What a squashfs begins with."""


def present(case: Case) -> Iterator[Finding]:
    """The squashfs on the shared file system, whole, and with the digest that the settings pin."""
    for container in _containers(case):
        path = _file_of(container)
        if (missing := missing_image(container)) is not None:
            yield failed("image", missing)
        elif path is not None:
            wrong = _wrong_file(container, path)
            yield failed("image", wrong) if wrong else passed("image", str(path))


def contents(case: Case) -> Iterator[Finding]:
    """Versions of the packages that ranks import, from the manifest: login nodes often lack enroot."""
    for path in filter(None, map(_file_of, _containers(case))):
        manifest = read_manifest(path)
        if not path.is_file():
            continue
        if manifest is None or not manifest.packages:
            yield warned("image contents", f"nothing is written beside {path} of what is inside: `cosmos-hpc image "
                         f"describe {path}` does it, and `doctor --on-cluster` looks")  # fmt: skip
            continue
        wrong = list(wrong_packages(manifest.packages))
        if wrong:
            yield failed("image contents", f"{path} {', and '.join(wrong)}: build an image by enroot/'s recipe, or "
                         "name one that has them")  # fmt: skip
        else:
            there = {name: version for name, version in manifest.packages.items() if name in PACKAGES}
            yield passed("image contents", ", ".join(f"{name} {version}" for name, version in there.items()))


def credentials(case: Case) -> Iterator[Finding]:
    """Of the registry, where an image has yet to be imported: it is asked as enroot would ask."""
    for container in _containers(case):
        name = container.image or ""
        if name.endswith(SUFFIXES) or _file_of(container) is not None:
            continue
        try:
            there = look_up(ImageName.of(name))
        except ConfigError as error:
            yield failed("credentials", str(error))
        else:
            yield passed("credentials", f"{name} can be imported: {there.size / 2**30:.1f} GiB, {there.digest}")


def _containers(case: Case) -> list[ContainerConfig]:
    found = [run.container for run in case.distinct(lambda run: run.container)]
    return [container for container in found if container.mode != "none"]


def _file_of(container: ContainerConfig) -> Path | None:
    """Where the image lies, or should; none where it was not imported."""
    try:
        return squashfs_of(container)
    except ConfigError:
        return None


def _wrong_file(container: ContainerConfig, path: Path) -> str | None:
    """What is wrong with the file of an image; none where nothing is."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return f"{path} is no squashfs file: import the image again"
    manifest = read_manifest(path)
    if manifest is not None and manifest.size != path.stat().st_size:
        return f"{path} has {path.stat().st_size} bytes, {manifest.size} when it was imported: import the image again"
    if container.digest and manifest is not None and manifest.digest != container.digest:
        return f"{path} is of {manifest.digest}, but container.digest is {container.digest}: import that one"
    return None


def wrong_packages(there: Mapping[str, str]) -> Iterator[str]:
    """What is missing, or of a version that this package was not tested with.

    Args:
        there: versions by name, as in a manifest.
    """
    needed = {canonicalize_name(one.name): one for one in map(Requirement, metadata.requires("cosmos-hpc") or ())}
    for name in PACKAGES:
        if name not in needed:  # the package itself, which comes with the job
            continue
        version = there.get(name)
        if version is None:
            yield f"lacks {name}"
        elif not _is_within(version, needed[canonicalize_name(name)]):
            yield f"has {name} {version}, {needed[canonicalize_name(name)].specifier} is needed"


def _is_within(version: str, needed: Requirement) -> bool:
    """Vendors' builds such as 2.6.0a0+ecf3bae40a.nv25.02 count as the release that they precede."""
    try:
        return needed.specifier.contains(Version(version).base_version)
    except InvalidVersion:
        return False
