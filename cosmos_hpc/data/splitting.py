"""Which shards train, validate and test: whole shards, and those that share a group together."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError

SPLITS = ("train", "val", "test")
Ratio = tuple[float, float, float]


def split_by_folder(root: Path, names: Sequence[str], groups: Mapping[str, set[str]]) -> dict[str, list[str]] | None:
    """The split that folders train, val and test make; none where the first two are not both there.

    Raises:
        ConfigError: if a shard lies beside them, or a group is in two of them.
    """
    splits = {part: [name for name in names if name.startswith(f"{part}/")] for part in SPLITS}
    if not splits["train"] or not splits["val"]:
        return None
    outside = [name for name in names if name.partition("/")[0] not in SPLITS]
    if outside:
        raise ConfigError(f"{root}/{outside[0]} lies beside the folders train and val: move it into one of them")
    seen: dict[str, str] = {}
    for part, shards in splits.items():
        for group in sorted({group for shard in shards for group in groups.get(shard, ())}):
            if seen.setdefault(group, part) != part:
                raise ConfigError(
                    f"{root}: videos of the group {group} are in {seen[group]} and in {part}, so that the run would "
                    "validate on what it trains with: pack them together, or with --group-by none"
                )
    return splits


def split_by_ratio(
    root: Path, names: Sequence[str], groups: Mapping[str, set[str]], ratio: Ratio, shuffle_seed: int | None
) -> dict[str, list[str]]:
    """Deal shards out, in the order of their names or shuffled; each part above 0 gets something.

    Raises:
        ConfigError: if the ratio is none, or there are too few shards that share no group.
    """
    if len(ratio) != len(SPLITS) or min(ratio) < 0 or ratio[0] <= 0 or ratio[1] <= 0:
        raise ConfigError(
            f"the split is {','.join(map(str, ratio))}, but takes parts for train, val and test, "
            "the first two above 0: such as 99,1,0"
        )
    bundles = _bundles(names, groups)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(bundles)
    wanted = sum(part > 0 for part in ratio)
    if len(bundles) < wanted:
        what = f"{len(bundles)} shard{'s' * (len(bundles) != 1)}"
        if len(bundles) < len(names):
            what = f"{len(names)} shards, which share groups so that they make {len(bundles)} part(s)"
        raise ConfigError(
            f"{root} holds {what}, but shards are split whole, so that "
            f"{'val' if len(bundles) < 2 else 'test'} would be empty: pack with a smaller --shard-size-mib or with "
            "--max-clips-per-shard, or put shards into folders train and val"
        )
    return _dealt_out(bundles, len(names), ratio)


def _dealt_out(bundles: list[list[str]], num_shards: int, ratio: Ratio) -> dict[str, list[str]]:
    """The last bundles test, those before them validate, all others train."""
    left = list(bundles)
    splits: dict[str, list[str]] = {}
    for number, part in ((2, "test"), (1, "val")):
        still_to_come = sum(share > 0 for share in ratio[:number])
        goal = max(1, int(num_shards * ratio[number] / sum(ratio))) if ratio[number] > 0 else 0
        taken: list[list[str]] = []
        while goal and sum(map(len, taken)) < goal and len(left) > still_to_come:
            taken.insert(0, left.pop())
        splits[part] = [name for bundle in taken for name in bundle]
    splits["train"] = [name for bundle in left for name in bundle]
    return {part: splits[part] for part in SPLITS}


def _bundles(names: Sequence[str], groups: Mapping[str, set[str]]) -> list[list[str]]:
    """Shards that have to stay together, in the order of the first of each."""
    bundle_of: dict[str, list[str]] = {}
    by_group: dict[str, list[str]] = defaultdict(list)
    for name in names:
        bundle_of[name] = [name]
        for group in groups.get(name, ()):
            by_group[group].append(name)
    for first, *others in by_group.values():
        for other in others:
            if bundle_of[other] is not bundle_of[first]:
                merged, joined = bundle_of[first], bundle_of[other]
                merged += joined
                for name in joined:
                    bundle_of[name] = merged
    bundles = {id(bundle): bundle for bundle in (bundle_of[name] for name in names)}
    order = {name: number for number, name in enumerate(names)}
    return [sorted(bundle, key=order.__getitem__) for bundle in bundles.values()]
