"""The decoders that can be chosen: each gives rectangles out of some frames of a small video, by one interface."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import av
import decord
import numpy as np

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.packets import FIRST_MS, MS_PER_FRAME, Packets

decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's own lines; what goes wrong is raised as well
av.logging.set_level(None)

FRAMES_AT_ONCE = 8
"""Whole pictures that are in memory at the same time, with decoders that can't cut before they convert."""

CHROMA_STEP = 4
"""Pixels by which colour is stored at most: a rectangle that begins between two steps would have other colours."""

UNKNOWN_TO_DECORD = ("av1", "vp9", "mjpeg", "png", "webp")
"""Codecs that its FFmpeg of 2018 has not got, or takes from no cut."""


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        """The rectangle of [H, W, 3], a view."""
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]

    def turned(self, num_quarter_turns: int, height: int, width: int) -> "Box":
        """Where it lies once the picture, of that size, is turned to the left."""
        if num_quarter_turns == 0:
            return self
        left_of_it = Box(width - self.left - self.width, self.top, self.width, self.height)
        return left_of_it.turned(num_quarter_turns - 1, width, height)


class Wanted(NamedTuple):
    """Rectangles of one frame."""

    frame: int
    """Place in the video, as shown."""

    boxes: Sequence[Box]
    """Which."""


Engine = Callable[[str, Sequence[Wanted]], Iterator[np.ndarray]]
"""Takes a video's path and rectangles of rising frames; gives uint8 [h, w, 3], RGB, of each, one after the other."""


def through_decord(path: str, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
    """Decord on one thread."""
    reader = decord.VideoReader(path, num_threads=1)
    yield from _in_parts(lambda frames: reader.get_batch(frames).asnumpy(), wanted)


def through_torchcodec(path: str, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
    """Torchcodec on one thread of the CPU."""
    from torchcodec.decoders import VideoDecoder  # optional

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    yield from _in_parts(lambda frames: decoder.get_frames_at(frames).data.numpy(), wanted)


def through_pyav(path: str, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
    """PyAV on one thread; what is not wanted of a picture is not converted to RGB."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        cuts: dict[Box, _CutBeforeConversion] = {}
        remaining = iter(wanted)
        following = next(remaining, None)
        first_ms = 0 if container.format.name.endswith("_pipe") else FIRST_MS  # a picture by itself
        for frame in container.decode(stream):
            if following is None:
                return
            if round(((frame.time or 0.0) * 1000 - first_ms) / MS_PER_FRAME) == following.frame:
                for box in following.boxes:
                    cut = cuts.get(box) or cuts.setdefault(box, _CutBeforeConversion(stream, box))
                    yield cut(frame)
                following = next(remaining, None)


ENGINES: dict[str, Engine] = {
    "decord": through_decord,
    "pyav": through_pyav,
    "torchcodec": through_torchcodec,
}


def check_decoder(name: str) -> None:
    """Refuse a decoder that is not installed.

    Raises:
        ConfigError: with the mend.
    """
    if name == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
        raise ConfigError("data.decoder is torchcodec, which is not installed: pip install 'cosmos-hpc[torchcodec]'")


def suitable_decoders(decoder: str, packets: Packets) -> list[str]:
    """The chosen decoder, then the one that tries where it fails; only PyAV where others are known to be wrong.

    In the cut of an open GOP decord doubles frames in place of those behind the first one, without an error, and
    torchcodec loses one.
    """
    if packets.is_open_gop:
        return ["pyav"]
    tries = [decoder, "decord" if decoder == "pyav" else "pyav"]
    return [name for name in tries if name != "decord" or packets.codec not in UNKNOWN_TO_DECORD]


def decode_boxes(
    path: str, wanted: Sequence[Wanted], put: Callable[[int, np.ndarray], None], decoders: Sequence[str]
) -> None:
    """Decode by the first of several decoders that can.

    Args:
        path: A video that `Cutter.cut` wrote.
        wanted: Rectangles of rising frames.
        put: Called with the number of each rectangle and its pixels; again from 0 where a decoder failed half-way.
        decoders: Names of them.

    Raises:
        UndecodableError: if no decoder can.
    """
    reasons = []
    for name in decoders:
        try:
            _put_all(ENGINES[name](path, wanted), wanted, put)
            return
        except (decord.DECORDError, av.FFmpegError, RuntimeError, ValueError, IndexError, UndecodableError) as error:
            reasons.append(f"{name}: {_first_line(error)}")
    raise UndecodableError(f"its frames can't be decoded ({'; '.join(reasons)})")


def _put_all(pictures: Iterator[np.ndarray], wanted: Sequence[Wanted], put: Callable[[int, np.ndarray], None]) -> None:
    boxes = [box for each in wanted for box in each.boxes]
    count = 0
    for box, picture in zip(boxes, pictures, strict=False):
        if picture.shape != (box.height, box.width, 3):
            raise UndecodableError(f"a picture of {box.width} x {box.height} came out as {list(picture.shape)}")
        put(count, picture)
        count += 1
    if count < len(boxes):
        raise UndecodableError(f"it ends after {count} of {len(boxes)} pictures")


def _in_parts(decode: Callable[[list[int]], np.ndarray], wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
    for first in range(0, len(wanted), FRAMES_AT_ONCE):
        part = wanted[first : first + FRAMES_AT_ONCE]
        for each, picture in zip(part, decode([each.frame for each in part]), strict=True):
            yield from (box.of(picture) for box in each.boxes)


class _CutBeforeConversion:
    """Libavfilter's crop, which moves pointers, before the conversion to RGB, which costs 2.5 ms for 1280 x 720."""

    def __init__(self, stream: av.VideoStream, box: Box) -> None:
        top, left = (number - number % CHROMA_STEP for number in (box.top, box.left))
        bottom, right = (number + -number % CHROMA_STEP for number in (box.top + box.height, box.left + box.width))
        height = min(bottom, stream.codec_context.height) - top
        width = min(right, stream.codec_context.width) - left
        self._inner = box._replace(top=box.top - top, left=box.left - left)
        self._graph = av.filter.Graph()
        parts = [
            self._graph.add_buffer(template=stream),
            self._graph.add("crop", f"{width}:{height}:{left}:{top}:exact=1"),
            self._graph.add("format", "rgb24"),
            self._graph.add("buffersink"),
        ]
        self._graph.link_nodes(*parts).configure()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        self._graph.push(frame)
        return self._inner.of(self._graph.pull().to_ndarray())


def _first_line(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip().partition("\n")[0].rpartition("] ")[2]
