"""One call makes a dataset that Energon reads, or refuses what would fail later; a second one changes nothing."""

import itertools
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from small_videos import NUM_TRAIN, NUM_VAL

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data import shard_check
from cosmos_hpc.data.dataset_index import split_shards
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import check, prepare


@pytest.fixture
def shards(videos, tmp_path) -> Path:
    """Ten videos in five shards, no folders."""
    pack([videos / "train"], tmp_path, max_clips_per_shard=2)
    return tmp_path


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def test_folders_are_the_split(videos, tmp_path):
    for part, source in (("train", "train"), ("val", "val")):
        pack([videos / source], tmp_path / part, max_clips_per_shard=3)
    assert prepare(tmp_path, num_workers=2) == {"train": NUM_TRAIN, "val": NUM_VAL, "test": 0}
    assert all(name.startswith("val/") for name in split_shards(tmp_path)["val"])


def test_ratio_deals_out_whole_shards_the_last_ones_validating(shards):
    assert prepare(shards, split=(3, 1, 1), num_workers=2) == {"train": 6, "val": 2, "test": 2}
    assert split_shards(shards) == {
        "train": ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"],
        "val": ["shard-000003.tar"],
        "test": ["shard-000004.tar"],
    }


def test_smallest_part_still_gets_a_shard(shards):
    assert prepare(shards, split=(99, 1, 0), num_workers=1) == {"train": 8, "val": 2, "test": 0}
    assert prepare(shards, split=(1, 99, 0), num_workers=1) == {"train": 2, "val": 8, "test": 0}


def test_progress_is_told_as_shards_are_looked_into_and_indexed(shards):
    told = []
    prepare(shards, num_workers=1, on_shard=lambda done, total: told.append((done, total)))
    assert told == [(step, 10) for step in range(1, 11)]
    told.clear()
    prepare(shards, num_workers=1, on_shard=lambda done, total: told.append((done, total)))
    assert told == [*((step, 10) for step in range(1, 6)), (10, 10)]


def test_second_time_changes_nothing(shards):
    prepare(shards, num_workers=2)
    before = snapshot(shards)
    assert prepare(shards, num_workers=2) == {"train": 8, "val": 2, "test": 0}
    assert snapshot(shards) == before


def test_another_ratio_changes_the_split_alone(shards):
    prepare(shards, num_workers=1)
    before = snapshot(shards)
    prepare(shards, split=(3, 2, 0), num_workers=1)
    after = snapshot(shards)
    assert {path for path in after if after[path] != before[path]} == {str(shards / ".nv-meta/split.yaml")}


def test_added_shard_is_indexed(shards, videos):
    prepare(shards, num_workers=1)
    pack([videos / "val"], shards / "more")
    assert prepare(shards, num_workers=1) == {"train": 13, "val": 2, "test": 0}


def test_replaced_shard_of_the_same_name_and_count_is_indexed_again(shards, videos):
    prepare(shards, num_workers=1)
    uuid = (shards / ".nv-meta/index.uuid").read_text()
    replaced = shards / "shard-000001.tar"
    times = replaced.stat()
    replaced.unlink()
    pack([videos / "val" / "10.mp4", videos / "train" / "00.mp4"], shards / "new", max_clips_per_shard=2)
    (shards / "new/shard-000000.tar").rename(replaced)
    os.utime(replaced, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` or rsync would leave it
    with tarfile.open(replaced) as tar:
        assert len(tar.getnames()) == 2
    (shards / "shard-000000.tar").unlink()  # it holds 00, too
    (shards / "shard-000000.tar.idx").unlink()
    prepare(shards, num_workers=1)
    assert (shards / ".nv-meta/index.uuid").read_text() != uuid


def test_interrupted_prepare_leaves_no_dataset_and_is_mended_by_the_next(shards, monkeypatch):
    from megatron.energon.flavors import BaseWebdatasetFactory

    from cosmos_hpc.data.dataset_index import check_dataset

    prepare(shards, num_workers=1)
    (shards / "shard-000004.tar").unlink()

    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BaseWebdatasetFactory, "prepare_dataset", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(shards, num_workers=1)
    with pytest.raises(ConfigError, match="no Energon index"):
        check_dataset(str(shards))
    assert prepare(shards, num_workers=1)["train"] == 6


def test_one_shard_is_refused_with_the_mend(videos, tmp_path):
    pack([videos / "train"], tmp_path)
    with pytest.raises(
        ConfigError, match="holds 1 shard, but shards are split whole, so that val would be empty: pack"
    ):
        prepare(tmp_path)
    assert not (tmp_path / ".nv-meta").exists()


@pytest.mark.parametrize("ratio", [(0, 1, 0), (1, 0, 0), (2, 1, -1)])
def test_ratio_without_train_or_val_is_refused(shards, ratio):
    with pytest.raises(ConfigError, match="the first two above 0: such as 99,1,0"):
        prepare(shards, split=ratio)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gone is not there"):
        prepare(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"holds no \.tar shards: run `cosmos-hpc pack"):
        prepare(tmp_path)


def test_shard_beside_the_folders_is_refused(videos, tmp_path):
    for part in ("train", "val"):
        pack([videos / part], tmp_path / part)
    shutil.copy(tmp_path / "val/shard-000000.tar", tmp_path / "left.tar")
    with pytest.raises(ConfigError, match=r"left\.tar lies beside the folders train and val"):
        prepare(tmp_path)


def test_truncated_shard_is_refused_by_name(shards):
    shard = shards / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    with pytest.raises(ConfigError, match=r"shard-000002\.tar can't be read to its end as a tar"):
        prepare(shards)


def test_file_that_is_no_tar_is_refused_by_name(shards):
    (shards / "zeros.tar").write_bytes(b"x" * 5000)
    with pytest.raises(ConfigError, match=r"zeros\.tar can't be read"):
        prepare(shards)


def test_shard_without_samples_is_refused_by_name(shards):
    tarfile.open(shards / "nothing.tar", "w").close()
    with pytest.raises(ConfigError, match=r"nothing\.tar holds no samples"):
        prepare(shards)


def test_key_in_two_shards_is_refused_by_name(shards):
    shutil.copy(shards / "shard-000000.tar", shards / "copy.tar")
    with pytest.raises(ConfigError, match=r"holds the key 0[01] twice: rename one of the two videos"):
        prepare(shards, num_workers=1)


def test_dataset_without_videos_is_refused(tmp_path):
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            (tmp_path / f"{name}.txt").write_text("words")
            tar.add(tmp_path / f"{name}.txt", f"{name}.txt")
    with pytest.raises(ConfigError, match="no sample of the split train can be read: its shards must hold mp4 files"):
        prepare(tmp_path, num_workers=1)


def test_dataset_yaml_written_by_hand_is_kept(shards):
    meta = shards / ".nv-meta"
    meta.mkdir()
    crude = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (meta / "dataset.yaml").write_text(crude)
    prepare(shards, num_workers=1)
    assert (meta / "dataset.yaml").read_text() == crude


def test_dataset_yaml_that_energon_refuses_is_named(shards):
    meta = shards / ".nv-meta"
    meta.mkdir()
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: NoSuchFactory\n")
    with pytest.raises(ConfigError, match=r"\.nv-meta/dataset\.yaml doesn't fit its shards .*: remove it"):
        prepare(shards, num_workers=1)


def test_terminal_stays_clean(shards, capfd):
    prepare(shards, num_workers=2)
    assert capfd.readouterr() == ("", "")


# splits


def grouped(videos: Path, out: Path, pattern: str) -> None:
    pack([videos / "train"], out, max_clips_per_shard=2, group_by=pattern)


def test_shards_that_share_a_group_stay_on_one_side(videos, tmp_path):
    grouped(videos, tmp_path, r"/0([0-5])\.mp4|/0([6-9])\.mp4")
    assert prepare(tmp_path, split=(3, 2, 0), num_workers=1) == {"train": 6, "val": 4, "test": 0}
    shutil.rmtree(tmp_path / ".pack")
    for name in ("videos.jsonl", "left_out.jsonl"):
        (tmp_path / name).unlink()
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    grouped(videos, tmp_path, r"/(\d+)\.mp4")  # each video a group of its own
    lines = (tmp_path / "videos.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries[3:]:
        entry["group"] = "one drive"  # from the second shard on
    (tmp_path / "videos.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert prepare(tmp_path, split=(1, 1, 0), num_workers=1) == {"train": 2, "val": 8, "test": 0}
    with pytest.raises(ConfigError, match=r"5 shards, which share groups so that they make 2 part\(s\).*test would be"):
        prepare(tmp_path, split=(1, 1, 1), num_workers=1)


def test_group_on_both_sides_of_folders_is_refused(videos, tmp_path):
    for part in ("train", "val"):
        pack([videos / part], tmp_path / part, group_by="videos")
    with pytest.raises(ConfigError, match="videos of the group videos are in train and in val"):
        prepare(tmp_path, num_workers=1)


def test_shuffled_tars_are_another_split_and_always_the_same(shards):
    prepare(shards, split=(1, 1, 1), num_workers=1)
    by_name = split_shards(shards)
    prepare(shards, split=(1, 1, 1), shuffle_tars=True, num_workers=1)
    shuffled = split_shards(shards)
    assert shuffled != by_name
    assert sorted(itertools.chain(*shuffled.values())) == sorted(itertools.chain(*by_name.values()))
    prepare(shards, split=(1, 1, 1), shuffle_tars=True, num_workers=1)
    assert split_shards(shards) == shuffled


def test_fewer_samples_than_ranks_times_workers_are_refused(shards):
    with pytest.raises(ConfigError, match="holds 8 training samples, but 9 ranks x workers need at least one each"):
        prepare(shards, num_streams=9, num_workers=1)
    assert prepare(shards, num_streams=8, num_workers=1)["train"] == 8


def test_folder_that_is_not_packed_to_its_end_is_refused(shards):
    (shards / ".pack/000004.json").unlink()
    with pytest.raises(ConfigError, match="1 shards are not packed yet: the same `cosmos-hpc pack` goes on"):
        prepare(shards, num_workers=1)


# again, and checked


def test_killed_prepare_does_not_look_twice_into_a_shard(shards, monkeypatch):
    looked: list[str] = []
    look_into = shard_check.look_into

    def stop_at_the_third(root: Path, name: str):
        if len(looked) == 3:
            raise KeyboardInterrupt
        looked.append(name)
        return look_into(root, name)

    with monkeypatch.context() as patch:
        patch.setattr(shard_check, "look_into", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            prepare(shards, num_workers=1)
    monkeypatch.setattr(shard_check, "look_into", lambda root, name: looked.append(name) or look_into(root, name))
    os.utime(shards / "shard-000001.tar")  # changed since
    assert prepare(shards, num_workers=1)["train"] == 8
    assert Counter(looked) == {f"shard-{n:06d}.tar": 2 if n == 1 else 1 for n in range(5)}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_check_finds_what_is_not_as_indexed(shards, num_workers):
    prepare(shards, num_workers=1)
    before = snapshot(shards)
    assert check(shards, num_workers=num_workers) == {"train": 8, "val": 2, "test": 0}
    assert snapshot(shards) == before
    cut, swapped = shards / "shard-000001.tar", shards / "shard-000003.tar"
    os.truncate(cut, cut.stat().st_size - 2 * tarfile.RECORDSIZE // 3)
    shutil.copy(shards / "shard-000000.tar", swapped)
    with swapped.open("r+b") as file:
        file.write(bytes(700))  # a header that is none
    with pytest.raises(ConfigError, match=r"2 of 5 shards are not as indexed: shard-000001\.tar is damaged.*-000003"):
        check(shards, num_workers=num_workers)
    cut.unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 indexed shards, shard-000001\.tar for one"):
        check(shards)


def test_check_without_an_index_says_so(shards):
    with pytest.raises(ConfigError, match="has no Energon index"):
        check(shards)
