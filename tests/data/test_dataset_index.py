"""The index is read without torch, and a dataset that can't be trained on is refused before a job is."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_videos import NUM_TRAIN, NUM_VAL

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.dataset_index import check_dataset, split_sizes

INFO = '{"energon_version": "7.4.1", "shard_counts": {"a/s-000.tar": 5, "a/s-001.tar": 7, "b.tar": 2}}'


@pytest.fixture
def indexed_by_hand(tmp_path) -> Path:
    """What `energon prepare` writes: names collapsed into patterns."""
    meta = tmp_path / ".nv-meta"
    meta.mkdir()
    (meta / ".info.json").write_text(INFO)
    split = {"split_parts": {"train": ["a/s-{000..001}.tar"], "val": ["b.tar"], "test": []}, "exclude": []}
    (meta / "split.yaml").write_text(yaml.safe_dump(split))
    return tmp_path


def test_sizes_are_those_of_the_packed_videos(dataset):
    assert split_sizes(dataset) == {"train": NUM_TRAIN, "val": NUM_VAL, "test": 0}


def test_patterns_of_energon_expand(indexed_by_hand):
    assert split_sizes(indexed_by_hand) == {"train": 12, "val": 2, "test": 0}


def test_excluded_shards_do_not_count(indexed_by_hand):
    split = {"split_parts": {"train": ["a/s-{000..001}.tar"], "val": ["b.tar"]}, "exclude": ["a/s-000.tar"]}
    (indexed_by_hand / ".nv-meta/split.yaml").write_text(yaml.safe_dump(split))
    assert split_sizes(indexed_by_hand) == {"train": 7, "val": 2}


def test_older_index_in_yaml_is_read(indexed_by_hand):
    meta = indexed_by_hand / ".nv-meta"
    (meta / ".info.json").rename(meta / ".info.yaml")  # JSON is YAML
    assert split_sizes(indexed_by_hand)["train"] == 12


def test_torn_index_names_the_shard_and_the_command(indexed_by_hand):
    (indexed_by_hand / ".nv-meta/.info.json").write_text('{"shard_counts": {"b.tar": 2}}')
    with pytest.raises(ConfigError, match=r"a/s-000\.tar, which the index doesn't count: run `cosmos-hpc prepare"):
        split_sizes(indexed_by_hand)


def test_prepared_dataset_passes(dataset):
    check_dataset(str(dataset))


def test_metadataset_file_passes(tmp_path):
    (tmp_path / "blend.yaml").write_text("__class__: MetadatasetV2")
    check_dataset(str(tmp_path / "blend.yaml"))


@pytest.mark.parametrize("path", [None, ""])
def test_missing_setting_is_refused(path):
    with pytest.raises(ConfigError, match=r"data\.path is not set: name the folder"):
        check_dataset(path)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path is .*gone, which is not there"):
        check_dataset(str(tmp_path / "gone"))


def test_folder_without_index_is_refused_with_the_command(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        check_dataset(str(tmp_path))
    assert str(refusal.value) == (
        f"data.path is {tmp_path}, which has no Energon index: run `cosmos-hpc prepare {tmp_path}` on it first"
    )


def test_empty_split_is_refused_only_where_it_is_needed(indexed_by_hand):
    check_dataset(str(indexed_by_hand))
    with pytest.raises(ConfigError, match="whose split test is empty: put shards into"):
        check_dataset(str(indexed_by_hand), needed=("test",))


def test_index_is_read_without_torch(dataset):
    program = (
        "import sys; from cosmos_hpc.data.dataset_index import check_dataset, split_sizes;"
        f"check_dataset({str(dataset)!r}); assert split_sizes(__import__('pathlib').Path({str(dataset)!r}));"
        "assert not {'torch', 'megatron', 'decord', 'av', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
