"""Whether a run folder has room for the next checkpoint."""

import errno
import os
import shutil
from pathlib import Path

from cosmos_hpc.config.run_folder import RunFolder

PROBE_BYTES = 2**24
"""Written to see whether a quota allows it, which the file system's free space does not tell."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What a write says on a full disk, and over a quota."""


def has_room(folder: RunFolder) -> bool:
    """Whether another checkpoint like the newest one could be written; removes what was left of the one that failed.

    No rank may be alive.
    """
    for leftover in folder.unfinished_checkpoints():
        shutil.rmtree(leftover, ignore_errors=True)
    needed = max(2**20, checkpoint_bytes(folder))
    space = os.statvfs(folder.path)
    return space.f_bavail * space.f_frsize >= needed and can_write(folder.path / ".room.partial", needed)


def is_full(folder: RunFolder) -> bool:
    """Whether not even a word could be written."""
    try:
        return not can_write(folder.path / ".room.partial", 2**16)
    except OSError:  # whatever is wrong, it is not that
        return False


def checkpoint_bytes(folder: RunFolder) -> int:
    """Size of the newest checkpoint; 0 before the first."""
    newest = folder.newest_checkpoint()
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) if newest else 0


def can_write(probe: Path, needed: int) -> bool:
    """Whether so many bytes, up to `PROBE_BYTES`, can be written into a new file, which is removed again.

    Raises:
        OSError: where something else than room is missing.
    """
    try:
        with probe.open("wb") as file:
            file.write(bytes(min(needed, PROBE_BYTES)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in NO_ROOM:
            return False
        raise
    finally:
        probe.unlink(missing_ok=True)
    return True
