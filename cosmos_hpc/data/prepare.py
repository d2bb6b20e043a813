"""Shards to a dataset that Energon reads: index, split and dataset.yaml, without a question asked."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.flavors import BaseWebdatasetFactory

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import write_atomically
from cosmos_hpc.data.bad_videos import SkippedVideos
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.dataset_index import META_FOLDER, shard_counts, split_shards, split_sizes
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.pack import packed_groups, unfinished_shards
from cosmos_hpc.data.shard_check import Shard, check_all, indexed_offsets, look_into_all
from cosmos_hpc.data.splitting import Ratio, split_by_folder, split_by_ratio
from cosmos_hpc.data.task_encoder import ClipTaskEncoder

SHUFFLE_SEED = 42
"""Energon's own."""

VIDEOS_ALONE = """\
__module__: megatron.energon
__class__: StandardWebdatasetFactory
sample_type:
  __module__: megatron.energon
  __class__: ImageSample
field_map:
  image: mp4
"""
"""Samples as the guide's wizard maps them: other tools read them, too."""

ALL_FIELDS = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""
"""Samples with all that they consist of, such as masks, several cameras or images; nothing is mapped."""


def prepare(
    root: Path,
    *,
    split: Ratio = (99, 1, 0),
    shuffle_tars: bool = False,
    num_workers: int = 4,
    num_streams: int = 1,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Index a folder of shards and split it; nothing is written where that is done already.

    Folders `train` and `val` (and `test`) with shards in them are the split. Otherwise whole shards are dealt out by
    ratio, in the order of their names: the end of the data validates, so that neighbours don't leak. Shards that
    `pack` gave videos of one group stay together.

    Args:
        root: Folder with the shards, at any depth.
        split: Parts for train, val and test, where no folders decide; each part above 0 gets a shard at least.
        shuffle_tars: Deal shards out in an order of chance, always the same, instead of that of their names.
        num_workers: Processes that read shards.
        num_streams: Ranks x workers that are to share the training samples; fewer samples are refused.
        on_shard: Called with the steps done and all steps: each shard is looked into, then indexed.

    Returns:
        Samples in train, val and test.

    Raises:
        ConfigError: if there are no shards, one is damaged, a key is there twice, train or val would be empty, a group
            is on both sides, there are too few samples, or a sample can't be read.
    """
    names = _shard_names(root)
    groups = _groups(root, names)
    splits = split_by_folder(root, names, groups)
    if splits is None:
        splits = split_by_ratio(root, names, groups, split, SHUFFLE_SEED if shuffle_tars else None)
    told = _Told(on_shard, 2 * len(names))
    shards = look_into_all(root, names, num_workers, told.one_more)
    _check_samples(root, shards, splits["train"], num_streams)
    if _is_current(root, shards):
        on_shard(told.total, told.total)
    else:
        _index(root, names, num_workers, told)
    if split_shards(root) != splits:
        write_atomically(
            root / META_FOLDER / "split.yaml", yaml.safe_dump({"split_parts": splits, "exclude": []}, sort_keys=False)
        )
    if not (root / META_FOLDER / "dataset.yaml").exists():
        fields = {field for shard in shards for field in shard.fields}
        content = VIDEOS_ALONE if fields <= {"mp4", "json"} else ALL_FIELDS
        write_atomically(root / META_FOLDER / "dataset.yaml", content)
    for part, its_shards in splits.items():
        if its_shards:
            _load_one(root, part)
    return split_sizes(root)


def check(
    root: Path, *, num_workers: int = 4, on_shard: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, int]:
    """Compare every shard, to its last byte, with the index; nothing is written.

    Returns:
        Samples in train, val and test.

    Raises:
        ConfigError: naming the shards that are not as indexed, or where there is no index.
    """
    sizes = split_sizes(root)
    names = sorted(name for names in split_shards(root).values() for name in names)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ConfigError(
            f"{root} lacks {len(missing)} indexed shards, {missing[0]} for one: bring it back, or prepare"
        )
    told = _Told(on_shard, len(names))
    samples = check_all(root, names, num_workers, told.one_more)
    if samples != sum(sizes.values()):
        raise ConfigError(f"{root} holds {samples} samples, but {sum(sizes.values())} are indexed: prepare it again")
    return sizes


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


def _groups(root: Path, names: list[str]) -> dict[str, set[str]]:
    """What `pack` kept together, by shard; a folder that it has not finished is refused."""
    groups: dict[str, set[str]] = {}
    for folder in sorted({(root / name).parent for name in names}):
        if unfinished := unfinished_shards(folder):
            raise ConfigError(f"{folder}: {unfinished} shards are not packed yet: the same `cosmos-hpc pack` goes on")
        below = folder.relative_to(root)
        groups |= {str(below / shard): found for shard, found in packed_groups(folder).items()}
    return groups


def _check_samples(root: Path, shards: list[Shard], train: list[str], num_streams: int) -> None:
    samples = sum(shard.samples for shard in shards if shard.name in set(train))
    if samples < num_streams:
        raise ConfigError(
            f"{root} holds {samples} training samples, but {num_streams} ranks x workers need at least one each: "
            "use fewer, or pack more videos or parts of them (--split-s)"
        )


def _is_current(root: Path, shards: list[Shard]) -> bool:
    """True if Energon's index describes the shards as they are."""
    if shard_counts(root) != {shard.name: shard.samples for shard in shards}:
        return False
    stamp = root / META_FOLDER / "index.uuid"
    return stamp.exists() and all(
        indexed_offsets(root / shard.name)[-1:] == [shard.end]
        and (root / shard.name).stat().st_mtime <= stamp.stat().st_mtime
        for shard in shards
    )


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
                    kind_of=lambda _stream, _number: ClipKind(1, 16, 16),
                    seed=None,
                    clip_decoder=clip_decoder,
                    skipped=skipped,
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
