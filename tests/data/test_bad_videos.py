"""Whatever a dataset holds, the run goes past it: bad videos, harmful ones and damaged shards are named and skipped."""

import errno
import fcntl
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from batches import equal, take
from megatron.energon.errors import FatalSampleError
from processes import children_of, gone
from small_videos import NUM_TRAIN, pictures, video_of

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data import decoding
from cosmos_hpc.data.bad_videos import SkippedVideos, Video
from cosmos_hpc.data.clips import Fault
from cosmos_hpc.data.loader import TrainLoader, ValidationLoader
from cosmos_hpc.data.packets import scanned
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import write_mp4

# bad videos


@pytest.fixture(scope="module")
def damaged(videos, tmp_path_factory) -> Path:
    """Four good videos, an empty one, one that is none, one whose end is missing, and one of five frames."""
    tmp_path = tmp_path_factory.mktemp("damaged")
    good = [(f"{number}.mp4", (videos / "train" / f"{number:02d}.mp4").read_bytes()) for number in range(4)]
    write_mp4(tmp_path / "brief.mp4", pictures(9, num_frames=5), fps=25)
    bad = [
        ("empty.mp4", b""),
        ("zeros.mp4", bytes(700)),
        ("torn.mp4", good[0][1][: len(good[0][1]) // 2]),
        ("brief.mp4", (tmp_path / "brief.mp4").read_bytes()),
    ]
    write_tar(tmp_path / "dataset/train/a.tar", good + bad)
    write_tar(tmp_path / "dataset/val/a.tar", [(f"val-{name}", raw) for name, raw in good[:2] + bad])
    prepare(tmp_path / "dataset", num_workers=1)
    return tmp_path / "dataset"


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TarWriter(str(path), encoder=False)
    for name, raw in files:
        writer.write({"__key__": name.removesuffix(".mp4"), "mp4": raw})
    writer.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unusable_videos_are_skipped_counted_and_each_named_once(
    data_config, train_loader, damaged, num_workers, caplog, capfd
):
    loader = train_loader(data_config(path=str(damaged), num_workers=num_workers))
    with caplog.at_level(logging.WARNING, "cosmos_hpc"):
        clips = torch.cat(take(loader, 12))
    assert {video_of(clip) for clip in clips} == {0, 1, 2, 3}
    assert loader.skipped.total() >= 8
    assert loader.skipped[Fault.TOO_SHORT] >= 2
    if num_workers:  # a worker logs to the same stream, but not into this process's list
        return
    named = Counter(record.getMessage().split(":")[0].removeprefix("skipped ") for record in caplog.records)
    assert named == {f"train/a.tar/{name}": 1 for name in ("empty", "zeros", "torn", "brief")}
    reasons = " ".join(record.getMessage() for record in caplog.records)
    assert "the file is empty" in reasons
    assert "it has 5 frames, 9 are needed" in reasons
    assert capfd.readouterr().out == ""


def test_unusable_videos_do_not_spoil_the_resume(data_config, train_loader, damaged):
    config = data_config(path=str(damaged), num_workers=1)
    unbroken = take(train_loader(config), 12)
    loader = train_loader(config)
    pieces = take(loader, 5)
    resumed = train_loader(config)
    resumed.restore([pickle.loads(pickle.dumps(loader.state()))])
    assert equal(pieces + take(resumed, 7), unbroken)


def test_validation_goes_past_unusable_videos(data_config, damaged):
    loader = ValidationLoader(data_config(path=str(damaged)), rank=0, world_size=1)
    assert [video_of(clip) for batch in loader for clip in batch] == [0, 1]
    assert loader.skipped == {Fault.UNDECODABLE: 3, Fault.TOO_SHORT: 1}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("max_bad_share", "complaint"),
    [
        (0.5, r"more unusable videos than data.max_bad_share 0.5 allows, train/shard-\d+.tar/\d\d for one"),
        (1.0, r"no usable video among 100 in a row, train/shard-\d+.tar/\d\d for one"),
    ],
)
def test_dataset_of_useless_videos_ends_the_run_in_one_line(
    data_config, train_loader, num_workers, max_bad_share, complaint
):
    loader = train_loader(data_config(num_frames=33, num_workers=num_workers, max_bad_share=max_bad_share))
    with pytest.raises(ConfigError, match=f"but holds {complaint}: it has 20 frames, 33 are needed$") as error:
        take(loader, 1)
    assert "\n" not in str(error.value)


def test_few_bad_videos_do_not_end_the_run_whatever_their_share(data_config, train_loader, damaged):
    assert len(take(train_loader(data_config(path=str(damaged), max_bad_share=0.1)), 6)) == 6


# the run's list of them


def quarantined(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quarantine_names_each_video_once_over_splits_and_starts(data_config, damaged, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    config = data_config(path=str(damaged), num_workers=1)
    for _ in range(2):
        loader = TrainLoader(config, seed=7, rank=0, world_size=1, quarantine=path)
        take(loader, 12)
        loader.close()
        list(ValidationLoader(config, rank=0, world_size=1, quarantine=path))
    entries = quarantined(path)
    names = ("brief", "empty", "torn", "zeros")
    expected = [("train/a.tar", name) for name in names] + [("val/a.tar", f"val-{name}") for name in names]
    assert sorted((entry["shard"], entry["key"]) for entry in entries) == expected
    assert {entry["key"]: entry["fault"] for entry in entries}["brief"] == "too short"
    assert {"shard": "val/a.tar", "key": "val-empty", "fault": "undecodable", "reason": "the file is empty"} in entries


# what harms the process that decodes


@pytest.fixture
def harmful(monkeypatch, tmp_path):
    """Gives a video, known by its length in bytes, a way to harm its decoder; each try leaves a mark in a file."""
    tries = tmp_path / "tries"
    tries.touch()

    def make(source: Path, harm: Callable[[], None]) -> Path:
        num_bytes = source.stat().st_size

        def harmful_scan(path: str):
            if Path(path).stat().st_size == num_bytes:
                tries.open("a").write(".")
                harm()
            return scanned(path)

        monkeypatch.setattr(decoding, "scanned", harmful_scan)
        return tries

    return make


def spin() -> None:
    while True:
        pass


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("harm", "num_workers", "fault", "num_tries"),
    [(spin, 1, "hanging", 1), (signal.pause, 0, "hanging", 1), (die, 1, "crashing", 2)],
)
def test_harmful_video_is_skipped_and_a_hanging_one_never_tried_again(
    data_config, videos, harmful, tmp_path, harm, num_workers, fault, num_tries
):
    tries = harmful(videos / "train/04.mp4", harm)
    path = tmp_path / "quarantine.jsonl"
    config = data_config(num_workers=num_workers, decode_timeout_s=0.3)
    for _ in range(2):  # the second start knows what hung in the first
        loader = TrainLoader(config, seed=7, rank=0, world_size=1, quarantine=path)
        clips = torch.cat(take(loader, 2 * NUM_TRAIN))
        loader.close()
        assert {video_of(clip) for clip in clips} == set(range(NUM_TRAIN)) - {4}
        assert loader.skipped[Fault(fault)] >= 2
        (entry,) = quarantined(path)
        assert (entry["key"], entry["fault"]) == ("04", fault)
    assert len(tries.read_text()) == (num_tries if fault == "hanging" else 2 * num_tries)


def test_answer_that_comes_at_the_limit_of_a_busy_machine_is_taken(data_config, train_loader, monkeypatch):
    """The child got a processor late, answered and went to sleep, before its parent got one and looked."""
    config = data_config(decode_timeout_s=0.1)
    expected = take(train_loader(config), 4)
    poll = Connection.poll

    def late(connection, timeout=0.0):
        if timeout > 0:
            poll(connection, 60)
        return timeout == 0.0 and poll(connection)

    monkeypatch.setattr(Connection, "poll", late)
    loader = train_loader(config)
    assert equal(take(loader, 4), expected)
    assert not loader.skipped


@pytest.mark.parametrize("num_below", [0, 1])
def test_decoder_that_dies_for_another_reason_is_replaced_without_loss(data_config, train_loader, num_below):
    """Below the worker is what keeps a decoder, and below that the decoder."""
    config = data_config(num_workers=1)
    undisturbed = take(train_loader(config), 8)
    loader = train_loader(config)
    before = set(children_of(os.getpid()))
    batches = take(loader, 2)
    (worker,) = set(children_of(os.getpid())) - before
    (child,) = children_of(worker)
    for _ in range(num_below):
        (child,) = children_of(child)
    os.kill(child, signal.SIGKILL)
    assert equal(batches + take(loader, 6), undisturbed)
    assert loader.skipped.total() == 0


def test_decoder_dies_with_its_rank(data_config):
    script = (
        "import sys, pickle; from cosmos_hpc.data.loader import TrainLoader\n"
        "loader = TrainLoader(pickle.loads(sys.stdin.buffer.read()), seed=7, rank=0, world_size=1)\n"
        "next(iter(loader)); print('ready', flush=True)\n"
        "import time; time.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    rank.stdin.write(pickle.dumps(data_config()))
    rank.stdin.close()
    assert rank.stdout.readline() == b"ready\n"
    (keeper,) = children_of(rank.pid)
    (decoder,) = children_of(keeper)
    rank.kill()
    rank.wait()
    assert gone([keeper, decoder], within_s=20)


# damaged shards


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_cut_short_after_prepare_costs_its_lost_samples_alone(
    data_config, dataset, tmp_path, num_workers, train_loader
):
    shutil.copytree(dataset, tmp_path / "cut")
    shard = tmp_path / "cut/train/shard-000001.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    path = tmp_path / "quarantine.jsonl"
    config = data_config(path=str(tmp_path / "cut"), num_workers=num_workers)
    loader = TrainLoader(config, seed=7, rank=0, world_size=1, quarantine=path)
    seen = Counter(video_of(clip) for clip in torch.cat(take(loader, 2 * NUM_TRAIN)))
    loader.close()
    assert {0, 1, 2, 3, 6, 7, 8, 9} <= set(seen) < set(range(NUM_TRAIN))  # the shard holds 3, 4 and 5
    entries = quarantined(path)
    assert len(entries) == NUM_TRAIN - len(seen)
    assert {(entry["shard"], entry["fault"]) for entry in entries} == {("train/shard-000001.tar", "unreadable")}
    assert all(re.search(r"the shard is damaged: ", entry["reason"]) for entry in entries)
    state = loader.state()
    resumed, again = train_loader(config), train_loader(config)
    resumed.restore([state])
    again.restore([state])
    assert equal(take(resumed, 8), take(again, 8))


# the list of bad videos itself


def test_a_split_without_a_usable_video_on_this_rank_ends_no_run_however_often_it_is_validated():
    skipped = SkippedVideos()
    for _ in range(50):
        skipped.expect(3, 1)
        for number in range(3):
            skipped.add(Video("val.tar", str(number)), Fault.TOO_SHORT, "it is too short")
    for number in range(96):
        skipped.add(Video("val.tar", str(number)), Fault.TOO_SHORT, "it is too short")
    with pytest.raises(FatalSampleError, match="no usable video among 100 in a row"):
        skipped.add(Video("val.tar", "one more"), Fault.TOO_SHORT, "it is too short")


def test_a_torn_line_of_the_quarantine_costs_no_more_than_itself(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    SkippedVideos(file).add(Video("a.tar", "0"), Fault.HANGING, "it hangs")
    file.write_text('{"shard": "b.tar", "ke\n' + file.read_text())
    assert SkippedVideos(file).known(Video("a.tar", "0"))


@pytest.mark.parametrize("fault", ["no locks", "no room"])
def test_a_quarantine_that_can_not_be_locked_or_written_ends_no_run(tmp_path, monkeypatch, fault):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    file = tmp_path / "quarantine.jsonl"
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "lockf", refuse)
    else:
        file = tmp_path / "not there" / file.name  # what can't be written
    skipped = SkippedVideos(file)
    skipped.add(Video("a.tar", "0"), Fault.HANGING, "it hangs")
    assert skipped.known(Video("a.tar", "0"))
    assert not file.exists() or json.loads(file.read_text())["key"] == "0"
