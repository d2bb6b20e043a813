"""Videos come back as they were written, and a file has its name only when it is whole."""

import numpy as np
import pytest
from small_videos import pictures

from cosmos_hpc.data.video_file import VideoInfo, probe, read_frames, write_mp4


def test_written_video_tells_its_size_rate_and_codec(tmp_path):
    write_mp4(tmp_path / "a.mp4", pictures(3, num_frames=7), fps=23.976)
    info = probe(tmp_path / "a.mp4")
    assert info == VideoInfo(7, 7, 48, 64, info.fps, "h264")
    assert info.fps == pytest.approx(23.976, abs=0.001)


def test_frames_come_back_close_to_what_was_written(tmp_path):
    write_mp4(tmp_path / "a.mp4", pictures(3), fps=25, crf=10)
    for written, read in zip(pictures(3), read_frames(tmp_path / "a.mp4"), strict=True):
        assert np.abs(written.astype(int) - read).mean() < 3


def test_start_and_stop_choose_frames_by_number(tmp_path):
    write_mp4(tmp_path / "a.mp4", pictures(3), fps=25)
    every = list(read_frames(tmp_path / "a.mp4"))
    chosen = list(read_frames(tmp_path / "a.mp4", 4, 6))
    assert len(chosen) == 2
    assert all(np.array_equal(*pair) for pair in zip(chosen, every[4:6], strict=True))


def test_odd_picture_grows_to_even(tmp_path):
    write_mp4(tmp_path / "a.mp4", pictures(3, height=47, width=33), fps=25)
    assert probe(tmp_path / "a.mp4")[2:4] == (48, 34)


def test_failed_write_leaves_neither_the_file_nor_a_partial_one(tmp_path):
    def frames():
        yield next(pictures(1))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_mp4(tmp_path / "a.mp4", frames(), fps=25)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write_mp4(tmp_path / "a.mp4", [], fps=25)


def test_file_that_is_no_video_is_refused_by_name(tmp_path):
    (tmp_path / "notes.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"notes\.mp4 can't be opened as a video"):
        probe(tmp_path / "notes.mp4")
