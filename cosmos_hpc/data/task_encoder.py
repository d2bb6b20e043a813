"""What a loader's worker does with a sample: from a video's bytes to one uint8 clip, a bad video skipped."""

import hashlib
import logging
import multiprocessing
from collections.abc import Sequence
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
from megatron.energon.errors import FatalSampleError
from torch import Tensor
from torch.nn.functional import interpolate

from cosmos_hpc.data.clips import UndecodableError, decode_chosen_clip
from cosmos_hpc.data.streams import NumberedPasses, pass_of

logger = logging.getLogger(__name__)

MAX_SKIPS_IN_A_ROW = 100

USELESS = "no usable video among"
"""How the error over a useless dataset begins: the loader finds it in what Energon and torch wrap around it."""


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


class SkippedVideos:
    """Counts the samples that had to be left out, over all workers of a rank, and names each video once.

    A video that failed is not tried again by the same worker: it costs a pass nothing but its place in the buffer.
    """

    def __init__(self) -> None:
        self._count = multiprocessing.get_context("fork").Value("q", 0)
        self._reasons: dict[str, str] = {}
        self._in_a_row = 0

    @property
    def count(self) -> int:
        """Samples left out so far, repeats in later passes included."""
        return self._count.value

    def known(self, video: str) -> bool:
        """True if this worker has seen the video fail."""
        return video in self._reasons

    def add(self, video: str, reason: str) -> None:
        """Take note of a skipped sample.

        Args:
            video: Shard and key.
            reason: Why it can't be used; ignored where the video is known.

        Raises:
            FatalSampleError: after `MAX_SKIPS_IN_A_ROW` with no usable video among them: Energon lets it through.
        """
        with self._count.get_lock():
            self._count.value += 1
        if not self.known(video):
            self._reasons[video] = reason
            logger.warning("skipped %s: %s", video, reason)
        self._in_a_row += 1
        if self._in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise FatalSampleError(f"{USELESS} {self._in_a_row} in a row, {video} for one: {self._reasons[video]}")

    def reset_row(self) -> None:
        """A video was usable."""
        self._in_a_row = 0

    def on_error(self, error: Exception, sample: Any, sources: Sequence[Any] | None) -> None:
        """Energon's handler of what fails outside of `encode_sample`, such as a sample without the field."""
        video = f"{sources[0].shard_name} {sources[0].file_names}" if sources else type(sample).__name__
        self.add(video, f"{type(error).__name__}: {error}")


class ClipTaskEncoder(DefaultTaskEncoder):
    """Energon's hooks: bytes go through the shuffle buffer and are decoded behind it, since frames would not fit."""

    decoder = None  # fields stay bytes

    def __init__(self, *, num_frames: int, crop_size: int, seed: int | None, skipped: SkippedVideos) -> None:
        """Both sizes are those of the clip: frames, and pixels in height and width.

        Args:
            num_frames: T.
            crop_size: H and W.
            seed: Of the random starts and crops; none: the middle of the video and of the picture.
            skipped: Takes note of what can't be used.
        """
        super().__init__()
        self.num_frames = num_frames
        self.crop_size = crop_size
        self.seed = seed
        self.skipped = skipped
        self.cookers = [Cooker(cook_raw_video)]

    def _load_dataset(self, dataset: Any, worker_rotation_offset: int, worker_config: WorkerConfig) -> SavableDataset:
        """Energon's, with numbered passes: what comes out is repeated and goes into the shuffle buffer."""
        samples = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        return NumberedPasses(samples, worker_config=worker_config)

    @stateless
    def encode_sample(self, sample: Sample) -> Clip:
        """Decode one clip of the video, cropped.

        Raises:
            SkipSample: if that can't be done.
        """
        video = _name(sample)
        if self.skipped.known(video):
            self.skipped.add(video, "")
            raise SkipSample
        draw = None if self.seed is None else _generator(self.seed, sample)
        try:
            frames = decode_chosen_clip(_mp4(sample), self.num_frames, lambda last: _choose(last, draw))
        except UndecodableError as error:
            self.skipped.add(video, str(error))
            raise SkipSample from error
        self.skipped.reset_row()
        return Clip.derive_from(sample, clip=crop(torch.from_numpy(frames).permute(3, 0, 1, 2), self.crop_size, draw))

    @stateless
    def batch(self, samples: list[Clip]) -> ClipBatch:
        """Stack the clips of a micro-batch."""
        return ClipBatch(
            __key__=[sample.__key__ for sample in samples],
            __restore_key__=tuple(sample.__restore_key__ for sample in samples),
            clips=torch.stack([sample.clip for sample in samples]),
        )


def crop(frames: Tensor, size: int, draw: torch.Generator | None) -> Tensor:
    """A square of the picture, at a random place or in its middle.

    A picture with a side shorter than the square is enlarged until it fits.

    Args:
        frames: uint8 [3, T, H, W].
        size: Height and width of the square in pixels.
        draw: Random numbers; none: the middle.

    Returns:
        uint8 [3, T, size, size], contiguous.
    """
    shorter = min(frames.shape[-2:])
    if shorter < size:
        target = [max(size, round(side * size / shorter)) for side in frames.shape[-2:]]
        frames = interpolate(frames.contiguous(), size=target, mode="bilinear", antialias=True)
    top = _choose(frames.shape[-2] - size, draw)
    left = _choose(frames.shape[-1] - size, draw)
    return frames[..., top : top + size, left : left + size].contiguous()


@stateless
def cook_raw_video(sample: dict[str, Any]) -> RawVideo:
    """Read a crude dataset: one whose dataset.yaml maps no fields."""
    return RawVideo(**basic_sample_keys(sample), mp4=sample.get("mp4", b""))


def _generator(seed: int, sample: Sample) -> torch.Generator:
    """Random numbers for one sample in one pass, whichever rank and worker decodes it and after whichever resume."""
    digest = hashlib.sha256(f"{seed},{sample.__key__},{pass_of(sample)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _choose(last: int, draw: torch.Generator | None) -> int:
    """A whole number from 0 to `last`, both included: drawn, or the middle."""
    return last // 2 if draw is None else int(torch.randint(last + 1, (), generator=draw))


def _mp4(sample: Sample) -> bytes:
    """The encoded video of a sample of either kind of dataset."""
    raw = sample.mp4 if isinstance(sample, RawVideo) else getattr(sample, "image", None)
    if not isinstance(raw, bytes):
        raise UndecodableError(f"a {type(sample).__name__} holds no video: dataset.yaml must map mp4 to image")
    return raw


def _name(sample: Sample) -> str:
    """Shard and key, as a person would look for them."""
    source = sample.__sources__[0]
    return f"{source.shard_name}/{sample.__key__.rpartition('/')[2]}"
