"""What the commands print as tables."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from cosmos_hpc.config.sweep import PlannedRun
from cosmos_hpc.launch.status import RunStatus
from cosmos_hpc.launch.submit import PlacedRun

if TYPE_CHECKING:  # brings torch
    from cosmos_hpc.report.scores import EvaluationSet, Interval

WIDTH = 160
"""Columns where the output is no terminal."""

SCORE_COLUMNS = ("mean", "95 % interval", "worst 5 %", "change", "its interval")


def plan_row(run: PlannedRun, placed: PlacedRun) -> dict[str, Any]:
    """A planned run as `plan --json` prints it."""
    return {
        "run": placed.folder.label,
        "choices": run.choices,
        "steps": run.config.trainer.max_steps,
        "ranks": run.config.trainer.world_size,
        "cluster": run.config.cluster.executor,
        "action": placed.action,
    }


def print_plan(runs: Sequence[PlannedRun], placed: Sequence[PlacedRun]) -> None:
    """One line a run: what the sweep chose, its size, what `submit` does with it."""
    rows = [plan_row(run, place) for run, place in zip(runs, placed, strict=True)]
    size = ("steps", "ranks", "cluster", "action")
    varied = dict.fromkeys(key for run in runs for key in run.choices)  # rows of sweep.list may name different ones
    print_table(
        ["run", *varied, *size],
        [
            [row["run"], *(str(row["choices"].get(key, "")) for key in varied), *(str(row[name]) for name in size)]
            for row in rows
        ],
    )


def print_status(rows: Sequence[RunStatus]) -> None:
    """One line a run: where it stands; below, why runs failed and which ranks are slow."""
    print_table(
        ["run", "status", "step", "loss", "val PSNR", "of average", "clips/s", "goodput", "attempts", "last outcome"],
        [
            [
                row.run,
                row.status,
                f"{row.step}/{row.max_steps}",
                "" if row.loss is None else f"{row.loss:.4f}",
                "" if row.val_psnr is None else f"{row.val_psnr:.2f} dB",
                "" if row.val_psnr_ema is None else f"{row.val_psnr_ema:.2f} dB",
                "" if row.clips_per_s is None else f"{row.clips_per_s:.2f}",
                "" if row.goodput is None else f"{row.goodput:.0%}",
                str(row.attempts),
                (row.last_outcome or "").replace("_", " "),
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row.message:
            print(f"{row.run}: {row.message}")
        for slow in row.stragglers:
            print(f"{row.run}: rank {slow.rank} takes {slow.step_time_s:.2f} s a step, {slow.ratio:.1f} x the median")


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


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns under a header; the first one is never cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=name == header[0])
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
