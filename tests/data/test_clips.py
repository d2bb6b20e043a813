"""A clip is what a player would show there, and only the clip is decoded."""

from pathlib import Path

import numpy as np
import pytest
from small_videos import film, with_index_first

from cosmos_hpc.data.clips import UndecodableError, decode_clip, frame_count
from cosmos_hpc.data.video_file import read_frames


@pytest.mark.parametrize("start", [0, 29, 100, 241])
def test_clip_equals_a_decode_from_the_first_frame(start):
    source = film("bikes.mp4")  # key frames at 0, 30, 76, 137, 187, 242
    expected = np.stack(list(read_frames(source, start, start + 9)))
    assert np.array_equal(decode_clip(source.read_bytes(), start, 9), expected)


def test_clip_of_a_film_with_one_key_frame_equals_a_decode_from_the_first_frame():
    source = film("bigbuckbunny.mp4")
    assert np.array_equal(decode_clip(source.read_bytes(), 99, 33), np.stack(list(read_frames(source, 99, 132))))


def test_frames_behind_the_clip_are_not_decoded(tmp_path):
    source = film("bikes.mp4")
    raw = with_index_first(source, tmp_path / "film.mp4")
    damaged = raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)
    assert np.array_equal(decode_clip(damaged, 10, 9), np.stack(list(read_frames(source, 10, 19))))
    with pytest.raises(UndecodableError):
        decode_clip(damaged, 230, 9)


def test_frame_count_is_the_number_of_frames():
    assert frame_count(film("bikes.mp4").read_bytes()) == 250


def test_clip_that_reaches_beyond_the_end_is_refused_with_both_lengths():
    raw = film("bikes.mp4").read_bytes()
    with pytest.raises(UndecodableError, match="it has 250 frames, 251 are needed"):
        decode_clip(raw, 0, 251)
    with pytest.raises(UndecodableError, match="no clip of 9 starts at 242"):
        decode_clip(raw, 242, 9)


@pytest.mark.parametrize("raw", [b"", bytes(900)], ids=["empty", "zeros"])
def test_bytes_that_are_no_video_are_refused_without_a_path(raw):
    with pytest.raises(UndecodableError) as refusal:
        frame_count(raw)
    assert "/proc" not in str(refusal.value)


def test_no_descriptor_is_left_open():
    raw = film("bikes.mp4").read_bytes()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        decode_clip(raw, 5, 1)
        with pytest.raises(UndecodableError):
            frame_count(b"no video")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
