"""A clip is what a player would show there, whatever the codec, the decoder and the file's oddities."""

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from small_videos import film, with_index_first

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.choosing import ClipKind, choose, last_start
from cosmos_hpc.data.clips import Fault, UndecodableError, memory_file
from cosmos_hpc.data.decoders import Box, Wanted, check_decoder, decode_boxes, suitable_decoders
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.packets import scan, scanned
from cosmos_hpc.data.video_file import read_frames, write_mp4

DECODERS = ["decord", "pyav"]
if importlib.util.find_spec("torchcodec") is not None:
    DECODERS.append("torchcodec")


def encode(path: Path, codec: str, *, options: dict[str, str], pix_fmt: str = "yuv420p", turned: int = 0) -> Path:
    """The film's first 60 frames again, 160 x 120."""
    with av.open(str(film("bikes.mp4"))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 120, pix_fmt
        if turned:
            stream.set_display_rotation(turned)
        for number, frame in enumerate(source.decode(video=0)):
            if number == 60:
                break
            small = frame.reformat(width=160, height=120, format=pix_fmt)
            small.pts, small.time_base, small.pict_type = number, Fraction(1, 25), 0
            target.mux(stream.encode(small))
        target.mux(stream.encode())
    return path


X265 = {"x265-params": "log-level=error:keyint=20:min-keyint=20:scenecut=0", "preset": "ultrafast"}
ODDITIES = {
    "h264.mp4": ("libx264", {"g": "20", "bf": "2", "sc_threshold": "0"}, {}),
    "open_gop.mp4": ("libx264", {"g": "20", "x264-params": "open-gop=1:bframes=3:scenecut=0"}, {}),
    "hevc_open_gop.mp4": ("libx265", X265, {}),
    "ten_bit.mp4": ("libx265", X265, {"pix_fmt": "yuv420p10le"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, {}),
    "av1.mp4": ("libsvtav1", {"g": "20", "preset": "12"}, {}),
    "left.mp4": ("libx264", {"g": "20"}, {"turned": 90}),
    "upside_down.mp4": ("libx264", {"g": "20"}, {"turned": 180}),
    "right.mp4": ("libx264", {"g": "20"}, {"turned": -90}),
    "full_colour.mkv": ("libx264", {"g": "20"}, {"pix_fmt": "yuv444p"}),
    "mjpeg.mov": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "mpeg4.mp4": ("mpeg4", {"g": "20"}, {}),
}


@pytest.fixture(scope="module")
def oddities(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oddities")
    usual = os.sched_getscheduler(0), os.sched_getparam(0)
    for name, (codec, options, settings) in ODDITIES.items():
        encode(folder / name, codec, options=options, **settings)
    # SVT-AV1 makes root's process that calls it a real-time one, which all ranks of later tests would inherit: they
    # starve each other and the machine.
    os.sched_setscheduler(0, *usual)
    write_uneven(folder / "uneven.mp4")
    return folder


def write_uneven(path: Path) -> None:
    """Frames at 0, 40, 80, 200, 240, 280, 400 ... ms."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"g": "20"})
        stream.width, stream.height, stream.time_base = 160, 120, Fraction(1, 25)
        for number, pixels in enumerate(read_frames(film("bikes.mp4"), stop=60)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(width=160, height=120)
            frame.pts, frame.time_base = number + number // 3 * 2, Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


def decode(path: Path, frames: list[int], decoder: str, box: Box | None = None) -> np.ndarray:
    """Frames of a video, upright, by the first decoder that is suitable and no other."""
    pictures = []
    with scanned(str(path)) as (packets, cutter):
        tries = suitable_decoders(decoder, packets)
        for stretch in cutter.stretches(frames):
            with memory_file("cut") as target:
                places = cutter.cut(stretch, target)
                whole = box or Box(0, 0, packets.height, packets.width)
                found: dict[int, np.ndarray] = {}
                decode_boxes(target, [Wanted(place, [whole]) for place in places], found.__setitem__, tries[:1])
                pictures += [np.rot90(found[number], packets.num_quarter_turns) for number in range(len(stretch))]
    return np.stack(pictures)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", [*ODDITIES, "uneven.mp4"])
def test_frames_equal_those_of_a_decode_from_the_first_frame(oddities, name, decoder):
    whole = np.stack(list(read_frames(oddities / name)))
    assert scan(str(oddities / name)).num_frames == len(whole) == 60
    for frames in ([0, 1, 2], [17, 18, 19, 20, 21], [20, 21], [45, 46], [59], [3, 30, 58]):
        taken = decode(oddities / name, frames, decoder)
        # 10 bits are brought to 8 with a dither that differs
        assert np.abs(taken.astype(int) - whole[frames]).mean() < (0.5 if "ten" in name else 1e-9), frames


@pytest.mark.parametrize("start", [0, 29, 100, 241])
@pytest.mark.parametrize("decoder", DECODERS)
def test_clip_of_a_real_film_equals_a_decode_from_the_first_frame(start, decoder):
    source = film("bikes.mp4")  # key frames at 0, 30, 76, 137, 187, 242
    expected = np.stack(list(read_frames(source, start, start + 9)))
    assert np.array_equal(decode(source, list(range(start, start + 9)), decoder), expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("box", [Box(0, 0, 272, 640), Box(3, 5, 64, 64), Box(207, 575, 65, 65), Box(101, 2, 33, 99)])
def test_rectangle_equals_that_of_the_whole_picture(box, decoder):
    whole = box.of(next(read_frames(film("bikes.mp4"), start=40)))
    assert np.array_equal(decode(film("bikes.mp4"), [40], decoder, box)[0], whole)


def test_frames_behind_the_clip_are_not_decoded(tmp_path):
    source = film("bikes.mp4")
    raw = with_index_first(source, tmp_path / "film.mp4")
    (tmp_path / "damaged.mp4").write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
    clip = decode(tmp_path / "damaged.mp4", list(range(10, 19)), "pyav")
    assert np.array_equal(clip, np.stack(list(read_frames(source, 10, 19))))


@pytest.mark.parametrize(
    ("name", "is_open"), [("h264.mp4", False), ("open_gop.mp4", True), ("hevc_open_gop.mp4", True)]
)
def test_open_gops_are_known_as_such(oddities, name, is_open):
    packets = scan(str(oddities / name))
    assert packets.is_open_gop is is_open
    assert packets.keys.tolist() == [0, 20, 40]


@pytest.mark.parametrize("raw", [b"", bytes(900)], ids=["empty", "zeros"])
def test_bytes_that_are_no_video_are_refused_without_a_path(raw):
    with pytest.raises(UndecodableError) as refusal:
        ClipDecoder(5.0).clips(raw, [ClipKind(1, 16, 16)], None)
    assert "/proc" not in str(refusal.value)


def test_decoder_that_is_not_installed_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"torchcodec, which is not installed: pip install 'cosmos-hpc\[torchcodec\]'"
    ):
        check_decoder("torchcodec")


def test_what_one_decoder_refuses_another_decodes(oddities):
    kind = ClipKind(9, 64, 64)
    for name in ("av1.mp4", "vp9.webm"):
        raw = (oddities / name).read_bytes()
        clips = [ClipDecoder(60.0, decoder).clips(raw, [kind], 3)[0] for decoder in DECODERS]
        assert all(torch.equal(clips[0], other) for other in clips)


# what is chosen


@pytest.fixture(scope="module")
def packets():
    return scan(str(film("bikes.mp4")))  # 250 frames of 640 x 272, 25 a second, key frames at 0, 30, 76, 137, 187, 242


def seeds() -> Iterator[int]:
    return iter(range(2000))


def test_starts_are_equally_likely_and_boxes_reach_every_edge(packets):
    kind = ClipKind(17, 256, 256)
    chosen = [clip for seed in seeds() for clip in choose(packets, [kind] * 4, seed)]
    starts = Counter(int(clip.frames[0]) for clip in chosen)
    assert set(starts) == set(range(250 - 16))
    expected = 8000 / 234
    assert 0.75 < sum(starts[start] for start in range(117)) / (117 * expected) < 1.25
    assert 0.6 < sum(starts[start] for start in range(76, 86)) / (10 * expected) < 1.5  # not more often behind a key
    assert {clip.box.top for clip in chosen} == set(range(272 - 256 + 1))
    assert {clip.box.left for clip in chosen} == set(range(640 - 256 + 1))


def test_clips_of_one_decode_lie_between_the_same_key_frames_and_differ(packets):
    differing = 0
    for seed in seeds():
        clips = choose(packets, [ClipKind(17, 64, 64)] * 4, seed)
        assert len({packets.key_before(int(clip.frames[0])) for clip in clips}) == 1
        differing += len({int(clip.frames[0]) for clip in clips}) > 1
    assert differing > 1900


def test_first_clip_of_several_is_the_one_that_would_be_chosen_alone(packets):
    kind = ClipKind(17, 64, 64)
    assert all(
        choose(packets, [kind] * 4, seed)[0].frames[0] == choose(packets, [kind], seed)[0].frames[0]
        for seed in range(50)
    )


def test_key_frames_are_the_starts_where_they_are_far_apart(packets):
    near = ClipKind(33, 64, 64, starts_at_keys=True)  # 250 / 6 = 42 frames apart: less than two clips
    assert len({int(choose(packets, [near], seed)[0].frames[0]) for seed in seeds()}) > 100
    far = near._replace(num_frames=17)
    keys = (0, 30, 76, 137, 187)
    assert {int(choose(packets, [far], seed)[0].frames[0]) for seed in seeds()} == set(keys)
    starts = {int(clip.frames[0]) for seed in seeds() for clip in choose(packets, [far] * 3, seed)}
    assert starts == {start for key in keys for start in range(key, key + 18)}


def test_stride_skips_frames_and_still_reaches_the_whole_video(packets):
    kind = ClipKind(9, 64, 64, frame_stride=10)
    assert last_start(packets, kind) == 250 - 81
    chosen = [choose(packets, [kind], seed)[0].frames for seed in seeds()]
    assert all(np.array_equal(np.diff(frames), np.full(8, 10)) for frames in chosen)
    assert max(int(frames[-1]) for frames in chosen) == 249


def test_frames_a_second_are_taken_by_their_time(packets, oddities):
    assert choose(packets, [ClipKind(9, 64, 64, fps=12.5)], None)[0].frames.tolist() == list(range(116, 133, 2))
    assert choose(packets, [ClipKind(5, 64, 64, fps=10)], 0)[0].frames.tolist()[0] <= 250 - 11
    uneven = scan(str(oddities / "uneven.mp4"))  # at 0, 40, 80, 200, 240, 280, 400, 440, 480 ms and so on
    times = np.round(1000 * uneven.times_s).astype(int)
    frames = choose(uneven, [ClipKind(5, 64, 64, fps=5)], 11)[0].frames
    assert np.diff(times[frames]).tolist() == [200] * 4


def test_slower_video_gives_each_frame_once(tmp_path):
    write_mp4(tmp_path / "slow.mp4", (np.full((32, 32, 3), 9 * n, np.uint8) for n in range(20)), fps=10)
    slow = scan(str(tmp_path / "slow.mp4"))
    kind = ClipKind(9, 16, 16, fps=30)
    assert {tuple(np.diff(choose(slow, [kind], seed)[0].frames)) for seed in range(30)} == {(1,) * 8}
    assert last_start(slow, kind) == 11


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ClipKind(251, 64, 64), "it has 250 frames, 251 are needed"),
        (ClipKind(33, 64, 64, frame_stride=8), "it has 250 frames, 257 are needed"),
        (ClipKind(33, 64, 64, fps=2), "its 250 frames are too few for 33 at 2 a second"),
    ],
)
def test_video_that_is_too_short_says_so(packets, kind, reason):
    with pytest.raises(UndecodableError, match=reason) as refusal:
        choose(packets, [kind], 0)
    assert refusal.value.fault is Fault.TOO_SHORT


def test_shorter_side_is_resized_before_the_cut(packets, oddities):
    assert choose(packets, [ClipKind(9, 64, 64, resize=136)], None)[0].box == Box(72, 256, 128, 128)
    turned = scan(str(oddities / "left.mp4"))  # stored 160 x 120, seen 120 x 160
    assert choose(turned, [ClipKind(9, 120, 60)], None)[0].box == Box(30, 20, 60, 120)
    clips = ClipDecoder(60.0).clips((oddities / "left.mp4").read_bytes(), [ClipKind(9, 80, 60, resize=60)], None)
    expected = next(read_frames(oddities / "left.mp4", start=25))  # 160 high, 120 wide; halved, 80 and 60
    halved = expected.reshape(80, 2, 60, 2, 3).mean(axis=(1, 3))
    assert np.abs(clips[0][:, 0].permute(1, 2, 0).numpy() - halved).mean() < 4


def test_share_of_clips_is_mirrored(packets):
    raw = film("bikes.mp4").read_bytes()
    kind = ClipKind(1, 272, 640, flip=0.5)
    mirrored = [choose(packets, [kind], seed)[0].is_mirrored for seed in seeds()]
    assert 0.45 < sum(mirrored) / len(mirrored) < 0.55
    seed = mirrored.index(True)
    decoder = ClipDecoder(60.0)
    (flipped,) = decoder.clips(raw, [kind], seed)
    (straight,) = decoder.clips(raw, [kind._replace(flip=0.0)], seed)
    assert torch.equal(flipped.flip(-1), straight)


def test_several_clips_are_what_the_single_choices_say(packets):
    kind, seed = ClipKind(9, 64, 48), 5
    clips = ClipDecoder(60.0).clips(film("bikes.mp4").read_bytes(), [kind] * 3, seed)
    assert [clip.shape for clip in clips] == [(3, 9, 64, 48)] * 3
    whole = list(read_frames(film("bikes.mp4")))
    for clip, chosen in zip(clips, choose(packets, [kind] * 3, seed), strict=True):
        expected = np.stack([chosen.box.of(whole[frame]) for frame in chosen.frames])
        assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), expected)


def test_no_descriptor_is_left_open():
    decoder = ClipDecoder(60.0)
    decoder.clips(film("bikes.mp4").read_bytes(), [ClipKind(1, 16, 16)], 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for seed in range(3):
        decode(film("bikes.mp4"), [5], "decord")
        decoder.clips(film("bikes.mp4").read_bytes(), [ClipKind(1, 16, 16)], seed)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
