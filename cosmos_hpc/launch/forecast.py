"""How long runs will take and what they will cost, by what was last measured with the same settings."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.loss_schema import LossTermConfig
from cosmos_hpc.config.rank_reports import last_lines
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.config.schema import RunConfig

MOST_LOOKED_AT = 300
"""Runs that are looked at, the newest first: reading the settings of one takes some milliseconds."""

FEWEST_STEPS = 5
"""Steps that a measurement is made of at least."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it is sent; none where nothing comparable was ever measured."""

    clips_per_s: float | None = None
    """Over all ranks, as last measured."""

    measured_in: str | None = None
    """The run that it was measured in."""

    wall_s: float | None = None
    """Seconds for the steps that are left, without validation, checkpoints and the start."""

    gpu_hours: float | None = None
    """That time on all GPUs, or on all ranks where there are none."""

    checkpoint_bytes: int | None = None
    """All checkpoints that the run keeps."""


def forecasts(runs: Sequence[RunConfig], folders: Sequence[RunFolder], root: Path) -> list[Forecast]:
    """One for each run.

    Args:
        runs: as they would be sent.
        folders: theirs; steps that they have saved are not counted again.
        root: folder of all experiments, in which is looked for measurements.
    """
    if not runs:
        return []
    speed_keys, size_keys = [_speed_key(run) for run in runs], [_size_key(run) for run in runs]
    speeds, sizes = _measured(set(speed_keys), set(size_keys), root)
    return [
        _forecast(run, folder, speeds.get(speed_key), sizes.get(size_key))
        for run, folder, speed_key, size_key in zip(runs, folders, speed_keys, size_keys, strict=True)
    ]


class Stop(NamedTuple):
    """What a run needs to leave with a checkpoint, as it was measured."""

    step_s: float
    """The longest of the last steps, but for the first one after a start."""

    save_s: float | None
    """The longest save; none where no attempt came to its end."""

    measured_in: str
    """The run."""


def measured_stop(run: RunConfig, root: Path) -> Stop | None:
    """What the last run with the same settings took for a step and a save; none where there was none.

    Args:
        run: as it would be sent.
        root: folder of all experiments.
    """
    wanted = _speed_key(run)
    for folder, config in _newest_runs(root):
        steps = noted(folder, "step_time_s", without_first=True) if wanted in _speed_keys(config) else []
        if len(steps) >= FEWEST_STEPS:
            state = RunState.read(folder.state)
            return Stop(max(steps), state.longest_silence_s.get("save") if state else None, folder.label)
    return None


def _forecast(
    run: RunConfig, folder: RunFolder, speed: tuple[float, str] | None, checkpoint_bytes: int | None
) -> Forecast:
    kept = run.checkpoint.keep + (run.checkpoint.best_by is not None)
    size = None if checkpoint_bytes is None else kept * checkpoint_bytes
    if speed is None:
        return Forecast(checkpoint_bytes=size)
    clips_per_s, label = speed
    wall_s = max(0, run.trainer.max_steps - folder.newest_step()) * run.data.global_batch_size / clips_per_s
    gpus = run.cluster.gpus_per_node or run.trainer.devices
    return Forecast(clips_per_s, label, wall_s, wall_s / 3600 * gpus * run.trainer.num_nodes, size)


def _measured(
    speed_keys: set[str], size_keys: set[str], root: Path
) -> tuple[dict[str, tuple[float, str]], dict[str, int]]:
    """Clips/s with the run that they are from, and bytes of one checkpoint, by key."""
    speeds: dict[str, tuple[float, str]] = {}
    sizes: dict[str, int] = {}
    for folder, config in _newest_runs(root):
        wanted = _speed_keys(config) & (speed_keys - speeds.keys())
        if wanted and (clips_per_s := _clips_per_s(folder)):
            speeds |= dict.fromkeys(wanted, (clips_per_s, folder.label))
        if (key := _size_key(config)) in size_keys - sizes.keys() and (newest := folder.newest_checkpoint()):
            sizes[key] = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        if speeds.keys() == speed_keys and sizes.keys() == size_keys:
            break
    return speeds, sizes


def _newest_runs(root: Path) -> Iterator[tuple[RunFolder, RunConfig]]:
    """Runs that have trained, the last written first."""
    written = sorted(root.glob("*/*-*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for metrics in written[:MOST_LOOKED_AT]:
        folder = RunFolder(metrics.parent)
        try:
            yield folder, read_run_config(folder.config)
        except ConfigError:
            continue


def noted(folder: RunFolder, name: str, *, without_first: bool = False) -> list[float]:
    """A number of the last steps, by its name in metrics.jsonl.

    Args:
        folder: the run.
        name: such as step_time_s.
        without_first: leave out each attempt's first step, which compiles and fills caches.
    """
    found, attempt = [], None
    for text in last_lines(folder.metrics).splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the first one may be cut, the last one is being written
            continue
        is_first, attempt = line.get("attempt") != attempt, line.get("attempt")
        if line.get(name) and not (is_first and without_first):
            found.append(line[name])
    return found


def _clips_per_s(folder: RunFolder) -> float | None:
    """Median of the last steps; none after too few of them, the first ones being slow."""
    speeds = noted(folder, "clips_per_s")
    return median(speeds) if len(speeds) >= FEWEST_STEPS else None


def _speed_key(run: RunConfig) -> str:
    """What decides the speed of a step."""
    data, trainer, cluster = run.data, run.trainer, run.cluster
    terms = [item.name for item in fields(run.loss) if _is_used(run, item.name)]
    return json.dumps([
        run.model.kind, run.model.temporal_compression, run.model.spatial_compression, run.model.channels,
        data.num_frames, data.crop_size, data.micro_batch_size, data.global_batch_size, trainer.num_nodes,
        trainer.devices, trainer.precision, terms, run.optim.use_distributed_optimizer,
        cluster.executor, cluster.partition, cluster.constraint,
    ])  # fmt: skip


def _speed_keys(trained: RunConfig) -> set[str]:
    """Keys of the runs that will be as fast as one that has trained: also of those that choose their micro batch."""
    chosen = dataclasses.replace(trained, data=dataclasses.replace(trained.data, micro_batch_size="auto"))
    return {_speed_key(trained), _speed_key(chosen)}


def _size_key(run: RunConfig) -> str:
    """What decides the size of a checkpoint."""
    model = run.model
    discriminator = _is_used(run, "adversarial") and run.loss.adversarial.channels
    return json.dumps([model.kind, model.temporal_compression, model.spatial_compression, model.channels,
                       run.optim.ema_decay > 0, discriminator])  # fmt: skip


def _is_used(run: RunConfig, term: str) -> bool:
    config = getattr(run.loss, term)
    return isinstance(config, LossTermConfig) and config.is_used(run.trainer.max_steps)
