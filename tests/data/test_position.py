"""A position in the data is exact: what comes behind it is what an unbroken run gives, on any number of ranks."""

import itertools
import pickle
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from batches import equal, in_pieces, take
from small_videos import NUM_TRAIN, start_of, video_of

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.loader import TrainLoader
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare

# the same ranks


RANK = """
import pickle, sys
from itertools import islice
from pathlib import Path
from cosmos_hpc.data.loader import TrainLoader, ValidationLoader

config, count, clips_to, state_to = pickle.loads(Path(sys.argv[1]).read_bytes())
list(ValidationLoader(config, rank=0, world_size=1))
loader = TrainLoader(config, seed=7, rank=0, world_size=1)
Path(clips_to).write_bytes(pickle.dumps([batch.numpy() for batch in islice(loader, count)]))
Path(state_to).write_bytes(pickle.dumps(loader.state()))
"""


def test_another_process_stops_and_this_one_goes_on(data_config, train_loader, tmp_path):
    config = data_config(num_workers=2)
    unbroken = take(train_loader(config), 12)
    (tmp_path / "asked").write_bytes(pickle.dumps((config, 5, tmp_path / "clips", tmp_path / "state")))
    done = subprocess.run([sys.executable, "-c", RANK, tmp_path / "asked"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")  # the user's terminal stays clean
    its_clips = [torch.from_numpy(batch) for batch in pickle.loads((tmp_path / "clips").read_bytes())]
    loader = train_loader(config)
    loader.restore([pickle.loads((tmp_path / "state").read_bytes())])
    assert equal(its_clips + take(loader, 7), unbroken)


@pytest.mark.parametrize(("num_workers", "draw"), [(0, 0), (0, 1), (0, 2), (3, 1)])
def test_run_interrupted_at_random_points_gives_the_clips_of_an_unbroken_one(
    data_config, train_loader, num_workers, draw
):
    chance = random.Random(f"{num_workers} {draw}")
    config = data_config(
        num_workers=num_workers,
        micro_batch_size=chance.choice([1, 2, 3]),
        shuffle_buffer_size=chance.choice([1, 3, 30]),
    )
    unbroken = take(train_loader(config, seed=draw), 24)
    pieces: list[torch.Tensor] = []
    state = None
    while len(pieces) < 24:
        loader = train_loader(config, seed=draw)
        if state is not None:
            loader.restore([pickle.loads(state)])
        pieces += take(loader, min(chance.randrange(0, 12), 24 - len(pieces)))
        state = pickle.dumps(loader.state())
        loader.close()
    assert equal(pieces, unbroken)


def test_second_interruption_before_every_worker_has_yielded_repeats_nothing(data_config, train_loader):
    """Energon 7.4.1's savable loader repeats the clips between its last snapshot and that save."""
    config = data_config(num_workers=2)
    unbroken = take(train_loader(config), 14)
    pieces: list[torch.Tensor] = []
    state = None
    for count in (9, 1, 4):
        loader = train_loader(config)
        if state is not None:
            loader.restore([state])
        pieces += take(loader, count)
        state = loader.state()
        loader.close()
    assert equal(pieces, unbroken)


def test_saving_does_not_disturb_what_follows(data_config, train_loader):
    config = data_config(num_workers=1)
    undisturbed = take(train_loader(config), 6)
    loader, batches = train_loader(config), []
    for batch in islice(loader, 6):
        batches.append(batch)
        loader.state()
    assert equal(batches, undisturbed)


def test_state_is_a_moment_and_not_a_view(data_config, train_loader):
    loader = train_loader(data_config())
    take(loader, 2)
    state = loader.state()
    before = pickle.dumps(state)
    following = take(loader, 5)
    assert pickle.dumps(state) == before
    for _ in range(2):  # restoring leaves it usable, too
        fresh = train_loader(data_config())
        fresh.restore([state])
        assert equal(take(fresh, 5), following)


def test_second_iteration_goes_on_instead_of_starting_over(data_config, train_loader):
    together = take(train_loader(data_config()), 5)
    loader = train_loader(data_config())
    assert equal(take(loader, 2) + take(loader, 3), together)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batch_size_may_change(data_config, train_loader, num_workers):
    unbroken = torch.cat(take(train_loader(data_config(micro_batch_size=1, num_workers=num_workers)), 28))
    streams: dict[int, list[torch.Tensor]] = {}
    state = None
    for micro, count in ((2, 3), (3, 2), (1, 4), (4, 2)):
        loader = train_loader(data_config(micro_batch_size=micro, num_workers=num_workers))
        if state is not None:
            loader.restore([state])
        for batch in take(loader, count):
            streams.setdefault(stream_of(video_of(batch[0]), max(1, num_workers)), []).extend(batch)
        state = loader.state()
        loader.close()
    for stream, clips in streams.items():
        expected = [clip for clip in unbroken if stream_of(video_of(clip), max(1, num_workers)) == stream]
        assert equal(clips[: len(expected)], expected[: len(clips)])


def test_position_is_known_when_the_workers_are_gone(data_config, train_loader):
    loader, unbroken = (train_loader(data_config(num_workers=2)) for _ in range(2))
    pieces = take(loader, 3)
    loader.close()
    resumed = train_loader(data_config(num_workers=2))
    resumed.restore([loader.state()])
    assert equal(pieces + take(resumed, 3), take(unbroken, 6))


# several clips of a decode


def several(data_config, **changes):
    return data_config(clips_per_decode=3, clip_buffer_size=7, **changes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_run_gives_the_clips_of_an_unbroken_one_where_a_video_gives_several(
    data_config, train_loader, num_workers
):
    config = several(data_config, num_workers=num_workers)
    unbroken = take(train_loader(config), 20)
    assert equal(in_pieces(lambda: train_loader(config), (1, 4, 0, 7, 2, 6)), unbroken)


def test_resume_decodes_what_waits_once_again_and_nothing_else(data_config, train_loader, monkeypatch):
    config = several(data_config, micro_batch_size=1)
    loader = train_loader(config)
    take(loader, 40)
    state = loader.state()
    decoded: list[int] = []
    clips = ClipDecoder.clips

    def counted(self, raw, kinds, seed, mask=None):
        decoded.append(seed)
        return clips(self, raw, kinds, seed, mask)

    monkeypatch.setattr(ClipDecoder, "clips", counted)
    following = take(loader, 30)
    unbroken, decoded = decoded[:], []
    resumed = train_loader(config)
    resumed.restore([state])
    assert equal(take(resumed, 30), following)
    assert len(set(unbroken)) == len(unbroken) == 10
    assert len(set(decoded)) == len(decoded)
    assert 0 < len(set(decoded) - set(unbroken)) <= 7  # those of which a clip waited


def test_every_pass_has_as_many_clips_of_every_video_as_a_decode_gives(data_config, train_loader):
    config = several(data_config, micro_batch_size=1, shuffle_buffer_size=1)
    clips = [batch[0] for batch in take(train_loader(config), 4 * 3 * NUM_TRAIN)]
    seen = Counter(video_of(clip) for clip in clips)
    assert sum(max(0, 4 * 3 - seen[video]) for video in range(NUM_TRAIN)) <= 7  # as many may wait
    neighbours = sum(video_of(one) == video_of(other) for one, other in itertools.pairwise(clips))
    assert neighbours < len(clips) / 3  # apart: two thirds of all pairs would be of one video otherwise
    keys = {(video_of(clip), start_of(clip), clip[2, 0, 0, 0].item()) for clip in clips}
    assert len(keys) > len(clips) * 0.8


# other ranks


def stream_of(video: int, num_streams: int) -> int:
    """Which stream a training video belongs to: equal neighbouring shares, as 10 over 1, 2 or 5; 3, 2, 3, 2 over 4."""
    ends = {1: [10], 2: [5, 10], 4: [3, 5, 8, 10]}[num_streams]
    return next(stream for stream, end in enumerate(ends) if video < end)


def one_rank(config: DataConfig, rank: int, world_size: int, num_batches: int, folder: Path) -> None:
    """What a rank does between two starts: restore what all wrote, take clips, note them and write its position."""
    loader = TrainLoader(config, seed=7, rank=rank, world_size=world_size)
    found = sorted((folder / "load").glob("*.pickle"))
    if found:
        loader.restore([pickle.loads(path.read_bytes()) for path in found])
    clips = [clip.numpy() for batch in take(loader, num_batches) for clip in batch]
    (folder / "save" / f"{rank}.pickle").write_bytes(pickle.dumps(loader.state()))
    (folder / f"clips_{rank}.pickle").write_bytes(pickle.dumps(clips))
    loader.close()


def run_ranks(config: DataConfig, world_size: int, num_batches: int, folder: Path) -> list[torch.Tensor]:
    """Run each rank in a process of its own; their clips, rank by rank."""
    (folder / "load").mkdir(exist_ok=True)
    (folder / "save").mkdir()
    ranks = [
        get_context("fork").Process(target=one_rank, args=(config, rank, world_size, num_batches, folder))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world_size
    for old in (folder / "load").iterdir():
        old.unlink()
    (folder / "load").rmdir()
    (folder / "save").rename(folder / "load")
    paths = [folder / f"clips_{rank}.pickle" for rank in range(world_size)]
    return [torch.from_numpy(clip) for path in paths for clip in pickle.loads(path.read_bytes())]


def by_stream(clips: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    ledger: list[list[torch.Tensor]] = [[], [], [], []]
    for clip in clips:
        ledger[stream_of(video_of(clip), 4)].append(clip)
    return ledger


# ranks, batches that each takes, micro-batch size, workers instead of four streams shared by all
PHASES = [(4, 5, 1, None), (2, 7, 1, None), (1, 9, 2, None), (1, 0, 1, None), (4, 4, 3, 0), (2, 3, 1, 2)]


@pytest.mark.parametrize(("shuffle_buffer_size", "clips_per_decode"), [(1, 1), (4, 3)])
def test_changing_ranks_consume_what_is_left_of_each_stream_once_a_pass(
    data_config, train_loader, tmp_path, shuffle_buffer_size, clips_per_decode
):
    """4 -> 2 -> 1 -> 4 -> 2 ranks in processes of their own, with batches of 1, 2 and 3 and counts that don't divide.

    Each stream's clips must be those of a run that never stopped: same videos, same starts, same crops.
    """
    clips: list[torch.Tensor] = []
    data_config = partial(data_config, clips_per_decode=clips_per_decode, clip_buffer_size=7)
    for world_size, num_batches, micro, num_workers in PHASES:
        layout = {"num_streams": 4} if num_workers is None else {"num_workers": num_workers}
        config = data_config(shuffle_buffer_size=shuffle_buffer_size, micro_batch_size=micro, **layout)
        taken = run_ranks(config, world_size, num_batches, tmp_path)
        assert len(taken) == world_size * num_batches * micro
        clips += taken
    config = data_config(shuffle_buffer_size=shuffle_buffer_size, micro_batch_size=1)
    for rank, ledger in enumerate(by_stream(clips)):
        unbroken = train_loader(config, rank=rank, world_size=4)
        assert equal(ledger, [batch[0] for batch in take(unbroken, len(ledger))])
        if shuffle_buffer_size == 1:  # else neighbouring passes mingle in the buffer
            videos = [video_of(clip) for clip in ledger]
            size = len(set(videos))
            passes = [Counter(videos[start : start + size]) for start in range(0, len(videos) - size + 1, size)]
            assert len(passes) > 5
            assert all(set(seen.values()) == {1} and len(seen) == size for seen in passes)


def test_ranks_that_take_over_streams_begin_with_the_one_furthest_behind(data_config, train_loader):
    states = []
    for rank in (0, 1):
        loader = train_loader(data_config(num_streams=4, micro_batch_size=1), rank=rank, world_size=2)
        take(loader, 3)  # two of its first stream, one of its second
        states.append(loader.state())
        loader.close()
    merged = train_loader(data_config(num_streams=4, micro_batch_size=1))
    merged.restore(states)
    assert [stream_of(video_of(batch[0]), 4) for batch in take(merged, 4)] == [1, 2, 3, 0]


def test_start_and_crop_of_a_video_depend_on_the_pass_and_not_on_the_streams(data_config, train_loader):
    def passes(**layout) -> list[dict[int, tuple[int, float]]]:
        loader = train_loader(data_config(micro_batch_size=1, shuffle_buffer_size=1, **layout))
        clips = [batch[0] for batch in take(loader, 3 * NUM_TRAIN)]
        places: dict[int, list[tuple[int, float]]] = {}
        for clip in clips:
            places.setdefault(video_of(clip), []).append((start_of(clip), clip[2, 0, :, 0].float().mean().item()))
        return [{video: places[video][number] for video in range(NUM_TRAIN)} for number in range(3)]

    alone = passes(num_workers=0)
    assert passes(num_workers=2) == alone
    assert all(alone[0][video] != alone[1][video] for video in range(NUM_TRAIN))


# refusals


STREAMS = "set data.num_streams to 6 and trainer.devices x trainer.num_nodes to 1, 2, 3 or 6$"


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"num_workers": 1}, rf"\(num_streams 6 -> 1\): {STREAMS}"),
        ({"num_streams": 8}, rf"\(num_streams 6 -> 8\): {STREAMS}"),
        ({"world_size": 4, "num_streams": 6}, rf"\(num_streams 6 -> 4\): {STREAMS}"),
        ({"clips_per_decode": 2}, r"\(clips_per_decode 1 -> 2\): set data.clips_per_decode to 1"),
        ({"shuffle_buffer_size": 5}, r"\(shuffle_buffer_size 4 -> 5\): set data.shuffle_buffer_size to 4"),
        ({"seed": 8}, r"\(seed 7 -> 8\): set trainer.seed to 7"),
    ],
)
def test_position_of_another_layout_is_refused_with_the_mend(data_config, train_loader, changes, mend):
    state = train_loader(data_config(num_workers=6)).state()
    settings = {"num_workers": 6} | changes
    arguments = {name: settings.pop(name) for name in ("seed", "world_size") if name in settings}
    other = train_loader(data_config(**settings), **arguments)
    with pytest.raises(
        ConfigError, match=f"^the checkpoint's position in the data fits another layout {mend}"
    ) as error:
        other.restore([state])
    assert "\n" not in str(error.value)


def test_position_in_another_dataset_is_refused(data_config, train_loader, videos, tmp_path):
    state = train_loader(data_config()).state()
    pack([videos / "train/00.mp4", videos / "train/01.mp4"], tmp_path / "train")
    pack([videos / "val"], tmp_path / "val")
    prepare(tmp_path, num_workers=1)
    with pytest.raises(ConfigError, match=r"train_samples 10 -> 2.*bring back the dataset of 10 training samples"):
        train_loader(data_config(path=str(tmp_path))).restore([state])


def test_position_of_too_few_ranks_and_late_calls_are_our_own_mistakes(data_config, train_loader):
    loader = train_loader(data_config(), world_size=2)
    state = loader.state()
    with pytest.raises(RuntimeError, match=r"got the positions of ranks \[0\]: pass those of all, in order"):
        train_loader(data_config(), rank=1, world_size=2).restore([state])
    take(loader, 1)
    with pytest.raises(RuntimeError, match="restore a fresh loader"):
        loader.restore([state])
