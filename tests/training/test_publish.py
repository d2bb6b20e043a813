"""The instants between a written checkpoint and a published one: a kill at any of them leaves a whole one behind."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.training.checkpoint_files import (
    DIGESTS,
    BestBy,
    damage,
    digest,
    point_and_prune,
    publish,
    remove_unfinished,
    write_digests,
)


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


class Disk:
    """Notes what reaches the disk for good and what changes a name; may be killed before one of these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.dies_before: int | None = None
        for name in ("fsync", "rename", "replace", "symlink", "unlink"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, function):
        def watched(first, *others, **more):
            if len(self.done) == self.dies_before:
                raise KilledError
            path = Path(f"/proc/self/fd/{first}").readlink() if name == "fsync" else first
            self.done.append(f"{name} {Path(path).name}")
            return function(first, *others, **more)

        return watched


def written(folder: RunFolder, step: int) -> Path:
    """An unfinished checkpoint as two writers and rank 0 leave it."""
    unfinished = folder.checkpoint(step).with_name(f"step_{step:08d}.partial")
    unfinished.mkdir(parents=True)
    for rank in range(2):
        file = unfinished / f"__{rank}_0.distcp"
        file.write_bytes(bytes([step, rank]) * 100)
        write_digests(unfinished, rank, {file.name: digest(file)})
    (unfinished / "checkpoint.json").write_text(json.dumps({"step": step}))
    return unfinished


def save(folder: RunFolder, step: int) -> None:
    publish(written(folder, step), folder.checkpoint(step))
    point_and_prune(folder.checkpoint(step), 1, BestBy(None))


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[RunFolder]:
    """As many as wanted, each with one good checkpoint, the only one that is kept."""

    def make() -> Iterator[RunFolder]:
        for number in range(1000):
            folder = RunFolder(tmp_path / str(number))
            save(folder, 1)
            yield folder

    return make()


def test_every_file_is_on_disk_before_the_name_and_the_pointer_comes_after_it(folders, monkeypatch) -> None:
    folder, disk = next(folders), Disk(monkeypatch)
    save(folder, 2)
    done = disk.done
    renamed = done.index("rename step_00000002.partial")
    files = [file.name for file in folder.checkpoint(2).iterdir()]
    assert sorted(files) == ["__0_0.distcp", "__1_0.distcp", "checkpoint.json", DIGESTS]
    assert {f"fsync {name}" for name in [*files, "step_00000002.partial"]} <= set(done[:renamed])
    assert done[renamed + 1] == "fsync checkpoints"
    assert done.index("replace .latest.partial") > renamed
    assert done.index("rename step_00000001") > renamed, "the good one before went first"


def test_killed_at_any_instant_there_is_a_whole_checkpoint(folders, monkeypatch) -> None:
    disk, found = Disk(monkeypatch), []
    for instant, folder in enumerate(folders):
        disk.done.clear()
        disk.dies_before = instant
        try:
            save(folder, 2)
        except KilledError:
            killed = True
        else:
            killed = False
        disk.dies_before = None
        remove_unfinished(folder.checkpoints)  # as the next start does
        newest = folder.newest_checkpoint()
        assert newest is not None
        assert damage(newest) is None, disk.done
        assert damage(folder.checkpoints / "latest") is None, disk.done
        found.append(newest.name)
        if not killed:
            break
    assert len(found) > 10
    assert found == sorted(found)
    assert (found[0], found[-1]) == ("step_00000001", "step_00000002")
