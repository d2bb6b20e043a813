"""Shards hold the very bytes of the videos under unique keys; what can't be used is left out by name."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from small_videos import NUM_TRAIN, film, picture, pictures, with_index_first

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data import pack_shard, probing
from cosmos_hpc.data.pack import PackSettings, PackTask, pack, packed_groups, plan_pack, unfinished_shards
from cosmos_hpc.data.packets import scan
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.reencode import scene_changes
from cosmos_hpc.data.video_file import read_frames, write_mp4
from cosmos_hpc.data.video_names import find_videos, named_videos


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def copy(video: Path, target: Path) -> None:
    """The same video in other bytes: an unused box at its end says where it lies."""
    name = str(target).encode()
    target.write_bytes(video.read_bytes() + (8 + len(name)).to_bytes(4, "big") + b"free" + name)


@pytest.fixture
def clip(videos) -> Path:
    return videos / "train" / "00.mp4"


def test_shards_hold_the_original_bytes_in_order(videos, tmp_path):
    summary = pack([videos / "train"], tmp_path, max_clips_per_shard=4)
    assert summary[:2] == (3, NUM_TRAIN)
    shards = sorted(tmp_path.glob("*.tar"))
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
        copy(clip, tmp_path / f"{number}.mp4")
    two_and_a_half_mib = 2.5 * (tmp_path / "0.mp4").stat().st_size / 2**20
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
        copy(clip, source / name)
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
        copy(clip, tmp_path / folder / "clip.mp4")
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
    assert reasons["notes.mp4"].startswith("it holds no video that can be opened")
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
    assert not list((tmp_path / "out").glob("*.tar"))


def test_folder_with_shards_is_not_added_to(videos, tmp_path):
    pack([videos / "val"], tmp_path)
    for sources, settings in (([videos / "train"], {}), ([videos / "val"], {"max_clips_per_shard": 2})):
        with pytest.raises(ConfigError, match="holds shards already, of other videos or settings"):
            pack(sources, tmp_path, **settings)


def test_interrupted_pack_leaves_only_whole_shards(videos, tmp_path):
    def stop_at_the_fifth(video: Path) -> None:
        if video.name == "04.mp4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([videos / "train"], tmp_path, max_clips_per_shard=3, on_video=stop_at_the_fifth)
    assert sorted(shard.name for shard in tmp_path.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert len(members(tmp_path / "shard-000000.tar")) == 3


@pytest.mark.parametrize("limits", [{"shard_size_mib": 0}, {"max_clips_per_shard": 0}])
def test_impossible_limits_are_refused(videos, tmp_path, limits):
    with pytest.raises(ConfigError, match="set both limits above 0"):
        pack([videos / "val"], tmp_path, **limits)


# what is left out, and told


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def odd_folder(clip, tmp_path) -> Path:
    """One good video among one of each kind that is left out."""
    source = tmp_path / "videos"
    source.mkdir()
    shutil.copy(clip, source / "good.mp4")
    shutil.copy(clip, source / "zcopy.mp4")
    write_mp4(source / "brief.mp4", pictures(3, num_frames=5), fps=25)
    write_mp4(source / "still.mp4", [picture(3, 3)] * 20, fps=25)
    (source / "empty.mov").touch()
    whole = bytearray(with_index_first(film("bikes.mp4"), tmp_path / "bikes.mp4"))
    begin = len(whole) // 3
    whole[begin : begin + 200_000] = os.urandom(200_000)
    (source / "spoilt.mp4").write_bytes(whole)
    return source


def test_broken_short_still_and_copied_videos_are_listed_with_the_reason(odd_folder, tmp_path):
    summary = pack([odd_folder], tmp_path / "out")
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in lines(tmp_path / "out/left_out.jsonl")}
    assert reasons["zcopy.mp4"] == f"it is a copy of {odd_folder / 'good.mp4'}"
    assert reasons["brief.mp4"] == "it is too short: 5 frames, 9 are asked for"
    assert reasons["still.mp4"] == "it is static: its first, middle and last frames are the same"
    assert reasons["empty.mov"] == "the file is empty"
    assert reasons["spoilt.mp4"].startswith("its middle frame can't be decoded")
    assert {path.name: reason for path, reason in summary.refused} == reasons
    (entry,) = lines(tmp_path / "out/videos.jsonl")
    assert (entry["key"], entry["shard"], entry["frames"], entry["codec"]) == ("good", "shard-000000.tar", 20, "h264")
    assert (entry["fps"], entry["width"], entry["height"], entry["rotation"]) == (25.0, 64, 48, 0)
    assert (entry["duration_s"], entry["is_variable_rate"]) == (0.8, False)


def test_without_probing_everything_goes_in(odd_folder, tmp_path):
    summary = pack([odd_folder], tmp_path / "out", probe=False)
    assert (summary.videos, [path.name for path, _ in summary.refused]) == (5, ["empty.mov"])


def test_video_that_hangs_or_kills_the_decoder_is_left_out(videos, tmp_path, monkeypatch):
    def harm(path: str, min_frames: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL) if path.endswith("11.mp4") else signal.pause()

    probe = probing.probe_closely
    monkeypatch.setattr(pack_shard, "PROBE_S", 3.0)
    monkeypatch.setattr(
        pack_shard, "probe_closely", lambda path, n: (harm if path[-6:-4] in ("11", "12") else probe)(path, n)
    )
    summary = pack([videos / "val"], tmp_path)
    assert {path.name: reason for path, reason in summary.refused} == {
        "11.mp4": "the decoder crashed",
        "12.mp4": "the decoder came to no end in 3 s",
    }
    assert summary.videos == 3


# sources


def test_patterns_and_lists_name_videos(clip, tmp_path):
    for name in ("a/front.mp4", "a/rear.mp4", "b/front.mp4"):
        (tmp_path / "drives" / name).parent.mkdir(parents=True, exist_ok=True)
        copy(clip, tmp_path / "drives" / name)
    assert [video.name for video in find_videos([tmp_path / "drives/*/front.mp4"])] == ["front.mp4"] * 2
    (tmp_path / "list.csv").write_text("city,path\nOslo,drives/a/rear.mp4\nRome,drives/b/front.mp4\n")
    assert named_videos([tmp_path / "list.csv"]) == [
        (tmp_path / "drives/a/rear.mp4", "drives-a-rear"),
        (tmp_path / "drives/b/front.mp4", "drives-b-front"),
    ]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/drives/a/front.mp4\n")
    assert named_videos([tmp_path / "list.txt"]) == [(tmp_path / "drives/a/front.mp4", "front")]
    (tmp_path / "list.txt").write_text("gone.mp4\n")
    with pytest.raises(ConfigError, match=r"list\.txt names gone\.mp4 as its entry 1, which is not there"):
        find_videos([tmp_path / "list.txt"])


# groups


def groups_by_shard(out: Path) -> list[set[str]]:
    return [groups for _, groups in sorted(packed_groups(out).items())]


def test_folders_are_groups_where_all_videos_lie_in_some(clip, tmp_path):
    for number in range(6):
        video = tmp_path / "videos" / f"drive{number % 3}" / f"{number}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        copy(clip, video)
    pack([tmp_path / "videos"], tmp_path / "by_folder", max_clips_per_shard=2)
    assert groups_by_shard(tmp_path / "by_folder") == [{"drive0"}, {"drive1"}, {"drive2"}]
    pack([tmp_path / "videos"], tmp_path / "by_name", max_clips_per_shard=2, group_by=r"/(\d)\.mp4")
    assert groups_by_shard(tmp_path / "by_name") == [{"0", "1"}, {"2", "3"}, {"4", "5"}]
    pack([tmp_path / "videos"], tmp_path / "none", group_by="none")
    assert groups_by_shard(tmp_path / "none") == []
    with pytest.raises(ConfigError, match="--group-by car finds nothing in"):
        pack([tmp_path / "videos"], tmp_path / "car", group_by="car")
    with pytest.raises(ConfigError, match=r"--group-by \( is no pattern"):
        pack([tmp_path / "videos"], tmp_path / "car", group_by="(")


# killed and parallel


KILLED = """
import sys
from pathlib import Path
from cosmos_hpc.data import pack_shard
from cosmos_hpc.data.pack import pack

write = pack_shard._write
def slow(writer, name, *rest):
    write(writer, name, *rest)
    writer.fileobj.flush()
    if name == "07.mp4":
        print("here", flush=True)
        import time; time.sleep(60)

pack_shard._write = slow
pack([Path(sys.argv[1])], Path(sys.argv[2]), max_clips_per_shard=3)
"""


def test_killed_pack_goes_on_with_the_shard_that_was_torn(videos, tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(videos / "train"), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout.readline() == "here\n"
    killed.kill()
    killed.wait()
    finished = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in finished] == ["shard-000000.tar", "shard-000001.tar"]
    assert unfinished_shards(tmp_path / "out") == 2
    finished[1].write_bytes(finished[1].read_bytes()[:2000])  # as a full disk may leave it
    times = finished[0].stat().st_mtime_ns
    again = pack([videos / "train"], tmp_path / "out", max_clips_per_shard=3)
    whole = pack([videos / "train"], tmp_path / "whole", max_clips_per_shard=3)
    assert again == whole
    assert finished[0].stat().st_mtime_ns == times
    assert [shard.read_bytes() for shard in sorted((tmp_path / "out").glob("*.tar"))] == [
        shard.read_bytes() for shard in sorted((tmp_path / "whole").glob("*.tar"))
    ]
    assert not list((tmp_path / "out").glob(".*.partial"))
    assert (unfinished_shards(tmp_path / "out"), unfinished_shards(videos)) == (0, 0)


def test_workers_and_tasks_write_the_same_shards(videos, tmp_path):
    alone = pack([videos / "train"], tmp_path / "alone", max_clips_per_shard=3)
    assert pack([videos / "train"], tmp_path / "two", num_workers=2, max_clips_per_shard=3) == alone
    plan_pack([videos / "train"], tmp_path / "tasks", PackSettings(max_clips_per_shard=3))
    for task in (1, 0):
        assert not (tmp_path / "tasks/videos.jsonl").exists()
        PackTask(tmp_path / "tasks", task, 2, num_workers=1)()
    for other in ("two", "tasks"):
        for file in (tmp_path / "alone").glob("[a-z]*.*"):
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes()


# written anew


def frames_of(raw: bytes, path: Path) -> list:
    path.write_bytes(raw)
    return list(read_frames(path))


def test_long_videos_are_cut_at_key_frames_into_the_same_frames(tmp_path):
    pack([film("bikes.mp4")], tmp_path / "out", split_s=2)  # key frames at 0, 1.2, 3.04, 5.48, 7.48 and 9.68 of 10 s
    files = members(tmp_path / "out/shard-000000.tar")
    assert list(files) == ["bikes-0000.mp4", "bikes-0001.mp4", "bikes-0002.mp4", "bikes-0003.mp4"]
    parts = [frames_of(raw, tmp_path / name) for name, raw in files.items()]
    assert [len(part) for part in parts] == [76, 61, 50, 63]
    whole = list(read_frames(film("bikes.mp4")))
    assert all(np.array_equal(*pair) for pair in zip(itertools.chain(*parts), whole, strict=True))
    assert [entry["frames"] for entry in lines(tmp_path / "out/videos.jsonl")] == [76, 61, 50, 63]
    assert all(entry["fps"] == 25 for entry in lines(tmp_path / "out/videos.jsonl"))
    assert pack([film("bikes.mp4")], tmp_path / "short", split_s=60).videos == 1


def test_film_is_cut_into_its_scenes(tmp_path):
    """Seen by eye: it cuts at 30, 76, 137, 187 and 242, each with a key frame; of the last scene 8 frames are there."""
    pack([film("bikes.mp4")], tmp_path / "out", split_scenes=True)
    parts = [frames_of(raw, tmp_path / name) for name, raw in members(tmp_path / "out/shard-000000.tar").items()]
    assert [len(part) for part in parts] == [30, 46, 61, 50, 55]
    whole = list(read_frames(film("bikes.mp4")))
    assert all(np.array_equal(*pair) for pair in zip(itertools.chain(*parts), whole[:242], strict=True))
    pack([film("bigbuckbunny.mp4")], tmp_path / "one", split_scenes=True)
    assert list(members(tmp_path / "one/shard-000000.tar")) == ["bigbuckbunny.mp4"]


def test_scene_is_cut_where_nothing_behind_it_is_needed_and_left_out_up_to_a_key_frame(tmp_path):
    frames = [frame[::2, ::2] for frame in read_frames(film("bigbuckbunny.mp4"), stop=105)]
    frames[40:70] = [255 - frame for frame in frames[40:70]]
    options = {"preset": "veryfast", "bf": "3", "b_strategy": "0", "sc_threshold": "0", "g": "50"}
    with av.open(str(tmp_path / "scenes.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=25, options=options)  # key frames at 0, 50 and 100
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for pixels in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        target.mux(stream.encode())
    assert scene_changes(str(tmp_path / "scenes.mp4")) == pytest.approx([40 / 25, 70 / 25], abs=0.001)
    pack([tmp_path / "scenes.mp4"], tmp_path / "out", split_scenes=True, min_frames=5)
    parts = [frames_of(raw, tmp_path / name) for name, raw in members(tmp_path / "out/shard-000000.tar").items()]
    whole = list(read_frames(tmp_path / "scenes.mp4"))
    for part, begin, end in zip(parts, (0, 50, 100), (40, 70, 105), strict=True):
        assert end - 3 <= begin + len(part) <= end  # B-frames that need one of the next scene are left out, too
        assert all(np.array_equal(*pair) for pair in zip(part, whole[begin:], strict=False))


def test_videos_are_encoded_anew_with_near_key_frames_and_smaller_pictures(tmp_path):
    pack([film("bikes.mp4")], tmp_path / "out", gop=17, height=136)
    (raw,) = members(tmp_path / "out/shard-000000.tar").values()
    (tmp_path / "small.mp4").write_bytes(raw)
    packets = scan(str(tmp_path / "small.mp4"))
    assert packets.keys.tolist() == list(range(0, 250, 17))
    assert (packets.width, packets.height, packets.fps) == (320, 136, pytest.approx(25))
    whole = np.stack(list(read_frames(film("bikes.mp4"), stop=20))).astype(float)
    halved = whole.reshape(20, 136, 2, 320, 2, 3).mean(axis=(2, 4))
    assert np.abs(np.stack(list(read_frames(tmp_path / "small.mp4", stop=20))) - halved).mean() < 3


def test_encoding_anew_keeps_uneven_times_and_the_way_up(tmp_path):
    with av.open(str(tmp_path / "odd.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.time_base = 64, 48, Fraction(1, 25)
        stream.set_display_rotation(90)
        for number, pixels in enumerate(pictures(1)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number + number // 3 * 2, Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    before = scan(str(tmp_path / "odd.mp4"))
    pack([tmp_path / "odd.mp4"], tmp_path / "out", gop=5)
    (raw,) = members(tmp_path / "out/shard-000000.tar").values()
    (tmp_path / "new.mp4").write_bytes(raw)
    after = scan(str(tmp_path / "new.mp4"))
    assert after.times_s - after.times_s[0] == pytest.approx(before.times_s - before.times_s[0], abs=1e-3)
    assert after.num_quarter_turns == before.num_quarter_turns == 1
    assert lines(tmp_path / "out/videos.jsonl")[0]["is_variable_rate"] is True


@pytest.mark.parametrize(("matrix", "levels"), [(1, 1), (5, 2), (1, 2)], ids=["HD", "full range", "HD, full range"])
def test_encoding_anew_keeps_the_colours(tmp_path, matrix, levels):
    pixels = np.full((48, 64, 3), (198, 39, 60), np.uint8)
    with av.open(str(tmp_path / "old.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, levels
        for number in range(9):
            moving = pixels.copy()
            moving[:8, 4 * number : 4 * number + 8] = 255
            frame = av.VideoFrame.from_ndarray(moving, format="rgb24")
            target.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=levels)))
        target.mux(stream.encode())
    pack([tmp_path / "old.mp4"], tmp_path / "out", gop=5)
    (raw,) = members(tmp_path / "out/shard-000000.tar").values()
    before, after = (
        frames[0][24:] for frames in (list(read_frames(tmp_path / "old.mp4")), frames_of(raw, tmp_path / "b"))
    )
    assert np.abs(before.astype(int) - pixels[24:]).max() <= 3
    assert np.abs(after.astype(int) - before).max() <= 3


def test_a_part_in_which_nothing_moves_is_left_out_alone(tmp_path):
    with av.open(str(tmp_path / "light.mp4"), "w") as target:
        options = {"g": "25", "keyint_min": "25", "sc_threshold": "0"}
        stream = target.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frames = [*pictures(1, 25), *([picture(1, 24)] * 25), *pictures(2, 25)]  # it stands at a red light
        for pixels in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(stream.encode())
    pack([tmp_path / "light.mp4"], tmp_path / "out", split_s=1.0)
    keys = ["light-0000", "light-0002"]
    assert list(members(tmp_path / "out/shard-000000.tar")) == [f"{key}.mp4" for key in keys]
    assert [entry["key"] for entry in lines(tmp_path / "out/videos.jsonl")] == keys
    (left,) = lines(tmp_path / "out/left_out.jsonl")
    assert left["reason"].startswith("part 0001: it is static")


@pytest.mark.parametrize("settings", [{"gop": 0}, {"height": -1}, {"split_s": 0.0}, {"crf": 52}])
def test_impossible_settings_are_refused(videos, tmp_path, settings):
    with pytest.raises(ConfigError, match=f"^--{next(iter(settings)).replace('_', '-')} is .*: set "):
        pack([videos / "val"], tmp_path, **settings)
