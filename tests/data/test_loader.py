"""The loader repeats itself, sees every video, and outlives bad ones and signals to the rank."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from batches import equal, take
from processes import children_of, gone
from small_videos import NUM_FRAMES, NUM_TRAIN, NUM_VAL, film, pictures, start_of, video_of

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.loader import TrainLoader, ValidationLoader, to_unit_range
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import write_mp4

# what comes out


def test_batches_are_uint8_clips_of_the_asked_size(data_config, train_loader):
    (batch,) = take(train_loader(data_config(micro_batch_size=3)), 1)
    assert batch.shape == (3, 3, 9, 32, 32)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()


def test_unit_range_takes_black_to_minus_one_and_white_to_one():
    clips = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    assert to_unit_range(clips).flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert to_unit_range(clips).dtype == torch.float32


def test_frames_of_a_clip_are_consecutive(data_config, train_loader):
    for batch in take(train_loader(data_config()), 10):
        for clip in batch:
            greens = clip[1].float().mean(dim=(1, 2)) / 10
            assert torch.allclose(greens.diff(), torch.ones(8), atol=0.35)


def test_starts_and_crops_cover_the_whole_video_and_picture(data_config, train_loader):
    clips = torch.cat(take(train_loader(data_config()), 150))
    assert {start_of(clip) for clip in clips} == set(range(NUM_FRAMES - 9 + 1))
    left_edges = {round(clip[2, 0, :, 0].float().mean().item() * 64 / 255) for clip in clips}
    assert min(left_edges) <= 1
    assert max(left_edges) >= 64 - 32 - 1


def test_every_pass_sees_every_video_in_another_order(data_config, train_loader):
    clips = torch.cat(take(train_loader(data_config(shuffle_buffer_size=1)), 3 * NUM_TRAIN // 2))
    passes = [[video_of(clip) for clip in clips[start : start + NUM_TRAIN]] for start in (0, NUM_TRAIN, 2 * NUM_TRAIN)]
    assert all(sorted(order) == list(range(NUM_TRAIN)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3


def test_dataset_smaller_than_the_shuffle_buffer_repeats_for_ever_and_evenly(data_config, train_loader):
    clips = torch.cat(take(train_loader(data_config(shuffle_buffer_size=100)), 10 * NUM_TRAIN))
    seen = Counter(video_of(clip) for clip in clips)
    assert set(seen) == set(range(NUM_TRAIN))
    assert sum(seen.values()) == 20 * NUM_TRAIN
    assert min(seen.values()) >= 10  # the buffer holds ten of each, so no video can lag by more than ten of twenty


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (2, 2)])
def test_ranks_and_workers_share_the_videos(data_config, train_loader, world_size, num_workers):
    config = data_config(num_workers=num_workers, micro_batch_size=1)
    seen = []
    for rank in range(world_size):
        clips = torch.cat(take(train_loader(config, rank=rank, world_size=world_size), 20))
        seen.append({video_of(clip) for clip in clips})
    assert seen[0] | seen[1] == set(range(NUM_TRAIN))
    assert not seen[0] & seen[1]


def test_seed_decides_order_and_crops(data_config, train_loader):
    first, again, other = (take(train_loader(data_config(), seed=seed), 6) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


def test_ranks_draw_their_own_starts(data_config, train_loader):
    ranks = [torch.cat(take(train_loader(data_config(), rank=rank, world_size=2), 8)) for rank in (0, 1)]
    starts = [[start_of(clip) for clip in clips] for clips in ranks]
    assert starts[0] != starts[1]


def test_clips_do_not_depend_on_what_else_the_process_decodes(data_config, train_loader):
    config = data_config(num_workers=2)
    alone = take(train_loader(config), 4)
    list(ValidationLoader(config, rank=0, world_size=1))
    take(train_loader(data_config(), seed=99), 2)
    torch.manual_seed(5)
    assert equal(take(train_loader(config), 4), alone)


def test_loading_leaves_the_random_numbers_of_the_rank_alone(data_config, train_loader):
    torch.manual_seed(3)
    untouched = torch.rand(4)
    torch.manual_seed(3)
    for num_workers in (0, 1):
        take(train_loader(data_config(num_workers=num_workers)), 2)
    list(ValidationLoader(data_config(), rank=0, world_size=1))
    assert torch.equal(torch.rand(4), untouched)


def test_small_picture_is_enlarged_to_the_crop(data_config, train_loader, tmp_path):
    for part, first in (("train", 0), ("val", 2)):
        for number in (first, first + 1):
            write_mp4(tmp_path / "videos" / part / f"{number}.mp4", pictures(number, height=48, width=32), fps=25)
        pack([tmp_path / "videos" / part], tmp_path / part)
    prepare(tmp_path, num_workers=1)
    config = data_config(path=str(tmp_path), crop_size=80)
    (batch,) = take(train_loader(config), 1)
    assert batch.shape[-2:] == (80, 80)
    (whole_width,) = ValidationLoader(config, rank=0, world_size=1)
    edges = whole_width[0, 2, 0, :, [0, -1]].float().mean(dim=0)
    assert edges[0] < 20  # 32 pixels became 80, none of the width is lost
    assert edges[1] > 235


def test_real_films_are_read(data_config, train_loader, videos, tmp_path):
    pack([film("bikes.mp4"), film("bigbuckbunny.mp4")], tmp_path / "train")
    pack([videos / "val"], tmp_path / "val")
    prepare(tmp_path, num_workers=1)
    config = data_config(path=str(tmp_path), num_frames=17, crop_size=256, micro_batch_size=1)
    clips = torch.cat(take(train_loader(config), 4))
    assert clips.shape == (4, 3, 17, 256, 256)
    assert all(clip.float().std() > 10 for clip in clips)


# streams


@pytest.mark.parametrize(
    ("changes", "world_size", "mend"),
    [
        ({"num_workers": 6}, 2, "2 ranks x 6 workers need at least one each: set data.num_workers to 5,"),
        ({"num_streams": 12}, 2, "2 ranks x 6 workers need at least one each: set data.num_streams to 10,"),
        ({"num_workers": 0}, 11, "11 ranks x 1 workers need at least one each: use fewer ranks,"),
    ],
)
def test_fewer_samples_than_streams_are_refused_at_once(data_config, changes, world_size, mend):
    with pytest.raises(ConfigError, match=f"split train holds 10 samples, but {mend}"):
        TrainLoader(data_config(**changes), seed=0, rank=0, world_size=world_size)


def test_streams_are_divided_over_the_ranks(data_config, train_loader):
    state = train_loader(data_config(num_streams=4, num_workers=9), world_size=2).state()
    assert state.layout.num_streams == 4
    assert len(state.streams) == 2


# validation


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (7, 0), (2, 2)])
def test_validation_yields_each_sample_once_over_all_ranks_and_the_same_each_time(data_config, world_size, num_workers):
    seen = []
    for rank in range(world_size):
        loader = ValidationLoader(data_config(), rank=rank, world_size=world_size, num_workers=num_workers)
        batches = list(loader)
        assert equal(list(loader), batches)
        seen += [video_of(clip) for batch in batches for clip in batch]
    assert sorted(seen) == list(range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))


def test_validation_takes_the_middle_and_a_smaller_last_batch(data_config):
    batches = list(ValidationLoader(data_config(), rank=0, world_size=1))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    clip = batches[0][0]
    assert start_of(clip) == (NUM_FRAMES - 9) // 2
    assert clip[2, 0, :, 0].float().mean().item() == pytest.approx(16 * 255 / 64, abs=6)


def test_limit_takes_the_first_batches(data_config):
    every = list(ValidationLoader(data_config(), rank=0, world_size=1))
    loader = ValidationLoader(data_config(), rank=0, world_size=1, limit_batches=2)
    assert equal(list(loader), every[:2])
    assert equal(list(loader), every[:2])


def test_abandoned_validation_does_not_change_the_next(data_config):
    loader = ValidationLoader(data_config(), rank=0, world_size=1)
    first = take(loader, 1)
    assert equal(take(loader, 1), first)


# other datasets


def test_crude_dataset_gives_the_same_clips(data_config, train_loader, dataset, tmp_path):
    expected = take(train_loader(data_config()), 4)
    shutil.copytree(dataset, tmp_path / "crude")
    (tmp_path / "crude/.nv-meta/dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    assert equal(take(train_loader(data_config(path=str(tmp_path / "crude"))), 4), expected)


@pytest.mark.parametrize(
    "kind", [["--sample-type", "ImageSample", "--field-map", '{"image": "mp4"}'], ["--sample-type", "CrudeWebdataset"]]
)
def test_dataset_that_energon_has_prepared_by_hand_gives_the_same_clips(
    data_config, train_loader, dataset, tmp_path, kind
):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for shard in (dataset / part).glob("*.tar"):
            shutil.copy(shard, tmp_path / part)
    parts = ["--split-parts", "train:train/shard-{000000..000003}.tar", "--split-parts", "val:val/shard-.*"]
    energon = [Path(sys.executable).with_name("energon"), "prepare", tmp_path, "--non-interactive", "--no-progress"]
    subprocess.run([*energon, "--num-workers", "1", *parts, *kind], check=True, capture_output=True)
    assert equal(take(train_loader(data_config(path=str(tmp_path))), 4), take(train_loader(data_config()), 4))


def test_blend_of_datasets_is_read(data_config, train_loader, dataset, videos, tmp_path):
    for part in ("train", "val"):
        pack([videos / "val" / ("10.mp4" if part == "train" else "11.mp4")], tmp_path / "more" / part)
    prepare(tmp_path / "more", num_workers=1)
    sources = {"train": (dataset, tmp_path / "more"), "val": (tmp_path / "more",)}
    splits = {
        part: {"blend": [{"weight": 1, "path": str(path), "split_part": part} for path in paths]}
        for part, paths in sources.items()
    }
    blend = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    config = data_config(path=str(tmp_path / "blend.yaml"))
    clips = torch.cat(take(train_loader(config), 20))
    assert Counter(video_of(clip) for clip in clips)[10] > 10
    assert [video_of(clip) for batch in ValidationLoader(config, rank=0, world_size=1) for clip in batch] == [11]


# workers


SIGNALLED_RANK = """
import os, signal, sys, time
from itertools import islice
from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.data.clips import Fault
from cosmos_hpc.data.loader import TrainLoader

caught = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: (caught.append(number), print("caught", os.getpid(), flush=True)))
config = DataConfig(path=sys.argv[1], num_frames=9, crop_size=32, num_workers=2, shuffle_buffer_size=4)
loader = TrainLoader(config, seed=7, rank=0, world_size=1)
batches = iter(loader)
next(batches)
print("ready", flush=True)
while len(caught) < 4:
    time.sleep(0.02)
for _ in range(20):  # more than the workers can have had in store
    next(batches)
loader.state()
print("went on", flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def start_signalled_rank(dataset: Path, then: str) -> tuple[subprocess.Popen, list[int]]:
    rank = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED_RANK, str(dataset), then],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert rank.stdout.readline() == "ready\n"
    workers = children_of(rank.pid)
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.killpg(rank.pid, number)
        assert rank.stdout.readline() == f"caught {rank.pid}\n"  # the rank, and no worker
    assert rank.stdout.readline() == "went on\n"
    return rank, workers


def test_signals_to_the_whole_group_reach_the_rank_alone_which_ends_its_workers(dataset):
    rank, workers = start_signalled_rank(dataset, "leave")
    assert rank.wait(timeout=20) == 0
    assert gone(workers, within_s=1)


def test_workers_die_with_a_killed_rank(dataset):
    rank, workers = start_signalled_rank(dataset, "wait")
    rank.kill()
    rank.wait()
    assert gone(workers, within_s=5)


def test_close_ends_the_workers_soon(data_config, train_loader):
    loader = train_loader(data_config(num_workers=2))
    before = set(children_of(os.getpid()))
    take(loader, 1)
    workers = set(children_of(os.getpid())) - before
    assert len(workers) == 2
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 4
    assert gone(list(workers), within_s=1)


def test_cameras_of_a_sample_take_turns_over_the_passes(data_config, train_loader, videos, tmp_path):
    """Each drive is seen by two cameras; even videos are front, odd ones rear."""
    from webdataset import TarWriter

    for part, drives in (("train", range(0, 8, 2)), ("val", range(8, 12, 2))):
        (tmp_path / part).mkdir()
        with TarWriter(str(tmp_path / part / "a.tar"), encoder=False) as writer:
            for number in drives:
                files = {
                    f"{camera}.mp4": next(videos.glob(f"*/{video:02d}.mp4")).read_bytes()
                    for camera, video in (("front", number), ("rear", number + 1))
                }
                writer.write({"__key__": f"drive{number}", **files})
    (tmp_path / ".nv-meta").mkdir()
    crude = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (tmp_path / ".nv-meta/dataset.yaml").write_text(crude)
    prepare(tmp_path, num_workers=1)
    loader = train_loader(data_config(path=str(tmp_path), micro_batch_size=1, shuffle_buffer_size=1))
    seen = [video_of(batch[0]) for batch in take(loader, 16)]
    passes = [set(seen[start : start + 4]) for start in range(0, 16, 4)]
    assert all({video // 2 for video in each} == {0, 1, 2, 3} for each in passes)
    assert Counter(seen) == dict.fromkeys(range(8), 2)
    assert all(not one & other for one, other in itertools.pairwise(passes))
