"""Videos written anew for training: parts of long ones, and with key frames close together or smaller pictures."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

from cosmos_hpc.data.clips import UndecodableError, memory_file
from cosmos_hpc.data.packets import Packets, scanned

CRF = 18
"""x264's constant rate factor of re-encoded videos: looks lossless; 0 is lossless, 51 is worst."""

RGB = 0
"""FFmpeg's colour matrix of pictures that are stored as they are seen."""

PRESET = "veryfast"

SCENE_SCORE, SCENE_WIDTH = 0.2, 160
"""FFmpeg's measure of change, 0 to 1, from which another scene begins; and the width at which pictures are compared."""


def scene_changes(path: str) -> list[float]:
    """When another scene begins, in the video's own seconds: every frame is decoded, and compared small.

    Raises:
        UndecodableError: where the video is damaged.
    """
    try:
        with av.open(path) as source:
            stream = source.streams.video[0]
            stream.thread_count = 1
            graph = av.filter.Graph()
            graph.link_nodes(
                graph.add_buffer(template=stream),
                graph.add("scale", f"{SCENE_WIDTH}:-2"),
                graph.add("select", f"gt(scene,{SCENE_SCORE})"),
                graph.add("buffersink"),
            ).configure()
            return [float(frame.time) for frame in _filtered(graph, source.decode(stream))]
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableError(
            f"its scenes can't be told apart: {getattr(error, 'strerror', None) or error}"
        ) from error


def _filtered(graph: av.filter.Graph, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """What a graph lets through."""
    for frame in itertools.chain(frames, [None]):
        graph.push(frame)
        with contextlib.suppress(av.BlockingIOError, av.EOFError):
            while True:
                yield graph.pull()


def parts(
    path: str, seconds: float | None, changes_s: Sequence[float] = (), min_frames: int = 1
) -> Iterator[bytes | None]:
    """A video in parts: the packets as they are.

    A scene begins with the first key frame in it, and ends where no later frame is needed to decode it. Inside of one,
    parts begin at key frames.

    Args:
        path: The video.
        seconds: What each part has at least, where a scene is longer; none: scenes are not divided.
        changes_s: When another scene begins, as `scene_changes` says.
        min_frames: Scenes with fewer are left out.

    Yields:
        Each part as the bytes of an mp4 file; none in place of the bytes where the video stays whole.

    Raises:
        UndecodableError: if the packets can't be read or written, or no scene is long enough.
    """
    if seconds is None and not len(changes_s):
        yield None
        return
    with scanned(path) as (packets, cutter):
        scenes = [(begin, end) for begin, end in _scenes(packets, changes_s) if end - begin >= min_frames]
        if not scenes:
            raise UndecodableError(f"no scene in it has {min_frames} frames from a key frame on")
        ranges = [each for scene in scenes for each in _divided(packets, scene, seconds)]
        if ranges == [(0, packets.num_frames)]:
            yield None
            return
        for begin, end in ranges:
            with memory_file("part") as target:
                cutter.copy(begin, end, target)
                yield Path(target).read_bytes()


def _scenes(packets: Packets, changes_s: Sequence[float]) -> list[tuple[int, int]]:
    """First frame, and the one behind the last, of each scene with a key frame."""
    changes = np.searchsorted(packets.times_s, np.array(changes_s) - 1e-3).tolist()
    edges = [0, *changes, packets.num_frames]
    scenes = []
    for change, following in itertools.pairwise(edges):
        begin = change if change in packets.keys else packets.key_after(change)
        if begin < following:
            scenes.append((begin, following if following == packets.num_frames else _closed_end(packets, following)))
    return scenes


def _closed_end(packets: Packets, end: int) -> int:
    """The last frame, no later than one, before which everything can be decoded without what comes behind it."""
    while end > 0 and packets.places[:end].max() > packets.places[end:].min():
        end -= 1
    return end


def _divided(packets: Packets, scene: tuple[int, int], seconds: float | None) -> list[tuple[int, int]]:
    """A scene in parts of at least so many seconds."""
    if seconds is None:
        return [scene]
    begin, end = scene
    times_s, begins = packets.times_s, [begin]
    for key in packets.keys[(packets.keys > begin) & (packets.keys < end)].tolist():
        is_long_enough = times_s[key] - times_s[begins[-1]] >= seconds - 1e-3
        if is_long_enough and times_s[end - 1] - times_s[key] >= seconds / 2:  # else the rest goes with what is before
            begins.append(key)
    return list(itertools.pairwise([*begins, end]))


def reencode(path: str, target: str, *, gop: int | None, height: int | None, crf: int = CRF) -> None:
    """Encode a video as H.264 (yuv420p) without sound, its frames, their times and what their colours mean kept.

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
    for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
        value = getattr(given.codec_context, name)
        if (name, value) != ("colorspace", RGB):  # such a source becomes YUV here, as untagged files are read
            setattr(stream.codec_context, name, value)
    yield stream, size
