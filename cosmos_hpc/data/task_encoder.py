"""Energon's hooks: encoded videos go through the shuffle buffer as bytes, and are decoded behind it."""

import re
from collections.abc import Callable, Sequence
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
from cosmos_hpc.data.choosing import ClipKind, seed_of
from cosmos_hpc.data.clip_batches import ClipBatches
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.streams import NumberedPasses, pass_of

CAMERA = re.compile(r"(?!(?:.+\.)?mask\.)(?:(.+)\.)?(?:mp4|m4v|mov|mkv|webm|avi|jpg|jpeg|png|webp)")
"""Fields that hold what a camera saw: mp4, or front.mp4 and rear.mp4 in one sample; masks do not."""

MASK = re.compile(r"(?:(.+)\.)?mask\.(?:mp4|png)")
"""Fields that hold what the loss is to look at in a camera's pictures: mask.png, or front.mask.mp4."""


@edataclass
class RawVideo(Sample):
    """Encoded videos, as they wait in the shuffle buffer."""

    cameras: dict[str, bytes]
    """Field to file; several where several cameras saw the same."""

    masks: dict[str, bytes]
    """Likewise, of what the loss is to look at."""


class RawTaskEncoder(DefaultTaskEncoder):
    """What Energon asks of a dataset's user who wants samples as they are stored."""

    decoder = None  # fields stay bytes

    def __init__(self, skipped: SkippedVideos) -> None:
        """Read samples.

        Args:
            skipped: Takes note of what can't be used.
        """
        super().__init__()
        self.skipped = skipped
        self.cookers = [Cooker(cook_raw_video)]
        self.num_samples = 0
        """Of the rank's part of the dataset, once it is opened."""

    def _load_dataset(self, dataset: Any, worker_rotation_offset: int, worker_config: WorkerConfig) -> SavableDataset:
        """Energon's, with numbered passes: what comes out is repeated and goes into the shuffle buffer."""
        samples = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        self.num_samples += samples.len_rank()
        _forgive_damage(samples, self.skipped)
        return NumberedPasses(samples, worker_config=worker_config)

    def build_encode_sample(self, dataset: SavableDataset, *, worker_config: WorkerConfig) -> SavableDataset:
        """Nothing."""
        return dataset

    def build_batch(self, dataset: SavableDataset, **_: Any) -> SavableDataset:
        """Nothing."""
        return dataset


class ClipTaskEncoder(RawTaskEncoder):
    """What Energon asks of a user who wants clips: decoded behind the shuffle buffer, while batches are made."""

    def __init__(
        self,
        *,
        kind_of: Callable[[int, int], ClipKind],
        seed: int | None,
        clip_decoder: ClipDecoder,
        skipped: SkippedVideos,
        clips_per_decode: int = 1,
        clip_buffer_size: int = 1,
        images: SavableDataset | None = None,
    ) -> None:
        """What clips look like, and how they come about.

        Args:
            kind_of: Tells what a batch looks like, by its stream and its number in this since the start.
            seed: Of all that is chosen by chance; none: the middle of the video and of the picture.
            clip_decoder: Gives the clips.
            skipped: Takes note of what can't be used.
            clips_per_decode: Clips out of one decoded stretch.
            clip_buffer_size: Clips among which those of one video are mixed.
            images: Samples of `RawTaskEncoder` for the batches of one frame; none: they come from videos as well.
        """
        super().__init__(skipped)
        self.kind_of = kind_of
        self.seed = seed
        self.clip_decoder = clip_decoder
        self.clips_per_decode = clips_per_decode
        self.clip_buffer_size = clip_buffer_size
        self.images = images

    def build_batch(  # type: ignore[override]  # Energon passes these by name
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
            self.images,
            self.decode,
            kind_of=self.kind_of,
            batch_size=batch_size or 1,
            drops_last=batch_drop_last,
            clips_per_decode=self.clips_per_decode,
            buffer_size=self.clip_buffer_size,
            worker_config=worker_config,
        )

    def decode(self, sample: Sample, kinds: Sequence[ClipKind]) -> list[Tensor] | None:
        """A clip of each kind out of a video, [C, T, H, W]; none where it can't be used, which is noted."""
        where = Video(sample.__sources__[0].shard_name, sample.__key__.rpartition("/")[2])
        try:
            files = _cameras(sample)
            field = next(iter(files)) if len(files) == 1 else self._camera(sample, sorted(files))
            if len(files) > 1:
                where = where._replace(key=f"{where.key}.{field}")
            if self.skipped.known(where):
                return None
            seed = None if self.seed is None else seed_of(self.seed, sample.__key__, pass_of(sample))
            mask = _mask(sample, field) if kinds[0].has_mask else None
            clips = self.clip_decoder.clips(files[field], kinds, seed, mask)
        except UndecodableError as error:
            self.skipped.add(where, error.fault, str(error))
            return None
        self.skipped.reset_row()
        return clips

    def _camera(self, sample: Sample, fields: list[str]) -> str:
        """The one of several that this pass takes: as many passes, as many cameras."""
        draw = torch.Generator().manual_seed(seed_of(self.seed or 0, sample.__key__, "cameras"))
        order = torch.randperm(len(fields), generator=draw)
        return fields[int(order[(pass_of(sample) if self.seed is not None else 0) % len(fields)])]


def _cameras(sample: Sample) -> dict[str, bytes]:
    """The files of a sample, by field."""
    cameras = sample.cameras if isinstance(sample, RawVideo) else {"image": getattr(sample, "image", None)}
    files = {field: raw for field, raw in cameras.items() if isinstance(raw, bytes)}
    if not files:
        raise UndecodableError(f"a {type(sample).__name__} holds no video: dataset.yaml must map mp4 to image")
    return files


def _mask(sample: Sample, field: str) -> bytes | None:
    """What belongs to a camera's pictures, if there is such a file."""
    if not isinstance(sample, RawVideo):
        raise UndecodableError(
            "data.masks is set, but dataset.yaml maps fields, so that masks are left behind: "
            "remove it and run `cosmos-hpc prepare`"
        )
    camera = CAMERA.fullmatch(field)
    of_camera = {name: found[1] for name in sample.masks if (found := MASK.fullmatch(name))}
    return next((sample.masks[name] for name, its in of_camera.items() if camera and its == camera[1]), None)


@stateless
def cook_raw_video(sample: dict[str, Any]) -> RawVideo:
    """Read a crude dataset: one whose dataset.yaml maps no fields."""
    files = {field: raw for field, raw in sample.items() if isinstance(raw, bytes)}
    cameras, masks = ({field: files[field] for field in files if kind.fullmatch(field)} for kind in (CAMERA, MASK))
    return RawVideo(**basic_sample_keys(sample), cameras=cameras, masks=masks)


def _forgive_damage(dataset: SavableDataset, skipped: SkippedVideos) -> None:
    """Make the innermost dataset pass over what its shards don't give."""
    if isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [ForgivingReader(reader, skipped) for reader in dataset.join_readers]
    for inner in getattr(dataset, "datasets", ()):
        _forgive_damage(inner, skipped)
