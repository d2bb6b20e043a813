"""Energon's hooks: encoded videos go through the shuffle buffer as bytes, and are decoded behind it."""

import hashlib
import re
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SavableDataset,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    stateless,
)
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from torch import Tensor

from cosmos_hpc.data.bad_videos import ForgivingReader, SkippedVideos, Video
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.clip_batches import ClipBatches
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.streams import NumberedPasses, pass_of

CAMERA = re.compile(r"(?!mask\.)(?:.+\.)?(?:mp4|m4v|mov|mkv|webm|avi|jpg|jpeg|png|webp)")
"""Fields that hold what a camera saw: mp4, or front.mp4 and rear.mp4 in one sample; masks do not."""


@edataclass
class RawVideo(Sample):
    """Encoded videos, as they wait in the shuffle buffer."""

    cameras: dict[str, bytes]
    """Field to file; several where several cameras saw the same."""


class ClipTaskEncoder(DefaultTaskEncoder):
    """What Energon asks of a dataset's user."""

    decoder = None  # fields stay bytes

    def __init__(
        self,
        *,
        kind: ClipKind,
        seed: int | None,
        clip_decoder: ClipDecoder,
        skipped: SkippedVideos,
        clips_per_decode: int = 1,
        clip_buffer_size: int = 1,
    ) -> None:
        """What clips look like, and how they come about.

        Args:
            kind: What all have in common.
            seed: Of all that is chosen by chance; none: the middle of the video and of the picture.
            clip_decoder: Gives the clips.
            skipped: Takes note of what can't be used.
            clips_per_decode: Clips out of one decoded stretch.
            clip_buffer_size: Clips among which those of one video are mixed.
        """
        super().__init__()
        self.kind = kind
        self.seed = seed
        self.clip_decoder = clip_decoder
        self.skipped = skipped
        self.clips_per_decode = clips_per_decode
        self.clip_buffer_size = clip_buffer_size
        self.cookers = [Cooker(cook_raw_video)]
        self.num_videos = 0
        """Of the rank's part of the dataset, once it is opened."""

    def _load_dataset(self, dataset: Any, worker_rotation_offset: int, worker_config: WorkerConfig) -> SavableDataset:
        """Energon's, with numbered passes: what comes out is repeated and goes into the shuffle buffer."""
        samples = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        self.num_videos += samples.len_rank()
        _forgive_damage(samples, self.skipped)
        return NumberedPasses(samples, worker_config=worker_config)

    def build_encode_sample(self, dataset: SavableDataset, *, worker_config: WorkerConfig) -> SavableDataset:
        """Nothing: `build_batch` decodes."""
        return dataset

    def build_batch(
        self,
        dataset: SavableDataset,
        *,
        batch_size: int | None,
        batch_drop_last: bool = False,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
    ) -> SavableDataset:
        """Decode and put together."""
        return ClipBatches(
            dataset,
            self.decode,
            batch_size=batch_size or 1,
            drops_last=batch_drop_last,
            clips_per_decode=self.clips_per_decode,
            buffer_size=self.clip_buffer_size,
            worker_config=worker_config,
        )

    def decode(self, sample: Sample) -> Tensor | None:
        """The clips of a video, [K, 3, T, H, W]; none where it can't be used, which is noted."""
        where = Video(sample.__sources__[0].shard_name, sample.__key__.rpartition("/")[2])
        try:
            camera, raw = self._camera(sample)
            if camera is not None:
                where = where._replace(key=f"{where.key}.{camera}")
            if self.skipped.known(where):
                return None
            seed = None if self.seed is None else _hash(self.seed, sample.__key__, pass_of(sample))
            clips = self.clip_decoder.clips(raw, self.kind, seed, self.clips_per_decode)
        except UndecodableError as error:
            self.skipped.add(where, error.fault, str(error))
            return None
        self.skipped.reset_row()
        return clips

    def _camera(self, sample: Sample) -> tuple[str | None, bytes]:
        """The field, if there are several, and the file that this pass takes: as many passes, as many cameras."""
        cameras = sample.cameras if isinstance(sample, RawVideo) else {"image": getattr(sample, "image", None)}
        files = {field: raw for field, raw in sorted(cameras.items()) if isinstance(raw, bytes)}
        if not files:
            raise UndecodableError(f"a {type(sample).__name__} holds no video: dataset.yaml must map mp4 to image")
        if len(files) == 1:
            return None, next(iter(files.values()))
        order = torch.randperm(
            len(files), generator=torch.Generator().manual_seed(_hash(self.seed or 0, sample.__key__, "cameras"))
        )
        field = list(files)[int(order[(pass_of(sample) if self.seed is not None else 0) % len(files)])]
        return field, files[field]


@stateless
def cook_raw_video(sample: dict[str, Any]) -> RawVideo:
    """Read a crude dataset: one whose dataset.yaml maps no fields."""
    cameras = {field: raw for field, raw in sample.items() if CAMERA.fullmatch(field) and isinstance(raw, bytes)}
    return RawVideo(**basic_sample_keys(sample), cameras=cameras)


def _hash(seed: int, sample_key: str, what: int | str) -> int:
    """A seed for one sample and one purpose, whichever rank and worker asks, after any resume."""
    digest = hashlib.sha256(f"{seed},{sample_key},{what}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _forgive_damage(dataset: SavableDataset, skipped: SkippedVideos) -> None:
    """Make the innermost dataset pass over what its shards don't give."""
    if isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [ForgivingReader(reader, skipped) for reader in dataset.join_readers]
    for inner in getattr(dataset, "datasets", ()):
        _forgive_damage(inner, skipped)
