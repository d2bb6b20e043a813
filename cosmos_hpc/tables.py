"""What the commands print as tables."""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmos_hpc.config.sweep import PlannedRun
from cosmos_hpc.launch.batch import Batch
from cosmos_hpc.launch.explain import duration
from cosmos_hpc.launch.forecast import Forecast
from cosmos_hpc.launch.placement import PlacedRun
from cosmos_hpc.launch.status import RunStatus

if TYPE_CHECKING:  # brings torch
    from cosmos_hpc.doctor import Finding
    from cosmos_hpc.report.scores import EvaluationSet, Interval

WIDTH = 160
"""Columns where the output is no terminal."""

LONGEST_PRETTY = 100
"""Rows that are laid out by rich."""

GAP = 3
"""Characters between two columns."""

SPARE_STATUS = ("data wait", "of average", "goodput", "nodes", "clips/s", "SLURM", "loss", "attempts")
"""Columns of `status` that a narrow terminal can do without, the first one first."""

SCORE_COLUMNS = ("mean", "95 % interval", "worst 5 %", "change", "its interval")


def plan_rows(
    runs: Sequence[PlannedRun], placed: Sequence[PlacedRun], forecasts: Sequence[Forecast]
) -> list[dict[str, Any]]:
    """Planned runs as `plan --json` prints them."""
    return [
        {
            "run": place.folder.label,
            "choices": run.choices,
            "steps": run.config.trainer.max_steps,
            "ranks": run.config.trainer.world_size,
            "cluster": run.config.cluster.executor,
            "action": place.action,
            **asdict(forecast),
        }
        for run, place, forecast in zip(runs, placed, forecasts, strict=True)
    ]


def print_plan(runs: Sequence[PlannedRun], placed: Sequence[PlacedRun], forecasts: Sequence[Forecast]) -> None:
    """One line a run: what the sweep chose, its size, what `submit` does with it; below, what all of them take."""
    rows = plan_rows(runs, placed, forecasts)
    size = ("steps", "ranks", "cluster", "action")
    varied = dict.fromkeys(key for run in runs for key in run.choices)  # rows of sweep.list may name different ones
    print_table(
        ["run", *varied, *size, "wall time", "GPU-hours", "checkpoints"],
        [
            [
                row["run"],
                *(str(row["choices"].get(key, "")) for key in varied),
                *(str(row[name]) for name in size),
                "unknown" if forecast.wall_s is None else _duration(forecast.wall_s),
                "unknown" if forecast.gpu_hours is None else f"{forecast.gpu_hours:.1f}",
                "unknown" if forecast.checkpoint_bytes is None else _size(forecast.checkpoint_bytes),
            ]
            for row, forecast in zip(rows, forecasts, strict=True)
        ],
    )
    _print_sum([forecast for forecast, place in zip(forecasts, placed, strict=True) if place.is_sent])


def _print_sum(forecasts: Sequence[Forecast]) -> None:
    """What the runs that would be sent take together, and by what measurement."""
    known = [forecast for forecast in forecasts if forecast.gpu_hours is not None]
    if known:
        hours, size = (sum(getattr(one, name) or 0 for one in known) for name in ("gpu_hours", "checkpoint_bytes"))
        by = ", ".join(dict.fromkeys(f"{one.clips_per_s:.2f} clips/s of {one.measured_in}" for one in known))
        print(f"{len(known)} runs to send: {hours:.1f} GPU-hours, {_size(size)} of checkpoints, by {by}; "
              "validation, checkpoints and starts come on top")  # fmt: skip
    if len(known) < len(forecasts):
        count = len(forecasts) - len(known)
        print(f"no clips/s was measured yet with the settings of {count} run{'s' * (count > 1)}: how long it takes is "
              "known once one such run has trained some steps")  # fmt: skip


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes // 60}:{minutes % 60:02d} h"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def print_batches(batches: Sequence[Batch]) -> None:
    """The scripts, one after the other; with several, a comment before each says how it is sent."""
    for index, batch in enumerate(batches):
        if len(batches) > 1 or batch.follows:
            waits = ", once the jobs before it have ended" if batch.follows else ""
            print(f"# {index + 1} of {len(batches)}: sbatch {batch.script}{waits}")
        print(batch.text, end="")


def print_findings(found: "Sequence[Finding]") -> None:
    """A line for each; below, how many are bad."""
    colours = {"pass": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was found, and the mend", overflow="fold")
    for finding in found:
        table.add_row(finding.check, Text(finding.verdict, style=colours[finding.verdict]), Text(finding.message))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    counts = Counter(finding.verdict.value for finding in found)
    print(f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failed")


def print_status(rows: Sequence[RunStatus]) -> None:
    """One line a run: where it stands; below, why runs failed and which ranks are slow."""
    print_table(
        ["run", "status", "SLURM", "step", "loss", "val PSNR", "of average", "clips/s", "data wait", "goodput",
         "attempts", "nodes", "time left"],
        [
            [
                row.run,
                row.status,
                "" if row.job is None else row.job.state,
                f"{row.step}/{row.max_steps}",
                "" if row.loss is None else f"{row.loss:.4f}",
                "" if row.val_psnr is None else f"{row.val_psnr:.2f} dB",
                "" if row.val_psnr_ema is None else f"{row.val_psnr_ema:.2f} dB",
                "" if row.clips_per_s is None else f"{row.clips_per_s:.2f}",
                "" if row.data_wait is None else f"{row.data_wait:.0%}",
                "" if row.goodput is None else f"{row.goodput:.0%}",
                attempts(row),
                row.nodes,
                "" if row.time_left_s is None else duration(row.time_left_s),
            ]
            for row in rows
        ],
        spare=SPARE_STATUS,
    )  # fmt: skip
    for row in rows:
        if row.message:
            print(f"{row.run}: {row.message}")
        if row.compilation and row.compilation.startswith("eager: rank"):
            print(f"{row.run}: computes {row.compilation}")
        for slow in row.stragglers:
            print(f"{row.run}: rank {slow.rank} takes {slow.step_time_s:.2f} s a step, {slow.ratio:.1f} x the median")


def attempts(row: RunStatus) -> str:
    """How many, and how they ended: `4: 2 preempted, node failure`."""
    causes = [f"{count} {cause}" if count > 1 else cause for cause, count in row.causes.items()]
    return ": ".join([str(row.attempts), *([", ".join(causes).replace("_", " ")] if causes else [])])


def print_evaluation(found: "EvaluationSet") -> None:
    """Each metric of each set of weights, what became of the latents, slices, the worst videos."""
    from cosmos_hpc.report.scores import METRICS, OVER_ALL

    everything = list(range(len(found.videos)))
    rows = _score_rows(found, everything)
    for name, metric in OVER_ALL.items():
        for each in found.evaluations:
            if name in each.over_all:
                rows.append([metric.title, each.weights, format(each.over_all[name], metric.form), "", "", "", ""])
    print_table(["metric", "weights", *SCORE_COLUMNS], rows)
    for name in found.slices:
        sliced = [
            [f"{name}={value}", str(len(chosen)), *row]
            for value, chosen in found.by_slice(name).items()
            for row in _score_rows(found, chosen)
        ]
        print_table(["slice", "videos", "metric", "weights", *SCORE_COLUMNS], sliced)
    _print_latents(found)
    for each in found.evaluations:
        worst = (f"{found.videos[index]} ({each.per_video['psnr'][index]:.2f} dB)" for index in each.worst(5))
        print(f"worst of {each.weights}: {', '.join(worst)}")
    for video, reason in found.left_out:
        print(f"left out {video}: {reason}")
    known = [metric for name, metric in METRICS.items() if name in found.metrics()]
    known += [metric for name, metric in OVER_ALL.items() if any(name in each.over_all for each in found.evaluations)]
    print(f"over {len(found.videos)} videos; intervals: 95 %, bootstrap over videos; change: against the first weights")
    for metric in known:
        print(f"{metric.title}: {metric.meaning}")


def _score_rows(found: "EvaluationSet", chosen: list[int]) -> list[list[str]]:
    """A line for each metric and set of weights, those of a metric together."""
    from cosmos_hpc.report.scores import METRICS

    rows = []
    for name in found.metrics():
        metric = METRICS[name]
        for each in found.evaluations:
            score = each.score(name, chosen)
            if score is None:
                continue
            mean, interval = _written_interval(score.mean, metric.form)
            row = [metric.title, each.weights, mean, interval, format(score.worst5, metric.form)]
            gain = None if each is found.evaluations[0] else found.gain(each, name, chosen)
            rows.append([*row, *(("", "") if gain is None else _written_interval(gain, f"+{metric.form}"))])
    return rows


def _written_interval(interval: "Interval", form: str) -> tuple[str, str]:
    mean, low, high = (format(value, form) for value in interval)
    return mean, "one video" if math.isnan(interval.low) else f"{low} to {high}"


def _print_latents(found: "EvaluationSet") -> None:
    """Per channel, the shift of the mean in standard deviations, and the ratio of these."""
    moved = [(each.weights, each.latents) for each in found.evaluations if each.latents is not None]
    for weights, latents in moved:
        if latents.is_unchanged:
            print(f"latents of {weights}: each the same number as of {found.evaluations[0].weights}")
    told = [(weights, latents) for weights, latents in moved if not latents.is_unchanged]
    if not told:
        return
    print(f"latents against {found.evaluations[0].weights}: shift of the mean in standard deviations, ratio of these")
    channels = zip(*(zip(each.mean_shift, each.std_ratio, strict=True) for _, each in told), strict=True)
    rows = [
        [str(number), *(f"{shift:+.3f}, x {ratio:.3f}" for shift, ratio in pairs)]
        for number, pairs in enumerate(channels)
    ]
    print_table(["channel", *(weights for weights, _ in told)], rows)


def print_table(header: list[str], rows: list[list[str]], *, spare: Sequence[str] = ()) -> None:
    """Columns under a header; the first one is never cut. A thousand rows take rich a second: long ones are plain.

    Args:
        header: names of the columns.
        rows: cells.
        spare: columns that are left out, one after the other, as long as the terminal is too narrow.
    """
    if len(rows) > LONGEST_PRETTY:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, ["-" * width for width in widths], *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    columns = dict(zip(header, zip(*rows, strict=True) if rows else [()] * len(header), strict=True))
    console = Console(width=None if sys.stdout.isatty() else max(WIDTH, _least_width(columns)))
    left_out = []
    for name in spare:
        if _least_width(columns) <= console.width:
            break
        del columns[name]
        left_out.append(name)
    console.print(_table(columns))
    if left_out:
        print(f"left out, since the terminal is narrow: {', '.join(left_out)}; --json has everything")


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, (name, cells) in enumerate(columns.items()):
        table.add_column(name, no_wrap=index == 0 or not _may_wrap(cells))
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _may_wrap(cells: Sequence[str]) -> bool:
    """Whether they are sentences, rather than a number and its unit."""
    return any(len(cell.split()) > 2 for cell in cells)


def _least_width(columns: Mapping[str, Sequence[str]]) -> int:
    """Characters of a line in which nothing is cut."""
    words = [
        (name, *(word for cell in cells for word in cell.split())) if _may_wrap(cells) else (name, *cells)
        for name, cells in columns.items()
    ]
    return sum(max(map(len, own)) + GAP for own in words)
