"""Video files to WebDataset shards: the original bytes, under unique readable keys, broken files left out by name."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from webdataset import TarWriter

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.video_file import probe, read_frames

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
MIB = 1024 * 1024


class PackSummary(NamedTuple):
    """What came of the videos."""

    shards: int
    """Tar files written."""

    videos: int
    """Videos in them."""

    bytes: int
    """Size of these videos."""

    refused: list[tuple[Path, str]]
    """Each file left out, with the reason."""


def find_videos(sources: Sequence[Path]) -> list[Path]:
    """The video files among `sources` and in the folders among them, at any depth, sorted within each.

    Raises:
        ConfigError: if a source is not there or no video is found.
    """
    return [video for video, _ in named_videos(sources)]


def pack(
    sources: Sequence[Path],
    out: Path,
    *,
    shard_size_mib: float = 256,
    max_clips_per_shard: int | None = None,
    on_video: Callable[[Path], None] = lambda video: None,
) -> PackSummary:
    """Write videos into `out`/shard-000000.tar and on, each as it is, in the field mp4.

    A key is the video's path below its source, with what WebDataset can't take replaced. A shard appears under its
    name only when it is whole.

    Args:
        sources: Video files and folders.
        out: Folder of the shards; made where missing.
        shard_size_mib: A shard is closed before it would grow beyond this; one larger video has a shard of its own.
        max_clips_per_shard: It is closed at this number of videos, too.
        on_video: Called after each file, packed or refused.

    Raises:
        ConfigError: if there is no video, none is usable, a limit is not positive, or `out` holds shards already.
    """
    if shard_size_mib <= 0 or (max_clips_per_shard is not None and max_clips_per_shard < 1):
        raise ConfigError(
            f"a shard can't hold {shard_size_mib} MiB or {max_clips_per_shard} clips: set both limits above 0"
        )
    if any(out.glob("shard-*.tar")):
        raise ConfigError(f"{out} holds shards already: remove them, or choose another folder for --out")
    named = named_videos(sources)
    out.mkdir(parents=True, exist_ok=True)
    refused: list[tuple[Path, str]] = []
    shards = _ShardSequence(out, shard_size_mib * MIB, max_clips_per_shard)
    try:
        for video, key in named:
            try:
                shards.add(key, usable_bytes(video))
            except UndecodableError as error:
                refused.append((video, str(error)))
            on_video(video)
        shards.finish()
    finally:
        shards.discard()
    if not shards.videos:
        path, reason = refused[0]
        raise ConfigError(f"none of {len(refused)} videos can be used, {path} for one: {reason}")
    return PackSummary(shards.finished, shards.videos, shards.bytes, refused)


def usable_bytes(video: Path) -> bytes:
    """A video file's bytes, looked at first.

    Raises:
        UndecodableError: with the reason, if no clip could be had from it.
    """
    try:
        raw = video.read_bytes()
        if not raw:
            raise UndecodableError("the file is empty")
        info = probe(video)
    except OSError as error:
        raise UndecodableError(f"it can't be read: {error.strerror}") from error
        next(read_frames(video), None)
    except ValueError as error:
        raise UndecodableError(str(error).removeprefix(f"{video} ")) from error
    if info.frames < info.frames_promised:
        raise UndecodableError(f"it is cut short: {info.frames} of {info.frames_promised} frames are there")
    return raw


class _ShardSequence:
    """Shards in the order they are filled; the open one is a partial file."""

    def __init__(self, out: Path, max_bytes: float, max_clips: int | None) -> None:
        self.out = out
        self.max_bytes = max_bytes
        self.max_clips = max_clips
        self.finished = self.videos = self.bytes = 0
        self._clips_here = self._bytes_here = 0
        self._partial = out / f".shard.{os.getpid()}.partial"
        self._writer: TarWriter | None = None

    def add(self, key: str, raw: bytes) -> None:
        is_full = self._bytes_here + len(raw) > self.max_bytes or self._clips_here == self.max_clips
        if self._writer is not None and is_full:
            self.finish()
        if self._writer is None:
            self._writer = TarWriter(str(self._partial), encoder=False, mtime=0)  # equal videos, equal shards
        self._writer.write({"__key__": key, "mp4": raw})
        self._clips_here += 1
        self._bytes_here += len(raw)
        self.videos += 1
        self.bytes += len(raw)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._partial.rename(self.out / f"shard-{self.finished:06d}.tar")
            self.finished += 1
            self._writer = None
            self._clips_here = self._bytes_here = 0

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._partial.unlink()
            self._writer = None


def named_videos(sources: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each video once, with its key."""
    found: dict[Path, tuple[Path, str]] = {}
    taken: set[str] = set()
    for source in sources:
        for video, name in _below(source):
            if video.resolve() not in found:
                key = _unique(_readable_key(name), taken)
                taken.add(key)
                found[video.resolve()] = (video, key)
    if not found:
        raise ConfigError(
            f"no videos in {', '.join(map(str, sources)) or 'nothing'}: name files or folders with {' '.join(SUFFIXES)}"
        )
    return list(found.values())


def _below(source: Path) -> Iterator[tuple[Path, str]]:
    if source.is_dir():
        for video in sorted(source.rglob("*")):
            below = video.relative_to(source)
            hidden = any(part.startswith(".") for part in below.parts)  # ._clip.mp4 is no video but a Mac's note on it
            if video.suffix.lower() in SUFFIXES and video.is_file() and not hidden:
                yield video, str(below.with_suffix(""))
    elif source.is_file():
        yield source, source.stem
    else:
        raise ConfigError(f"{source} is not there: name video files or folders of them")


def _readable_key(name: str) -> str:
    """WebDataset ends a key at its first dot; folders are joined by dashes, and letters of any script stay."""
    return re.sub(r"[^\w-]+", "_", name.replace("/", "-")).strip("_") or "video"


def _unique(key: str, taken: set[str]) -> str:
    candidate, number = key, 1
    while candidate in taken:
        number += 1
        candidate = f"{key}-{number}"
    return candidate
