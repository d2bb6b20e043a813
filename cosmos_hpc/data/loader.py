"""Batches of clips for one rank: for training without end and exactly resumable, for validation in one order."""

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset, get_val_dataset
from megatron.energon.errors import FatalSampleError
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import DataConfig
from cosmos_hpc.data.dataset_index import check_dataset, is_metadataset, split_sizes
from cosmos_hpc.data.task_encoder import USELESS, ClipBatch, ClipTaskEncoder, SkippedVideos
from cosmos_hpc.data.workers import WorkerContext

SNAPSHOT_EVERY_S = 10.0
"""A resume decodes again what a worker made since its last snapshot: about this long."""


def to_unit_range(clips: Tensor) -> Tensor:
    """uint8 clips as the network takes them: float32 in [-1, 1]. To be called on the device that computes."""
    return clips.to(torch.float32).div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class Layout:
    """What must not change between saving a position in the data and restoring it.

    Energon itself refuses another number of workers only, and without a message; under the other changes it goes on
    with other samples.
    """

    world_size: int
    """Ranks."""

    workers_per_rank: int
    """Decoding processes per rank."""

    shuffle_buffer_size: int
    """data.shuffle_buffer_size."""

    micro_batch_size: int
    """data.micro_batch_size."""

    train_samples: int | None
    """Samples in the split train; none where it can't be told beforehand."""

    seed: int
    """trainer.seed."""

    energon: str
    """Version of Energon, which keeps the position."""


MENDS = {
    "world_size": "set trainer.devices and trainer.num_nodes to {saved} ranks",
    "workers_per_rank": "decode with {saved} workers per rank (data.num_workers, or data.num_streams over all ranks)",
    "shuffle_buffer_size": "set data.shuffle_buffer_size to {saved}",
    "micro_batch_size": "set data.micro_batch_size to {saved}",
    "train_samples": "bring back the dataset of {saved} training samples",
    "seed": "set trainer.seed to {saved}",
    "energon": "install megatron-energon=={saved}",
}


@dataclass(frozen=True)
class LoaderState:
    """One rank's position in the data: everything after it is determined."""

    layout: Layout
    """The arrangement for which the position holds."""

    rank: int
    """Whose position it is."""

    position: Any
    """Energon's own state; none before the first clip."""


class TrainLoader:
    """Training clips of one rank, without end; every pass over the dataset in another order."""

    def __init__(self, data: DataConfig, *, seed: int, rank: int, world_size: int) -> None:
        """Open the dataset; workers start with the first batch.

        Args:
            data: Dataset, clip size, micro-batch, workers.
            seed: Of the order, the clips' starts and the crops.
            rank: This process among those that share the data.
            world_size: Number of them.

        Raises:
            ConfigError: if the dataset can't be read, or has fewer training samples than streams.
        """
        check_dataset(data.path, needed=("train",))
        num_workers = data.num_workers if data.num_streams is None else data.num_streams // world_size
        path = Path(data.path)  # type: ignore[arg-type]  # checked above
        train_samples = None if is_metadataset(path) else split_sizes(path)["train"]
        if train_samples is not None:
            _check_streams(data, train_samples, world_size, num_workers)
        self.layout = Layout(
            world_size=world_size,
            workers_per_rank=num_workers,
            shuffle_buffer_size=data.shuffle_buffer_size,
            micro_batch_size=data.micro_batch_size,
            train_samples=train_samples,
            seed=seed,
            energon=version("megatron-energon"),
        )
        self.rank = rank
        self._path = path
        self._skipped = SkippedVideos()
        worker_config = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            seed_offset=seed,
            global_error_handler=self._skipped.on_error,
        )
        dataset = get_train_dataset(
            path,
            worker_config=worker_config,
            batch_size=data.micro_batch_size,
            batch_drop_last=True,
            shuffle_buffer_size=data.shuffle_buffer_size,
            max_samples_per_sequence=None,
            task_encoder=_task_encoder(data, self._skipped, is_training=True),
        )
        self._loader = _open(dataset, seed)
        self._batches: Iterator[ClipBatch] | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[Tensor]:
        """Uint8 clips [B, 3, T, H, W], B the micro-batch size; a second call goes on where the first one is.

        Raises:
            ConfigError: if no video among many can be used.
        """
        if self._batches is None:
            self._batches = _usable(self._loader, self._path)
        return (batch.clips for batch in self._batches)

    @property
    def num_skipped(self) -> int:
        """Samples left out since the start because they could not be decoded or were too short."""
        return self._skipped.count

    def state(self) -> LoaderState:
        """The position behind the last clip that was taken out. Picklable; a resume needs each rank's own."""
        if self._is_closed:
            raise RuntimeError("state() came after close(): the workers that know the position are gone")
        return LoaderState(self.layout, self.rank, copy.deepcopy(self._loader.save_state_rank()))

    def restore(self, states: Sequence[LoaderState]) -> None:
        """Go on behind a saved position. To be called before the first clip is taken.

        Args:
            states: Those of all ranks of the checkpoint, in the order of their ranks.

        Raises:
            ConfigError: if the position was saved under another layout.
        """
        if self._batches is not None:
            raise RuntimeError("restore() came after the first clip: restore a fresh loader")
        ranks = [state.rank for state in states]
        if ranks != list(range(states[0].layout.world_size)):
            raise RuntimeError(f"restore() got the positions of ranks {ranks}: pass those of all, in order")
        _check_layout(states[0].layout, self.layout)
        state = states[self.rank]
        self._loader.restore_state_rank(copy.deepcopy(state.position))
        if state.position is not None and self.layout.workers_per_rank:
            # Energon 7.4.1 forgets the offset: a save before every worker has yielded again would repeat clips
            self._loader._worker_sample_counters = [
                worker.state.sample_index + worker.offset - 1 for worker in state.position.worker_states
            ]

    def close(self) -> None:
        """End the workers. Neither clips nor the position can be taken afterwards."""
        _end_workers(self._loader)
        self._batches = iter(())
        self._is_closed = True


class ValidationLoader:
    """Clips of the split val for one rank: the same in every iteration, each sample at most once over all ranks."""

    def __init__(
        self, data: DataConfig, *, rank: int, world_size: int, num_workers: int = 0, limit_batches: int | None = None
    ) -> None:
        """Check the dataset; it is opened by each iteration.

        Args:
            data: Dataset, clip size, micro-batch.
            rank: This process among those that share the samples.
            world_size: Number of them.
            num_workers: Decoding processes; 0: decode in this one.
            limit_batches: Batches of this rank in one iteration; none: all.

        Raises:
            ConfigError: if the dataset can't be read or its split val is empty.
        """
        check_dataset(data.path, needed=("val",))
        self._data = data
        self._limit_batches = limit_batches
        self._skipped = SkippedVideos()
        self._worker_config = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            global_error_handler=self._skipped.on_error,
        )

    def __iter__(self) -> Iterator[Tensor]:
        """Uint8 clips [B, 3, T, H, W]; the last batch may be smaller, and a rank without samples yields none."""
        path = Path(self._data.path)  # type: ignore[arg-type]  # checked in __init__
        dataset = get_val_dataset(
            path,
            split_part="val",
            worker_config=self._worker_config,
            batch_size=self._data.micro_batch_size,
            limit=self._limit_batches,
            task_encoder=_task_encoder(self._data, self._skipped, is_training=False),
        )
        loader = _open(dataset, seed=0)
        try:
            for batch in _usable(loader, path):
                yield batch.clips
        finally:
            _end_workers(loader)

    @property
    def num_skipped(self) -> int:
        """Samples left out so far, once for each iteration, because they could not be decoded or were too short."""
        return self._skipped.count


def _task_encoder(data: DataConfig, skipped: SkippedVideos, *, is_training: bool) -> ClipTaskEncoder:
    return ClipTaskEncoder(
        num_frames=data.num_frames, crop_size=data.crop_size, is_training=is_training, skipped=skipped
    )


def _open(dataset: Any, seed: int) -> Any:
    """Energon's loader, which draws nothing from torch's global generator and whose workers obey their rank alone."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # more than cores
    loader = get_savable_loader(
        dataset,
        checkpoint_every_sec=SNAPSHOT_EVERY_S,
        watchdog_timeout_seconds=None,
        gc_collect_every_n_steps=10 if dataset.worker_config.num_workers else 0,  # the rank's heap stays unfrozen
    )
    loader.pin_memory = torch.cuda.is_available()
    loader.generator = torch.Generator().manual_seed(seed)
    if loader.num_workers:
        loader.multiprocessing_context = WorkerContext()
    return loader


def _usable(loader: Any, path: Path) -> Iterator[ClipBatch]:
    """Energon's batches; its error over a dataset in which nothing is usable becomes the user's."""
    try:
        yield from loader
    except FatalSampleError as error:
        sentences = re.findall(rf"{USELESS}.*", str(error))  # a worker's traceback quotes it, then Energon, at the end
        if not sentences:
            raise
        raise ConfigError(f"data.path is {path}, but holds {sentences[-1].rstrip('.')}") from error


def _end_workers(loader: Any) -> None:
    """Torch ends persistent workers only with the interpreter, unless its private iterator is told to."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and loader.num_workers > 0:
        iterator._shutdown_workers()


def _check_streams(data: DataConfig, train_samples: int, world_size: int, num_workers: int) -> None:
    """Refuse fewer samples than streams: Energon fails in a worker."""
    streams = world_size * max(num_workers, 1)
    if train_samples < streams:
        setting = "data.num_workers" if data.num_streams is None else "data.num_streams"
        workers = train_samples // world_size
        fitting = workers if data.num_streams is None else workers * world_size
        mend = f"set {setting} to {fitting}" if workers else "use fewer ranks"
        raise ConfigError(
            f"data.path is {data.path}, whose split train holds {train_samples} samples, but {world_size} ranks x "
            f"{max(num_workers, 1)} workers need at least one each: {mend}, or pack more videos"
        )


def _check_layout(saved: Layout, layout: Layout) -> None:
    changed = [field.name for field in fields(Layout) if getattr(saved, field.name) != getattr(layout, field.name)]
    if changed:
        what = ", ".join(f"{name} {getattr(saved, name)} -> {getattr(layout, name)}" for name in changed)
        mend = ", ".join(MENDS[name].format(saved=getattr(saved, name)) for name in changed)
        raise ConfigError(f"the checkpoint's position in the data fits another layout ({what}): {mend}")
