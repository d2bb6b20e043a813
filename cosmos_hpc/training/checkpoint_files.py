"""The files of a checkpoint: their digests, and the renames by which a name means a whole checkpoint."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.run_folder import read_json

logger = logging.getLogger(__name__)

DIGESTS = "sha256.json"
"""SHA-256 of every other file in a checkpoint, by name."""


def digest(file: Path) -> str:
    """SHA-256 of a file that is on disk for good, in hexadecimal."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_digests(folder: Path, rank: int, digests: dict[str, str]) -> None:
    """Note one rank's digests in an unfinished checkpoint."""
    (folder / f".digests_{rank:05d}.json").write_text(json.dumps(digests))


class Best(NamedTuple):
    """The best checkpoint of a run."""

    path: Path
    worth: float
    num_clips: float | None
    """Clips that it was validated on, where that is known."""


class BestBy:
    """Compares checkpoints by a validation score that their checkpoint.json holds."""

    def __init__(self, metric: str | None) -> None:
        """Compare by a score of metrics.jsonl; none: no checkpoint is better than another."""
        self.metric = metric

    def worth(self, scores: Mapping[str, float]) -> float | None:
        """The score, the higher the better; none where there is none."""
        value = scores.get(self.metric or "", math.nan)
        if not math.isfinite(value):
            return None
        return -value if "lpips" in str(self.metric) else value

    def best(self, checkpoints: Path) -> Best | None:
        """The best whole checkpoint in that folder, of those validated on as many clips as the newest of them.

        The earliest of equals.
        """
        found = [best for path in sorted(checkpoints.glob("step_????????")) if (best := self._rated(path)) is not None]
        alike = [best for best in found if best.num_clips == found[-1].num_clips]
        return max(alike, key=lambda best: best.worth, default=None)

    def _rated(self, checkpoint: Path) -> Best | None:
        try:
            scores = read_json(checkpoint / "checkpoint.json").get("scores", {})
        except ValueError:
            return None
        worth = self.worth(scores)
        return None if worth is None else Best(checkpoint, worth, scores.get("val_clips"))


def publish(unfinished: Path, target: Path) -> None:
    """Give a checkpoint its name, after every file is on disk with its digest.

    Args:
        unfinished: its folder until now, beside `target`.
        target: its name.
    """
    known: dict[str, str] = {}
    for part in unfinished.glob(".digests_*.json"):
        known |= json.loads(part.read_text())
        part.unlink()
    late = {file.name: digest(file) for file in unfinished.iterdir() if file.name not in known}
    (unfinished / DIGESTS).write_text(json.dumps(known | late, indent=1))
    fsync(unfinished / DIGESTS)
    fsync(unfinished)
    unfinished.rename(target)
    fsync(target.parent)


def point_and_prune(target: Path, keep: int, best_by: BestBy) -> None:
    """Let `latest` and `best` name their checkpoints, and take the names from those beyond `keep`.

    What has no name any more is left to `remove_unfinished`: a file of a gigabyte can take a second to go.

    Args:
        target: the newest checkpoint.
        keep: checkpoints left, newest first.
        best_by: the best one by this is left as well.
    """
    _point_at(target, "latest")
    best = best_by.best(target.parent)
    if best is not None:
        _point_at(best.path, "best")
    fsync(target.parent)
    for old in sorted(target.parent.glob("step_????????"))[:-keep]:
        if best is None or old != best[0]:
            old.rename(old.with_name(f"{old.name}.partial"))  # a name means a whole checkpoint, on its way out as well


def has_digests(checkpoint: Path) -> bool:
    """Whether the files of a checkpoint can be told from damaged ones."""
    return (checkpoint / DIGESTS).exists()


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint; none if each is as it was written.

    Args:
        checkpoint: its folder.
        share: read only every `shares`-th file, from this one on: ranks divide the work.
        shares: number of readers.
    """
    try:
        digests = read_json(checkpoint / DIGESTS)
    except ValueError:
        return f"{DIGESTS} can't be read"
    if not digests:
        return f"{DIGESTS} is missing"
    for name in sorted(digests)[share::shares]:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if digest(file) != digests[name]:
            return f"{name} is not as it was written"
    return None


def set_aside(checkpoint: Path, reason: str) -> None:
    """Take a damaged checkpoint's name away from it; nothing is deleted."""
    taken = len(list(checkpoint.parent.glob(f"{checkpoint.name}.bad*")))
    aside = checkpoint.with_name(f"{checkpoint.name}.bad{taken or ''}")
    checkpoint.rename(aside)
    logger.warning("%s is damaged (%s): set aside as %s", checkpoint, reason, aside.name)


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a kill left of a save, or of a removal."""
    for leftover in checkpoints.glob("step_????????.partial*"):
        shutil.rmtree(leftover, ignore_errors=True)


def fsync(path: Path) -> None:
    """Have a file or folder on disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_at(target: Path, name: str) -> None:
    """Let checkpoints/latest and checkpoints/best name their checkpoint, for people and other programs."""
    pointer = target.with_name(f".{name}.partial")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(target.name)
    pointer.replace(target.with_name(name))
