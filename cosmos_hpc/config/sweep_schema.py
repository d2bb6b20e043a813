"""The settings of a sweep: what varies, in four forms whose product is taken."""

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from cosmos_hpc.config.schema import require

Rows = list[dict[str, Any]]
"""By this name, since SweepConfig has a field `list`."""

RANGES = ("uniform", "log_uniform", "integers")
"""Ways to draw from a range."""


@dataclass(frozen=True, kw_only=True)
class RandomSweepConfig:
    """Runs with values drawn at random, the same ones each time."""

    count: int = 0
    """Draws; each becomes a run. A larger number keeps the draws of a smaller one."""

    seed: int = 0
    """Other seeds draw other values."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Setting (dotted) to what it is drawn from: a list, `{uniform: [low, high]}`, `{log_uniform: [low, high]}` (each
    power of ten as likely as the next) or `{integers: [low, high]}` (both ends included)."""

    def __post_init__(self) -> None:
        require(
            (self.count > 0) == bool(self.settings),
            f"sweep.random has count {self.count} and {len(self.settings)} settings: give at least one of each",
        )
        for key, source in self.settings.items():
            _check_source(key, source)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One experiment file, many runs: each combination of the grid with each row of zip, list and random."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Setting (dotted) to its values; every combination becomes a run, the last key varying fastest."""

    zip: dict[str, list[Any]] = field(default_factory=dict)
    """Setting (dotted) to its values; lists of equal length, walked side by side."""

    random: RandomSweepConfig = field(default_factory=RandomSweepConfig)
    """Values drawn at random."""

    list: Rows = field(default_factory=Rows)
    """Rows of settings (dotted) with their values, such as `[{optim.lr: 1e-4}, {optim.lr: 3e-5, optim.eps: 1e-6}]`."""

    max_parallel: int | None = None
    """Runs at the same time; none: as many as the cluster gives, and one on a local machine."""

    def __post_init__(self) -> None:
        for key, values in (*self.grid.items(), *self.zip.items()):
            require(len(values) > 0, f"sweep: {key} has no values: give a list of at least one")
        lengths = {key: len(values) for key, values in self.zip.items()}
        require(
            len(set(lengths.values())) <= 1,
            f"sweep.zip walks its lists side by side, but their lengths are {lengths}: make them equal",
        )
        require(all(self.list), "sweep.list has an empty row: name a setting in it, or take it out")
        self._check_forms()
        require(
            self.max_parallel is None or self.max_parallel >= 1,
            f"sweep.max_parallel is {self.max_parallel}, but must be at least 1",
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """Every setting that varies, dotted."""
        return tuple(key for keys in self._keys_by_form().values() for key in keys)

    def _keys_by_form(self) -> dict[str, dict[str, None]]:
        rows = {key: None for row in self.list for key in row}
        return {name: dict.fromkeys(keys) for name, keys in
                (("grid", self.grid), ("zip", self.zip), ("list", rows), ("random", self.random.settings))}  # fmt: skip

    def _check_forms(self) -> None:
        home: dict[str, str] = {}
        for form, keys in self._keys_by_form().items():
            for key in keys:
                first = home.setdefault(key, form)
                require(first == form, f"sweep names {key} in {first} and in {form}: keep one")


def _check_source(key: str, source: Any) -> None:
    where = f"sweep.random.settings.{key}"
    if isinstance(source, list):
        require(len(source) > 0, f"{where} has no values: give a list of at least one")
        return
    example = "give a list, or a range such as {log_uniform: [1e-5, 1e-3]}"
    require(isinstance(source, dict) and len(source) == 1, f"{where} is {source!r}: {example}")
    ((form, ends),) = source.items()
    near = difflib.get_close_matches(str(form), RANGES, n=1, cutoff=0.0)
    require(form in RANGES, f"{where} is drawn by {form!r}, which is none of {', '.join(RANGES)}: take {near[0]}?")
    require(
        isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends) and ends[0] < ends[1],
        f"{where} is {{{form}: {ends!r}}}: give two numbers, the lower one first",
    )
    require(form != "log_uniform" or ends[0] > 0, f"{where} begins at {ends[0]}: a log scale begins above 0")
    whole = all(isinstance(end, int) for end in ends)
    require(form != "integers" or whole, f"{where} is {{integers: {ends!r}}}: give two whole numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
