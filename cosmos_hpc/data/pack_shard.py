"""One shard of `pack`: looks at its videos, cuts or encodes them anew where asked, and writes the tar."""

import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError, memory_file
from cosmos_hpc.data.probing import Probe, guarded, probe_closely
from cosmos_hpc.data.reencode import CRF, parts, reencode, scene_changes
from cosmos_hpc.data.video_names import siblings

MIB = 1024 * 1024
PROBE_S, ENCODE_S = 60.0, 3600.0
"""How long looking at a video, and encoding it, may take."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What `pack` makes of videos."""

    shard_size_mib: float = 256
    """A shard is closed before the files in it would exceed this; one larger video has a shard of its own."""

    max_clips_per_shard: int | None = None
    """It is closed at this number of files, too."""

    probe: bool = True
    """Whether each video is looked at, and left out if it is broken, short, static or a copy."""

    min_frames: int = 9
    """Videos with fewer are left out."""

    group_by: str | None = None
    """Pattern whose find in a path names what must stay together; none: the folder, where all lie in folders;
    `none`: nothing."""

    split_s: float | None = None
    """Longer videos are cut, at key frames, into parts of at least so many seconds."""

    split_scenes: bool = False
    """Videos are cut where another scene begins; what lies before the first key frame of a scene is left out."""

    gop: int | None = None
    """Videos are encoded anew with a key frame every so many frames."""

    height: int | None = None
    """Videos are encoded anew with a shorter side of so many pixels, if it is longer."""

    crf: int = CRF
    """Quality of what is encoded anew."""

    def check(self) -> None:
        """Refuse what can't be.

        Raises:
            ConfigError: with the mend.
        """
        if self.shard_size_mib <= 0 or (self.max_clips_per_shard is not None and self.max_clips_per_shard < 1):
            size = f"{self.shard_size_mib} MiB or {self.max_clips_per_shard} clips"
            raise ConfigError(f"a shard can't hold {size}: set both limits above 0")
        for name in ("gop", "height", "split_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: set a number above 0")
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"--crf is {self.crf}: set 0 (lossless) to 51 (worst)")
        try:
            re.compile(self.group_by or "")
        except re.error as error:
            raise ConfigError(f"--group-by {self.group_by} is no pattern ({error}): see Python's re") from None


class PlannedVideo(NamedTuple):
    """A file, as the plan knows it."""

    path: str
    key: str
    group: str | None
    num_bytes: int
    mtime_ns: int
    """A file that has changed since makes another plan."""


@dataclass(frozen=True)
class ShardResult:
    """What came of a shard."""

    tar_bytes: int
    """Size of the tar; 0 where no video could be used and there is none."""

    video_bytes: int
    """Of the videos in it."""

    packed: list[dict[str, Any]]
    """For each: key, shard, source, group, and what was found out about it."""

    refused: list[tuple[str, str]]
    """Path and reason of each file left out."""

    def to_json(self) -> str:
        """As it is written beside the plan."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> "ShardResult":
        """What was written."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**found | {"refused": [(path, reason) for path, reason in found["refused"]]})


def pack_shard(tar: Path, videos: list[PlannedVideo], settings: PackSettings) -> ShardResult:
    """Write a shard, which appears under its name when it is whole.

    Raises:
        OSError: if it can't be written.
    """
    partial = tar.with_name(f".{tar.name}.partial")
    packed: list[dict[str, Any]] = []
    refused: list[tuple[str, str]] = []
    num_bytes = 0
    try:
        with tarfile.TarFile(partial, "w", copybufsize=MIB) as writer:
            for video in videos:
                try:
                    for key, size, probe in _add(writer, video, settings, refused):
                        facts = {} if probe is None else probe._asdict()
                        packed.append(
                            {"key": key, "shard": tar.name, "source": video.path, "group": video.group, **facts}
                        )
                        num_bytes += size
                except UndecodableError as error:
                    refused.append((video.path, str(error)))
        if packed:
            partial.replace(tar)
    finally:
        partial.unlink(missing_ok=True)
    return ShardResult(tar.stat().st_size if packed else 0, num_bytes, packed, refused)


def _add(
    writer: tarfile.TarFile, video: PlannedVideo, settings: PackSettings, refused: list[tuple[str, str]]
) -> Iterator[tuple[str, int, Probe | None]]:
    """Add a video, or those of its parts that are worth it; what is wrong with the whole is found before them."""
    if video.num_bytes == 0:
        raise UndecodableError("the file is empty")
    try:
        with Path(video.path).open("rb") as file:
            probe = None
            if settings.probe:
                probe = guarded(probe_closely, video.path, settings.min_frames, timeout_s=PROBE_S)
            contents = list(_contents(video, settings))
            for number, content in enumerate(contents):
                try:
                    found = probe if content is None else _probed(content, settings)
                except UndecodableError as error:
                    if len(contents) == 1:
                        raise
                    refused.append((video.path, f"part {number:04d}: {error}"))
                    continue
                key = video.key if len(contents) == 1 else f"{video.key}-{number:04d}"
                size = video.num_bytes if content is None else len(content)
                _write(writer, f"{key}.mp4", file if content is None else io.BytesIO(content), size)
                for ending, sibling in _siblings(video, settings, is_whole=len(contents) == 1).items():
                    _write(writer, f"{key}.{ending}", io.BytesIO(sibling), len(sibling))
                yield key, size, found
    except OSError as error:
        if str(error.filename) != video.path:
            raise
        raise UndecodableError(f"it can't be read: {error.strerror}") from error


def _contents(video: PlannedVideo, settings: PackSettings) -> Iterator[bytes | None]:
    """The files to write; none for the one that is there."""
    changes_s: list[float] = []
    if settings.split_scenes:
        changes_s = guarded(scene_changes, video.path, timeout_s=ENCODE_S)
    for part in parts(video.path, settings.split_s, changes_s, settings.min_frames):
        if settings.gop is None and settings.height is None:
            yield part
            continue
        with memory_file("part") as source, memory_file("encoded") as target:
            if part is not None:
                Path(source).write_bytes(part)
            guarded(_reencode, video.path if part is None else source, target, settings, timeout_s=ENCODE_S)
            yield Path(target).read_bytes()


def _reencode(path: str, target: str, settings: PackSettings) -> None:
    reencode(path, target, gop=settings.gop, height=settings.height, crf=settings.crf)


def _probed(content: bytes, settings: PackSettings) -> Probe | None:
    if not settings.probe:
        return None
    with memory_file("written") as path:
        Path(path).write_bytes(content)
        found: Probe = guarded(probe_closely, path, 1, timeout_s=PROBE_S)
        return found


def _siblings(video: PlannedVideo, settings: PackSettings, is_whole: bool) -> dict[str, bytes]:
    """What lies beside a video and still fits what becomes of it: boxes and masks are of its own frames and size."""
    found = {ending: path.read_bytes() for ending, path in siblings(Path(video.path)).items()}
    if is_whole and settings.height is None:
        return found
    try:
        facts = json.loads(found["json"])
        return {"json": json.dumps({name: value for name, value in facts.items() if name != "boxes"}).encode()}
    except (KeyError, ValueError, AttributeError):
        return {}


def _write(writer: tarfile.TarFile, name: str, content: Any, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444  # no time and no owner: equal videos, equal shards
    writer.addfile(info, content)
