"""Video files to WebDataset shards, in parallel and resumable: what can't be used is left out by name and reason.

What a call is to do is planned first and written down, in `out`/.pack: which video goes into which shard. A shard is
then one piece of work that depends on no other, and is done once its result is written beside the plan. So a killed
call goes on, and tasks of an array share the shards out.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import write_atomically
from cosmos_hpc.data.pack_shard import MIB, PackSettings, PlannedVideo, ShardResult, pack_shard
from cosmos_hpc.data.video_names import NamedVideo, all_videos

PLAN_FOLDER = ".pack"
PACKED_LIST, LEFT_OUT_LIST = "videos.jsonl", "left_out.jsonl"


class PackSummary(NamedTuple):
    """What came of the videos."""

    shards: int
    """Tar files written."""

    videos: int
    """Videos in them, parts of long ones counted each."""

    bytes: int
    """Size of these videos."""

    refused: list[tuple[Path, str]]
    """Each file left out, with the reason."""


@dataclass(frozen=True)
class PackPlan:
    """Which video goes into which shard."""

    settings: PackSettings
    shards: list[list[PlannedVideo]]
    duplicates: list[tuple[str, str]]
    """Files that are left out because of another one, each with the reason."""

    def to_json(self) -> str:
        """As it is written beside the shards."""
        return json.dumps(
            {"settings": dataclasses.asdict(self.settings), "shards": self.shards, "duplicates": self.duplicates}
        )

    @classmethod
    def read(cls, out: Path) -> "PackPlan":
        """The plan of a folder.

        Raises:
            ConfigError: if there is none.
        """
        try:
            found = json.loads(_plan_file(out).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{out} holds no plan of `cosmos-hpc pack`: call that first") from None
        shards = [[PlannedVideo(*video) for video in shard] for shard in found["shards"]]
        duplicates = [(path, reason) for path, reason in found["duplicates"]]
        return cls(PackSettings(**found["settings"]), shards, duplicates)


def pack(
    sources: Sequence[Path],
    out: Path,
    settings: PackSettings | None = None,
    *,
    num_workers: int = 1,
    on_video: Callable[[Path], None] = lambda video: None,
    **changes: object,
) -> PackSummary:
    """Write videos into `out`/shard-000000.tar and on, in the field mp4; go on where an equal call was killed.

    A shard appears under its name only when it is whole. `out`/videos.jsonl tells what is in them, left_out.jsonl what
    is not, and why.

    Args:
        sources: As `video_names.all_videos` takes them.
        out: Folder of the shards; made where missing.
        settings: What to make of them.
        num_workers: Shards that are written at the same time.
        on_video: Called after each file, packed or refused.
        changes: Settings by their names, in place of `settings`.

    Raises:
        ConfigError: if there is no video, none is usable, or `out` holds shards of another call.
    """
    plan = plan_pack(sources, out, settings or PackSettings(**changes))  # type: ignore[arg-type]
    _work(plan, out, range(len(plan.shards)), num_workers, on_video)
    return finish_pack(out)


@dataclass(frozen=True)
class PackTask:
    """One task of several that carry out the plan in a folder."""

    out: Path
    index: int
    count: int
    num_workers: int

    def __call__(self) -> None:
        """Write every `count`-th shard; the task that is last also writes the lists."""
        plan = PackPlan.read(self.out)
        numbers = range(self.index, len(plan.shards), self.count)
        _work(plan, self.out, numbers, self.num_workers, lambda video: None)
        if not _missing(plan, self.out):
            finish_pack(self.out)


def plan_pack(sources: Sequence[Path], out: Path, settings: PackSettings) -> PackPlan:
    """Decide which video goes where, and write it down.

    Raises:
        ConfigError: as `pack`.
    """
    settings.check()
    videos = all_videos(sources)
    groups = _groups(videos, settings.group_by)
    planned, duplicates = [], []
    first_of = _first_of_duplicates(videos) if settings.probe else {}
    for video in sorted(videos, key=lambda video: groups[video.key] or ""):
        if video.key in first_of:
            duplicates.append((str(video.path), f"it is a copy of {first_of[video.key]}"))
            continue
        stat = video.path.stat()
        path = str(video.path.resolve())
        planned.append(PlannedVideo(path, video.key, groups[video.key], stat.st_size, stat.st_mtime_ns))
    plan = PackPlan(settings, _shards(planned, settings), duplicates)
    file = _plan_file(out)
    if file.exists() and file.read_text(encoding="utf-8") == plan.to_json():
        return plan
    if any(out.glob("shard-*.tar")):
        raise ConfigError(
            f"{out} holds shards already, of other videos or settings: remove them, or choose another folder for --out"
        )
    shutil.rmtree(file.parent, ignore_errors=True)
    write_atomically(file, plan.to_json())
    return plan


def finish_pack(out: Path) -> PackSummary:
    """Write the lists of what was packed and what was left out.

    Raises:
        ConfigError: if no video could be used.
    """
    plan = PackPlan.read(out)
    results = [ShardResult.read(_result_file(out, number)) for number in range(len(plan.shards))]
    packed = [entry for result in results for entry in result.packed]
    refused = plan.duplicates + [each for result in results for each in result.refused]
    _write_lines(out / PACKED_LIST, packed)
    _write_lines(out / LEFT_OUT_LIST, ({"path": path, "reason": reason} for path, reason in refused))
    if not packed:
        path, reason = refused[0]
        raise ConfigError(f"none of {len(refused)} videos can be used, {path} for one: {reason}")
    return PackSummary(
        shards=sum(bool(result.packed) for result in results),
        videos=len(packed),
        bytes=sum(result.video_bytes for result in results),
        refused=[(Path(path), reason) for path, reason in refused],
    )


def unfinished_shards(folder: Path) -> int:
    """Shards that a call of `pack` has planned for a folder and not come to; what was done to others is no matter."""
    if not _plan_file(folder).exists():
        return 0
    return sum(not _result_file(folder, number).exists() for number in range(len(PackPlan.read(folder).shards)))


def packed_groups(folder: Path) -> dict[str, set[str]]:
    """The groups in each shard of a folder, by the shard's file name; empty where `pack` has not written it."""
    groups: dict[str, set[str]] = defaultdict(set)
    if (folder / PACKED_LIST).exists():
        with (folder / PACKED_LIST).open(encoding="utf-8") as file:
            for entry in map(json.loads, file):
                if entry["group"] is not None:
                    groups[entry["shard"]].add(entry["group"])
    return dict(groups)


def _work(
    plan: PackPlan, out: Path, numbers: Iterable[int], num_workers: int, on_video: Callable[[Path], None]
) -> None:
    """Write the shards that are not there, and tell of all."""
    missing = set(_missing(plan, out))
    todo = [number for number in numbers if number in missing]
    for number in set(numbers) - missing:
        _tell(plan.shards[number], on_video)
    if num_workers <= 1 or len(todo) <= 1:
        for number in todo:
            _write_shard(plan, out, number)
            _tell(plan.shards[number], on_video)
        return
    with ProcessPoolExecutor(min(num_workers, len(todo)), mp_context=get_context("fork")) as workers:
        futures = {workers.submit(_write_shard, plan, out, number): number for number in todo}
        try:
            for future in as_completed(futures):
                future.result()
                _tell(plan.shards[futures[future]], on_video)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shard(plan: PackPlan, out: Path, number: int) -> None:
    result = pack_shard(out / _shard_name(number), plan.shards[number], plan.settings)
    write_atomically(_result_file(out, number), result.to_json())


def _tell(videos: Iterable[PlannedVideo], on_video: Callable[[Path], None]) -> None:
    for video in videos:
        on_video(Path(video.path))


def _missing(plan: PackPlan, out: Path) -> list[int]:
    """Shards without a result, or whose tar is not the one that the result tells of."""
    missing = []
    for number in range(len(plan.shards)):
        file, tar = _result_file(out, number), out / _shard_name(number)
        size = tar.stat().st_size if tar.exists() else 0
        if not file.exists() or ShardResult.read(file).tar_bytes != size:
            missing.append(number)
    return missing


def _groups(videos: Sequence[NamedVideo], pattern: str | None) -> dict[str, str | None]:
    """What each video belongs to, by its key: what the pattern finds in its path, or its folder if all lie in some."""
    if pattern == "none":
        return dict.fromkeys((video.key for video in videos), None)
    if pattern is None:
        folders = {video.folder for video in videos}
        are_drives = len(folders) > 1 and "" not in folders
        return {video.key: video.folder if are_drives else None for video in videos}
    groups: dict[str, str | None] = {}
    for video in videos:
        found = re.search(pattern, str(video.path))
        if found is None:
            raise ConfigError(f"--group-by {pattern} finds nothing in {video.path}: choose a pattern that fits all")
        groups[video.key] = "-".join(group or "" for group in found.groups()) or found.group()
    return groups


def _first_of_duplicates(videos: Sequence[NamedVideo]) -> dict[str, Path]:
    """Keys of exact copies, with the file that each is a copy of; only files of one size are read."""
    by_size: dict[int, list[NamedVideo]] = defaultdict(list)
    for video in videos:
        by_size[video.path.stat().st_size].append(video)
    copies: dict[str, Path] = {}
    for size, group in by_size.items():
        first: dict[bytes, Path] = {}
        for video in group if size > 0 and len(group) > 1 else ():
            try:
                with video.path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            except OSError:
                continue  # what packs it tells of it
            if digest in first:
                copies[video.key] = first[digest]
            first.setdefault(digest, video.path)
    return copies


def _shards(videos: Sequence[PlannedVideo], settings: PackSettings) -> list[list[PlannedVideo]]:
    shards: list[list[PlannedVideo]] = []
    num_bytes = 0
    for video in videos:
        is_full = num_bytes + video.num_bytes > settings.shard_size_mib * MIB
        if not shards or is_full or len(shards[-1]) == settings.max_clips_per_shard:
            shards.append([])
            num_bytes = 0
        shards[-1].append(video)
        num_bytes += video.num_bytes
    return shards


def _write_lines(path: Path, entries: Iterable[dict[str, object]]) -> None:
    write_atomically(path, "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries))


def _plan_file(out: Path) -> Path:
    return out / PLAN_FOLDER / "plan.json"


def _result_file(out: Path, number: int) -> Path:
    return out / PLAN_FOLDER / f"{number:06d}.json"


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"
