"""Which clips are taken out of a video: their frames, rectangles and mirrorings, all drawn from one seed."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.data.clips import Fault, UndecodableError
from cosmos_hpc.data.decoders import Box
from cosmos_hpc.data.packets import Packets

LONG_GOP = 2
"""Lengths of a clip that key frames have to be apart on average for clips to be bound to them."""


class ClipKind(NamedTuple):
    """What a clip looks like; those of a dataset differ in T, H and W at most."""

    num_frames: int
    """T."""

    height: int
    """H in pixels."""

    width: int
    """W in pixels."""

    frame_stride: int = 1
    """Frames of the video from one frame of the clip to the next."""

    fps: float | None = None
    """Frames of the clip per second of the video, in place of the stride."""

    resize: int | None = None
    """What the shorter side of the picture is brought to before the rectangle is cut out; none: its own size."""

    flip: float = 0.0
    """Share of the clips that are mirrored."""

    starts_at_keys: bool = False
    """Whether clips begin at key frames in videos in which these are far apart."""

    longest: int = 0
    """T of the longest kind in the dataset: all begin where a clip of that length can."""

    has_mask: bool = False
    """Whether a fourth channel says what the loss is to look at: 255 yes, 0 no."""

    @classmethod
    def of(cls, data: DataConfig, num_frames: int, height: int, width: int) -> "ClipKind":
        """What the settings say of clips of one of their shapes."""
        return cls(
            num_frames=num_frames,
            height=height,
            width=width,
            frame_stride=data.frame_stride,
            fps=data.fps,
            resize=data.resize,
            flip=data.flip,
            starts_at_keys=data.clip_start == "keyframe",
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[C, T, H, W], C 3 or 4."""
        return 3 + self.has_mask, self.num_frames, self.height, self.width


class ChosenClip(NamedTuple):
    """One clip within a video."""

    frames: np.ndarray
    """int64 [T], rising: which frames of the video."""

    box: Box
    """Rectangle of the picture as stored; it is then turned, mirrored and brought to [H, W]."""

    is_mirrored: bool
    """Left for right, seen upright."""


def seed_of(seed: int, *what: str | int) -> int:
    """A seed for one purpose, whichever rank and worker asks, after any resume."""
    digest = hashlib.sha256(",".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def choose(packets: Packets, kinds: Sequence[ClipKind], seed: int | None) -> list[ChosenClip]:
    """Choose clips that can be decoded in one go: all begin between the same two key frames.

    Each by itself begins at any possible frame with the same likelihood; or, where clips are bound to key frames, the
    first at one of them, and the others no more than the length of a clip behind it. Where a clip begins does not
    depend on its own or another's T, H and W.

    Args:
        packets: Of the video.
        kinds: What each clip looks like.
        seed: Of every choice; none: the middle of the video and of the picture, as it is.

    Raises:
        UndecodableError: if the video is too short for the longest kind.
    """
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    longest = kinds[0]._replace(num_frames=max(kinds[0].longest, *(kind.num_frames for kind in kinds)))
    starts = _starts(packets, longest, last_start(packets, longest), len(kinds), draw)
    boxes_and_flips = [(_box(packets, kind, draw), _is_mirrored(kind, draw)) for kind in kinds]
    return [
        ChosenClip(_frames(packets, kind, start), *rest)
        for kind, start, rest in zip(kinds, starts, boxes_and_flips, strict=True)
    ]


def last_start(packets: Packets, kind: ClipKind) -> int:
    """The last frame with which a clip can begin.

    Raises:
        UndecodableError: if there is none.
    """
    if kind.fps is None:
        needed = 1 + kind.frame_stride * (kind.num_frames - 1)
        last = packets.num_frames - needed
        reason = f"it has {packets.num_frames} frames, {needed} are needed"
    else:
        last = _last_start_in_time(packets, kind)
        reason = f"its {packets.num_frames} frames are too few for {kind.num_frames} at {kind.fps:g} a second"
    if last < 0:
        raise UndecodableError(reason, Fault.TOO_SHORT)
    return last


def _last_start_in_time(packets: Packets, kind: ClipKind) -> int:
    fits, too_late = -1, packets.num_frames
    while too_late - fits > 1:
        middle = (fits + too_late) // 2
        if _frames(packets, kind, middle)[-1] < packets.num_frames:
            fits = middle
        else:
            too_late = middle
    return fits


def _frames(packets: Packets, kind: ClipKind, start: int) -> np.ndarray:
    """Numbers of a clip's frames; beyond the last one where it doesn't fit."""
    steps = np.arange(kind.num_frames)
    if kind.fps is None:
        return start + kind.frame_stride * steps
    times = packets.times_s
    beyond = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1 / kind.fps)
    halves = (times + np.append(times[1:], beyond)) / 2
    nearest = np.searchsorted(halves, times[start] + steps / kind.fps - 1e-6)
    return np.maximum.accumulate(nearest - steps) + steps  # a slower video gives each of its frames, none twice


def _starts(packets: Packets, kind: ClipKind, last: int, num_clips: int, draw: torch.Generator | None) -> list[int]:
    span = int(_frames(packets, kind, 0)[-1]) + 1
    if kind.starts_at_keys and draw is not None and packets.mean_gop > LONG_GOP * span:
        keys = packets.keys[packets.keys <= last]
        key = int(keys[_drawn(len(keys) - 1, draw)])
        latest = min(key + span, packets.key_after(key) - 1, last)
        return [key] + [key + _drawn(latest - key, draw) for _ in range(num_clips - 1)]
    first = _drawn(last, draw)
    earliest, latest = packets.key_before(first), min(packets.key_after(first) - 1, last)
    return [first] + [earliest + _drawn(latest - earliest, draw) for _ in range(num_clips - 1)]


def _box(packets: Packets, kind: ClipKind, draw: torch.Generator | None) -> Box:
    """The part of the picture that becomes [H, W]: smaller or larger than that where the picture is resized."""
    is_turned = packets.num_quarter_turns % 2 == 1
    wanted = (kind.width, kind.height) if is_turned else (kind.height, kind.width)
    sides = packets.height, packets.width
    scale = 1.0 if kind.resize is None else kind.resize / min(sides)
    scale = max(scale, *(want / side for want, side in zip(wanted, sides, strict=True)))
    height, width = (min(side, round(want / scale)) for want, side in zip(wanted, sides, strict=True))
    return Box(_drawn(sides[0] - height, draw), _drawn(sides[1] - width, draw), height, width)


def _is_mirrored(kind: ClipKind, draw: torch.Generator | None) -> bool:
    return draw is not None and kind.flip > 0 and float(torch.rand((), generator=draw)) < kind.flip


def _drawn(last: int, draw: torch.Generator | None) -> int:
    """A whole number from 0 to `last`, both included: drawn, or the middle."""
    return last // 2 if draw is None else int(torch.randint(last + 1, (), generator=draw))
