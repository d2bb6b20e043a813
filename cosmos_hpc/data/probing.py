"""Whether a video is worth packing: what is inside, and whether its beginning, middle and end can be decoded."""

import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cosmos_hpc.data.clips import UndecodableError, memory_file
from cosmos_hpc.data.decoders import Box, Wanted, decode_boxes
from cosmos_hpc.data.packets import Cutter, Packets, scanned

STILL, BLOCK = 3.0, 16
"""Difference, in levels of 255, of the means of any block of so many pixels a side, below which pictures are the same:
what moves changes a block by more, noise and the encoder by less."""

UNEVEN = 0.05
"""Share by which the distances of frames differ from the usual one where the frame rate varies."""


class Probe(NamedTuple):
    """What a video is, for the list of what was packed."""

    codec: str
    frames: int
    fps: float
    width: int
    height: int
    rotation: int
    """Degrees by which stored pictures are turned to the left to be upright."""

    duration_s: float
    is_variable_rate: bool
    is_open_gop: bool
    mean_gop: float
    """Frames from one key frame to the next."""


def probe_closely(path: str, min_frames: int) -> Probe:
    """Look into a video, and decode its first, middle and last frame.

    Raises:
        UndecodableError: with the reason for which it is not worth packing.
    """
    with scanned(path) as (packets, cutter):
        if len(packets.pts) < packets.frames_promised:  # those that an edit list hides count
            reason = f"it is cut short: {len(packets.pts)} of {packets.frames_promised} frames are there"
            raise UndecodableError(reason)
        if packets.num_frames < min_frames:
            raise UndecodableError(f"it is too short: {packets.num_frames} frames, {min_frames} are asked for")
        count = packets.num_frames
        pictures = [_decoded(packets, cutter, frame) for frame in sorted({0, count // 2, count - 1})]
        if count > 1 and all(_difference(pictures[0], other) < STILL for other in pictures[1:]):
            raise UndecodableError("it is static: its first, middle and last frames are the same")
        return described(packets)


def described(packets: Packets) -> Probe:
    """What the packets alone tell."""
    steps = np.diff(packets.times_s)
    usual = float(np.median(steps)) if len(steps) else 0.0
    is_uneven = bool(len(steps)) and bool((np.abs(steps - usual) > UNEVEN * usual + 0.0015).any())  # 1 ms in Matroska
    return Probe(
        codec=packets.codec,
        frames=packets.num_frames,
        fps=round(packets.fps, 3),
        width=packets.width,
        height=packets.height,
        rotation=90 * packets.num_quarter_turns,
        duration_s=round(float(packets.times_s[-1] - packets.times_s[0]) + usual, 3),
        is_variable_rate=is_uneven,
        is_open_gop=packets.is_open_gop,
        mean_gop=round(packets.mean_gop, 1),
    )


def _decoded(packets: Packets, cutter: Cutter, frame: int) -> np.ndarray:
    found: list[np.ndarray] = []
    with memory_file("probe") as target:
        places = cutter.cut([frame], target)
        whole = Box(0, 0, packets.height, packets.width)
        try:
            decode_boxes(target, [Wanted(places[0], [whole])], lambda _, picture: found.append(picture), ["pyav"])
        except UndecodableError as error:
            which = {0: "first", packets.num_frames - 1: "last"}.get(frame, "middle")
            raise UndecodableError(f"its {which} frame can't be decoded: {error}") from error
    return found[-1]


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of the means of any two blocks."""
    height, width = (max(side // BLOCK, 1) * min(BLOCK, side) for side in one.shape[:2])
    difference = one[:height, :width].astype(np.float32) - other[:height, :width]
    size = min(BLOCK, one.shape[0]), min(BLOCK, one.shape[1])
    blocks = difference.reshape(height // size[0], size[0], width // size[1], size[1], 3).mean(axis=(1, 3))
    return float(np.abs(blocks).max())


def guarded(work: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
    """Do something with a video in a process that may hang or die of it.

    Raises:
        UndecodableError: if it does, or if `work` raises one.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, work, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise UndecodableError(f"the decoder came to no end in {timeout_s:g} s")
        result = receiver.recv()
    except EOFError:
        raise UndecodableError("the decoder crashed") from None
    finally:
        child.kill()
        child.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_result(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(work(*arguments))
    except UndecodableError as error:
        sender.send(error)
