import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.launch.local import children, is_locked, locked, place_among


def hold(path) -> subprocess.Popen:
    """Another process that holds a lock until it is killed."""
    code = f"""
from pathlib import Path
from cosmos_hpc.launch.local import locked
import time
with locked(Path({str(path)!r})) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "True"
    return process


def test_a_lock_is_seen_by_others_and_freed_by_the_death_of_its_holder(tmp_path):
    path = tmp_path / "supervisor.lock"
    assert not is_locked(path)
    holder = hold(path)
    assert is_locked(path)
    with locked(path) as ours:
        assert not ours
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not is_locked(path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_where_the_file_system_has_no_locks_all_are_alone(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "supervisor.lock"):
            pass
        return
    with locked(tmp_path / "supervisor.lock") as ours:
        assert ours
        assert not is_locked(tmp_path / "supervisor.lock")


def test_a_run_waits_for_a_place_until_it_gives_up(tmp_path):
    experiment = ExperimentFolder(tmp_path)
    with place_among(experiment, 1, gives_up=lambda: False) as first:
        assert first
        asked = []
        with place_among(experiment, 1, gives_up=lambda: len(asked) == 3 or asked.append(1)) as second:
            assert not second
        with place_among(experiment, 2, gives_up=lambda: False) as other_place:
            assert other_place


def test_children_are_the_living_processes_that_a_process_started(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.pid in children(os.getpid())
    child.communicate(b"\n")
    assert child.pid not in children(os.getpid())
