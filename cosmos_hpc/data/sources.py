"""The videos that a call names, as files or inside tar shards, and their frames."""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.dataset_index import is_metadataset, metadataset_parts, split_shards
from cosmos_hpc.data.video_file import VideoInfo, probe, read_frames
from cosmos_hpc.data.video_names import find_videos, named_videos, siblings

FILM = re.compile(r"(?!(?:.+\.)?mask\.)(?:(.+)\.)?(?:mp4|m4v|mov|mkv|webm)")
"""Members of a sample that are videos, and the camera where there are several."""


class Part(NamedTuple):
    """A stretch of a file: a whole one, or a member of a shard."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Video(NamedTuple):
    """One video among those that a call names."""

    name: str
    """Unique among all that go into one folder: its key, below its shard's name where it comes from one."""

    key: str
    """Of its sample."""

    path: Path
    """The video file, or the shard that holds it."""

    size: int
    """Bytes."""

    shard: str | None = None
    """Name of the shard that holds it, below the folder that was named, without `.tar`."""

    offset: int = 0
    """Where it begins in the shard."""

    camera: str | None = None
    """Which of several in a sample took it."""

    siblings: Mapping[str, Part] = MappingProxyType({})
    """What lies beside it under the same key, by its ending, such as `json`."""

    @property
    def source(self) -> str:
        """As it is told to people."""
        return str(self.path) if self.shard is None else f"{self.path}/{self.key}.mp4"


def find(sources: Sequence[Path], out: Path) -> list[Video]:
    """All videos among the sources, in order: those of a folder's tar shards, or video files.

    Raises:
        ConfigError: if there is none, shards are mixed with anything else, a shard is torn, or `out` lies in a source.
    """
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"{out} lies in {source}, which is read: choose another folder for --out")
    shards = [(source, shard) for source in sources for shard in _shards(source)]
    if not shards:
        return [Video(key, key, path, path.stat().st_size) for path, key in named_videos(sources)]
    if len(sources) > 1 or _holds_videos(sources[0]):
        raise ConfigError(f"{shards[0][1]} is a shard among other sources: name one folder of shards, or only videos")
    videos = [video for source, shard in shards for video in _members(shard, _name_below(shard, source))]
    if not videos:
        raise ConfigError(f"no shard in {sources[0]} holds a video in the field mp4: pack videos into it first")
    return videos


def spread(source: Path, count: int) -> Iterator[Video]:
    """The videos of a folder of shards or of video files, the first `count` of them spread over all that it holds.

    No more than `count` shards are looked into.

    Raises:
        ConfigError: if there is none.
    """
    shards = _shards(source)
    if not shards:
        videos = [Video(key, key, path, path.stat().st_size) for path, key in named_videos([source])]
        length = -(-len(videos) // count)
        yield from _interleaved([videos[start : start + length] for start in range(0, len(videos), length)])
        return
    chosen = shards[:: -(-len(shards) // count)]
    yield from _interleaved([list(_members(shard, _name_below(shard, source))) for shard in chosen])


def of_split(source: Path, split: str) -> list[Video]:
    """The videos of one split of a prepared dataset; of any other folder, all that it holds. Siblings are found.

    Args:
        source: a dataset with an Energon index, a Metadataset that blends such ones, a folder of shards, or a folder
            of video files; `NAME.json` and the like beside `NAME.mp4` are its siblings.
        split: such as `val`.

    Raises:
        ConfigError: if there is none, or the dataset has no such split.
    """
    if is_metadataset(source):
        return [video for part in metadataset_parts(source, split) for video in of_split(part, split)]
    splits = split_shards(source)
    if not splits:
        shards = _shards(source)
        if not shards:
            return [
                Video(key, key, path, path.stat().st_size, siblings=_beside(path))
                for path, key in named_videos([source])
            ]
    else:
        shards = [source / name for name in splits.get(split, [])]
    videos = [video for shard in shards for video in _members(shard, _name_below(shard, source))]
    if not videos:
        held = f"; it has {', '.join(splits)}" if splits else ""
        raise ConfigError(f"{source} holds no video in its split {split}{held}: name another dataset or split")
    return videos


def _beside(video: Path) -> dict[str, Part]:
    return {ending: Part(path, 0, path.stat().st_size) for ending, path in siblings(video).items()}


def _interleaved(groups: list[list[Video]]) -> Iterator[Video]:
    """The first of each group, then the second of each, and so on."""
    return (video for videos in zip_longest(*groups) for video in videos if video is not None)


@contextmanager
def opened(video: Video) -> Iterator[Path]:
    """A path under which a video can be opened, also where it lies in a shard."""
    if video.shard is None:
        yield video.path
        return
    descriptor = os.memfd_create("video", os.MFD_CLOEXEC)
    try:
        with video.path.open("rb") as shard, open(descriptor, "wb", closefd=False) as copy:
            shard.seek(video.offset)
            copy.write(shard.read(video.size))
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def look_into(path: Path) -> VideoInfo:
    """What a video says of itself.

    Raises:
        UndecodableError: if it can't be opened, or is cut short.
    """
    try:
        info = probe(path)
    except ValueError as error:
        raise UndecodableError(str(error).replace(f"{path} ", "it ", 1)) from error
    if info.frames < info.frames_promised:
        raise UndecodableError(f"it is cut short: {info.frames} of {info.frames_promised} frames are there")
    return info


def decoded(path: Path, max_frames: int | None) -> Iterator[np.ndarray]:
    """A video's frames, uint8 [H, W, 3] of one size.

    Raises:
        UndecodableError: where it is damaged, or its size changes.
    """
    try:
        yield from read_frames(path, stop=max_frames)
    except ValueError as error:
        raise UndecodableError(str(error).replace(f"{path} ", "it ", 1)) from error


def _shards(source: Path) -> list[Path]:
    if source.is_dir():
        return [shard for shard in sorted(source.rglob("*.tar")) if not shard.name.startswith(".")]
    return [source] if source.suffix == ".tar" and source.is_file() else []


def _holds_videos(source: Path) -> bool:
    try:
        return source.is_dir() and bool(find_videos([source]))
    except ConfigError:
        return False


def _name_below(shard: Path, source: Path) -> str:
    return (shard.relative_to(source) if source.is_dir() else Path(shard.name)).with_suffix("").as_posix()


def _members(shard: Path, name: str) -> Iterator[Video]:
    """The videos in a shard; a key ends at the first dot of a member's name, as WebDataset has it."""
    parts: dict[str, dict[str, Part]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile() and (found := re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)):
                    parts.setdefault(found[1], {})[found[2]] = Part(shard, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{shard} can't be read as a tar ({error}): pack it again") from None
    for key, members in parts.items():
        if ".." in PurePosixPath(key).parts or key.startswith("/"):
            raise ConfigError(f"{shard} holds {key}.mp4, which points out of it: pack it again")
        films = {ending: film for ending in members if (film := FILM.fullmatch(ending))}
        others = {ending: part for ending, part in members.items() if ending not in films}
        for ending, film in films.items():
            camera, part = film[1], members[ending]
            name_of = key if camera is None else f"{key}-{camera.replace('.', '-')}"  # a key ends at the first dot
            own = {
                other.removeprefix(f"{camera}."): of for other, of in others.items() if other.startswith(f"{camera}.")
            }
            yield Video(f"{name}/{name_of}", name_of, shard, part.size, name, part.offset, camera, others | own)
