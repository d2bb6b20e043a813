"""Sample streams: the parts that all workers of all ranks divide the data into, and where each of them is.

A stream goes over its part again and again, in an order of its own that depends on no other stream. So a position in
the data is one position for each stream, and another number of ranks only has to share out the same streams anew.

Energon's own savable loader is not used: it asks the workers for their positions, so that a save waits until each has
decoded its current batch (0.4 to 1.3 s on two workers over 720p), it may get a worker's answer from before a restore,
and it counts in batches, so that a position fits one micro-batch size. Here each batch carries the position behind it.
"""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron.energon import Batch, Sample, SavableDataset, WorkerConfig
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.wrappers.base import BaseWrapperDataset


class StreamPosition(NamedTuple):
    """How far one stream is."""

    num_clips: int
    """Clips taken out of it since the run began."""

    state: bytes | None
    """Energon's state behind the last of them, pickled; none before the first."""


BEGINNING = StreamPosition(0, None)


def share(streams: Sequence[StreamPosition], rank: int, world_size: int) -> list[StreamPosition]:
    """The streams of one rank: neighbours, as Energon shares out the samples.

    Args:
        streams: All of them, a multiple of `world_size`.
        rank: Whose.
        world_size: Number of ranks.
    """
    each = len(streams) // world_size
    return list(streams[rank * each : (rank + 1) * each])


def furthest_behind(streams: Sequence[StreamPosition]) -> int:
    """Index of the stream that gives the next batch where a rank has got the streams of others."""
    return min(range(len(streams)), key=lambda index: streams[index].num_clips)


class PositionedBatch(NamedTuple):
    """What leaves a worker of a training loader."""

    batch: Batch
    """The clips."""

    worker: int
    """Index, within the rank, of the stream that they come from."""

    state: bytes
    """The stream's state behind them."""


class PositionedBatches(BaseWrapperDataset):
    """Batches, each with the position behind it, from where `start_at` says."""

    def __init__(self, dataset: SavableDataset, *, worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self._states: Sequence[bytes | None] = [None] * max(1, worker_config.num_workers)

    def start_at(self, states: Sequence[bytes | None]) -> None:
        """Positions of the rank's streams; to be called before the workers start."""
        self._states = states

    def __iter__(self) -> Iterator[PositionedBatch]:
        worker = self.worker_config.rank_worker_id()
        state = self._states[worker]
        if state is not None:
            self.dataset.restore_state(pickle.loads(state))  # written by this run
        for batch in self.dataset:
            yield PositionedBatch(batch, worker, pickle.dumps(self.dataset.save_state()))

    def reset_state_own(self) -> None:
        """There is nothing of its own."""

    def len_worker(self, worker_idx: int | None = None) -> int:
        """As the batches'."""
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict[str, Any]:
        """As the batches'."""
        return self.dataset.config()


class NumberedPasses(BaseWrapperDataset):
    """Samples whose restore key says in which pass over the dataset they come, counted from 0 by each stream.

    The key, and so the number, outlives a wait in the shuffle buffer and a resume.
    """

    _savable_fields = ("_pass",)

    def __init__(self, dataset: SavableDataset, *, worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Back to the first pass."""
        self._pass = 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.dataset:
            yield add_sample_restore_key(sample, self._pass, src=self)
        self._pass += 1

    def restore_sample(self, restore_key: tuple) -> Sample:
        """The sample of that key, in the pass that the key names."""
        _, number, *inner = restore_key
        return add_sample_restore_key(self.dataset.restore_sample(tuple(inner)), number, src=self)

    def len_worker(self, worker_idx: int | None = None) -> int:
        """As the dataset's."""
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict[str, Any]:
        """As the dataset's."""
        return self.dataset.config()


def pass_of(sample: Sample) -> int:
    """The pass in which a sample of `NumberedPasses` comes."""
    key = sample.__restore_key__
    return int(key[key.index(NumberedPasses.__name__) + 1])
