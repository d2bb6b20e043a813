"""From encoded videos to batches of clips: decoding, and the buffer that keeps clips of one video apart."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.energon import Batch, Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.flavors.base_dataset import FlexState
from megatron.energon.rng import WorkerRng
from megatron.energon.wrappers.base import BaseWrapperDataset
from torch import Tensor

DecodeVideo = Callable[[Sample], Tensor | None]
"""Takes an encoded video; gives its clips, uint8 [K, 3, T, H, W], or none where it can't be used."""


@edataclass
class ClipBatch(Batch):
    """What leaves a worker."""

    clips: Tensor
    """uint8 [B, 3, T, H, W]."""


@dataclass
class WaitingClip:
    """A clip in the buffer."""

    video: tuple[Any, ...]
    """Key by which Energon finds the video again, in the pass in which it came."""

    number: int
    """Of the clip among those that the video gave in that pass."""

    sample_key: str | None = None
    """The video's name; none until it is decoded again behind a resume."""

    pixels: Tensor | None = None
    """uint8 [3, T, H, W], likewise."""


class ClipBatches(BaseWrapperDataset):
    """Batches of clips, of which the same video gives several in one pass, mixed with those of others.

    The position is the keys and numbers of the clips that wait. Behind a resume, each of their videos is decoded again
    when the first of its clips is drawn.
    """

    _savable_fields = ("_num_decoded", "_worker_rng")

    def __init__(
        self,
        videos: SavableDataset,
        decode: DecodeVideo,
        *,
        batch_size: int,
        drops_last: bool,
        clips_per_decode: int,
        buffer_size: int,
        worker_config: WorkerConfig,
    ) -> None:
        """The buffer fills while it gives: by one clip less for each video than that brings.

        Args:
            videos: Encoded.
            decode: Gives their clips.
            batch_size: B.
            drops_last: Whether a batch that isn't full at the end is left out.
            clips_per_decode: K.
            buffer_size: Clips that wait, once it is full.
            worker_config: Energon's.
        """
        super().__init__(videos, worker_config=worker_config)
        self._decode = decode
        self._batch_size = batch_size
        self._drops_last = drops_last
        self._clips_per_decode = clips_per_decode
        self._buffer_size = 1 if clips_per_decode == 1 else buffer_size
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Back to an empty buffer."""
        self._waiting: list[WaitingClip] = []
        self._num_decoded = 0
        self._worker_rng = WorkerRng(self.worker_config)

    def __iter__(self) -> Iterator[ClipBatch]:
        videos = iter(self.dataset)
        while True:
            clips: list[WaitingClip] = []
            while len(clips) < self._batch_size and (clip := self._draw(videos)) is not None:
                clips.append(clip)
            if len(clips) == self._batch_size or (clips and not self._drops_last):
                yield ClipBatch(
                    __key__=[f"{clip.sample_key}#{clip.number}" for clip in clips],
                    __restore_key__=(),
                    clips=torch.stack([clip.pixels for clip in clips if clip.pixels is not None]),
                )
            if len(clips) < self._batch_size:
                return

    def _draw(self, videos: Iterator[Sample]) -> WaitingClip | None:
        """A clip at random out of the buffer; none at the end."""
        while True:
            while len(self._waiting) < min(self._buffer_size, 1 + self._num_decoded):
                video = next(videos, None)
                if video is None:
                    break
                self._fill(video)
            if not self._waiting:
                return None
            clip = self._waiting.pop(self._worker_rng.randbelow(len(self._waiting)))
            if clip.pixels is None:
                self._decode_again(clip)
            if clip.pixels is not None:
                return clip

    def _fill(self, video: Sample) -> None:
        clips = self._decode(video)
        if clips is not None:
            self._num_decoded += 1
            key = video.__restore_key__
            self._waiting += [WaitingClip(key, n, video.__key__, clip) for n, clip in enumerate(clips)]

    def _decode_again(self, drawn: WaitingClip) -> None:
        """Behind a resume: bring back all clips of a video that wait, the drawn one among them."""
        video = self.dataset.restore_sample(drawn.video)
        clips = self._decode(video)
        if clips is not None:
            for clip in [drawn, *self._waiting]:
                if clip.video == drawn.video:
                    clip.sample_key, clip.pixels = video.__key__, clips[clip.number]

    def save_state(self) -> FlexState:
        """Where the videos are, and which clips wait."""
        state = super().save_state()
        state["_waiting"] = [(clip.video, clip.number) for clip in self._waiting]
        return state

    def restore_state(self, state: FlexState) -> None:
        """Back to that, with nothing decoded."""
        super().restore_state(state)
        self._waiting = [WaitingClip(video, number) for video, number in state["_waiting"]]

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Batches of one pass, if all videos can be used."""
        clips = self.dataset.len_worker(worker_idx) * self._clips_per_decode
        return clips // self._batch_size if self._drops_last else -(-clips // self._batch_size)

    def config(self) -> dict[str, Any]:
        """As the videos'."""
        return self.dataset.config()
