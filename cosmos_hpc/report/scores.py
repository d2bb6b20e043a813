"""What an evaluation found: scores of each video, their means with intervals, slices; as CSV and JSON."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import write_atomically

RESAMPLES = 2000
"""Of the bootstrap; the ends of its 95 % intervals then move by a few per cent of their width from seed to seed."""

DRAWN_AT_ONCE = 1_000_000
"""Values, 8 MB."""

EVALUATION, PER_VIDEO, PER_SLICE = "evaluation.json", "videos.csv", "slices.csv"
"""Files of an evaluation's folder."""

NO_VALUE = "(none)"
"""Slice of the videos that don't have the field."""


class Metric(NamedTuple):
    """How a score of a video is told."""

    title: str
    form: str
    is_better_high: bool
    meaning: str


METRICS = {
    "psnr": Metric("PSNR, dB", ".2f", True, "of each frame, mean over frames; in float on [0, 1], not 8 bits"),
    "ssim": Metric("SSIM", ".4f", True, "Gaussian window of 11 pixels, each colour for itself, in float on [0, 1]"),
    "lpips": Metric("VGG distance", ".4f", False, "the loss's: features of VGG16 as they are, not the published LPIPS"),
    "flicker": Metric("flicker", ".4f", False, "mean absolute error of the change from frame to frame, on [0, 1]"),
    "border": Metric("border error", ".2f", False, "flicker across borders of windows over that inside; 1: no seam"),
    "psnr_inside": Metric("PSNR inside, dB", ".2f", True, "over the pixels in boxes and masks alone"),
    "ssim_inside": Metric("SSIM inside", ".4f", True, "over the pixels in boxes and masks alone"),
    "agreement": Metric("probe", ".3f", True, "agreement of the probe on reconstruction and original, 1: the same"),
    "old_encoder": Metric("old encoder, dB", ".2f", True, "PSNR of this decoder on the first weights' latents"),
    "old_decoder": Metric("old decoder, dB", ".2f", True, "PSNR of the first weights' decoder on these latents"),
    "changed": Metric("changed indices", ".1%", False, "share of indices that differ from the first weights'"),
}
"""Scores of a video, by their names in the files."""

OVER_ALL = {
    "frechet": Metric("rFVD", ".2f", False, "Frechet distance of features of originals and reconstructions"),
    "code_use": Metric("code use", ".1%", True, "share of the codebook that occurs"),
    "perplexity": Metric("perplexity", ".0f", True, "number of codes that, used evenly, would carry as much"),
}
"""Scores of all videos together, which have no interval."""


class Interval(NamedTuple):
    """A mean over videos and where it may lie: 95 % bootstrap interval over videos."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The interval as +-."""
        return (self.high - self.low) / 2


class Score(NamedTuple):
    """One metric over videos."""

    mean: Interval
    worst5: float
    """The 5th percentile from its bad side: one video in twenty is worse."""


@dataclass(frozen=True)
class LatentDrift:
    """How the latents of some weights differ from those of the first ones."""

    is_unchanged: bool
    """Every latent of every video is the same number."""

    mean_shift: tuple[float, ...]
    """Of each channel, in standard deviations of the first weights' channel."""

    std_ratio: tuple[float, ...]
    """Of each channel, this standard deviation over the first weights'."""

    @property
    def largest_shift(self) -> float:
        """Over channels, without its sign."""
        return max(map(abs, self.mean_shift), default=0.0)


@dataclass(frozen=True)
class Evaluation:
    """What one set of weights makes of the videos."""

    weights: str
    """As they were named."""

    per_video: dict[str, list[float]]
    """Metric to its value for each video, in their order; nan where a video has none."""

    run: str | None = None
    """The run that trained them, by name; none for other weights."""

    step: int | None = None
    """Updates that they have seen, where that is known."""

    is_start: bool = False
    """They are what the runs started from."""

    over_all: dict[str, float] = field(default_factory=dict)
    """Scores of OVER_ALL that there are."""

    latents: LatentDrift | None = None
    """Against the first weights."""

    def score(self, metric: str, chosen: Sequence[int] | None = None) -> Score | None:
        """A metric over all or some videos; none where no video has it."""
        values = self._values(metric, chosen)
        if not values.size:
            return None
        worst5 = np.percentile(values, 5 if METRICS[metric].is_better_high else 95)
        return Score(bootstrap(values), float(worst5))

    @property
    def psnr_mean(self) -> float:
        """DB."""
        return float(np.mean(self.per_video["psnr"]))

    def has(self, metric: str) -> bool:
        """Whether any video has it."""
        return bool(self._values(metric, None).size)

    def worst(self, count: int) -> list[int]:
        """Positions of the videos with the lowest PSNR, worst first."""
        return [int(index) for index in np.argsort(self.per_video["psnr"], kind="stable")[:count]]

    def _values(self, metric: str, chosen: Sequence[int] | None) -> np.ndarray:
        values = np.asarray(self.per_video.get(metric, []), float)
        values = values if chosen is None or not values.size else values[list(chosen)]
        return values[np.isfinite(values)]


@dataclass(frozen=True)
class EvaluationSet:
    """Some weights on the same videos; the first ones are what the others are compared with."""

    data: str
    """Dataset or folder."""

    split: str
    num_frames: int
    """Of a window."""

    num_windows: int
    """Of a clip, each encoded and decoded by itself."""

    crop_size: int | None
    """Pixels; none: whole frames."""

    videos: list[str]
    """Their names."""

    slices: dict[str, list[str]]
    """Field of the videos' JSON to its value for each of them."""

    left_out: list[tuple[str, str]]
    """Videos that gave no clip, with the reason."""

    evaluations: list[Evaluation]

    def gain(self, evaluation: Evaluation, metric: str, chosen: Sequence[int] | None = None) -> Interval | None:
        """Change against the first weights, video by video; the interval is that of the pairs' differences."""
        ours, first = (np.asarray(each.per_video.get(metric, []), float) for each in (evaluation, self.evaluations[0]))
        if not ours.size or ours.shape != first.shape:
            return None
        differences = ours - first
        differences = differences if chosen is None else differences[list(chosen)]
        differences = differences[np.isfinite(differences)]
        return bootstrap(differences) if differences.size else None

    def metrics(self) -> list[str]:
        """The names of the metrics that any video has under any weights, in order."""
        return [name for name in METRICS if any(each.has(name) for each in self.evaluations)]

    def by_slice(self, name: str) -> dict[str, list[int]]:
        """Value of a field to the positions of its videos, in order of the values."""
        positions: dict[str, list[int]] = {}
        for index, value in enumerate(self.slices[name]):
            positions.setdefault(value, []).append(index)
        return dict(sorted(positions.items()))


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of values and the 2.5th and 97.5th percentile of the means of samples drawn from them with replacement.

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993. Equal values, equal interval; one value has none.
    """
    if len(values) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    draw = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // len(values))
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = [values[draw.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def write_evaluation(found: EvaluationSet, folder: Path) -> None:
    """The files of an evaluation: everything as JSON, a CSV line for each video and weights, one for each slice."""
    write_atomically(folder / PER_VIDEO, _per_video_csv(found))
    if found.slices:
        write_atomically(folder / PER_SLICE, _per_slice_csv(found))
    write_atomically(folder / EVALUATION, json.dumps(_written(dataclasses.asdict(found)), indent=1))


def read_evaluation(path: Path) -> EvaluationSet:
    """Read what `write_evaluation` wrote.

    Raises:
        ConfigError: if it is of another version's form.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        evaluations = [_read_one(each) for each in written.pop("evaluations")]
        left_out = [(name, reason) for name, reason in written.pop("left_out")]
        return EvaluationSet(**written, left_out=left_out, evaluations=evaluations)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no evaluation of this version ({error}): run `cosmos-hpc evaluate` anew"
        ) from None


def summary(found: EvaluationSet) -> dict[str, Any]:
    """What `evaluate --json` prints: scores with their intervals, gains, slices."""
    metrics = found.metrics()
    rows = []
    for each in found.evaluations:
        row: dict[str, Any] = {"weights": each.weights, "run": each.run, "step": each.step, "videos": len(found.videos)}
        row["scores"] = {name: _score_dict(each.score(name)) for name in metrics}
        row |= {"over_all": each.over_all, "latents": each.latents and dataclasses.asdict(each.latents)}
        if each is not found.evaluations[0]:
            row["gains"] = {name: (gain := found.gain(each, name)) and gain._asdict() for name in metrics}
        row["slices"] = {
            name: {
                value: {metric: _score_dict(each.score(metric, chosen)) for metric in metrics}
                for value, chosen in found.by_slice(name).items()
            }
            for name in found.slices
        }
        row["worst"] = [found.videos[index] for index in each.worst(5)]
        rows.append(row)
    described = {name: getattr(found, name) for name in ("data", "split", "num_frames", "num_windows", "crop_size")}
    result: dict[str, Any] = _written({**described, "left_out": found.left_out, "evaluations": rows})
    return result


def _score_dict(score: Score | None) -> dict[str, float] | None:
    return None if score is None else {**score.mean._asdict(), "worst5": score.worst5}


def _per_video_csv(found: EvaluationSet) -> str:
    metrics = found.metrics()
    rows = [
        [
            video,
            each.weights,
            *(values[index] for values in found.slices.values()),
            *(_cell(each.per_video.get(name, []), index) for name in metrics),
        ]
        for each in found.evaluations
        for index, video in enumerate(found.videos)
    ]
    return _csv([["video", "weights", *found.slices, *metrics], *rows])


def _per_slice_csv(found: EvaluationSet) -> str:
    rows = [["field", "value", "videos", "weights", "metric", "mean", "low", "high", "worst5"]]
    for name in found.slices:
        for value, chosen in found.by_slice(name).items():
            for each in found.evaluations:
                for metric in found.metrics():
                    score = each.score(metric, chosen)
                    if score is not None:
                        numbers = [f"{number:.6g}" for number in (*score.mean, score.worst5)]
                        rows.append([name, value, str(len(chosen)), each.weights, metric, *numbers])
    return _csv(rows)


def _cell(values: Sequence[float], index: int) -> str:
    return f"{values[index]:.6g}" if index < len(values) and math.isfinite(values[index]) else ""


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read_one(written: Mapping[str, Any]) -> Evaluation:
    per_video = {
        name: [float("nan") if value is None else value for value in values]
        for name, values in written["per_video"].items()
    }
    drift = written["latents"]
    latents = drift and LatentDrift(drift["is_unchanged"], tuple(drift["mean_shift"]), tuple(drift["std_ratio"]))
    return Evaluation(**{**written, "per_video": per_video, "latents": latents})


def _written(value: Any) -> Any:
    """As JSON has it, which knows no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    return value
