"""Batches of clips for one rank: for training without end and exactly resumable, for validation in one order."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_train_dataset, get_val_dataset
from megatron.energon.errors import FatalSampleError
from megatron.energon.savable_loader import BasicDataLoader
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import DataConfig
from cosmos_hpc.data.bad_videos import SPOILT, USELESS, SkippedVideos
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.clips import Fault
from cosmos_hpc.data.dataset_index import check_dataset, is_metadataset, split_sizes
from cosmos_hpc.data.decoders import check_decoder
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.streams import BEGINNING, PositionedBatches, StreamPosition, furthest_behind, share
from cosmos_hpc.data.task_encoder import ClipTaskEncoder
from cosmos_hpc.data.workers import WorkerContext


def to_unit_range(clips: Tensor) -> Tensor:
    """uint8 clips as the network takes them: float32 in [-1, 1]. To be called on the device that computes."""
    return clips.to(torch.float32).div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class Layout:
    """What must not change between saving a position in the data and restoring it.

    Energon itself refuses none of these: it would go on with other samples.
    """

    num_streams: int
    """Streams over all ranks: ranks x workers per rank, a rank that decodes itself being one."""

    shuffle_buffer_size: int
    """data.shuffle_buffer_size."""

    clips_per_decode: int
    """data.clips_per_decode."""

    clip_buffer_size: int
    """data.clip_buffer_size."""

    train_samples: int | None
    """Samples in the split train; none where it can't be told beforehand."""

    seed: int
    """trainer.seed."""

    energon: str
    """Version of Energon, which keeps the position."""


MENDS = {
    "num_streams": "set data.num_streams to {saved} and trainer.devices x trainer.num_nodes to {ranks}",
    "shuffle_buffer_size": "set data.shuffle_buffer_size to {saved}",
    "clips_per_decode": "set data.clips_per_decode to {saved}",
    "clip_buffer_size": "set data.clip_buffer_size to {saved}",
    "train_samples": "bring back the dataset of {saved} training samples",
    "seed": "set trainer.seed to {saved}",
    "energon": "install megatron-energon=={saved}",
}


@dataclass(frozen=True)
class LoaderState:
    """One rank's position in the data. Those of all ranks, taken after the same step, determine everything after it."""

    layout: Layout
    """The arrangement for which the position holds."""

    rank: int
    """Whose position it is."""

    world_size: int
    """Number of ranks that share the streams."""

    streams: tuple[StreamPosition, ...]
    """Positions of the rank's streams, in their order over all ranks."""

    next_stream: int
    """Index among them of the one that gives the next batch."""


class TrainLoader:
    """Training clips of one rank, without end; every pass over the dataset in another order."""

    def __init__(
        self, data: DataConfig, *, seed: int, rank: int, world_size: int, quarantine: Path | None = None
    ) -> None:
        """Open the dataset; workers start with the first batch.

        Args:
            data: Dataset, clip size, micro-batch, workers.
            seed: Of the order, the clips' starts and the crops.
            rank: This process among those that share the data.
            world_size: Number of them.
            quarantine: File of the run that gets a JSON line for each video that can't be used.

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
            num_streams=world_size * max(1, num_workers),
            shuffle_buffer_size=data.shuffle_buffer_size,
            clips_per_decode=data.clips_per_decode,
            clip_buffer_size=data.clip_buffer_size,
            train_samples=train_samples,
            seed=seed,
            energon=version("megatron-energon"),
        )
        self._rank, self._world_size = rank, world_size
        self._path = path
        self._skipped = SkippedVideos(quarantine, data.max_bad_share)
        self._clip_decoder = _clip_decoder(data)
        worker_config = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            seed_offset=seed,
            global_error_handler=self._skipped.on_error,
        )
        task_encoder = _task_encoder(data, seed, self._clip_decoder, self._skipped)
        dataset = get_train_dataset(
            path,
            worker_config=worker_config,
            batch_size=data.micro_batch_size,
            batch_drop_last=True,
            shuffle_buffer_size=data.shuffle_buffer_size,
            max_samples_per_sequence=None,
            task_encoder=task_encoder,
        )
        self._skipped.expect(task_encoder.num_videos, num_streams=max(1, num_workers))
        self._dataset = PositionedBatches(dataset, worker_config=worker_config)
        self._loader = _open(self._dataset, seed)
        self._streams = [BEGINNING] * max(1, num_workers)
        self._next_stream = 0
        self._clips: Iterator[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Uint8 clips [B, 3, T, H, W], B the micro-batch size; a second call goes on where the first one is.

        Raises:
            ConfigError: if no video among many can be used.
        """
        if self._clips is None:
            self._clips = self._take_clips()
        return self._clips

    def _take_clips(self) -> Iterator[Tensor]:
        for batch, stream, state in _usable(self._loader, self._path):
            num_clips = self._streams[stream].num_clips + len(batch.clips)
            self._streams[stream] = StreamPosition(num_clips, state)
            self._next_stream = (stream + 1) % len(self._streams)
            yield batch.clips

    @property
    def skipped(self) -> Counter[Fault]:
        """Samples left out since the start, by what is wrong with them; repeats in later passes count."""
        return self._skipped.counts

    def state(self) -> LoaderState:
        """The position behind the last clip that was taken out. Picklable; waits for no worker."""
        return LoaderState(self.layout, self._rank, self._world_size, tuple(self._streams), self._next_stream)

    def restore(self, states: Sequence[LoaderState]) -> None:
        """Go on behind a saved position, whatever the micro-batch size. To be called before the first clip is taken.

        At the same number of ranks, the next clips are those of the unbroken run. At another, the streams are shared
        out anew: each goes on where it was, so that no sample is lost and none comes twice in a pass.

        Args:
            states: Those of all ranks of the checkpoint, in the order of their ranks.

        Raises:
            ConfigError: if the position was saved under another layout.
        """
        if self._clips is not None:
            raise RuntimeError("restore() came after the first clip: restore a fresh loader")
        ranks = [state.rank for state in states]
        if ranks != list(range(states[0].world_size)):
            raise RuntimeError(f"restore() got the positions of ranks {ranks}: pass those of all, in order")
        _check_layout(states[0].layout, self.layout)
        self._streams = share([stream for state in states for stream in state.streams], self._rank, self._world_size)
        is_same = len(states) == self._world_size
        self._next_stream = states[self._rank].next_stream if is_same else furthest_behind(self._streams)
        self._dataset.start_at([stream.state for stream in self._streams])
        self._loader.worker_init_fn = partial(_start_worker, self._next_stream, self._loader.worker_init_fn)

    def close(self) -> None:
        """End the workers. No clips can be taken afterwards."""
        _end_workers(self._loader)
        self._clip_decoder.close()
        self._clips = iter(())


class ValidationLoader:
    """Clips of the split val for one rank: the same in every iteration, each sample at most once over all ranks."""

    def __init__(
        self,
        data: DataConfig,
        *,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        limit_batches: int | None = None,
        quarantine: Path | None = None,
    ) -> None:
        """Check the dataset; it is opened by each iteration.

        Args:
            data: Dataset, clip size, micro-batch.
            rank: This process among those that share the samples.
            world_size: Number of them.
            num_workers: Decoding processes; 0: decode in this one.
            limit_batches: Batches of this rank in one iteration; none: all.
            quarantine: File of the run that gets a JSON line for each video that can't be used.

        Raises:
            ConfigError: if the dataset can't be read or its split val is empty.
        """
        check_dataset(data.path, needed=("val",))
        self._data = data
        self._limit_batches = limit_batches
        self._skipped = SkippedVideos(quarantine, data.max_bad_share)
        self._clip_decoder = _clip_decoder(data)
        self._worker_config = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            global_error_handler=self._skipped.on_error,
        )

    def __iter__(self) -> Iterator[Tensor]:
        """Uint8 clips [B, 3, T, H, W]; the last batch may be smaller, and a rank without samples yields none."""
        path = Path(self._data.path)  # type: ignore[arg-type]  # checked in __init__
        task_encoder = _task_encoder(self._data, None, self._clip_decoder, self._skipped)
        dataset = get_val_dataset(
            path,
            split_part="val",
            worker_config=self._worker_config,
            batch_size=self._data.micro_batch_size,
            limit=self._limit_batches,
            task_encoder=task_encoder,
        )
        self._skipped.expect(task_encoder.num_videos, num_streams=max(1, self._worker_config.num_workers))
        loader = _open(dataset, seed=0)
        try:
            for batch in _usable(loader, path):
                yield batch.clips
        finally:
            _end_workers(loader)

    @property
    def skipped(self) -> Counter[Fault]:
        """Samples left out so far, once for each iteration, by what is wrong with them."""
        return self._skipped.counts


def _clip_decoder(data: DataConfig) -> ClipDecoder:
    check_decoder(data.decoder)
    return ClipDecoder(data.decode_timeout_s, data.decoder)


def _task_encoder(
    data: DataConfig, seed: int | None, clip_decoder: ClipDecoder, skipped: SkippedVideos
) -> ClipTaskEncoder:
    """Training's, or with no seed validation's: one clip of each video, from its middle and as it is."""
    is_training = seed is not None
    return ClipTaskEncoder(
        kind=ClipKind.of(data),
        seed=seed,
        clip_decoder=clip_decoder,
        skipped=skipped,
        clips_per_decode=data.clips_per_decode if is_training else 1,
        clip_buffer_size=data.clip_buffer_size if is_training else 1,
    )


def _start_worker(first_stream: int, initialize: Callable[[int], None], worker_id: int) -> None:
    """In a worker: torch asks worker 0 first, so let that be the one whose turn it is."""
    WorkerConfig.worker_id_offset = first_stream
    initialize(worker_id)


def _open(dataset: Any, seed: int) -> BasicDataLoader:
    """Energon's loader, which draws nothing from torch's global generator and whose workers obey their rank alone."""
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")  # more than cores
    loader = BasicDataLoader(
        dataset,
        watchdog_timeout_seconds=None,
        gc_collect_every_n_steps=10 if dataset.worker_config.num_workers else 0,  # the rank's heap stays unfrozen
    )
    loader.pin_memory = torch.cuda.is_available()
    loader.generator = torch.Generator().manual_seed(seed)
    if loader.num_workers:
        loader.multiprocessing_context = WorkerContext()
    return loader


def _usable(loader: BasicDataLoader, path: Path) -> Iterator[Any]:
    """Energon's batches; its error over a dataset that is not worth a run becomes the user's."""
    try:
        yield from loader
    except FatalSampleError as error:
        # a worker's traceback quotes the sentence, then Energon, at the end
        sentences = re.findall(rf"(?:{USELESS}|{SPOILT}).*", str(error))
        if not sentences:
            raise
        raise ConfigError(f"data.path is {path}, but holds {sentences[-1].rstrip('.')}") from error


def _end_workers(loader: BasicDataLoader) -> None:
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
        *fitting, most = [str(ranks) for ranks in range(1, saved.num_streams + 1) if saved.num_streams % ranks == 0]
        ranks = f"{', '.join(fitting)} or {most}" if fitting else most
        what = ", ".join(f"{name} {getattr(saved, name)} -> {getattr(layout, name)}" for name in changed)
        mend = ", ".join(MENDS[name].format(saved=getattr(saved, name), ranks=ranks) for name in changed)
        raise ConfigError(f"the checkpoint's position in the data fits another layout ({what}): {mend}")
