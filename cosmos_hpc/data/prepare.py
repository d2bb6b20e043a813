"""Shards to a dataset that Energon reads: index, split and dataset.yaml, without a question asked."""

import contextlib
import io
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.flavors import BaseWebdatasetFactory

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import write_atomically
from cosmos_hpc.data.bad_videos import SkippedVideos
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.dataset_index import META_FOLDER, shard_counts, split_shards, split_sizes
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.task_encoder import ClipTaskEncoder

SAMPLE_PART = re.compile(r"(?!__[^/]*__(?:$|/))(?P<key>(?:.*/|)[^.]+)[.][^/]*$")
"""A file that belongs to a sample, as Energon sees it: its key ends at the first dot of its name."""

SPLITS = ("train", "val", "test")

DATASET_YAML = """\
__module__: megatron.energon
__class__: StandardWebdatasetFactory
sample_type:
  __module__: megatron.energon
  __class__: ImageSample
field_map:
  image: mp4
"""


class Shard(NamedTuple):
    """One tar as it lies on disk."""

    name: str
    """Path below the dataset's folder."""

    samples: int
    """Samples in it."""

    end: int
    """Offset at which the walk over its members ends."""


def prepare(
    root: Path,
    *,
    split: tuple[float, float, float] = (99, 1, 0),
    num_workers: int = 4,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Index a folder of shards and split it; nothing is written where that is done already.

    Folders `train` and `val` (and `test`) with shards in them are the split. Otherwise whole shards are dealt out by
    ratio, in the order of their names: the end of the data validates, so that neighbours don't leak.

    Args:
        root: Folder with the shards, at any depth.
        split: Parts for train, val and test, where no folders decide; each part above 0 gets a shard at least.
        num_workers: Processes that read shards.
        on_shard: Called with the steps done and all steps: each shard is looked into, then indexed.

    Returns:
        Samples in train, val and test.

    Raises:
        ConfigError: if there are no shards, one is damaged, a key is there twice, train or val would be empty, or a
            sample can't be read.
    """
    names = _shard_names(root)
    splits = _split_by_folder(root, names) or _split_by_ratio(root, names, split)
    told = _Told(on_shard, 2 * len(names))
    shards = []
    for name in names:
        shards.append(_look_into(root, name))
        told.one_more()
    if _is_current(root, shards):
        on_shard(told.total, told.total)
    else:
        _index(root, names, num_workers, told)
    if split_shards(root) != splits:
        write_atomically(
            root / META_FOLDER / "split.yaml", yaml.safe_dump({"split_parts": splits, "exclude": []}, sort_keys=False)
        )
    if not (root / META_FOLDER / "dataset.yaml").exists():
        write_atomically(root / META_FOLDER / "dataset.yaml", DATASET_YAML)
    for part, its_shards in splits.items():
        if its_shards:
            _load_one(root, part)
    return split_sizes(root)


class _Told:
    """Counts steps and tells of each."""

    def __init__(self, on_shard: Callable[[int, int], None], total: int) -> None:
        self.on_shard = on_shard
        self.total = total
        self.done = 0

    def one_more(self) -> None:
        self.done += 1
        self.on_shard(self.done, self.total)

    def energon_progress(self, steps: Iterable[int], total: int) -> Iterator[int]:
        """Energon takes one out of these after each shard."""
        for step in steps:
            self.one_more()
            yield step


def _shard_names(root: Path) -> list[str]:
    if not root.is_dir():
        raise ConfigError(f"{root} is not there: name the folder that `cosmos-hpc pack` wrote")
    names = sorted(
        str(tar.relative_to(root))
        for tar in root.rglob("*.tar")
        if not any(part.startswith(".") for part in tar.relative_to(root).parts)
    )
    if not names:
        raise ConfigError(f"{root} holds no .tar shards: run `cosmos-hpc pack VIDEOS --out {root}` first")
    for name in names:
        if set(name) & set("{},"):
            raise ConfigError(f"{root}/{name}: Energon takes braces and commas for patterns: rename the shard")
    return names


def _split_by_folder(root: Path, names: list[str]) -> dict[str, list[str]] | None:
    """The split that the folders make; none where train and val are not both there."""
    splits = {part: [name for name in names if name.startswith(f"{part}/")] for part in SPLITS}
    if not splits["train"] or not splits["val"]:
        return None
    outside = [name for name in names if name.partition("/")[0] not in SPLITS]
    if outside:
        raise ConfigError(f"{root}/{outside[0]} lies beside the folders train and val: move it into one of them")
    return splits


def _split_by_ratio(root: Path, names: list[str], ratio: tuple[float, float, float]) -> dict[str, list[str]]:
    if len(ratio) != len(SPLITS) or min(ratio) < 0 or ratio[0] <= 0 or ratio[1] <= 0:
        raise ConfigError(
            f"the split is {','.join(map(str, ratio))}, but takes parts for train, val and test, "
            "the first two above 0: such as 99,1,0"
        )
    wanted = sum(part > 0 for part in ratio)
    if len(names) < wanted:
        raise ConfigError(
            f"{root} holds {len(names)} shard{'s' * (len(names) > 1)}, but shards are split whole, so that "
            f"{'val' if len(names) < 2 else 'test'} would be empty: pack with a smaller --shard-size-mib or with "
            "--max-clips-per-shard, or put shards into folders train and val"
        )
    rest = [max(1, int(len(names) * part / sum(ratio))) if part > 0 else 0 for part in ratio[1:]]
    counts = [len(names) - sum(rest), *rest]
    while counts[0] < 1:
        counts[0], counts[counts.index(max(counts))] = counts[0] + 1, max(counts) - 1
    taken = iter(names)
    return {part: [next(taken) for _ in range(count)] for part, count in zip(SPLITS, counts, strict=True)}


def _look_into(root: Path, name: str) -> Shard:
    """Walk over a tar's headers, so that a damaged one is refused here and not in the middle of a run."""
    path, keys, last = root / name, 0, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                part = SAMPLE_PART.match(member.name)
                if member.isreg() and part is not None and part["key"] != last:
                    keys, last = keys + 1, part["key"]
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path} can't be read to its end as a tar ({error}): copy or pack it again") from error
    if keys == 0:
        raise ConfigError(f"{path} holds no samples: remove it")
    return Shard(name, keys, end)


def _is_current(root: Path, shards: list[Shard]) -> bool:
    """True if Energon's index describes the shards as they are."""
    if shard_counts(root) != {shard.name: shard.samples for shard in shards}:
        return False
    stamp = root / META_FOLDER / "index.uuid"
    return stamp.exists() and all(
        _indexed_end(root / shard.name) == shard.end and (root / shard.name).stat().st_mtime <= stamp.stat().st_mtime
        for shard in shards
    )


def _indexed_end(tar: Path) -> int | None:
    """The last offset in Energon's own index of a tar."""
    index = tar.with_name(f"{tar.name}.idx")
    if not index.exists() or index.stat().st_size < 8:
        return None
    with index.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return int(struct.unpack("<Q", file.read(8))[0])


def _index(root: Path, names: list[str], num_workers: int, told: _Told) -> None:
    """Let Energon write its index; a kill in the middle leaves a dataset that is refused, not one half read."""
    meta = root / META_FOLDER
    for stale in (".info.json", ".info.yaml", "index.sqlite"):
        (meta / stale).unlink(missing_ok=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            BaseWebdatasetFactory.prepare_dataset(
                root,
                names,
                split_parts_ratio=[("train", 1.0)],
                split_config=".split.partial.yaml",  # ours is written afterwards
                shuffle_seed=None,
                progress_fn=told.energon_progress,
                workers=min(max(num_workers, 1), len(names)),
            )
    except SystemExit:
        key = next((line.partition('"')[2].rstrip('"') for line in said.getvalue().splitlines() if '"' in line), "?")
        raise ConfigError(f"{root} holds the key {key} twice: rename one of the two videos and pack again") from None
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename} can't be written: the index lies beside the shards, so allow it"
        ) from error
    finally:
        (meta / ".split.partial.yaml").unlink(missing_ok=True)


def _load_one(root: Path, part: str) -> None:
    """Read one sample as training will, so that a dataset.yaml that doesn't fit is found now."""
    skipped, clip_decoder = SkippedVideos(), ClipDecoder(timeout_s=5.0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = get_val_dataset(
                root,
                split_part=part,
                worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=skipped.on_error),
                batch_size=1,
                limit=1,
                task_encoder=ClipTaskEncoder(
                    kind=ClipKind(1, 16, 16), seed=None, clip_decoder=clip_decoder, skipped=skipped
                ),
            )
            loader = get_loader(dataset, watchdog_timeout_seconds=None)
            loader.pin_memory = False  # on a machine without a GPU, torch would warn
            batch = next(iter(loader), None)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"{root / META_FOLDER / 'dataset.yaml'} doesn't fit its shards ({reason}): remove it and prepare again"
        ) from error
    finally:
        clip_decoder.close()
    if batch is None:
        raise ConfigError(f"{root}: no sample of the split {part} can be read: its shards must hold mp4 files")
