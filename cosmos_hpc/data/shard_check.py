"""What is in the tars of a dataset: looked into in parallel, remembered, and checked to their last byte."""

import json
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.dataset_index import META_FOLDER

SAMPLE_PART = re.compile(r"(?!__[^/]*__(?:$|/))(?P<key>(?:.*/|)[^.]+)[.][^/]*$")
"""A file that belongs to a sample, as Energon sees it: its key ends at the first dot of its name."""

REMEMBERED = "looked_into.jsonl"
READ_AT_ONCE = 1 << 20


class Shard(NamedTuple):
    """One tar as it lies on disk."""

    name: str
    """Path below the dataset's folder."""

    samples: int
    """Samples in it."""

    end: int
    """Offset at which the walk over its members ends."""

    fields: tuple[str, ...]
    """What its samples consist of, such as `mp4` and `mask.png`."""


def look_into_all(root: Path, names: Sequence[str], num_workers: int, on_shard: Callable[[], None]) -> list[Shard]:
    """Walk over the headers of all shards, so that a damaged one is refused here and not in the middle of a run.

    What was found in a shard is remembered in .nv-meta until that changes, so that a killed call goes on.

    Raises:
        ConfigError: if one can't be read or holds no samples.
    """
    known = _remembered(root)
    found: dict[str, Shard] = {}
    for name in names:
        shard = known.get((name, *_stamp(root / name)))
        if shard is not None:
            found[name] = shard
            on_shard()
    missing = [name for name in names if name not in found]
    if missing:
        (root / META_FOLDER).mkdir(exist_ok=True)
    for shard in _in_parallel(look_into, root, missing, num_workers):
        found[shard.name] = shard
        with (root / META_FOLDER / REMEMBERED).open("a", encoding="utf-8") as file:
            file.write(json.dumps([*shard, *_stamp(root / shard.name)]) + "\n")
        on_shard()
    return [found[name] for name in names]


def check_all(root: Path, names: Sequence[str], num_workers: int, on_shard: Callable[[], None]) -> int:
    """Read every tar to its last byte and compare it with Energon's index of it.

    Returns:
        Samples.

    Raises:
        ConfigError: naming each shard that is damaged or was changed behind the index.
    """
    samples, complaints = 0, []
    for result in _in_parallel(_check, root, names, num_workers):
        if isinstance(result, str):
            complaints.append(result)
        else:
            samples += result
        on_shard()
    if complaints:
        raise ConfigError(
            f"{len(complaints)} of {len(names)} shards are not as indexed: {'; '.join(sorted(complaints))}"
        )
    return samples


def look_into(root: Path, name: str) -> Shard:
    """Walk over a tar's headers.

    Raises:
        ConfigError: if it can't be read to its end or holds no samples.
    """
    keys, last, end = 0, None, 0
    fields: set[str] = set()
    try:
        with tarfile.open(root / name, "r:") as tar:
            for member in tar:
                part = SAMPLE_PART.match(member.name)
                if not member.isreg() or part is None:
                    continue
                fields.add(member.name[len(part["key"]) + 1 :])
                if part["key"] != last:
                    keys, last = keys + 1, part["key"]
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        message = f"{root / name} can't be read to its end as a tar ({error}): copy or pack it again"
        raise ConfigError(message) from error
    if keys == 0:
        raise ConfigError(f"{root / name} holds no samples: remove it")
    return Shard(name, keys, end, tuple(sorted(fields)))


def indexed_offsets(tar: Path) -> list[int]:
    """Where Energon's own index of a tar says that its samples begin, and where the last ends; empty without one."""
    index = tar.with_name(f"{tar.name}.idx")
    raw = index.read_bytes() if index.exists() else b""
    return [offset for (offset,) in struct.iter_unpack("<Q", raw[: len(raw) // 8 * 8])]


def changed_shard(root: Path, name: str) -> str | None:
    """What a look at sizes and times alone finds wrong with an indexed shard, in no time; none where nothing is."""
    shard, index = root / name, indexed_offsets(root / name)
    try:
        stat = shard.stat()
    except OSError as error:
        return f"{name} can't be read ({error.strerror})"
    if not index:
        return f"{name} has no index"
    if stat.st_size < index[-1]:
        return f"{name} has {stat.st_size} bytes, but samples are indexed up to {index[-1]}"
    stamp = root / META_FOLDER / "index.uuid"
    if stamp.exists() and stat.st_mtime > stamp.stat().st_mtime:
        return f"{name} was changed after it was indexed"
    return None


def _check(root: Path, name: str) -> int | str:
    """Number of samples, or what is wrong."""
    offsets = indexed_offsets(root / name)
    if not offsets:
        return f"{name} has no index"
    begins: list[int] = []
    last = None
    try:
        with tarfile.open(root / name, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                while content is not None and content.read(READ_AT_ONCE):
                    pass
                part = SAMPLE_PART.match(member.name)
                if member.isreg() and part is not None and part["key"] != last:
                    begins, last = [*begins, member.offset], part["key"]
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        return f"{name} is damaged ({error})"
    for number, (indexed, found) in enumerate(zip(offsets, [*begins, end], strict=False)):
        if indexed != found:
            return f"{name} is not what was indexed, from sample {number} on"
    if len(offsets) != len(begins) + 1:
        return f"{name} holds {len(begins)} samples, but {len(offsets) - 1} are indexed"
    return len(begins)


def _in_parallel(
    work: Callable[[Path, str], "Shard | int | str"], root: Path, names: Sequence[str], num_workers: int
) -> Iterator:
    if num_workers <= 1 or len(names) <= 1:
        yield from (work(root, name) for name in names)
        return
    with ProcessPoolExecutor(min(num_workers, len(names)), mp_context=get_context("fork")) as workers:
        futures = [workers.submit(work, root, name) for name in names]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _remembered(root: Path) -> dict[tuple[str, int, int], Shard]:
    file = root / META_FOLDER / REMEMBERED
    known = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            name, samples, end, fields, size, time = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        known[name, size, time] = Shard(name, samples, end, tuple(fields))
    return known


def _stamp(tar: Path) -> tuple[int, int]:
    stat = tar.stat()
    return stat.st_size, stat.st_mtime_ns
