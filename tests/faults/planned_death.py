"""A rank that kills itself at a point that nobody could hit from outside. The plan is a file, and is used once."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAN = Path("/nonexistent")
"""Holds {"rank": .., "at": ..} where a death is planned."""

POINTS = ("start-up", "validation", "write", "before rename", "after rename", "pruning")
"""Where a rank can die."""


def prepare(rank: int) -> None:
    """Let this rank look at the plan at each of the points."""
    from cosmos_hpc.training import background_write, checkpoint, checkpoint_files, heartbeat, validation

    heartbeat.EVERY_S = 1.0  # a hang is to be noticed soon

    def at(point: str, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not after:
                _die_if_planned(rank, point)
            result = function(*args, **kwargs)
            if after:
                _die_if_planned(rank, point)
            return result

        return watched

    store, write = checkpoint.CheckpointStore, background_write.BackgroundWrite
    store.load_newest = at("start-up", store.load_newest)
    validation.Validation.run = at("validation", validation.Validation.run)
    write.__init__ = at("write", write.__init__, after=True)
    checkpoint.publish = at("before rename", checkpoint.publish)
    checkpoint_files._point_at = at("after rename", checkpoint_files._point_at)
    removing = shutil.rmtree

    def remove(path: Path, *args: Any, **kwargs: Any) -> None:
        if "partial" in Path(path).name and PLAN.exists() and any(Path(path).glob("*")):
            next(Path(path).glob("*")).unlink()  # half gone
            _die_if_planned(rank, "pruning")
        removing(path, *args, **kwargs)

    checkpoint_files.shutil = type("Shutil", (), {"rmtree": staticmethod(remove)})
    _jump_the_clock()


def _die_if_planned(rank: int, point: str) -> None:
    if not PLAN.exists():
        return
    plan = json.loads(PLAN.read_text())
    if plan == {"rank": rank, "at": point}:
        PLAN.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def _jump_the_clock() -> None:
    """Beside the plan, a file `clock` holds seconds by which this process's wall clock is wrong."""
    clock, real = PLAN.with_name("clock"), time.time
    if clock.exists():
        offset = float(clock.read_text())
        time.time = lambda: real() + offset
