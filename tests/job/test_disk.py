"""Whether there is room, on a real small file system where one can be mounted."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.job.disk import has_room, is_full

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of its own")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_room_is_what_the_newest_checkpoint_takes_without_what_a_failed_save_left(small_disk: Path) -> None:
    folder = RunFolder(small_disk)
    assert has_room(folder)
    for name, size in (("step_00000010", 5), ("step_00000020.partial", 8)):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "rank_0").write_bytes(bytes(size * MIB))
    assert has_room(folder)
    assert folder.unfinished_checkpoints() == []
    (small_disk / "other").write_bytes(bytes(7 * MIB))
    assert not has_room(folder), "4 MiB are left for 5"
    assert not is_full(folder)
    with contextlib.suppress(OSError), (small_disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(MIB))
    assert is_full(folder)
    (small_disk / "rest").unlink()
    (small_disk / "other").unlink()
    assert has_room(folder)
    assert list(small_disk.iterdir()) == [folder.checkpoints], "the probe is gone"
