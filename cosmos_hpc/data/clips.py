"""From the bytes of a video file to the frames of one clip: only these are decoded, by decord."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import decord
import numpy as np

decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's own lines; what goes wrong is raised as well


class Fault(StrEnum):
    """What a video is skipped for."""

    UNREADABLE = "unreadable"
    """Its shard doesn't give it: cut short, or no such field."""

    UNDECODABLE = "undecodable"
    """The decoder refuses it."""

    TOO_SHORT = "too short"
    """It has fewer frames than a clip."""

    HANGING = "hanging"
    """The decoder comes to no end with it."""

    CRASHING = "crashing"
    """The decoder dies of it."""


class UndecodableError(Exception):
    """A video, or the clip asked for, can't be had. The message is the reason, without the video's name."""

    def __init__(self, reason: str, fault: Fault = Fault.UNDECODABLE) -> None:
        super().__init__(reason, fault)
        self.fault = fault

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def in_memory(raw: bytes) -> Iterator[str]:
    """A path to bytes, through a memfd: over BytesIO, decord keeps up to 1.6 GiB a process for a 27 MB video.

    Raises:
        UndecodableError: if there are none.
    """
    if not raw:
        raise UndecodableError("the file is empty")
    descriptor = os.memfd_create("clip", os.MFD_CLOEXEC)
    try:
        remaining = memoryview(raw)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def opened(path: str) -> Iterator["decord.VideoReader"]:
    """A reader over a video.

    Raises:
        UndecodableError: if decord can't open it, or fails in the block.
    """
    try:
        yield decord.VideoReader(path, num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise UndecodableError(_reason(error)) from error


def frame_count(raw: bytes) -> int:
    """Number of frames of a video in memory.

    Raises:
        UndecodableError: if it can't be opened.
    """
    with in_memory(raw) as path, opened(path) as reader:
        return len(reader)


def decode_clip(raw: bytes, start: int, num_frames: int) -> np.ndarray:
    """Decode consecutive frames, from the key frame before them on.

    Args:
        raw: A video file's bytes.
        start: First frame, counted from 0.
        num_frames: T.

    Returns:
        uint8 [T, H, W, 3], RGB, rotated as the file asks.

    Raises:
        UndecodableError: if the video can't be decoded or doesn't hold these frames.
    """
    with in_memory(raw) as path:
        return decode_chosen_clip(path, num_frames, lambda _: start)


def decode_chosen_clip(path: str, num_frames: int, choose_start: Callable[[int], int]) -> np.ndarray:
    """Like `decode_clip`, with the start chosen once the length is known: opening a video scans all of it.

    Args:
        path: The video.
        num_frames: T.
        choose_start: Gets the largest possible start, returns the start.

    Raises:
        UndecodableError: if the video is shorter than the clip or can't be decoded.
    """
    with opened(path) as reader:
        last_start = len(reader) - num_frames
        if last_start < 0:
            reason = f"it has {len(reader)} frames, {num_frames} are needed"
            raise UndecodableError(reason, Fault.TOO_SHORT)
        start = choose_start(last_start)
        if not 0 <= start <= last_start:
            raise UndecodableError(f"it has {len(reader)} frames, so no clip of {num_frames} starts at {start}")
        # rising and contiguous: decord returns wrong frames after seeking back in an open GOP
        frames = reader.get_batch(range(start, start + num_frames)).asnumpy()
    if frames.ndim != 4 or len(frames) != num_frames or frames.shape[-1] != 3:
        raise UndecodableError(f"it decodes to an array of shape {list(frames.shape)}")
    return frames


def _reason(error: Exception) -> str:
    """The first line of decord's message, without its source lines and the memfd's path."""
    line = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error).strip().partition("\n")[0])
    return "it holds no video that decord can decode" if "/proc/self/fd/" in line else line
