"""What a video's packets tell before anything is decoded: which frames there are and where decoding can begin.

A part of a video can be cut out of it as packets. What decodes that part has nothing to seek and nothing to read ahead:
decord, which seeks wrongly in open GOPs and decodes on to the end of what it is given, does neither in a cut.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from cosmos_hpc.data.clips import UndecodableError

FIRST_MS, MS_PER_FRAME = 1000, 10
"""When the frames of a cut are shown."""

PICTURES = ("png", "webp")
"""Codecs of still pictures that Matroska doesn't take; their one packet is the file."""


class Packets(NamedTuple):
    """M packets in the order in which they are decoded, and N frames in the order in which they are shown."""

    pts: np.ndarray
    """int64 [M]: when the frame of each packet is shown, in the file's own unit."""

    is_key: np.ndarray
    """bool [M]: whether decoding can begin with it."""

    places: np.ndarray
    """int64 [N]: which packet holds each frame; an edit list may hide some."""

    times_s: np.ndarray
    """float64 [N], rising: when each frame is shown."""

    keys: np.ndarray
    """int64, rising, the first 0: frames that begin a new stretch of pictures."""

    is_open_gop: bool
    """Whether frames that are shown before a key frame need it."""

    height: int
    """Pixels, as stored."""

    width: int
    """Pixels, as stored."""

    num_quarter_turns: int
    """By which stored pictures have to be turned to the left to be upright: 0 to 3."""

    codec: str
    """FFmpeg's name, such as h264."""

    frames_promised: int
    """Number that the file says it holds; 0 where it doesn't."""

    @property
    def num_frames(self) -> int:
        """N."""
        return len(self.times_s)

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of its pictures, turned as they are to be seen."""
        return (self.width, self.height) if self.num_quarter_turns % 2 else (self.height, self.width)

    @property
    def fps(self) -> float:
        """Frames per second, of the usual distance between two of them."""
        return 1 / float(np.median(np.diff(self.times_s))) if self.num_frames > 1 else 0.0

    @property
    def mean_gop(self) -> float:
        """Frames from one key frame to the next."""
        return self.num_frames / len(self.keys)

    def key_before(self, frame: int) -> int:
        """The last key frame that is shown no later than a frame."""
        return int(self.keys[np.searchsorted(self.keys, frame, side="right") - 1])

    def key_place(self, frame: int) -> int:
        """The packet with which decoding must begin for a frame."""
        keys = np.flatnonzero(self.is_key)
        return int(keys[np.searchsorted(self.pts[keys], self.pts[self.places[frame]], side="right") - 1])

    def key_after(self, frame: int) -> int:
        """The first key frame that is shown later than a frame, or N."""
        following = np.searchsorted(self.keys, frame, side="right")
        return int(self.keys[following]) if following < len(self.keys) else self.num_frames


def scan(path: str) -> Packets:
    """Read the packets of a video; only its first picture is decoded, as that alone says how it is turned.

    Raises:
        UndecodableError: if the file holds no video that can be opened.
    """
    with _opened(path) as container:
        return _scan(container, container.streams.video[0])


@contextmanager
def scanned(path: str) -> Iterator[tuple[Packets, "Cutter"]]:
    """As `scan`, with what cuts parts out of the same packets, which stay in memory.

    Raises:
        UndecodableError: if the file holds no video that can be opened.
    """
    with _opened(path) as container:
        kept: list[av.Packet] = []
        packets = _scan(container, container.streams.video[0], kept)
        yield packets, Cutter(packets, container.streams.video[0], kept)


class Cutter:
    """Writes the packets that some frames need, and no others, as a small video."""

    def __init__(self, packets: Packets, stream: av.VideoStream, content: list[av.Packet]) -> None:
        self._packets = packets
        self._stream = stream
        self._content = content

    def stretches(self, frames: Sequence[int]) -> list[list[int]]:
        """Divide rising frames where packets between them are not needed: a decoder can't be expected to skip some."""
        stretches: list[list[int]] = []
        end = -1
        for frame in frames:
            if self._packets.key_place(frame) > end + 1 or not stretches:
                stretches.append([])
            stretches[-1].append(frame)
            end = max(end, int(self._packets.places[frame]))
        return stretches

    def cut(self, frames: Sequence[int], target: str) -> list[int]:
        """Write a video whose pictures come out as they are stored, not turned.

        Args:
            frames: Those that are wanted, one of `stretches`.
            target: Matroska file to write.

        Returns:
            The place of each frame in the new video, as shown.

        Raises:
            UndecodableError: if such a video can't be written.
        """
        if self._packets.codec in PICTURES and len(self._content) == 1:
            Path(target).write_bytes(bytes(self._content[0]))
            return [0] * len(frames)
        pts = self._packets.pts
        needed = _needed(self._packets, frames)
        order = {int(place): number for number, place in enumerate(needed[np.argsort(pts[needed], kind="stable")])}
        try:
            with av.open(target, "w", format="matroska") as copy:
                stream = copy.add_stream_from_template(self._stream, opaque=True)
                stream.set_display_rotation(0)
                for number, place in enumerate(sorted(order)):
                    packet = self._content[place]
                    # Matroska keeps no time of decoding, but wants it to rise, and below the time of showing
                    packet.time_base = Fraction(1, 1000)
                    packet.pts, packet.dts = FIRST_MS + MS_PER_FRAME * order[place], number
                    packet.duration = MS_PER_FRAME
                    packet.stream = stream
                    copy.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            raise UndecodableError(f"its packets can't be copied: {_strerror(error)}") from error
        return [order[int(self._packets.places[frame])] for frame in frames]

    def copy(self, begin: int, end: int, target: str) -> None:
        """Write frames `begin`, a key frame, up to `end` as an mp4 file that plays, their times kept."""
        pts, places = self._packets.pts, self._packets.places
        first = self._packets.key_place(begin)
        wanted = sorted(place for place in range(first, len(pts)) if self._is_between(place, begin, end))
        start, unit = int(pts[places[begin]]), self._stream.time_base
        delay = max(number - order for number, order in enumerate(np.argsort(np.argsort(pts[wanted], kind="stable"))))
        times = np.sort(pts[wanted]) - start
        try:
            with av.open(target, "w", format="mp4") as copy:
                stream = copy.add_stream_from_template(self._stream, opaque=True)
                for number, place in enumerate(wanted):
                    packet = self._content[place]
                    packet.time_base = unit
                    packet.pts = int(pts[place]) - start
                    packet.dts = int(times[max(number - delay, 0)]) - max(delay - number, 0)
                    packet.stream = stream
                    copy.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            raise UndecodableError(f"its packets can't be copied: {_strerror(error)}") from error

    def _is_between(self, place: int, begin: int, end: int) -> bool:
        pts, places = self._packets.pts, self._packets.places
        is_before_end = end >= len(places) or pts[place] < pts[places[end]]
        return bool(pts[places[begin]] <= pts[place]) and bool(is_before_end)


@contextmanager
def _opened(path: str) -> Iterator[av.container.InputContainer]:
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UndecodableError("it holds no video stream")
            yield container
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableError(f"it holds no video that can be opened: {_strerror(error)}") from error


def _scan(
    container: av.container.InputContainer, stream: av.VideoStream, kept: list[av.Packet] | None = None
) -> Packets:
    pts: list[int] = []
    is_key: list[bool] = []
    is_shown: list[bool] = []
    turns = 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if kept is not None:
            kept.append(packet)
        if not pts:
            turns = _quarter_turns(stream, packet)
        number = packet.pts if packet.pts is not None else packet.dts
        pts.append(len(pts) if number is None else number)
        is_key.append(packet.is_keyframe)
        is_shown.append(not packet.is_discard)
    if not any(is_key):
        raise UndecodableError("it holds no key frame")
    times, first = np.array(pts), is_key.index(True)
    places = np.flatnonzero(is_shown)
    places = places[(places >= first) & (times[places] >= times[first])]  # what comes before can't be decoded
    places = places[np.argsort(times[places], kind="stable")]
    is_key_frame = np.array(is_key)[places]
    is_key_frame[0] = True  # else an edit list hides the key frame that it begins with
    newest_key = np.maximum.accumulate(np.where(is_key, times, times.min()))
    codec = stream.codec_context
    return Packets(
        pts=times,
        is_key=np.array(is_key),
        places=places,
        times_s=times[places] * float(stream.time_base or 1),
        keys=np.flatnonzero(is_key_frame),
        is_open_gop=bool((times[first:] < newest_key[first:]).any()),
        height=codec.height,
        width=codec.width,
        num_quarter_turns=turns,
        codec=codec.codec.canonical_name,
        frames_promised=stream.frames,
    )


def _quarter_turns(stream: av.VideoStream, first: av.Packet) -> int:
    codec = stream.codec_context
    shown = av.Packet(bytes(first))  # without the mark of an edit list that hides it, and whatever comes of it
    shown.pts, shown.dts, shown.time_base = first.pts, first.dts, first.time_base
    try:
        frames = codec.decode(shown) + codec.decode(None)
    except av.FFmpegError:
        return 0  # damage there costs the first frames alone
    return round(frames[0].rotation / 90) % 4 if frames else 0


def _needed(packets: Packets, frames: Sequence[int]) -> np.ndarray:
    """Places of the packets from the first frame's key frame to the last of the frames, rising.

    What is shown before that key frame needs an earlier one, and is left out.
    """
    places = packets.places[list(frames)]
    first = packets.key_place(frames[0])
    part = np.arange(first, places.max() + 1)
    return part[packets.pts[part] >= packets.pts[first]]


def _strerror(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
