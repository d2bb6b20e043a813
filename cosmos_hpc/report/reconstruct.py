"""A video beside what a tokenizer makes of it, for the eye."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.video_file import VideoInfo, probe, read_frames, write_mp4
from cosmos_hpc.report.evaluate import compute_device
from cosmos_hpc.tokenizer import Tokenizer

WINDOWS_AT_ONCE = 4
"""The tokenizer's windows per piece of the video: 257 frames with their lead-in, 0.7 GB at 1280 x 720."""

FALLBACK_FPS = 25.0
"""For files that don't tell theirs."""


class Piece(NamedTuple):
    """A stretch of a video."""

    frames: np.ndarray
    """uint8 [T, H, W, 3]."""

    num_lead_in: int
    """Of these, frames at the beginning that belong to the piece before."""


def reconstruct(
    video: Path,
    weights: Path,
    out: Path,
    *,
    max_frames: int | None = None,
    on_frames: Callable[[int], None] | None = None,
) -> Path:
    """Write original and reconstruction side by side, original on the left.

    Args:
        video: of any length and size; read piece by piece.
        weights: a run, a checkpoint, an export or a folder of released weights.
        out: the mp4 to write, at the frame rate of the video.
        max_frames: frames after which to stop; none: the whole video.
        on_frames: called with the number of frames that have come through since the last call.

    Returns:
        `out`.

    Raises:
        ConfigError: if the video or the weights can't be read, or `out` is the video itself.
    """
    info = _look_into(video)
    if out.exists() and out.samefile(video):
        raise ConfigError(f"{out} is the video itself: name another file to write")
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"at most {max_frames} frames of {video} leave nothing to show: allow 1 or more")
    tokenizer = Tokenizer.from_weights(weights, compute_device())
    pairs = side_by_side(_frames(video, max_frames), tokenizer, on_frames or (lambda count: None))
    write_mp4(out, pairs, info.fps or FALLBACK_FPS)
    return out


def side_by_side(
    frames: Iterator[np.ndarray], tokenizer: Tokenizer, on_frames: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Each frame [H, W, 3] with its reconstruction to the right: uint8 [H, 2 W, 3].

    The pieces begin where a window of the tokenizer begins and are led in by a whole one, so that encoder and decoder
    go through the same windows as they would with the whole video at once, and give the same.
    """
    stride = tokenizer.architecture.temporal_compression
    lead_in = 1 + (tokenizer.window_length - 1) * stride
    step = (tokenizer.window_length - tokenizer.overlap) * stride
    for piece in pieces(frames, WINDOWS_AT_ONCE * step, lead_in):
        both = np.concatenate([piece.frames, tokenizer.reconstruct(piece.frames)], axis=2)[piece.num_lead_in :]
        on_frames(len(both))
        yield from both


def pieces(frames: Iterator[np.ndarray], length: int, lead_in: int) -> Iterator[Piece]:
    """Cut a video into pieces of `length` frames, each led in by `lead_in` frames; the first keeps these as well."""
    before: list[np.ndarray] = []
    while new := list(islice(frames, length if before else lead_in + length)):
        yield Piece(np.stack([*before, *new]), len(before))
        before = [*before, *new][-lead_in:]


def _look_into(video: Path) -> VideoInfo:
    if not video.is_file():
        raise ConfigError(f"{video} is no file: name a video")
    try:
        info = probe(video)
    except ValueError as error:
        raise ConfigError(f"{error}: name a video, such as an mp4") from None
    if info.frames == 0:
        raise ConfigError(f"{video} holds no frame: name another video")
    return info


def _frames(video: Path, max_frames: int | None) -> Iterator[np.ndarray]:
    try:
        yield from read_frames(video, stop=max_frames)
    except ValueError as error:  # what PyAV's errors for damaged data are
        raise ConfigError(f"{video} is damaged ({error}): repair it, or stop before the damage by max_frames") from None
