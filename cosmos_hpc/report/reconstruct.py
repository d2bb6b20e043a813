"""A video beside what a tokenizer makes of it, for the eye."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.video_file import VideoInfo, probe, read_frames, write_mp4
from cosmos_hpc.data.video_names import named_videos
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


class ReconstructSummary(NamedTuple):
    """What came of the videos."""

    written: list[Path]
    """Side-by-side mp4s that are new."""

    kept: list[Path]
    """Those that were there already."""

    refused: list[tuple[Path, str]]
    """Each video without one, with the reason."""


def reconstruct_all(
    sources: Sequence[Path],
    weights: Path,
    out: Path,
    *,
    max_frames: int | None = None,
    overwrite: bool = False,
    tile_size: int | None = None,
    tile_overlap: int | None = None,
    on_frames: Callable[[int, int], None] = lambda done, total: None,
) -> ReconstructSummary:
    """Write one side-by-side mp4 for each video, named by its path below its source; broken videos are left out.

    Args:
        sources: videos, and folders that hold them at any depth; what lies in `out` is not among them.
        weights: a run, a checkpoint, an export or a folder of released weights.
        out: folder of the mp4s; made where missing.
        max_frames: frames of each video after which to stop; none: the whole video.
        overwrite: write anew what is there already.
        tile_size: pixels along the sides of the tiles that larger frames are cut into; none takes frames whole.
        tile_overlap: pixels over which neighbouring tiles are blended; `TILE_OVERLAP` if left out.
        on_frames: called with the frames that are done and those that this call has in all.

    Raises:
        ConfigError: if there is no video, none can be read, or the weights can't be read.
    """
    _check_max_frames(max_frames)
    targets = {
        video: out / f"{key}.mp4"
        for video, key in named_videos(sources)
        if out.resolve() not in video.resolve().parents
    }
    if not targets:
        raise ConfigError(f"all videos of {', '.join(map(str, sources))} lie in {out}: choose another folder for --out")
    kept = [] if overwrite else [target for target in targets.values() if target.exists()]
    written: list[Path] = []
    refused: list[tuple[Path, str]] = []
    infos = _look_into_all([video for video, target in targets.items() if target not in kept], refused)
    counts = {video: min(info.frames, max_frames or info.frames) for video, info in infos.items()}
    if infos:
        tokenizer = Tokenizer.from_weights(weights, compute_device(), tile_size=tile_size, tile_overlap=tile_overlap)
        bar = _FrameCount(sum(counts.values()), on_frames)
        for video, info in infos.items():
            try:
                written.append(_write_pair(video, info, tokenizer, targets[video], max_frames, bar.add))
            except ConfigError as error:
                refused.append((video, str(error)))
            bar.end_video(counts[video])
    if not written and not kept:
        raise ConfigError(f"none of {len(targets)} videos can be reconstructed, for one: {refused[0][1]}")
    return ReconstructSummary(written, kept, refused)


def reconstruct(
    video: Path,
    weights: Path,
    out: Path,
    *,
    max_frames: int | None = None,
    on_frames: Callable[[int], None] = lambda count: None,
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
    _check_max_frames(max_frames)
    tokenizer = Tokenizer.from_weights(weights, compute_device())
    return _write_pair(video, info, tokenizer, out, max_frames, on_frames)


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


class _FrameCount:
    """Frames that are done over several videos; one that breaks off counts in full, since none of it is left to do."""

    def __init__(self, total: int, on_frames: Callable[[int, int], None]) -> None:
        self.total = total
        self.on_frames = on_frames
        self._ended = self._here = 0

    def add(self, count: int) -> None:
        self._here += count
        self.on_frames(self._ended + self._here, self.total)

    def end_video(self, count: int) -> None:
        self._ended, self._here = self._ended + count, 0
        self.on_frames(self._ended, self.total)


def _write_pair(
    video: Path,
    info: VideoInfo,
    tokenizer: Tokenizer,
    out: Path,
    max_frames: int | None,
    on_frames: Callable[[int], None],
) -> Path:
    write_mp4(out, side_by_side(_frames(video, max_frames), tokenizer, on_frames), info.fps or FALLBACK_FPS)
    return out


def _check_max_frames(max_frames: int | None) -> None:
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"--max-frames is {max_frames}, which leaves nothing of a video: set 1 or more")


def _look_into_all(videos: list[Path], refused: list[tuple[Path, str]]) -> dict[Path, VideoInfo]:
    """What each video says of itself; those that can't be opened are added to `refused`."""
    infos = {}
    for video in videos:
        try:
            infos[video] = _look_into(video)
        except ConfigError as error:
            refused.append((video, str(error)))
    return infos


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
    frame = None
    try:
        for frame in read_frames(video, stop=max_frames):
            yield frame
    except ValueError as error:
        raise ConfigError(f"{error}: encode it anew, or stop before that by --max-frames") from None
    if frame is None:
        raise ConfigError(f"{video} has no frame that can be decoded: name another video")
