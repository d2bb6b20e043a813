"""What an experiment has brought, in one sentence: on the user's own videos, elsewhere, and for the latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosmos_hpc.report.run_data import RunRecord, best_run
from cosmos_hpc.report.scores import Evaluation, EvaluationSet, Interval

FITS_DB = 0.5
"""Latents still fit where decoding them crosswise loses no more than this: below it eyes see no difference."""


class Evidence(NamedTuple):
    """The evaluations of an experiment, told apart."""

    own: EvaluationSet | None
    """Of the videos that belong to the runs' dataset."""

    others: list[EvaluationSet]
    """General ones."""


def told_apart(records: Sequence[RunRecord], evaluations: Sequence[EvaluationSet]) -> Evidence:
    """Which evaluation is of the runs' own data; of several the one with the most videos."""
    paths = {Path(record.config.data.path).resolve() for record in records if record.config.data.path}
    own = [each for each in evaluations if Path(each.data).resolve() in paths]
    chosen = max(own, key=lambda each: len(each.videos), default=None)
    return Evidence(chosen, [each for each in evaluations if each is not chosen and each not in own])


def best_of(records: Sequence[RunRecord], evidence: Evidence) -> RunRecord | None:
    """The run with the highest PSNR in the evaluation of its own data; without one, in its newest validation."""
    names = {record.name: record for record in records}
    rows = [] if evidence.own is None else [row for row in evidence.own.evaluations if row.run in names]
    if not rows:
        return best_run(records)
    return names[max(rows, key=lambda row: row.psnr_mean).run]  # type: ignore[index]  # filtered above


def verdict(run: RunRecord, evidence: Evidence) -> str | None:
    """The sentence, if the run has been evaluated on its own data against other weights.

    Args:
        run: the best one.
        evidence: of the experiment.
    """
    found = [_compared(evidence_set, run, on) for evidence_set, on in _sets(evidence)]
    if evidence.own is None or found[0] is None:
        return None
    clauses = [clause for clause in found if clause is not None]
    latents = _latents(evidence.own, run)
    if latents:
        clauses.append(latents)
    listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
    return f"Run {run.name} is {listed}."


def row_of(found: EvaluationSet, run: RunRecord) -> Evaluation | None:
    """A run's best weights in an evaluation: its newest, or their average."""
    rows = [row for row in found.evaluations[1:] if row.run == run.name]
    return max(rows, key=lambda row: row.psnr_mean, default=None)


def crosswise_loss(found: EvaluationSet, row: Evaluation) -> float | None:
    """Decibels that the first weights' PSNR loses when either half is the other's; none where they were not crossed."""
    if "old_encoder" not in row.per_video or "old_decoder" not in row.per_video:
        return None
    crossed = min(float(np.mean(row.per_video[name])) for name in ("old_encoder", "old_decoder"))
    return found.evaluations[0].psnr_mean - crossed


def _sets(evidence: Evidence) -> list[tuple[EvaluationSet | None, str]]:
    others = [(each, f"on {Path(each.data).name}") for each in evidence.others]
    return [(evidence.own, "on your videos"), *others]


def _compared(found: EvaluationSet | None, run: RunRecord, on: str) -> str | None:
    row = None if found is None else row_of(found, run)
    gain = None if found is None or row is None else found.gain(row, "psnr")
    return None if found is None or gain is None else f"{_direction(gain)} {on} ({len(found.videos)} videos)"


def _direction(gain: Interval) -> str:
    """Such as `better by 1.20 ± 0.30 dB PSNR`; an interval that holds 0 tells nothing."""
    size = f"{abs(gain.mean):.2f} \N{PLUS-MINUS SIGN} {gain.half_width:.2f} dB PSNR"
    if gain.low > 0 or gain.high < 0:
        return f"{'better' if gain.mean > 0 else 'worse'} by {size}"
    if gain.low == gain.low:
        return f"neither better nor worse ({'+' if gain.mean >= 0 else '-'}{size})"
    return f"{'better' if gain.mean > 0 else 'worse'} by {abs(gain.mean):.2f} dB PSNR"


def _latents(found: EvaluationSet, run: RunRecord) -> str | None:
    row = row_of(found, run)
    if row is None or row.latents is None:
        return None
    if row.latents.is_unchanged:
        return "its latents are those of its start to the last bit"
    loss = crosswise_loss(found, row)
    assert loss is not None, "crossed where there is a drift"
    changed = row.score("changed")
    moved = f", and {changed.mean.mean:.1%} of the indices changed" if changed else ""
    fits = "still fit" if loss <= FITS_DB else "no longer fit"
    lost = f"lose {loss:.2f} dB" if loss > 0 else "lose nothing"
    return f"its latents {fits} what was made for those of its start: decoded crosswise they {lost}{moved}"
