"""Batches of clips for one rank: for training without end and exactly resumable, for validation in one order."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.energon import SavableDataset, WorkerConfig, get_train_dataset, get_val_dataset
from megatron.energon.errors import FatalSampleError
from megatron.energon.savable_loader import BasicDataLoader
from torch import Tensor

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.bad_videos import SPOILT, USELESS, SkippedVideos
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.clips import Fault
from cosmos_hpc.data.dataset_index import check_dataset, energon_path, is_remote, split_sizes, tells_its_size
from cosmos_hpc.data.decoders import check_decoder
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.shapes import StepShapes
from cosmos_hpc.data.streams import BEGINNING, PositionedBatches, StreamPosition, furthest_behind, share
from cosmos_hpc.data.task_encoder import ClipTaskEncoder, RawTaskEncoder
from cosmos_hpc.data.workers import WorkerContext


def to_unit_range(clips: Tensor) -> Tensor:
    """uint8 clips [B, C, T, H, W] without their masks as the network takes them: float32 in [-1, 1].

    To be called on the device that computes.
    """
    return clips[:, :3].to(torch.float32).div_(127.5).sub_(1.0)


def loss_mask(clips: Tensor) -> Tensor | None:
    """What the loss is to look at, float32 in [0, 1] of the shape of `to_unit_range(clips)`; none: at everything."""
    return clips[:, 3:].to(torch.float32).div_(255).expand(-1, 3, -1, -1, -1) if clips.shape[1] > 3 else None


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

    image_samples: int | None
    """Those of data.image_path."""

    seed: int
    """trainer.seed."""

    energon: str
    """Version of Energon, which keeps the position."""


MENDS = {
    "num_streams": "set data.num_streams to {saved} and trainer.devices x trainer.num_nodes to {ranks}",
    "shuffle_buffer_size": "set data.shuffle_buffer_size to {saved}",
    "clips_per_decode": "set data.clips_per_decode to {saved}",
    "clip_buffer_size": "set data.clip_buffer_size to {saved}",
    "image_samples": "bring back the dataset of {saved} training images",
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
        if data.image_path is not None:
            check_dataset(data.image_path, needed=("train",), setting="data.image_path")
        self.layout = Layout(
            num_streams=world_size * max(1, num_workers),
            shuffle_buffer_size=data.shuffle_buffer_size,
            clips_per_decode=data.clips_per_decode,
            clip_buffer_size=data.clip_buffer_size,
            train_samples=_train_samples(data, "path", world_size, num_workers),
            image_samples=_train_samples(data, "image_path", world_size, num_workers),
            seed=seed,
            energon=version("megatron-energon"),
        )
        self._rank, self._world_size = rank, world_size
        self._path = str(data.path)
        self._global_batch_size = data.global_batch_size
        self._skipped = SkippedVideos(quarantine, data.max_bad_share)
        self._clip_decoder = _clip_decoder(data)
        worker_config = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            seed_offset=seed,
            global_error_handler=self._skipped.on_error,
        )
        self._shapes = StepShapes(
            *_kinds(data),
            seed=seed,
            batches_per_step=max(1, data.global_batch_size // (data.micro_batch * world_size)),
            num_streams=max(1, num_workers),
        )
        images, image_encoder = None, RawTaskEncoder(self._skipped)
        if data.image_path is not None:
            images = _samples(data, data.image_path, worker_config, image_encoder)
        task_encoder = ClipTaskEncoder(
            kind_of=self._kind_of,
            seed=seed,
            clip_decoder=self._clip_decoder,
            skipped=self._skipped,
            clips_per_decode=data.clips_per_decode,
            clip_buffer_size=data.clip_buffer_size,
            images=images,
        )
        dataset = _samples(data, self._path, worker_config, task_encoder)
        num_samples = task_encoder.num_samples + image_encoder.num_samples
        self._skipped.expect(num_samples, num_streams=max(1, num_workers))
        self._dataset = PositionedBatches(dataset, worker_config=worker_config)
        self._loader = _open(self._dataset, seed)
        self._streams = [BEGINNING] * max(1, num_workers)
        self._next_stream = 0
        self._clips: Iterator[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Uint8 clips [B, C, T, H, W], B the micro-batch size; a second call goes on where the first one is.

        C is 4 with `data.masks`, else 3; T, H and W are those of the step, the same on all ranks.

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

    def _kind_of(self, stream: int, number: int) -> ClipKind:
        return self._shapes.of_batch(stream, number)

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
        consumed = sum(stream.num_clips for state in states for stream in state.streams)
        self._shapes = self._shapes.start_at(consumed // self._global_batch_size, self._next_stream)
        self._dataset.start_at([stream.state for stream in self._streams])
        self._loader.worker_init_fn = partial(_start_worker, self._next_stream, self._loader.worker_init_fn)

    def close(self) -> None:
        """End the workers. No clips can be taken afterwards."""
        _end_workers(self._loader)
        self._clip_decoder.close()
        self._clips = iter(())


class ValidationLoader:
    """Clips of the split val for one rank: the same in every iteration, each sample at most once over all ranks.

    They are `data.num_frames` long and `data.crop_size` wide, from the middle of each video and as it is.
    """

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
        self._kind = ClipKind.of(data, data.num_frames, data.crop_size, data.crop_size)
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
        path = str(self._data.path)
        task_encoder = ClipTaskEncoder(
            kind_of=lambda _stream, _number: self._kind,
            seed=None,
            clip_decoder=self._clip_decoder,
            skipped=self._skipped,
        )
        with _told_in_one_line(path):
            dataset = get_val_dataset(
                energon_path(path),
                split_part="val",
                worker_config=self._worker_config,
                batch_size=self._data.micro_batch,
                limit=self._limit_batches,
                task_encoder=task_encoder,
            )
        self._skipped.expect(task_encoder.num_samples, num_streams=max(1, self._worker_config.num_workers))
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


def _kinds(data: DataConfig) -> tuple[list[ClipKind], list[float]]:
    """What training clips look like, and how often; images need no room for longer clips."""
    shapes = data.clip_shapes
    longest = max(num_frames for num_frames, _, _ in shapes)
    kinds = [
        ClipKind.of(data, *shape)._replace(
            longest=1 if data.image_path is not None and shape[0] == 1 else longest, has_mask=data.masks
        )
        for shape in shapes
    ]
    return kinds, list(shapes.values())


def _samples(data: DataConfig, path: str, worker_config: WorkerConfig, task_encoder: RawTaskEncoder) -> SavableDataset:
    """Training samples of a dataset, without end; what becomes of them is the encoder's matter."""
    with _told_in_one_line(path):
        return get_train_dataset(
            energon_path(path),
            worker_config=worker_config,
            batch_size=data.micro_batch,
            batch_drop_last=True,
            shuffle_buffer_size=data.shuffle_buffer_size,
            max_samples_per_sequence=None,
            task_encoder=task_encoder,
        )


@contextmanager
def _told_in_one_line(path: str) -> Iterator[None]:
    """What an object store answers is the user's: no such bucket, profile or key."""
    try:
        yield
    except Exception as error:  # each store and its client have errors of their own
        if not is_remote(path):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"{path} can't be opened as a dataset ({reason}): see that it is indexed, and that the profile and keys of "
            "multi-storage-client are right (MSC_CONFIG)"
        ) from error


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


def _usable(loader: BasicDataLoader, path: str) -> Iterator[Any]:
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


def _train_samples(data: DataConfig, setting: str, world_size: int, num_workers: int) -> int | None:
    """Samples in the split train of `data.path` or `data.image_path`; none where that can't be told.

    Raises:
        ConfigError: if there are fewer than streams, over which Energon fails in a worker.
    """
    path = getattr(data, setting)
    if path is None or not tells_its_size(path):
        return None
    samples, streams = split_sizes(Path(path))["train"], world_size * max(num_workers, 1)
    if samples < streams:
        count = "data.num_workers" if data.num_streams is None else "data.num_streams"
        workers = samples // world_size
        fitting = workers if data.num_streams is None else workers * world_size
        mend = f"set {count} to {fitting}" if workers else "use fewer ranks"
        raise ConfigError(
            f"data.{setting} is {path}, whose split train holds {samples} samples, but {world_size} ranks x "
            f"{max(num_workers, 1)} workers need at least one each: {mend}, or pack more videos"
        )
    return samples


def _check_layout(saved: Layout, layout: Layout) -> None:
    changed = [field.name for field in fields(Layout) if getattr(saved, field.name) != getattr(layout, field.name)]
    if changed:
        *fitting, most = [str(ranks) for ranks in range(1, saved.num_streams + 1) if saved.num_streams % ranks == 0]
        ranks = f"{', '.join(fitting)} or {most}" if fitting else most
        what = ", ".join(f"{name} {getattr(saved, name)} -> {getattr(layout, name)}" for name in changed)
        mend = ", ".join(MENDS[name].format(saved=getattr(saved, name), ranks=ranks) for name in changed)
        raise ConfigError(f"the checkpoint's position in the data fits another layout ({what}): {mend}")
