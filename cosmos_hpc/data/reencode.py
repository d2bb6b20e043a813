"""Videos written anew for training: parts of long ones, and with key frames close together or smaller pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

from cosmos_hpc.data.clips import UndecodableError, memory_file
from cosmos_hpc.data.packets import scanned

CRF = 18
"""x264's constant rate factor of re-encoded videos: looks lossless; 0 is lossless, 51 is worst."""

PRESET = "veryfast"


def parts(path: str, seconds: float | None) -> Iterator[bytes | None]:
    """A video in parts of at least so many seconds, cut at key frames: the packets as they are.

    Yields:
        Each part as the bytes of an mp4 file; none in place of the bytes where the video stays whole.

    Raises:
        UndecodableError: if the packets can't be read or written.
    """
    if seconds is None:
        yield None
        return
    with scanned(path) as (packets, cutter):
        begins = _part_begins(packets.times_s, packets.keys, seconds)
        if len(begins) == 1:
            yield None
            return
        for begin, end in zip(begins, [*begins[1:], packets.num_frames], strict=True):
            with memory_file("part") as target:
                cutter.copy(begin, end, target)
                yield Path(target).read_bytes()


def _part_begins(times_s: np.ndarray, keys: np.ndarray, seconds: float) -> list[int]:
    begins = [0]
    for key in keys.tolist():
        is_long_enough = times_s[key] - times_s[begins[-1]] >= seconds - 1e-3
        if is_long_enough and times_s[-1] - times_s[key] >= seconds / 2:  # else the rest goes with the part before
            begins.append(key)
    return begins


def reencode(path: str, target: str, *, gop: int | None, height: int | None, crf: int = CRF) -> None:
    """Encode a video as H.264 (yuv420p) without sound, its frames and their times kept.

    Args:
        path: The video.
        target: mp4 file to write.
        gop: Frames from one key frame to the next; none: as x264 likes.
        height: What the shorter side of the picture is brought to, if it is longer; none: as it is.
        crf: Quality.

    Raises:
        UndecodableError: where the video is damaged.
    """
    options = {"crf": str(crf), "preset": PRESET}
    if gop is not None:
        options |= {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
    try:
        with av.open(path) as source, av.open(target, "w", format="mp4") as copy:
            given = source.streams.video[0]
            given.thread_count = 1
            with _encoder(copy, given, options, height) as (stream, size):
                for frame in source.decode(given):
                    if stream.frames == 0 and frame.rotation:
                        stream.set_display_rotation(frame.rotation)
                    small = frame.reformat(*size, format="yuv420p")
                    small.pict_type = 0
                    copy.mux(stream.encode(small))
                copy.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableError(f"it can't be encoded again: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _encoder(
    copy: av.container.OutputContainer, given: av.VideoStream, options: dict[str, str], height: int | None
) -> Iterator[tuple[av.VideoStream, tuple[int, int]]]:
    sides = given.codec_context.width, given.codec_context.height
    scale = 1.0 if height is None else min(1.0, height / min(sides))
    size = round(sides[0] * scale / 2) * 2, round(sides[1] * scale / 2) * 2
    stream = copy.add_stream("libx264", rate=given.average_rate or 30, options=options)
    stream.thread_count = 1
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    stream.codec_context.time_base = given.time_base
    yield stream, size
