"""An experiment's folders to one HTML page that needs nothing besides itself: no network, no script, no other file."""

import base64
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cosmos_hpc import __version__
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, write_atomically
from cosmos_hpc.config.run_state import AttemptRecord, Goodput
from cosmos_hpc.report.curves import Style, loss_curves, psnr_curves, run_style
from cosmos_hpc.report.pictures import PictureRows, before_and_after
from cosmos_hpc.report.run_data import (
    FINAL_STEPS,
    RunRecord,
    best_run,
    differing_settings,
    num_validation_clips,
    read_run,
    settings_of,
)

NOTHING = "\N{EN DASH}"
"""Stands where there is no number yet."""


@dataclass(frozen=True)
class RunRow:
    """A run as a line of the table, ready to print."""

    name: str
    """<index>-<hash>."""

    style: Style
    """Of its curves."""

    choices: tuple[str, ...]
    """Values of the settings that differ between runs."""

    status: str
    """finished, running, waiting, failed, cancelled or not started."""

    is_best: bool
    """True for the run that the summary names."""

    step: str
    """Done and to do."""

    final_loss: str
    """Mean over the last steps."""

    psnr_start: str
    """dB."""

    psnr_end: str
    """dB."""

    gain: str
    """dB, signed."""

    clips_per_s: str
    """Median."""

    wall_time: str
    """In attempts."""

    attempts: tuple[str, ...]
    """How each ended."""


@dataclass(frozen=True)
class GoodputRow:
    """Where a run's seconds went, as a line of the table, ready to print."""

    name: str
    """<index>-<hash>."""

    share: str
    """Productive over allocated."""

    allocated: str
    """Duration."""

    spent: tuple[str, ...]
    """One duration for each of SPENT."""

    bar: tuple[float, ...]
    """One share in per cent for each of SPENT but the queue, which is not allocated."""


SPENT = {
    "productive_s": "steps that count",
    "startup_s": "start-up",
    "data_s": "data wait",
    "validation_s": "validation",
    "checkpoint_s": "checkpoint stall",
    "lost_s": "lost steps",
    "backoff_s": "back-off",
    "silence_s": "silence",
    "queue_s": "queue",
}
"""Field of `Goodput` to its heading; all but the last add up to the allocated seconds."""


@dataclass(frozen=True)
class SettingRow:
    """A setting as a line of the settings table."""

    name: str
    """Dotted."""

    values: tuple[str, ...]
    """One value per run, or a single one that all runs share."""


def write_report(experiment: ExperimentFolder, *, num_pictures: int = 3) -> Path:
    """Write the page of an experiment, whatever state its runs are in.

    Args:
        experiment: its folder, with at least one run in it.
        num_pictures: validation clips to show before and after; 0 for a page without pictures.

    Returns:
        The page, `experiment.report`.

    Raises:
        ConfigError: if the experiment has no run, or a run folder is not of this version's form.
    """
    records = [read_run(folder) for folder in experiment.runs()]
    if not records:
        raise ConfigError(f"{experiment.path} holds no run: submit the experiment first, or check the name")
    pictures = before_and_after(records, num_pictures, best_run(records))
    # References in the place of letters beyond ASCII, so that no reader has to guess the encoding.
    page = _render(experiment.name, records, pictures).encode("ascii", "xmlcharrefreplace").decode()
    write_atomically(experiment.report, page)
    return experiment.report


def summary(records: Sequence[RunRecord], num_clips: int | None) -> str:
    """The facts in a sentence: best run, its gain over the starting weights, over how many clips."""
    best = best_run(records)
    if best is None or best.last_validation is None:
        return "No run has been validated after training yet."
    chosen = ", ".join(_choices(best, differing_settings([settings_of(record.config) for record in records])))
    start, end = best.psnr_at_start, best.last_validation.val_psnr
    assert end is not None, "a validation has a PSNR"
    sentence = f"Best run {best.name}{f' ({chosen})' if chosen else ''}: "
    sentence += f"{end:.2f} dB validation PSNR at step {best.last_validation.step}"
    if start is not None:
        direction = "above" if end >= start else "below"
        sentence += f", {abs(end - start):.2f} dB {direction} its starting weights ({start:.2f} dB)"
    return sentence + ("." if num_clips is None else f", over {_counted(num_clips, 'validation clip')}.")


def written_value(value: Any) -> str:
    """A setting's value as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={written_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(written_value(item) for item in value) or "none"
    return str(value)


def written_duration(seconds: float) -> str:
    """Such as `2 h 05 min`, `4 min 05 s`, `38 s`."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest_min:02d} min"
    return f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"


def _render(name: str, records: Sequence[RunRecord], pictures: PictureRows) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png_url"] = _png_url
    all_settings = [settings_of(record.config) for record in records]
    differing = differing_settings(all_settings)
    best = best_run(records)
    charts = (loss_curves(records), psnr_curves(records))
    return environment.get_template("page.html").render(
        name=name,
        written=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        started=_started(records),
        summary=summary(records, num_validation_clips((best or records[0]).config)),
        status_counts=Counter(record.status for record in records),
        num_runs=_counted(len(records), "run"),
        loss_curves=_trusted(charts[0]),
        psnr_curves=_trusted(charts[1]),
        has_interruptions=any(record.interruptions for record in records),
        differing=differing,
        choices_of={record.name: _choices(record, differing) for record in records},
        runs=[_run_row(index, record, differing, record is best) for index, record in enumerate(records)],
        goodput=[_goodput_row(record.name, record.goodput) for record in records if record.goodput.allocated_s > 0],
        spent=list(SPENT.values()),
        final_steps=FINAL_STEPS,
        failures=[(record.name, record.failure) for record in records if record.failure],
        settings=[
            _setting_row(setting, [settings[setting] for settings in all_settings]) for setting in all_settings[0]
        ],
        pictures=pictures,
        version=__version__,
    )


def _run_row(index: int, record: RunRecord, differing: Sequence[str], is_best: bool) -> RunRow:
    settings = settings_of(record.config)
    start, end = record.psnr_at_start, record.psnr_at_end
    return RunRow(
        name=record.name,
        style=run_style(index),
        choices=tuple(written_value(settings[name]) for name in differing),
        status=record.status,
        is_best=is_best,
        step=f"{record.last_step} / {record.config.trainer.max_steps}",
        final_loss=_number(record.final_loss, ".4f"),
        psnr_start=_number(start, ".2f"),
        psnr_end=_number(end, ".2f"),
        gain=_number(None if start is None or end is None else end - start, "+.2f"),
        clips_per_s=_number(record.clips_per_s, ".2f"),
        wall_time=written_duration(record.wall_time_s) if record.attempts else NOTHING,
        attempts=tuple(_written_attempt(attempt) for attempt in record.attempts),
    )


def _goodput_row(name: str, goodput: Goodput) -> GoodputRow:
    seconds = [getattr(goodput, item) for item in SPENT]
    return GoodputRow(
        name=name,
        share=f"{goodput.share or 0.0:.1%}",
        allocated=written_duration(goodput.allocated_s),
        spent=tuple(written_duration(item_s) if item_s >= 0.5 else NOTHING for item_s in seconds),
        bar=tuple(round(100 * item_s / goodput.allocated_s, 2) for item_s in seconds[:-1]),
    )


def _choices(record: RunRecord, differing: Sequence[str]) -> list[str]:
    """Such as `optim.lr 0.0003`, for each setting that tells the runs apart."""
    settings = settings_of(record.config)
    return [f"{name} {written_value(settings[name])}" for name in differing]


def _setting_row(name: str, values: Sequence[Any]) -> SettingRow:
    if all(value == values[0] for value in values):
        values = values[:1]
    return SettingRow(name, tuple(written_value(value) for value in values))


def _written_attempt(attempt: AttemptRecord) -> str:
    ending = "running" if attempt.outcome is None else attempt.outcome.replace("_", " ")
    return f"{attempt.attempt}: {ending}" + ("" if attempt.step is None else f" at step {attempt.step}")


def _started(records: Sequence[RunRecord]) -> str | None:
    starts = [attempt.started for record in records for attempt in record.attempts]
    return time.strftime("%-d %B %Y, %H:%M %Z", time.localtime(min(starts))) if starts else None


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _trusted(svg: str | None) -> Markup | None:
    """Our own picture, which must not be escaped; it holds no text of the user's."""
    return None if svg is None else Markup(svg)


def _png_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
