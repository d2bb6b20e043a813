"""The team's own detector on originals and reconstructions: does it still see the same?"""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosmos_hpc.config.errors import ConfigError

LEAST_OVERLAP = 0.5
"""Intersection over union from which two boxes are the same object."""

FORMS = (
    "return an array of integers (classes, a segmentation), or for each frame a list of (label, left, top, right, "
    "bottom)"
)


class Detection(NamedTuple):
    """What a detector finds in a frame."""

    label: Any
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""


class Probe:
    """A function of uint8 frames [T, H, W, 3], called once with the original and once with the reconstruction."""

    def __init__(self, name: str) -> None:
        """Import it, from the working folder as well.

        Args:
            name: module:function.

        Raises:
            ConfigError: if there is no such function.
        """
        module, _, function = name.partition(":")
        if not module or not function:
            raise ConfigError(f"--probe is {name}, but takes module:function, such as my_detector:detect")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            self._function: Callable[[np.ndarray], Any] = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"--probe is {name}, which can't be imported ({error}): check the name") from None
        self._name = name

    def look(self, frames: np.ndarray) -> Any:
        """What it finds.

        Raises:
            ConfigError: if it fails.
        """
        try:
            return self._function(frames)
        except Exception as error:  # the team's own code, which may fail in any way
            raise ConfigError(f"--probe {self._name} failed: {type(error).__name__}: {error}") from error

    def agreement(self, original: Any, reconstruction: Any) -> float:
        """How far two findings are the same, in [0, 1]; nan where there is nothing to find in either.

        Arrays of integers: the share of equal ones. Detections: twice those that both have, over all (F1); both have
        one if label and frame are the same and the boxes overlap by half.

        Raises:
            ConfigError: if the findings are of neither form.
        """
        if isinstance(original, np.ndarray) and isinstance(reconstruction, np.ndarray):
            if original.dtype.kind not in "iub" or original.shape != reconstruction.shape:
                raise ConfigError(
                    f"--probe {self._name} returns {original.dtype} {list(original.shape)}, then "
                    f"{list(reconstruction.shape)}: {FORMS}"
                )
            return float((original == reconstruction).mean())
        try:
            ours, theirs = ([_detections(frame) for frame in found] for found in (reconstruction, original))
            pairs = list(zip(ours, theirs, strict=True))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--probe {self._name} returns something else ({error}): {FORMS}") from None
        count = sum(len(own) + len(other) for own, other in pairs)
        return 2 * sum(_num_common(*pair) for pair in pairs) / count if count else float("nan")


def _detections(frame: Iterable[Any]) -> list[Detection]:
    found = []
    for label, *box in frame:
        left, top, right, bottom = (float(side) for side in box)
        found.append(Detection(label, (left, top, right, bottom)))
    return found


def _num_common(ours: list[Detection], theirs: list[Detection]) -> int:
    """Pairs of detections, those that overlap most first, each in one pair at most."""
    overlaps = sorted(
        (
            (_overlap(own.box, other.box), i, j)
            for i, own in enumerate(ours)
            for j, other in enumerate(theirs)
            if own.label == other.label
        ),
        reverse=True,
    )
    taken: set[tuple[str, int]] = set()
    for overlap, i, j in overlaps:
        if overlap >= LEAST_OVERLAP and not {("own", i), ("other", j)} & taken:
            taken |= {("own", i), ("other", j)}
    return len(taken) // 2


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return common / (areas - common) if areas > common else 0.0
