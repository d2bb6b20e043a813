"""Whole video files, frame by frame, through PyAV: reading, writing and looking at what is inside."""

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np


class VideoInfo(NamedTuple):
    """What a video file says of itself."""

    frames: int
    """Number of frames that are there, counted from the packets."""

    frames_promised: int
    """Number of frames that the file says it has; 0 where it doesn't."""

    height: int
    """Pixels, as stored (before any rotation flag)."""

    width: int
    """Pixels, as stored."""

    fps: float
    """Mean frames per second; 0 where the file doesn't say."""

    codec: str
    """FFmpeg's name of the codec, such as h264."""


def probe(path: Path) -> VideoInfo:
    """Look into a video without decoding it.

    Raises:
        ValueError: if the file holds no video that can be opened.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            frames = sum(packet.size > 0 for packet in container.demux(stream))
            codec = stream.codec_context
            return VideoInfo(
                frames, stream.frames, codec.height, codec.width, float(stream.average_rate or 0), codec.name
            )
    except av.FFmpegError as error:
        raise ValueError(f"{path} can't be opened as a video: {error.strerror}") from error


def read_frames(path: Path, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Decode a video in order, each frame turned upright as the file asks: phones film sideways and say so.

    Args:
        path: The file.
        start: First frame that is yielded, counted from 0.
        stop: Frame before which to end; none: the end of the file.

    Yields:
        uint8 [H, W, 3], RGB, all of one size.

    Raises:
        ValueError: where the video is damaged, or its frames change their size.
    """
    shape = None
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if stop is not None and index >= stop:
                    return
                if index >= start:
                    pixels = _upright(frame)
                    shape = shape or pixels.shape
                    if pixels.shape != shape:
                        raise ValueError(f"{path} changes from {shape[1]} x {shape[0]} pixels to another size")
                    yield pixels
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}") from error


class MiddleFrames(NamedTuple):
    """The frames in the middle of a video."""

    start: int
    """Number of the first one in the video, from 0."""

    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB, upright."""


def read_middle(path: Path, num_frames: int) -> MiddleFrames:
    """Decode the frames in the middle of a video, from the key frame before them on.

    Raises:
        ValueError: if the video is damaged or shorter than that.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            packets = container.demux(stream)
            times = sorted(each.pts for each in packets if each.pts is not None and not each.is_discard)
            start = (len(times) - num_frames) // 2
            if start < 0:
                raise ValueError(f"{path} has {len(times)} frames, {num_frames} are needed")
        frames = _frames_from(path, times[start] if start else None, num_frames)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}") from error
    if len(frames) < num_frames or any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError(f"{path} does not give {num_frames} frames of one size from frame {start} on")
    return MiddleFrames(start, np.stack(frames))


def _frames_from(path: Path, time: int | None, num_frames: int) -> list[np.ndarray]:
    """Frames from the one shown at a time on, in the stream's own units; none: from the beginning."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if time is not None:
            container.seek(time, stream=stream)
        shown = (frame for frame in container.decode(stream) if time is None or (frame.pts or 0) >= time)
        return [_upright(frame) for frame in islice(shown, num_frames)]


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """The picture, rotated by the quarter turns that the file's display matrix asks for."""
    pixels = frame.to_ndarray(format="rgb24")
    num_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, num_turns)) if num_turns else pixels


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Encode frames as H.264 (yuv420p), which every player and decoder reads.

    yuv420p halves the colour in both directions, so an odd height or width grows by one repeated pixel.
    The file appears under its name only when it is whole.

    Args:
        path: File to write.
        frames: uint8 [H, W, 3] each, all of one size.
        fps: Frames per second.
        crf: x264's constant rate factor: 0 is lossless, 18 looks lossless, 51 is worst.

    Raises:
        ValueError: if there are no frames.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"no frames to write into {path}")
    height, width = first.shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)}
            )
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            for frame in chain([first], frames):
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
