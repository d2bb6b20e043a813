"""Loss and PSNR over steps, all runs in one picture, as SVG to be put inside an HTML page.

Which colour is which run stands in the page's own legend.
"""

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosmos_hpc.report.run_data import RunRecord

COLOURS = (
    "#2f7ed8",
    "#e8743b",
    "#19a979",
    "#c2417c",
    "#8f6ed5",
    "#b58900",
    "#13a4b4",
    "#d64545",
    "#6c8893",
    "#5b9e2d",
    "#9c6b4f",
    "#e377c2",
)
"""Told apart on white and on black paper."""

DASHES = ("solid", "dashed", "dotted")
"""Once the colours are used up."""

MAX_POINTS = 600
"""Points per curve: more than the picture has pixels only make the page heavy."""

SMOOTHING_SHARE = 40
"""The moving mean of a loss reaches over one part in this many of its curve, to both sides."""

MAX_DOTS = 50
"""More validations than this are drawn as a line without a dot for each."""

MAX_TICK_LETTERS = 18
"""Of a value below an axis; paths differ at their ends."""

INK = "#123456"
"""Stands for the page's text colour, so that the picture follows a dark page."""


class Style(NamedTuple):
    """How a run is drawn, here and in the page's legend."""

    colour: str
    """Hexadecimal."""

    dash: str
    """One of DASHES."""


class Curve(NamedTuple):
    """Points of one line."""

    steps: list[float]
    """Along."""

    values: list[float]
    """Up."""


def run_style(index: int) -> Style:
    """Style of the index-th run of the page."""
    return Style(COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)])


def loss_curves(records: Sequence[RunRecord]) -> str | None:
    """Total loss of each run, thin as it was and thick as a moving mean; none where no run has made a step."""
    curves = [_binned(_curve((step.step, step.loss) for step in record.steps)) for record in records]
    if not any(curve.steps for curve in curves):
        return None
    figure, axes = _axes("loss")
    for index, (record, curve) in enumerate(zip(records, curves, strict=True)):
        style = run_style(index)
        smooth = moving_mean(curve.values, reach=len(curve.values) // SMOOTHING_SHARE)
        axes.plot(curve.steps, curve.values, color=style.colour, linewidth=0.7, alpha=0.35)
        axes.plot(curve.steps, smooth, color=style.colour, linestyle=style.dash, linewidth=1.8)
        _mark_interruptions(axes, record, style)
    return _inline_svg(figure)


def psnr_curves(records: Sequence[RunRecord], score: str = "val_psnr") -> str | None:
    """Validation PSNR of each run, and thin that of its averaged weights; none where no run has it.

    Args:
        records: the runs.
        score: `val_psnr`, or `general_psnr` for the second validation set.
    """
    if not any(score in validation.scores for record in records for validation in record.validations):
        return None
    figure, axes = _axes("validation PSNR (dB)")
    for index, record in enumerate(records):
        style = run_style(index)
        curve = _curve((each.step, each.scores.get(score)) for each in record.validations)
        average = _curve((each.step, each.scores.get(f"{score}_ema")) for each in record.validations)
        marker = "o" if len(curve.steps) <= MAX_DOTS else ""
        axes.plot(*curve, color=style.colour, linestyle=style.dash, linewidth=1.8, marker=marker, markersize=3.5)
        axes.plot(*average, color=style.colour, linewidth=0.9, alpha=0.7)
        _mark_interruptions(axes, record, style)
    return _inline_svg(figure)


def setting_plots(records: Sequence[RunRecord], settings: Mapping[str, Sequence[Any]]) -> list[tuple[str, str]]:
    """For each setting that a sweep varies, validation PSNR at the end over its values, a dot for each run.

    Args:
        records: the runs.
        settings: dotted name to its value in each run.

    Returns:
        Name and picture of each setting with two values or more among the runs that have been validated.
    """
    found = ((index, record.at_end("val_psnr")) for index, record in enumerate(records))
    ends = {index: end for index, end in found if end is not None and math.isfinite(end)}
    plots = []
    for name, values in settings.items():
        if len({str(values[index]) for index in ends}) >= 2:
            figure, axes = _axes("validation PSNR (dB)")
            axes.set_xlabel(name, color=INK)
            for index, place in zip(ends, _places(axes, [values[index] for index in ends]), strict=True):
                style = run_style(index)
                axes.plot([place], [ends[index]], "o", color=style.colour, markersize=7)
            plots.append((name, _inline_svg(figure)))
    return plots


def _places(axes: Axes, values: Sequence[Any]) -> list[float]:
    """Where values lie along the axis: numbers as they are or by powers of ten, others side by side."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and max(values) / min(values) >= 10:
            axes.set_xscale("log")
        return [float(value) for value in values]
    names = sorted({str(value) for value in values})
    axes.set_xticks(range(len(names)), [_shortened(name) for name in names], parse_math=False)  # a $ is a $
    axes.set_xlim(-0.5, len(names) - 0.5)
    return [float(names.index(str(value))) for value in values]


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_TICK_LETTERS else f"...{name[-MAX_TICK_LETTERS:]}"


def moving_mean(values: Sequence[float], reach: int) -> list[float]:
    """Each value replaced by the mean of itself and `reach` neighbours to both sides; fewer towards the ends."""
    last = len(values) - 1
    reaches = (min(reach, index, last - index) for index in range(len(values)))
    return [statistics.fmean(values[index - near : index + near + 1]) for index, near in enumerate(reaches)]


def _curve(points: Iterable[tuple[int, float | None]]) -> Curve:
    known = [(float(step), value) for step, value in points if value is not None]
    return Curve([step for step, _ in known], [value for _, value in known])


def _binned(curve: Curve) -> Curve:
    """Means of equally many neighbours, where there are more points than the picture can show."""
    width = -(-len(curve.steps) // MAX_POINTS)
    if width <= 1:
        return curve
    starts = range(0, len(curve.steps), width)
    return Curve(*([statistics.fmean(axis[start : start + width]) for start in starts] for axis in curve))


def _axes(label: str) -> tuple[Figure, Axes]:
    # Figure alone, without pyplot, keeps no state and asks for no display.
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _mark_interruptions(axes: Axes, record: RunRecord, style: Style) -> None:
    for step in record.interruptions:
        axes.axvline(step, color=style.colour, linestyle=(0, (2, 3)), linewidth=1.1, alpha=0.8)


def _inline_svg(figure: Figure) -> str:
    """The figure without prolog, metadata and name spaces, which HTML does not need and which look like links."""
    written = io.StringIO()
    # Letters as text, so that they can be searched and take the page's font; equal data, equal picture.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cosmos-hpc"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    _, _, rest = written.getvalue().partition("<svg")
    opening, _, content = rest.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None, "matplotlib writes one"
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    return f"<svg {view_box[0]} role='img'>{content}".replace(INK, "currentColor")
