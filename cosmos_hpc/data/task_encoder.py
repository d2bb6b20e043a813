"""What a loader's worker does with a sample: from a video's bytes to one uint8 clip, a bad video skipped."""

import hashlib
from typing import Any

import torch
from megatron.energon import (
    Batch,
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SavableDataset,
    SkipSample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    stateless,
)
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from torch import Tensor

from cosmos_hpc.data.bad_videos import ForgivingReader, SkippedVideos, Video
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.streams import NumberedPasses, pass_of


@edataclass
class RawVideo(Sample):
    """An encoded video, as it waits in the shuffle buffer."""

    mp4: bytes
    """The file's bytes; empty where the sample holds no mp4."""


@edataclass
class Clip(Sample):
    """A decoded and cropped clip."""

    clip: Tensor
    """uint8 [3, T, H, W]."""


@edataclass
class ClipBatch(Batch):
    """What leaves a worker."""

    clips: Tensor
    """uint8 [B, 3, T, H, W]."""


class ClipTaskEncoder(DefaultTaskEncoder):
    """Energon's hooks: bytes go through the shuffle buffer and are decoded behind it, since frames would not fit."""

    decoder = None  # fields stay bytes

    def __init__(
        self,
        *,
        num_frames: int,
        crop_size: int,
        seed: int | None,
        clip_decoder: ClipDecoder,
        skipped: SkippedVideos,
    ) -> None:
        """Both sizes are those of the clip: frames, and pixels in height and width.

        Args:
            num_frames: T.
            crop_size: H and W.
            seed: Of the random starts and crops; none: the middle of the video and of the picture.
            clip_decoder: Gives the clips.
            skipped: Takes note of what can't be used.
        """
        super().__init__()
        self.num_frames = num_frames
        self.crop_size = crop_size
        self.seed = seed
        self.clip_decoder = clip_decoder
        self.skipped = skipped
        self.cookers = [Cooker(cook_raw_video)]
        self.num_videos = 0
        """Of the rank's part of the dataset, once it is opened."""

    def _load_dataset(self, dataset: Any, worker_rotation_offset: int, worker_config: WorkerConfig) -> SavableDataset:
        """Energon's, with numbered passes: what comes out is repeated and goes into the shuffle buffer."""
        samples = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        self.num_videos += samples.len_rank()
        _forgive_damage(samples, self.skipped)
        return NumberedPasses(samples, worker_config=worker_config)

    @stateless
    def encode_sample(self, sample: Sample) -> Clip:
        """Decode one clip of the video, cropped.

        Raises:
            SkipSample: if that can't be done.
        """
        video = Video(sample.__sources__[0].shard_name, sample.__key__.rpartition("/")[2])
        if self.skipped.known(video):
            raise SkipSample
        seed = None if self.seed is None else _clip_seed(self.seed, sample)
        try:
            clip = self.clip_decoder.clip(_mp4(sample), self.num_frames, self.crop_size, seed)
        except UndecodableError as error:
            self.skipped.add(video, error.fault, str(error))
            raise SkipSample from error
        self.skipped.reset_row()
        return Clip.derive_from(sample, clip=clip)

    @stateless
    def batch(self, samples: list[Clip]) -> ClipBatch:
        """Stack the clips of a micro-batch."""
        return ClipBatch(
            __key__=[sample.__key__ for sample in samples],
            __restore_key__=tuple(sample.__restore_key__ for sample in samples),
            clips=torch.stack([sample.clip for sample in samples]),
        )


@stateless
def cook_raw_video(sample: dict[str, Any]) -> RawVideo:
    """Read a crude dataset: one whose dataset.yaml maps no fields."""
    return RawVideo(**basic_sample_keys(sample), mp4=sample.get("mp4", b""))


def _clip_seed(seed: int, sample: Sample) -> int:
    """Of the random numbers for one sample in one pass, whichever rank and worker decodes it, after any resume."""
    digest = hashlib.sha256(f"{seed},{sample.__key__},{pass_of(sample)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _mp4(sample: Sample) -> bytes:
    """The encoded video of a sample of either kind of dataset."""
    raw = sample.mp4 if isinstance(sample, RawVideo) else getattr(sample, "image", None)
    if not isinstance(raw, bytes):
        raise UndecodableError(f"a {type(sample).__name__} holds no video: dataset.yaml must map mp4 to image")
    return raw


def _forgive_damage(dataset: SavableDataset, skipped: SkippedVideos) -> None:
    """Make the innermost dataset pass over what its shards don't give."""
    if isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [ForgivingReader(reader, skipped) for reader in dataset.join_readers]
    for inner in getattr(dataset, "datasets", ()):
        _forgive_damage(inner, skipped)
