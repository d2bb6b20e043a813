"""What a run folder tells: its settings, its attempts, and the numbers of every step."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import known_settings, read_run_config
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, Goodput, RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.dataset_index import split_sizes

FINAL_STEPS = 10
"""Steps whose mean is called the final loss; a single step's loss is mostly the noise of its clips."""

SCORES = ("val_", "general_")
"""How the names of validation scores begin: on the run's own split val, and on the second, general set."""

NOT_STARTED = "not started"
"""Stands for the status of a run that no supervisor has taken up."""


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl; step 0 is the network before training."""

    step: int
    """Optimizer steps done."""

    attempt: int
    """Start of the step's job that the line comes from."""

    loss: float | None
    """Total loss of the step; none at step 0."""

    clips_per_s: float | None
    """Clips over all ranks and second; none at step 0."""

    scores: Mapping[str, float]
    """What a validation after the step found, by the names in the file: val_psnr, general_psnr, val_ssim_ema, ..."""

    @property
    def val_psnr(self) -> float | None:
        """dB, where a validation followed the step."""
        return self.scores.get("val_psnr")


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder stood when it was read."""

    folder: RunFolder
    """Where it lies."""

    config: RunConfig
    """Resolved settings."""

    status: str
    """A `Status`, or NOT_STARTED."""

    attempts: tuple[AttemptRecord, ...]
    """In order of time."""

    steps: tuple[StepRecord, ...]
    """In order of step."""

    last_sign_of_life: float | None
    """Unix seconds of the last line of metrics.jsonl; none before the first."""

    @property
    def name(self) -> str:
        """<index>-<hash>."""
        return self.folder.path.name

    @property
    def last_step(self) -> int:
        """Optimizer steps done; 0 before the first."""
        return self.steps[-1].step if self.steps else 0

    @property
    def final_loss(self) -> float | None:
        """Mean over the last FINAL_STEPS steps, or over all where there are fewer."""
        losses = [record.loss for record in self.steps if record.loss is not None]
        return statistics.fmean(losses[-FINAL_STEPS:]) if losses else None

    @property
    def validations(self) -> list[StepRecord]:
        """The steps that were followed by a validation."""
        return [record for record in self.steps if record.val_psnr is not None]

    @property
    def last_validation(self) -> StepRecord | None:
        """The newest validation of trained weights."""
        return next((record for record in reversed(self.validations) if record.step > 0), None)

    def at_start(self, score: str) -> float | None:
        """A validation score of the starting weights."""
        return next((record.scores.get(score) for record in self.validations if record.step == 0), None)

    def at_end(self, score: str) -> float | None:
        """A validation score at the newest validation of trained weights."""
        return self.last_validation.scores.get(score) if self.last_validation else None

    def gain(self, score: str) -> float | None:
        """How much a validation score has risen since the start."""
        start, end = self.at_start(score), self.at_end(score)
        return None if start is None or end is None else end - start

    @property
    def gpu_hours(self) -> float | None:
        """Ranks times hours in attempts; none before the first."""
        return self.config.trainer.world_size * self.wall_time_s / 3600 if self.attempts else None

    @property
    def gpu_hours_per_db(self) -> float | None:
        """What a decibel of validation PSNR has cost; none where it has not risen."""
        gain = self.gain("val_psnr")
        return None if self.gpu_hours is None or gain is None or gain <= 0 else self.gpu_hours / gain

    @property
    def clips_per_s(self) -> float | None:
        """Median over the steps, which the slow first ones of an attempt hardly move."""
        speeds = [record.clips_per_s for record in self.steps if record.clips_per_s is not None]
        return statistics.median(speeds) if speeds else None

    @property
    def failure(self) -> AttemptRecord | None:
        """The attempt that a failed run ended with."""
        return self.attempts[-1] if self.status == Status.FAILED and self.attempts else None

    @property
    def wall_time_s(self) -> float:
        """Seconds in attempts, waiting between them left out; one without an end lasts to the last sign of life."""
        return sum(
            max(0.0, (attempt.ended or self.last_sign_of_life or attempt.started) - attempt.started)
            for attempt in self.attempts
        )

    @property
    def goodput(self) -> Goodput:
        """Where the seconds of all attempts went."""
        return sum((attempt.goodput for attempt in self.attempts if attempt.goodput), start=Goodput())

    @property
    def interruptions(self) -> list[int]:
        """Steps at which one attempt stopped and the next went on, or is to go on."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        resumed = {before.step for before, after in pairs if before.attempt != after.attempt}
        goes_on = self.status in (Status.WAITING, Status.RUNNING) and self.attempts
        waits_at = self.attempts[-1].step if goes_on and self.attempts[-1].outcome is not None else None
        return sorted(resumed | ({waits_at} if waits_at is not None and waits_at <= self.last_step else set()))


def read_run(folder: RunFolder) -> RunRecord:
    """Read a run folder, which may be one of a run that has not started, is under way or failed.

    Raises:
        ConfigError: for settings of another form, or a malformed line of metrics.
    """
    state = RunState.read(folder.state)
    return RunRecord(
        folder=folder,
        config=read_run_config(folder.config),
        status=state.status.value if state else NOT_STARTED,
        attempts=tuple(state.attempts) if state else (),
        steps=read_metrics(folder.metrics),
        last_sign_of_life=folder.metrics.stat().st_mtime if folder.metrics.exists() else None,
    )


def read_metrics(path: Path) -> tuple[StepRecord, ...]:
    """All whole lines of a metrics.jsonl; none where there is no file. A last line still being written is left out.

    Raises:
        ConfigError: for a malformed line, by its number.
    """
    if not path.exists():
        return ()
    *lines, _unfinished = path.read_text().split("\n")
    return tuple(_step(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip())


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Every setting of a run: dotted name to value, in the order of the schema."""
    return {name: reduce(getattr, name.split("."), config) for name, _ in known_settings()}


def differing_settings(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names of the settings that are not the same in all runs."""
    if not all_settings:
        return []
    first, *others = all_settings
    return [name for name, value in first.items() if any(other[name] != value for other in others)]


def num_validation_samples(data: DataConfig) -> int | None:
    """Samples in the split val; none where the dataset can't tell (it blends others, or is gone)."""
    try:
        return split_sizes(Path(data.path or "")).get("val", 0)
    except ConfigError:
        return None


def num_validation_clips(config: RunConfig) -> int | None:
    """Clips in each validation of a run, over all ranks; none where the dataset can't tell."""
    num_samples = num_validation_samples(config.data)
    most = config.trainer.limit_val_batches * config.data.micro_batch * config.trainer.world_size
    return None if num_samples is None else min(num_samples, most)


def best_run(records: Sequence[RunRecord]) -> RunRecord | None:
    """The run with the highest validation PSNR at its newest validation; none before the first one."""
    ends = [(record.at_end("val_psnr"), record) for record in records]
    # A diverged run has PSNR nan, which compares with nothing.
    numbers = [(end, record) for end, record in ends if end is not None and not math.isnan(end)]
    return max(numbers, key=lambda pair: pair[0], default=(None, None))[1]


def _step(line: str, place: str) -> StepRecord:
    try:
        written = json.loads(line)
        return StepRecord(
            step=written["step"],
            attempt=written["attempt"],
            loss=written.get("loss"),
            clips_per_s=written.get("clips_per_s"),
            scores={name: value for name, value in written.items() if name.startswith(SCORES)},
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place}: no line of metrics ({error!r}): cut the file before it, or delete it") from None
