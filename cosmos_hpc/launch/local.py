"""What a scheduler would know, on a machine without one: who lives, and who may start."""

import contextlib
import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cosmos_hpc.config.run_folder import ExperimentFolder

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without locks says (Lustre without `-o flock`, NFS without lockd): there, all are alone."""


@contextlib.contextmanager
def locked(path: Path, *, patience_s: float = 0.0) -> Iterator[bool]:
    """Try to hold a lock file; true if it is ours until the block ends. The kernel lets go when the holder dies.

    Args:
        path: made where it is missing.
        patience_s: how long to try; `is_locked` of another process may hold it for an instant.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("a") as file:
        while not (ours := _flock(file, fcntl.LOCK_EX)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield ours


def is_locked(path: Path) -> bool:
    """Whether a living process on this machine holds the lock file."""
    if not path.exists():
        return False
    with path.open() as file:
        return not _flock(file, fcntl.LOCK_SH)  # shared, so that two who ask don't take each other for the holder


def is_alive(pid: int) -> bool:
    """Whether a process runs on this machine."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _flock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


@contextlib.contextmanager
def place_among(experiment: ExperimentFolder, max_parallel: int, *, gives_up: Callable[[], bool]) -> Iterator[bool]:
    """Wait for one of `max_parallel` places on this machine and hold it.

    Args:
        experiment: whose runs share the places.
        max_parallel: number of places.
        gives_up: asked ten times a second while waiting.

    Yields:
        Whether a place was got; false after `gives_up` said so.
    """
    while not gives_up():
        for slot in range(max_parallel):
            with locked(experiment.slot_lock(slot)) as ours:
                if ours:
                    yield True
                    return
        time.sleep(0.1)
    yield False


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still live (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended while we looked
            after_name = stat.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == pid and after_name[0] != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)
