"""A minimal root file system with Python for the tests' containers, made by mmdebstrap once and kept between runs."""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOUBLE = Path(__file__).parent / "containers" / "double" / "enroot"
RECIPE = ("--mode=root", "--variant=minbase", "--include=python3")
CODENAME = platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")
"""Of this machine's Debian, so that its Python finds the libraries that it knows."""

NEEDLESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl", "usr/lib/x86_64-linux-gnu/perl",
            "usr/lib/x86_64-linux-gnu/gconv")  # fmt: skip
APT_LINE = "apt-get install -y --no-install-recommends mmdebstrap squashfs-tools"
COMMANDS = ("mmdebstrap", "mksquashfs", "unsquashfs", "unshare")
REQUIRED = "COSMOS_HPC_REQUIRES_CLUSTER"
"""Set where containers that can't be made are a failure rather than a reason to skip."""

ENVIRONMENT = "PATH=/opt/image/bin:/usr/sbin:/usr/bin:/sbin:/bin\nIMAGE_SAYS=hello\n"
WORKDIR = "/srv/work"
RC = f'cd {WORKDIR} && unset OLDPWD || exit 1\nif [ $# -gt 0 ]; then exec "$@"; else exec sh; fi\n'


def enroot() -> Path:
    """The enroot under test: COSMOS_HPC_ENROOT, else the one in PATH, else the double."""
    named = os.environ.get("COSMOS_HPC_ENROOT") or shutil.which("enroot")
    return Path(named) if named else DOUBLE


def what_is_missing() -> str | None:
    """Why there can be no containers here, with the mend; none if there can."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: {APT_LINE}"
    if os.geteuid() != 0:
        return "containers of the tests need namespaces and mounts: run as root"
    return None


def root_squashfs() -> Path:
    """The image, as enroot would have imported it; made now where it is not kept from an earlier run.

    Raises:
        RuntimeError: if mmdebstrap can't make it, with its last words.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cosmos-hpc" / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    digits = hashlib.sha256("\n".join([*RECIPE, CODENAME, *NEEDLESS, ENVIRONMENT, RC]).encode()).hexdigest()[:8]
    image = cache / f"root-{digits}.sqsh"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not image.exists():
            _make(image)
    return image


def _make(image: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="cosmos-hpc-root-", dir="/var/tmp") as scratch:
        root, partial = Path(scratch) / "root", image.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        _run("mmdebstrap", *RECIPE, *_apt_options(), CODENAME, str(root), *_sources())
        for name in NEEDLESS:
            shutil.rmtree(root / name, ignore_errors=True)
        (root / WORKDIR[1:]).mkdir(parents=True)
        for name, text in (("environment", ENVIRONMENT), ("rc", RC), ("fstab", "")):
            (root / "etc" / name).write_text(text)
        _run("mksquashfs", str(root), str(partial), "-comp", "zstd", "-Xcompression-level", "1", "-no-progress")
        partial.rename(image)


def _sources() -> list[str]:
    """Where this machine has its own packages from; a mirror may be all that it reaches."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    suite = re.compile(rf"^(?:deb\s.*\s|Suites:.*\s){CODENAME}(?:\s|$)", re.MULTILINE)
    return [str(file) for file in files if file.is_file() and suite.search(file.read_text())]


def _apt_options() -> list[str]:
    """What apt is told here of proxies and of its checks of dates, which mmdebstrap does not take over."""
    told = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    return [
        f"--aptopt={line}" for line in re.findall(r"^Acquire::(?:\S*[Pp]roxy\S*|Check-\S+) .*;$", told, re.MULTILINE)
    ]


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {' | '.join(done.stdout.splitlines()[-3:])}")


def python_mounts() -> list[str]:
    """Folders by which this Python, with its virtual environment, runs inside at its own path."""
    folders = {Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1]}
    return sorted(str(folder) for folder in folders if folder != Path("/usr"))
