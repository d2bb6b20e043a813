"""Shards hold the very bytes of the videos under unique keys; what can't be used is left out by name."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest
from small_videos import NUM_TRAIN, film, with_index_first

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.pack import find_videos, pack
from cosmos_hpc.data.prepare import prepare


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture
def clip(videos) -> Path:
    return videos / "train" / "00.mp4"


def test_shards_hold_the_original_bytes_in_order(videos, tmp_path):
    summary = pack([videos / "train"], tmp_path, max_clips_per_shard=4)
    assert summary[:2] == (3, NUM_TRAIN)
    shards = sorted(tmp_path.iterdir())
    assert [shard.name for shard in shards] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    packed = {name: raw for shard in shards for name, raw in members(shard).items()}
    assert packed == {video.name: video.read_bytes() for video in sorted((videos / "train").iterdir())}
    assert summary.bytes == sum(map(len, packed.values()))
    assert summary.refused == []


def test_real_film_keeps_its_bytes(tmp_path):
    pack([film("bikes.mp4")], tmp_path)
    assert members(tmp_path / "shard-000000.tar") == {"bikes.mp4": film("bikes.mp4").read_bytes()}


def test_shard_closes_before_it_exceeds_its_size(clip, tmp_path):
    for number in range(4):
        shutil.copy(clip, tmp_path / f"{number}.mp4")
    two_and_a_half_mib = 2.5 * clip.stat().st_size / 2**20
    assert pack([tmp_path], tmp_path / "out", shard_size_mib=two_and_a_half_mib).shards == 2
    assert pack([tmp_path], tmp_path / "one-each", shard_size_mib=1e-6).shards == 4


def test_equal_videos_make_equal_shards(videos, tmp_path):
    for name in ("a", "b"):
        pack([videos / "val"], tmp_path / name)
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_keys_are_unique_and_readable_whatever_the_files_are_called(clip, tmp_path):
    source, out = tmp_path / "videos", tmp_path / "out"
    names = [
        "day.1/cam 0.mp4",
        "day 1/cam.0.mp4",
        "雨の日.mp4",
        "clip...v2.MP4",
        "a-b.mp4",
        "a/b.mp4",
        "ü" * 120 + ".mov",
    ]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, source / name)
    pack([source], out)
    keys = [name.removesuffix(".mp4") for name in members(out / "shard-000000.tar")]
    assert keys == ["a-b", "a-b-2", "clip_v2", "day_1-cam_0", "day_1-cam_0-2", "ü" * 120, "雨の日"]
    for part in ("train", "val"):
        (out / part).mkdir()
    shutil.copy(out / "shard-000000.tar", out / "train")
    (out / "shard-000000.tar").unlink()
    pack([film("bikes.mp4")], out / "val")
    assert prepare(out, num_workers=1) == {"train": 7, "val": 1, "test": 0}  # Energon finds them under these keys


def test_file_named_twice_is_packed_once_and_namesakes_both(clip, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(clip, tmp_path / folder / "clip.mp4")
    pack([tmp_path / "a", tmp_path / "b", tmp_path / "a/clip.mp4"], tmp_path / "out")
    assert list(members(tmp_path / "out/shard-000000.tar")) == ["clip.mp4", "clip-2.mp4"]


def test_unusable_files_are_left_out_each_with_its_reason(clip, tmp_path):
    source, seen = tmp_path / "videos", []
    source.mkdir()
    shutil.copy(clip, source / "good.mp4")
    (source / "empty.mp4").touch()
    (source / "notes.mp4").write_text("not a video")
    raw = clip.read_bytes()
    (source / "torn.mp4").write_bytes(raw[: len(raw) // 2])  # its table of contents, at the end, is gone
    whole = with_index_first(film("bikes.mp4"), tmp_path / "bikes.mp4")
    (source / "short.mp4").write_bytes(whole[: len(whole) // 2])
    (source / "read me.txt").touch()
    (source / "._good.mp4").touch()
    summary = pack([source], tmp_path / "out", on_video=seen.append)
    reasons = {path.name: reason for path, reason in summary.refused}
    assert summary.videos == 1
    assert len(seen) == 5
    assert reasons.keys() == {"empty.mp4", "notes.mp4", "torn.mp4", "short.mp4"}
    assert reasons["empty.mp4"] == "the file is empty"
    assert reasons["notes.mp4"].startswith("can't be opened as a video")
    assert reasons["short.mp4"] == "it is cut short: 117 of 250 frames are there"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_that_may_not_be_read_is_left_out(clip, tmp_path):
    for name in ("good.mp4", "locked.mp4"):
        shutil.copy(clip, tmp_path / name)
    (tmp_path / "locked.mp4").chmod(0)
    assert pack([tmp_path], tmp_path / "out").refused[0][1] == "it can't be read: Permission denied"


def test_nothing_to_pack_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"no videos in {tmp_path}: name files or folders with .mp4"):
        find_videos([tmp_path])
    with pytest.raises(ConfigError, match="gone is not there"):
        find_videos([tmp_path / "gone"])


def test_only_broken_videos_are_refused_with_the_first_reason(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ConfigError, match=r"none of 1 videos can be used, .*a\.mp4 for one: the file is empty"):
        pack([tmp_path], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_folder_with_shards_is_not_added_to(videos, tmp_path):
    pack([videos / "val"], tmp_path)
    with pytest.raises(ConfigError, match="holds shards already"):
        pack([videos / "val"], tmp_path)


def test_interrupted_pack_leaves_only_whole_shards(videos, tmp_path):
    def stop_at_the_fifth(video: Path) -> None:
        if video.name == "04.mp4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([videos / "train"], tmp_path, max_clips_per_shard=3, on_video=stop_at_the_fifth)
    assert [shard.name for shard in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert len(members(tmp_path / "shard-000000.tar")) == 3


@pytest.mark.parametrize("limits", [{"shard_size_mib": 0}, {"max_clips_per_shard": 0}])
def test_impossible_limits_are_refused(videos, tmp_path, limits):
    with pytest.raises(ConfigError, match="set both limits above 0"):
        pack([videos / "val"], tmp_path, **limits)
