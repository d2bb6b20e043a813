"""Images from a registry to squashfs files on the shared file system: each digest once, whole or not at all."""

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import write_atomically
from cosmos_hpc.launch.images import SUFFIXES, ImageName, Manifest, imported, manifest_file, read_manifest, to_json
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.registry import RemoteImage, look_up

ATTEMPTS = 4
"""Of an import; layers that are in enroot's cache are not transferred again."""

PAUSE_S = 10.0
"""Before the second attempt; twice as long before each further one."""

UNPACKED = 4
"""Bytes that a compressed byte of a layer may take in enroot's temporary folder: unpacked, and once more in part."""

POLL_S = 0.5

_INFO = re.compile(r"\[INFO\] (.*\S)")
_PACKAGE = re.compile(r"/(?:site|dist)-packages/([^/]+?)-(\d[^/-]*)(?:-[^/]*)?\.(?:dist|egg)-info$")


@dataclass(frozen=True)
class WantedImage:
    """An image that the registry has, and where it goes."""

    name: ImageName
    """With its digest."""

    remote: RemoteImage
    """What the registry says of it."""

    folder: Path
    """For squashfs files."""

    @property
    def file(self) -> Path:
        """Its squashfs file, there or not."""
        return self.folder / f"{self.name.file_stem}.sqsh"

    @property
    def is_there(self) -> bool:
        """Whether it was imported, whole."""
        manifest = read_manifest(self.file)
        return manifest is not None and self.file.is_file() and self.file.stat().st_size == manifest.size


Report = Callable[[str, int], None]
"""Told what enroot does, and how many bytes of the layers it has."""


def find(text: str, folder: Path, digest: str | None = None) -> WantedImage:
    """Ask the registry for an image, with enroot's credentials.

    Args:
        text: its name as people write it.
        folder: where squashfs files lie.
        digest: that it must have; none: what its tag points to now.

    Raises:
        ConfigError: if it can't be had.
    """
    name = ImageName.of(text)
    name = dataclasses.replace(name, digest=digest or name.digest)
    remote = look_up(name)
    if not remote.digest:
        raise ConfigError(f"{name.registry} tells no digest of {name}: name one, as NAME@sha256:...")
    return WantedImage(dataclasses.replace(name, digest=remote.digest), remote, folder)


def bring(wanted: WantedImage, report: Report = lambda *_: None) -> Path:
    """Have enroot import an image, unless it is there.

    A second importer waits for the first one. What a killed one left is removed by the next.

    Args:
        wanted: from `find`.
        report: called every now and then.

    Returns:
        The squashfs file; its manifest lies beside it.

    Raises:
        ConfigError: if there is no enroot, no room, or every attempt failed.
    """
    wanted.folder.mkdir(parents=True, exist_ok=True)
    with _alone(wanted, report):
        if wanted.is_there:
            return wanted.file
        for old in wanted.folder.glob(f".{wanted.name.file_stem}.*.partial"):
            old.unlink()
        if not _link(wanted):
            if shutil.which("enroot") is None:
                raise ConfigError(
                    f"there is no enroot on {socket.gethostname()}: import where it is, with --cluster PROFILE"
                )
            _refuse_without_room(wanted)
            _import(wanted, report)
    return wanted.file


@contextlib.contextmanager
def _alone(wanted: WantedImage, report: Report) -> Iterator[None]:
    lock = wanted.folder / f".{wanted.name.file_stem}.lock"
    while True:
        with locked(lock) as ours:
            if ours:
                yield
                return
        report("waiting for another import of the same image", 0)
        time.sleep(POLL_S)


def _link(wanted: WantedImage) -> bool:
    """Give the same content, imported under another tag, this name as well."""
    for file, manifest in imported(wanted.folder):
        if manifest.digest == wanted.remote.digest and file.stat().st_size == manifest.size:
            renamed = dataclasses.replace(manifest, name=str(wanted.name), imported=_now())
            write_atomically(manifest_file(wanted.file), to_json(renamed))
            wanted.file.unlink(missing_ok=True)
            os.link(file, wanted.file)
            return True
    return False


def _import(wanted: WantedImage, report: Report) -> None:
    stem, who = wanted.name.file_stem, f"{socket.gethostname()}-{os.getpid()}"
    partial = wanted.folder / f".{stem}.{who}.partial"
    said = ""
    try:
        for attempt in range(ATTEMPTS):
            if attempt:
                report(f"attempt {attempt} failed ({said}): trying again", 0)
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            partial.unlink(missing_ok=True)  # enroot refuses a file that is there
            code, said = _call_enroot(wanted, partial, report)
            if code == 0 and partial.is_file():
                break
        else:
            raise ConfigError(f"enroot could not import {wanted.name} in {ATTEMPTS} attempts: {said}")
        report("looking at what is inside", wanted.remote.size)
        manifest = Manifest(
            name=str(wanted.name),
            digest=wanted.remote.digest,
            size=partial.stat().st_size,
            imported=_now(),
            made_by=enroot_version(),
            packages=package_versions(partial),
        )
        partial.chmod(0o644)  # for colleagues
        write_atomically(manifest_file(wanted.file), to_json(manifest))
        partial.rename(wanted.file)
    finally:
        partial.unlink(missing_ok=True)


def describe(file: Path) -> Manifest:
    """Write the manifest of a squashfs file that came otherwise.

    Raises:
        ConfigError: if it is none.
    """
    if file.suffix not in SUFFIXES or not file.is_file():
        raise ConfigError(f"{file} is no squashfs file: name one that ends in .sqsh")
    manifest = Manifest(name=file.name, digest=None, size=file.stat().st_size, imported=_now(),
                        made_by=enroot_version(), packages=package_versions(file))  # fmt: skip
    write_atomically(manifest_file(file), to_json(manifest))
    return manifest


def _call_enroot(wanted: WantedImage, partial: Path, report: Report) -> tuple[int, str]:
    """Its exit code, and the last that it said."""
    said = step = "starting"
    command = ["enroot", "import", "--output", str(partial), wanted.name.enroot_uri]
    with tempfile.NamedTemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            with Path(output.name).open(errors="replace") as told:
                while True:
                    is_over = process.poll() is not None
                    for line in told.read().splitlines():
                        said = line.strip() or said
                        step = found[1] if (found := _INFO.search(line)) else step
                    report(step, _transferred(wanted.remote))
                    if is_over:
                        return process.returncode, said.removeprefix("[ERROR] ")
                    time.sleep(POLL_S)
        except BaseException:  # Ctrl-C, the end of the job: nothing goes on behind it
            process.terminate()
            process.wait()
            raise


def _transferred(remote: RemoteImage) -> int:
    """Bytes of the layers in enroot's cache; as it packs them anew, this is a close guess."""
    cache, total = cache_folder(), 0
    for digest, size in remote.layers.items():
        stem = digest.removeprefix("sha256:")
        with contextlib.suppress(OSError):  # renamed while we looked
            total += size if (cache / stem).exists() else sum(f.stat().st_size for f in cache.glob(f"{stem}.*"))
    return min(total, remote.size)


def _refuse_without_room(wanted: WantedImage) -> None:
    """Before hours are spent. Folders on the same disk share its room."""
    size = wanted.remote.size
    needs = [
        (wanted.folder, "COSMOS_HPC_IMAGES", 2 * size),
        (temp_folder(), "ENROOT_TEMP_PATH", UNPACKED * size),
        (cache_folder(), "ENROOT_CACHE_PATH", size + size // 4),
    ]
    on_disk: dict[int, int] = {}
    for folder, setting, needed in needs:
        above = next(path for path in (folder, *folder.parents) if path.exists())
        disk = above.stat().st_dev
        on_disk[disk] = on_disk.get(disk, 0) + needed
        free = shutil.disk_usage(above).free
        if free < on_disk[disk]:
            raise ConfigError(
                f"{folder} has {free / 2**30:.1f} GiB left, but importing {wanted.name} may take "
                f"{on_disk[disk] / 2**30:.1f} GiB there: free some, or set {setting} to a folder with more room"
            )


def cache_folder() -> Path:
    """Where enroot keeps layers."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("ENROOT_CACHE_PATH", home / "enroot"))


def temp_folder() -> Path:
    """Where enroot unpacks layers."""
    return Path(os.environ.get("ENROOT_TEMP_PATH") or os.environ.get("TMPDIR") or "/tmp")


def enroot_version() -> str:
    """What `enroot version` says; empty where there is none."""
    if shutil.which("enroot") is None:
        return ""
    done = subprocess.run(["enroot", "version"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def package_versions(squashfs: Path) -> dict[str, str]:
    """Python packages in a squashfs file, by what pip left there; nothing is started. Empty without unsquashfs."""
    if shutil.which("unsquashfs") is None:
        return {}
    found: dict[str, str] = {}
    command = ["unsquashfs", "-l", str(squashfs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as listing:
        assert listing.stdout is not None
        for line in listing.stdout:
            if match := _PACKAGE.search(line.rstrip()):
                found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return dict(sorted(found.items()))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
