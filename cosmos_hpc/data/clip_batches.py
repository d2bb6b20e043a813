"""From encoded videos to batches of clips: decoding, and the buffer that keeps clips of one video apart."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.energon import Batch, Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.flavors.base_dataset import FlexState
from megatron.energon.rng import WorkerRng
from megatron.energon.wrappers.base import BaseWrapperDataset
from torch import Tensor

from cosmos_hpc.data.choosing import ClipKind

DecodeVideo = Callable[[Sample, Sequence[ClipKind]], list[Tensor] | None]
"""Takes an encoded video; gives a clip of each kind, uint8 [C, T, H, W], or none where it can't be used."""


@edataclass
class ClipBatch(Batch):
    """What leaves a worker."""

    clips: Tensor
    """uint8 [B, C, T, H, W]."""


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
    """uint8 [C, T, H, W], likewise."""


class ClipBatches(BaseWrapperDataset):
    """Batches of clips, of which the same video gives several in one pass, mixed with those of others.

    The clips that a stream gives lie in slots, one after the other. A slot that is empty when its turn comes takes the
    first clip of the next video, whose others are put into slots to come, drawn among the empty ones. So the step of
    each clip, and with it its shape, is known when it is decoded.

    The position is the slots of the clips that wait. Behind a resume, each of their videos is decoded again when the
    turn of its first clip comes.
    """

    _savable_fields = ("_slot", "_worker_rng")

    def __init__(
        self,
        videos: SavableDataset,
        images: SavableDataset | None,
        decode: DecodeVideo,
        *,
        kind_of: Callable[[int, int], ClipKind],
        batch_size: int,
        drops_last: bool,
        clips_per_decode: int,
        buffer_size: int,
        worker_config: WorkerConfig,
    ) -> None:
        """Make batches.

        Args:
            videos: Encoded; without end where K is above 1.
            images: Encoded, without end, for the batches of one frame; none: they come from videos as well.
            decode: Gives their clips.
            kind_of: Tells what a batch looks like, by its stream and its number in this since the start.
            batch_size: B.
            drops_last: Whether a batch that isn't full at the end is left out.
            clips_per_decode: K.
            buffer_size: Slots ahead in which the clips of a video wait, as far as they are empty.
            worker_config: Energon's.
        """
        super().__init__([videos] if images is None else [videos, images], worker_config=worker_config)
        self._decode = decode
        self._kind_of = kind_of
        self._batch_size = batch_size
        self._drops_last = drops_last
        self._clips_per_decode = clips_per_decode
        self._buffer_size = buffer_size
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Back to the first slot."""
        self._waiting: dict[int, WaitingClip] = {}
        self._slot = 0
        self._worker_rng = WorkerRng(self.worker_config)

    def __iter__(self) -> Iterator[ClipBatch]:
        videos, *images = (iter(dataset) for dataset in self.datasets)
        self._to_come = self._video_kinds()
        self._kinds: deque[ClipKind] = deque()
        for number in itertools.count():
            kind = self._kind(number)
            if self._takes_images(kind):
                clips = self._image_clips(images[0], kind)
            else:
                clips = list(itertools.islice(iter(lambda: self._draw(videos), None), self._batch_size))
            if len(clips) == self._batch_size or (clips and not self._drops_last):
                yield ClipBatch(
                    __key__=[f"{clip.sample_key}#{clip.number}" for clip in clips],
                    __restore_key__=(),
                    clips=torch.stack([clip.pixels for clip in clips if clip.pixels is not None]),
                )
            if len(clips) < self._batch_size:
                return

    def _kind(self, number: int) -> ClipKind:
        return self._kind_of(self.worker_config.rank_worker_id(), number)

    def _takes_images(self, kind: ClipKind) -> bool:
        return len(self.datasets) > 1 and kind.num_frames == 1

    def _video_kinds(self) -> Iterator[ClipKind]:
        """What the clips out of videos look like, slot by slot from this one on."""
        for number in itertools.count():
            kind = self._kind(number)
            if not self._takes_images(kind):
                yield from itertools.repeat(kind, self._batch_size)

    def _kind_at(self, slot: int) -> ClipKind:
        while len(self._kinds) <= slot - self._slot:
            self._kinds.append(next(self._to_come))
        return self._kinds[slot - self._slot]

    def _image_clips(self, images: Iterator[Sample], kind: ClipKind) -> list[WaitingClip]:
        clips: list[WaitingClip] = []
        while len(clips) < self._batch_size:
            image = next(images)
            decoded = self._decode(image, [kind])
            if decoded is not None:
                clips.append(WaitingClip(image.__restore_key__, 0, image.__key__, decoded[0]))
        return clips

    def _draw(self, videos: Iterator[Sample]) -> WaitingClip | None:
        """The clip in the slot whose turn it is; none at the end."""
        clip = self._waiting.pop(self._slot, None)
        if clip is not None and clip.pixels is None:
            self._decode_again(clip)
        if clip is None or clip.pixels is None:
            clip = self._open(videos)
        self._kind_at(self._slot)
        self._kinds.popleft()
        self._slot += 1
        return clip

    def _open(self, videos: Iterator[Sample]) -> WaitingClip | None:
        """The first clip of the next video that can be used; the others wait."""
        slots = [self._slot, *self._slots_to_come()]
        kinds = [self._kind_at(slot) for slot in slots]
        for video in videos:
            decoded = self._decode(video, kinds)
            if decoded is not None:
                clips = [
                    WaitingClip(video.__restore_key__, number, video.__key__, pixels)
                    for number, pixels in enumerate(decoded)
                ]
                self._waiting |= dict(zip(slots[1:], clips[1:], strict=True))
                return clips[0]
        return None

    def _slots_to_come(self) -> list[int]:
        others = self._clips_per_decode - 1
        if not others:
            return []
        empty = (slot for slot in itertools.count(self._slot + 1) if slot not in self._waiting)
        nearest = itertools.islice(empty, max(self._buffer_size - len(self._waiting), others))
        return self._worker_rng.shuffle(list(nearest))[:others]

    def _decode_again(self, drawn: WaitingClip) -> None:
        """Behind a resume: bring back all clips of a video that wait, the drawn one among them."""
        waiting = {self._slot: drawn} | {at: clip for at, clip in self._waiting.items() if clip.video == drawn.video}
        kinds = [self._kind_at(self._slot)] * self._clips_per_decode  # those that are gone have to look like something
        for slot, clip in waiting.items():
            kinds[clip.number] = self._kind_at(slot)
        video = self.datasets[0].restore_sample(drawn.video)
        clips = self._decode(video, kinds)
        if clips is not None:
            for clip in waiting.values():
                clip.sample_key, clip.pixels = video.__key__, clips[clip.number]

    def save_state(self) -> FlexState:
        """Where the videos are, and which clips wait."""
        state = super().save_state()
        state["_waiting"] = [(slot, clip.video, clip.number) for slot, clip in self._waiting.items()]
        return state

    def restore_state(self, state: FlexState) -> None:
        """Back to that, with nothing decoded."""
        super().restore_state(state)
        self._waiting = {slot: WaitingClip(video, number) for slot, video, number in state["_waiting"]}

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Batches of one pass over the videos, if all can be used."""
        clips = self.datasets[0].len_worker(worker_idx) * self._clips_per_decode
        return clips // self._batch_size if self._drops_last else -(-clips // self._batch_size)

    def config(self) -> dict[str, Any]:
        """As the videos'."""
        return self.datasets[0].config()
