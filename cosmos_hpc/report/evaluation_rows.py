"""Evaluations as tables of the page, ready to print."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.report.scores import (
    EVALUATION,
    METRICS,
    OVER_ALL,
    Evaluation,
    EvaluationSet,
    Interval,
    Metric,
    read_evaluation,
)

WORST = 5
"""Videos that are named."""

CROSSED = ("old_encoder", "old_decoder", "changed")
"""Metrics of the latents, which are told over all videos."""


class Cell(NamedTuple):
    """A number as it is printed, and as the column is sorted by it."""

    text: str
    value: float | None = None


class EvaluationTable(NamedTuple):
    """One set of videos."""

    title: str
    clips: str
    """What was cut out of them."""

    columns: list[Metric]
    rows: list[tuple[str, list[Cell]]]
    """Weights and a cell for each column."""

    slice_columns: list[Metric]
    slices: list[tuple[str, str, list[Cell]]]
    """Slice, weights and a cell for each of its columns."""

    channels: list[tuple[str, list[str]]]
    """Channel of the latents, and a cell for each of the moved weights."""

    moved: list[str]
    """Weights whose latents are not the first ones'."""

    worst: list[tuple[str, list[str]]]
    """Weights and the videos that they are worst at."""

    left_out: list[tuple[str, str]]
    """Videos without a clip, and why."""

    strips: list[Path]
    """Pictures of the worst clips."""


class Evaluations(NamedTuple):
    """What `evaluate` left for an experiment."""

    sets: list[EvaluationSet]
    folders: list[Path]
    unreadable: list[str]


def evaluations_of(experiment: ExperimentFolder) -> Evaluations:
    """Read them; those of another version are named."""
    sets, folders, unreadable = [], [], []
    for path in sorted(experiment.evaluations.glob(f"*/{EVALUATION}")):
        try:
            sets.append(read_evaluation(path))
            folders.append(path.parent)
        except ConfigError as error:
            unreadable.append(str(error))
    return Evaluations(sets, folders, unreadable)


def evaluation_table(found: EvaluationSet, folder: Path, is_own: bool) -> EvaluationTable:
    """The tables of one set of videos.

    Args:
        found: the scores.
        folder: that holds its strips.
        is_own: the videos are of the runs' dataset.
    """
    names = found.metrics()
    over_all = [name for name in OVER_ALL if any(name in each.over_all for each in found.evaluations)]
    sliced = [name for name in names if name not in CROSSED]
    everything = list(range(len(found.videos)))
    moved = [each for each in found.evaluations if each.latents is not None and not each.latents.is_unchanged]
    size = "whole frames" if found.crop_size is None else f"{found.crop_size} x {found.crop_size} pixels"
    windows = "" if found.num_windows == 1 else f", {found.num_windows} windows in a row"
    return EvaluationTable(
        title=f"{Path(found.data).name}{' (your videos)' if is_own else ''}",
        clips=f"{len(found.videos)} videos of {found.data}, the middle {found.num_frames} frames{windows}, {size}",
        columns=[*(METRICS[name] for name in names), *(OVER_ALL[name] for name in over_all)],
        slice_columns=[METRICS[name] for name in sliced],
        rows=[
            (each.weights, [*_cells(found, each, names, everything), *(_over_all(each, name) for name in over_all)])
            for each in found.evaluations
        ],
        slices=[
            (f"{field} = {value} ({len(chosen)})", each.weights, _cells(found, each, sliced, chosen))
            for field in found.slices
            for value, chosen in found.by_slice(field).items()
            for each in found.evaluations
        ],
        channels=_channels(moved),
        moved=[each.weights for each in moved],
        worst=[(each.weights, _worst(found, each)) for each in found.evaluations],
        left_out=found.left_out,
        strips=sorted((folder / "strips").glob("*.png")),
    )


def _cells(found: EvaluationSet, each: Evaluation, names: Sequence[str], chosen: list[int]) -> list[Cell]:
    return [_cell(found, each, name, chosen) for name in names]


def _cell(found: EvaluationSet, each: Evaluation, name: str, chosen: list[int]) -> Cell:
    """Mean +- half of its interval, what one in twenty is worse than, the change against the first weights."""
    score, metric = each.score(name, chosen), METRICS[name]
    if score is None:
        return Cell("\N{EN DASH}")
    lines = [_plus_minus(score.mean, metric.form), f"worst 5 % {format(score.worst5, metric.form)}"]
    gain = None if each is found.evaluations[0] else found.gain(each, name, chosen)
    if gain is not None:
        lines.append(f"\N{GREEK CAPITAL LETTER DELTA} {_plus_minus(gain, f'+{metric.form}')}")
    return Cell("\n".join(lines).replace("-", "\N{MINUS SIGN}"), score.mean.mean)


def _plus_minus(interval: Interval, form: str) -> str:
    mean = format(interval.mean, form)
    width = interval.half_width
    return mean if math.isnan(width) else f"{mean} \N{PLUS-MINUS SIGN} {format(width, form.removeprefix('+'))}"


def _over_all(each: Evaluation, name: str) -> Cell:
    value = each.over_all.get(name)
    return Cell("\N{EN DASH}") if value is None else Cell(format(value, OVER_ALL[name].form), value)


def _channels(moved: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    drifts = [each.latents for each in moved if each.latents is not None]
    if not drifts:
        return []
    pairs = zip(*(zip(drift.mean_shift, drift.std_ratio, strict=True) for drift in drifts), strict=True)
    times = "\N{MULTIPLICATION SIGN}"
    return [
        (str(channel), [f"{shift:+.3f}, {times} {ratio:.3f}" for shift, ratio in row])
        for channel, row in enumerate(pairs)
    ]


def _worst(found: EvaluationSet, each: Evaluation) -> list[str]:
    return [f"{found.videos[index]} ({each.per_video['psnr'][index]:.2f} dB)" for index in each.worst(WORST)]
