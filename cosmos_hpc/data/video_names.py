"""The videos that a call names: files, folders, patterns or lists; each once, under a key that WebDataset takes."""

import csv
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
LISTS = (".csv", ".txt")

MASK_ENDINGS = ("mask.mp4", "mask.png")
"""What follows a video's name in that of its mask: white pixels are inside, in each of its frames or in all."""


class NamedVideo(NamedTuple):
    """A video file."""

    path: Path
    """Where it is."""

    key: str
    """Its path below the source that was named, with what WebDataset can't take replaced; unique."""

    folder: str
    """Its folder below that source; empty where it lies in the source itself."""


def find_videos(sources: Sequence[Path]) -> list[Path]:
    """The video files among `sources` and in the folders among them, at any depth, sorted within each.

    Raises:
        ConfigError: if a source is not there or no video is found.
    """
    return [video.path for video in all_videos(sources)]


def named_videos(sources: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each video once, with its key.

    Raises:
        ConfigError: if a source is not there or no video is found.
    """
    return [(video.path, video.key) for video in all_videos(sources)]


def all_videos(sources: Sequence[Path]) -> list[NamedVideo]:
    """Each video once.

    Args:
        sources: Video files, folders, patterns such as `drives/*/front.mp4`, and lists: .csv with a column `path` (or
            with paths in its first column), .txt with a path on each line, both relative to the list.

    Raises:
        ConfigError: if a source is not there or no video is found.
    """
    found: dict[Path, NamedVideo] = {}
    taken: set[str] = set()
    for source in sources:
        for video, name in _below(source):
            if video.resolve() not in found:
                key = _unique(_readable_key(name), taken)
                taken.add(key)
                folder = str(Path(name).parent)
                found[video.resolve()] = NamedVideo(video, key, "" if folder == "." else folder)
    if not found:
        raise ConfigError(
            f"no videos in {', '.join(map(str, sources)) or 'nothing'}: name files or folders with {' '.join(SUFFIXES)}"
        )
    return list(found.values())


def siblings(video: Path) -> dict[str, Path]:
    """The JSON and the masks beside a video file, by what follows its name."""
    named = {ending: video.with_name(f"{video.stem}.{ending}") for ending in ("json", *MASK_ENDINGS)}
    return {ending: path for ending, path in named.items() if path.is_file()}


def _below(source: Path) -> Iterator[tuple[Path, str]]:
    if source.is_dir():
        for video in sorted(source.rglob("*")):
            below = video.relative_to(source)
            hidden = any(part.startswith(".") for part in below.parts)  # ._clip.mp4 is no video but a Mac's note on it
            is_mask = video.name.endswith(f".{MASK_ENDINGS[0]}")
            if video.suffix.lower() in SUFFIXES and video.is_file() and not hidden and not is_mask:
                yield video, str(below.with_suffix(""))
    elif source.is_file() and source.suffix.lower() in LISTS:
        yield from _listed(source)
    elif source.is_file():
        yield source, source.stem
    elif glob.has_magic(str(source)):
        first_wild = next(number for number, part in enumerate(source.parts) if glob.has_magic(part))
        root = Path(*source.parts[:first_wild])
        for match in sorted(root.glob(str(Path(*source.parts[first_wild:])))):
            if match.is_dir() or match.suffix.lower() in SUFFIXES:
                yield from ((video, str(video.relative_to(root).with_suffix(""))) for video, _ in _below(match))
    else:
        raise ConfigError(f"{source} is not there: name video files, folders of them, patterns or lists")


def _listed(source: Path) -> Iterator[tuple[Path, str]]:
    """The videos of a list; a line that names nothing is the caller's mistake."""
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows = (
            [row for row in csv.reader(file) if row] if source.suffix.lower() == ".csv" else [[x.strip()] for x in file]
        )
    column = rows[0].index("path") if rows and "path" in rows[0] else 0
    lines = enumerate(rows[1:] if rows and "path" in rows[0] else rows, start=1)
    for number, row in lines:
        if len(row) <= column or not row[column].strip():
            continue
        named = Path(row[column].strip())
        video = named if named.is_absolute() else source.parent / named
        if not video.is_file():
            raise ConfigError(f"{source} names {named} as its entry {number}, which is not there: correct the list")
        yield video, str((Path(named.name) if named.is_absolute() else named).with_suffix(""))


def _readable_key(name: str) -> str:
    """WebDataset ends a key at its first dot; folders are joined by dashes, and letters of any script stay."""
    return re.sub(r"[^\w-]+", "_", name.replace("/", "-")).strip("_") or "video"


def _unique(key: str, taken: set[str]) -> str:
    candidate, number = key, 1
    while candidate in taken:
        number += 1
        candidate = f"{key}-{number}"
    return candidate
