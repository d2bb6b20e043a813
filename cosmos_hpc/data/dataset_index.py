"""What an Energon dataset holds, read from its index alone: light enough for a login node."""

import json
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

from cosmos_hpc.config.errors import ConfigError

META_FOLDER = ".nv-meta"


def is_remote(path: str | None) -> bool:
    """True for a dataset in an object store: s3:// or msc://."""
    return path is not None and "://" in path


def tells_its_size(path: str) -> bool:
    """False for what is only opened by the ranks: a Metadataset, or a dataset in an object store."""
    return not is_remote(path) and not is_metadataset(Path(path))


def energon_path(path: str) -> str | Path:
    """A dataset as Energon takes it, which reads s3:// through multi-storage-client's own profile of the bucket."""
    if path.startswith("s3://"):
        return f"msc://_s3-{path.removeprefix('s3://')}"
    return path if is_remote(path) else Path(path)


def is_metadataset(path: Path) -> bool:
    """True for a Metadataset: a YAML file that blends several datasets."""
    return path.is_file() and path.suffix in (".yaml", ".yml")


def metadataset_parts(path: Path, split: str) -> list[Path]:
    """The datasets that a Metadataset reads for a split, each once; relative paths begin at its own folder."""
    found: dict[Path, None] = {}

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("path"), str):
                found[path.parent / node["path"]] = None
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)

    collect((yaml.safe_load(path.read_text()).get("splits") or {}).get(split))
    return list(found)


def shard_counts(path: Path) -> dict[str, int]:
    """Samples of each shard, by the shard's name relative to the dataset; empty where there is no index."""
    meta = path / META_FOLDER
    if (meta / ".info.json").is_file():
        info = json.loads((meta / ".info.json").read_text())
    elif (meta / ".info.yaml").is_file():
        info = yaml.safe_load((meta / ".info.yaml").read_text())
    else:
        return {}
    return {str(name): int(count) for name, count in info["shard_counts"].items()}


def split_shards(path: Path) -> dict[str, list[str]]:
    """Names of the shards of each split, in order; empty where there is no split file."""
    for name in ("split.yaml", "split.json"):  # JSON is YAML
        file = path / META_FOLDER / name
        if file.is_file():
            content = yaml.safe_load(file.read_text())
            excluded = {name for pattern in content.get("exclude") or [] for name in braceexpand(pattern)}
            return {
                split: [name for pattern in patterns or [] for name in braceexpand(pattern) if name not in excluded]
                for split, patterns in content["split_parts"].items()
            }
    return {}


def split_sizes(path: Path) -> dict[str, int]:
    """Samples in each split of an indexed dataset.

    Args:
        path: Folder that holds `.nv-meta`.

    Raises:
        ConfigError: if the index is missing, torn, or names a shard that it doesn't count.
    """
    counts, splits = shard_counts(path), split_shards(path)
    if not counts or not splits:
        raise ConfigError(f"{path} has no Energon index: run `cosmos-hpc prepare {path}` on it first")
    try:
        return {split: sum(counts[name] for name in names) for split, names in splits.items()}
    except KeyError as error:
        raise ConfigError(
            f"{path}: split.yaml names shard {error.args[0]}, which the index doesn't count: "
            f"run `cosmos-hpc prepare {path}` again"
        ) from None


def check_dataset(path: str | None, needed: tuple[str, ...] = ("train", "val"), setting: str = "data.path") -> None:
    """Refuse a dataset that a run could not read.

    A Metadataset (a YAML file) passes when the file exists, and a dataset in an object store without a look: what they
    hold is checked when the ranks open it.

    Args:
        path: Value of the setting.
        needed: Splits that must hold samples.
        setting: Its name, for messages.

    Raises:
        ConfigError: if the path is not set or not there, has no Energon index, or a needed split is empty.
    """
    if not path:
        raise ConfigError(f"{setting} is not set: name the folder of a dataset that `cosmos-hpc prepare` has indexed")
    if is_remote(path):
        if not path.startswith(("s3://", "msc://")):
            raise ConfigError(f"{setting} is {path}, but takes a folder, s3://BUCKET/FOLDER or msc://PROFILE/FOLDER")
        return
    folder = Path(path)
    if is_metadataset(folder):
        return
    if not folder.is_dir():
        raise ConfigError(
            f"{setting} is {path}, which is not there: name a folder that `cosmos-hpc prepare` has indexed"
        )
    if not shard_counts(folder) or not split_shards(folder):
        raise ConfigError(
            f"{setting} is {path}, which has no Energon index: run `cosmos-hpc prepare {path}` on it first"
        )
    sizes = split_sizes(folder)
    for split in needed:
        if not sizes.get(split):
            raise ConfigError(
                f"{setting} is {path}, whose split {split} is empty: put shards into {path}/{split}/ "
                f"(or pack into more shards, which are split whole) and run `cosmos-hpc prepare {path}` again"
            )
