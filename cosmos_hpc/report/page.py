"""An experiment's folders to one HTML page that needs nothing besides itself: no network, no other file."""

import base64
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cosmos_hpc import __version__
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, write_atomically
from cosmos_hpc.config.run_state import AttemptRecord, Goodput
from cosmos_hpc.report.curves import Style, loss_curves, psnr_curves, run_style, setting_plots
from cosmos_hpc.report.evaluation_rows import Cell, Evaluations, evaluation_table, evaluations_of
from cosmos_hpc.report.origins import origins_of, quarantine_of
from cosmos_hpc.report.pictures import PictureRows, before_and_after
from cosmos_hpc.report.run_data import (
    FINAL_STEPS,
    RunRecord,
    differing_settings,
    num_validation_clips,
    read_run,
    settings_of,
)
from cosmos_hpc.report.verdict import best_of, told_apart, verdict

NOTHING = "\N{EN DASH}"
"""Stands where there is no number yet."""


@dataclass(frozen=True)
class RunRow:
    """A run as a line of the table, ready to print."""

    name: str
    """<index>-<hash>."""

    style: Style
    """Of its curves."""

    choices: tuple[Cell, ...]
    """Values of the settings that differ between runs."""

    status: str
    """finished, running, waiting, failed, cancelled or not started."""

    is_best: bool
    """True for the run that the summary names."""

    scores: tuple[Cell, ...]
    """One for each column of the first table."""

    costs: tuple[Cell, ...]
    """One for each column of the second."""

    attempts: tuple[str, ...]
    """How each ended."""


class Column(NamedTuple):
    """A number of a run in the table."""

    heading: str
    """Lines of it by line breaks."""

    value: Callable[[RunRecord], float | None]
    text: str | Callable[[RunRecord], str]
    """The value's form, or how it is written otherwise."""

    is_optional: bool = False
    """Left out where no run has it."""


SCORE_COLUMNS = (
    Column("step", lambda run: run.last_step, lambda run: f"{run.last_step} / {run.config.trainer.max_steps}"),
    Column(f"final loss\n(mean of last\n{FINAL_STEPS} steps)", lambda run: run.final_loss, ".4f"),
    Column("val PSNR\nat start, dB", lambda run: run.at_start("val_psnr"), ".2f"),
    Column("val PSNR\nat end, dB", lambda run: run.at_end("val_psnr"), ".2f"),
    Column("gain, dB", lambda run: run.gain("val_psnr"), "+.2f"),
    Column("of average,\ndB", lambda run: run.at_end("val_psnr_ema"), ".2f", is_optional=True),
    Column("val SSIM", lambda run: run.at_end("val_ssim"), ".4f", is_optional=True),
    Column("val VGG\ndistance", lambda run: run.at_end("val_lpips"), ".4f", is_optional=True),
    Column("gain on the\ngeneral set, dB", lambda run: run.gain("general_psnr"), "+.2f", is_optional=True),
)
"""How good a run is."""

COST_COLUMNS = (
    Column("clips/s\n(median)", lambda run: run.clips_per_s, ".2f"),
    Column(
        "wall time",
        lambda run: run.wall_time_s if run.attempts else None,
        lambda run: written_duration(run.wall_time_s),
    ),
    Column("GPU-hours", lambda run: run.gpu_hours, ".3g"),
    Column("GPU-hours\nper dB", lambda run: run.gpu_hours_per_db, ".3g"),
)
"""What it took."""


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
        num_pictures: validation clips to show before and after; 0 for a page without any frame of a video.

    Returns:
        The page, `experiment.report`.

    Raises:
        ConfigError: if the experiment has no run, or a run folder is not of this version's form.
    """
    records = [read_run(folder) for folder in experiment.runs()]
    if not records:
        raise ConfigError(f"{experiment.path} holds no run: submit the experiment first, or check the name")
    evaluations = evaluations_of(experiment)
    evidence = told_apart(records, evaluations.sets)
    best = best_of(records, evidence)
    pictures = before_and_after(records, num_pictures, best)
    # References in the place of letters beyond ASCII, so that no reader has to guess the encoding.
    page = _render(experiment.name, records, evaluations, best, pictures, num_pictures > 0)
    write_atomically(experiment.report, page.encode("ascii", "xmlcharrefreplace").decode())
    return experiment.report


def summary(records: Sequence[RunRecord], best: RunRecord | None, num_clips: int | None) -> str:
    """What the runs' own validations tell: best run, its gain over the starting weights, over how many clips."""
    if best is None or best.last_validation is None:
        return "No run has been validated after training yet."
    chosen = ", ".join(_choices(best, differing_settings([settings_of(record.config) for record in records])))
    start, end = best.at_start("val_psnr"), best.at_end("val_psnr")
    assert end is not None, "a validation has a PSNR"
    sentence = f"Best run {best.name}{f' ({chosen})' if chosen else ''}: "
    sentence += f"{end:.2f} dB validation PSNR at step {best.last_validation.step}"
    if start is not None:
        direction = "above" if end >= start else "below"
        sentence += f", {abs(end - start):.2f} dB {direction} its starting weights ({start:.2f} dB)"
    general = best.gain("general_psnr")
    if general is not None:
        sentence += f", {abs(general):.2f} dB {'above' if general >= 0 else 'below'} them on the general set"
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


def _render(
    name: str,
    records: Sequence[RunRecord],
    evaluations: Evaluations,
    best: RunRecord | None,
    pictures: PictureRows,
    shows_frames: bool,
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"png_url": _png_url, "file_url": lambda path: _png_url(path.read_bytes())}
    all_settings = [settings_of(record.config) for record in records]
    differing = differing_settings(all_settings)
    varied = {setting: [settings[setting] for settings in all_settings] for setting in differing}
    scores = [
        each for each in SCORE_COLUMNS if not each.is_optional or any(each.value(run) is not None for run in records)
    ]
    evidence = told_apart(records, evaluations.sets)
    sentence = None if best is None else verdict(best, evidence)
    of_validation = summary(records, best, num_validation_clips((best or records[0]).config))
    charts = (loss_curves(records), psnr_curves(records), psnr_curves(records, "general_psnr"))
    return environment.get_template("page.html").render(
        name=name,
        written=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        started=_started(records),
        summary=sentence or of_validation,
        below_summary=of_validation if sentence else None,
        status_counts=Counter(record.status for record in records),
        num_runs=_counted(len(records), "run"),
        loss_curves=_trusted(charts[0]),
        psnr_curves=_trusted(charts[1]),
        general_curves=_trusted(charts[2]),
        setting_plots=[(setting, _trusted(plot)) for setting, plot in setting_plots(records, varied)],
        has_interruptions=any(record.interruptions for record in records),
        differing=differing,
        choices_of={record.name: _choices(record, differing) for record in records},
        scores=[each.heading.split("\n") for each in scores],
        costs=[each.heading.split("\n") for each in COST_COLUMNS],
        runs=[_run_row(index, record, differing, scores, record is best) for index, record in enumerate(records)],
        goodput=[_goodput_row(record.name, record.goodput) for record in records if record.goodput.allocated_s > 0],
        spent=list(SPENT.values()),
        failures=[(record.name, record.failure) for record in records if record.failure],
        settings=[
            _setting_row(setting, [settings[setting] for settings in all_settings]) for setting in all_settings[0]
        ],
        evaluations=[
            evaluation_table(each, folder, each is evidence.own)
            for each, folder in sorted(
                zip(evaluations.sets, evaluations.folders, strict=True), key=lambda pair: pair[0] is not evidence.own
            )
        ],
        unreadable=evaluations.unreadable,
        shows_frames=shows_frames,
        quarantines=[found for record in records if (found := quarantine_of(record)).num_videos],
        origins=origins_of(records),
        pictures=pictures,
        version=__version__,
    )


def _run_row(
    index: int, record: RunRecord, differing: Sequence[str], scores: Sequence[Column], is_best: bool
) -> RunRow:
    settings = settings_of(record.config)
    return RunRow(
        name=record.name,
        style=run_style(index),
        choices=tuple(_choice(settings[name]) for name in differing),
        status=record.status,
        is_best=is_best,
        scores=tuple(_run_cell(record, column) for column in scores),
        costs=tuple(_run_cell(record, column) for column in COST_COLUMNS),
        attempts=tuple(_written_attempt(attempt) for attempt in record.attempts),
    )


def _run_cell(record: RunRecord, column: Column) -> Cell:
    value = column.value(record)
    if value is None or isinstance(column.text, str):
        return Cell(_number(value, str(column.text)), value)
    return Cell(column.text(record), value)


def _choice(value: Any) -> Cell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(written_value(value), float(value) if is_number else None)


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
