"""Videos come back as they were written, and a file has its name only when it is whole."""

import av
import numpy as np
import pytest
from small_videos import NUM_FRAMES, film, pictures, trimmed

from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.packets import scan
from cosmos_hpc.data.probing import probe_closely
from cosmos_hpc.data.video_file import VideoInfo, probe, read_frames, read_middle, write_mp4


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


@pytest.mark.parametrize(
    ("matrix", "num_turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_video_filmed_sideways_is_read_upright_as_in_training(tmp_path, matrix, num_turns):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[16:, :32], picture[:16, 32:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    write_mp4(tmp_path / "a.mp4", [picture] * 3, fps=25)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    for place, value in zip((0, 1, 3, 4), matrix, strict=True):  # of the nine 16.16 numbers in the track's header
        at = raw.index(b"tkhd") + 44 + 4 * place
        raw[at : at + 4] = (value << 16).to_bytes(4, "big", signed=True)
    (tmp_path / "b.mp4").write_bytes(raw)
    height, width = next(read_frames(tmp_path / "b.mp4")).shape[:2]
    (clip,) = ClipDecoder(60.0).clips(bytes(raw), [ClipKind(3, height, width)], None)
    for frame, in_training in zip(read_frames(tmp_path / "b.mp4"), clip.permute(1, 2, 3, 0).numpy(), strict=True):
        assert np.array_equal(frame, in_training)
        assert np.abs(np.rot90(picture, num_turns).astype(int) - frame).mean() < 5


def test_video_trimmed_by_an_edit_list_is_whole_upright_and_counted_from_its_first_shown_frame(tmp_path):
    write_mp4(tmp_path / "whole.mp4", pictures(1), fps=25)
    trimmed(tmp_path / "whole.mp4", tmp_path / "trimmed.mp4", num_hidden=7, rotation=90)
    packets = scan(str(tmp_path / "trimmed.mp4"))
    assert (packets.num_frames, packets.num_quarter_turns) == (NUM_FRAMES - 7, 1)
    assert probe_closely(str(tmp_path / "trimmed.mp4"), min_frames=13).frames == 13
    shown = list(read_frames(tmp_path / "trimmed.mp4"))
    assert [round(frame[..., 1].mean() / 10) for frame in shown] == list(range(7, NUM_FRAMES))
    middle = read_middle(tmp_path / "trimmed.mp4", 5)
    assert middle.start == 4
    assert np.array_equal(middle.frames, shown[4:9])
    (clip,) = ClipDecoder(60.0).clips((tmp_path / "trimmed.mp4").read_bytes(), [ClipKind(5, 64, 48)], None)
    assert np.array_equal(clip.permute(1, 2, 3, 0), middle.frames)


def test_damage_and_a_change_of_size_on_the_way_are_told(tmp_path):
    write_mp4(tmp_path / "a.mp4", pictures(3), fps=25)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    begin = raw.index(b"mdat") + 4
    raw[begin : begin + 2000] = b"\xff" * 2000
    (tmp_path / "a.mp4").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.mp4 is damaged: "):
        list(read_frames(tmp_path / "a.mp4"))
    streams = []
    for size in ((48, 64), (64, 48)):
        with av.open(str(tmp_path / "part"), "w", format="h264") as container:  # plain packets, which can be joined
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8), format="rgb24")
            container.mux((*stream.encode(frame), *stream.encode()))
        streams.append((tmp_path / "part").read_bytes())
    (tmp_path / "b.h264").write_bytes(b"".join(streams))
    with pytest.raises(ValueError, match=r"b\.h264 changes from 64 x 48 pixels to another size"):
        list(read_frames(tmp_path / "b.h264"))


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_middle_frames_are_those_of_the_whole_video(name):
    num_frames = probe(film(name)).frames
    start, frames = read_middle(film(name), 5)
    assert start == (num_frames - 5) // 2
    assert np.array_equal(frames, np.stack(list(read_frames(film(name), start, start + 5))))


def test_video_shorter_than_its_middle_is_refused(tmp_path):
    write_mp4(tmp_path / "short.mp4", pictures(0, 3), fps=25)
    assert read_middle(tmp_path / "short.mp4", 3).start == 0
    with pytest.raises(ValueError, match="has 3 frames, 4 are needed"):
        read_middle(tmp_path / "short.mp4", 4)
