"""What the commands print as tables."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from cosmos_hpc.config.sweep import PlannedRun
from cosmos_hpc.launch.batch import Batch
from cosmos_hpc.launch.explain import duration
from cosmos_hpc.launch.forecast import Forecast
from cosmos_hpc.launch.placement import PlacedRun
from cosmos_hpc.launch.status import RunStatus

if TYPE_CHECKING:  # brings torch
    from cosmos_hpc.report.evaluate import Evaluation

WIDTH = 160
"""Columns where the output is no terminal."""

LONGEST_PRETTY = 100
"""Rows that are laid out by rich."""


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
        print(f"no clips/s was measured yet with the settings of {len(forecasts) - len(known)} runs: their time is "
              "known once one of them has trained some steps")  # fmt: skip


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


def print_json(value: Any) -> None:
    """For scripts."""
    print(json.dumps(value, indent=1, default=str))


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
    )  # fmt: skip
    for row in rows:
        if row.message:
            print(f"{row.run}: {row.message}")
        for slow in row.stragglers:
            print(f"{row.run}: rank {slow.rank} takes {slow.step_time_s:.2f} s a step, {slow.ratio:.1f} x the median")


def attempts(row: RunStatus) -> str:
    """How many, and how they ended: `4: 2 preempted, node failure`."""
    causes = [f"{count} {cause}" if count > 1 else cause for cause, count in row.causes.items()]
    return ": ".join([str(row.attempts), *([", ".join(causes).replace("_", " ")] if causes else [])])


def print_evaluations(rows: "Sequence[Evaluation]") -> None:
    """One line for each set of weights."""
    print_table(
        ["weights", "clips", "PSNR mean", "PSNR 5th percentile"],
        [[str(row.source), str(row.num_clips), f"{row.psnr_mean:.2f} dB", f"{row.psnr_p5:.2f} dB"] for row in rows],
    )


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns under a header; the first one is never cut. A thousand rows take rich a second: long ones are plain."""
    if len(rows) > LONGEST_PRETTY:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, ["-" * width for width in widths], *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=name == header[0])
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
