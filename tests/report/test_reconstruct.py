from pathlib import Path

import numpy as np
import pytest
import torch
from report_parts import film, grey_state, run_config, save_checkpoint
from typer.testing import CliRunner

from cosmos_hpc.cli import app
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.data.video_file import probe, read_frames, write_mp4
from cosmos_hpc.report import reconstruct as reconstruct_module
from cosmos_hpc.report.reconstruct import pieces, reconstruct, reconstruct_all, side_by_side
from cosmos_hpc.tokenizer import Tokenizer, starting_tokenizer


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that turn every clip into the grey half way."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "000-00000000")
    return save_checkpoint(folder, grey_state(run_config("d")), step=1)


def test_video_of_odd_size_and_length_stands_beside_its_reconstruction(tmp_path: Path, grey: Path) -> None:
    write_mp4(tmp_path / "road.mp4", film(60, num_frames=11, height=38, width=50), fps=12.5)
    counts: list[int] = []
    written = reconstruct(tmp_path / "road.mp4", grey, tmp_path / "out" / "pair.mp4", on_frames=counts.append)
    info = probe(written)
    assert (info.frames, info.height, info.width, info.fps, sum(counts)) == (11, 38, 100, 12.5, 11)
    originals, pairs = list(read_frames(tmp_path / "road.mp4")), list(read_frames(written))
    for original, pair in zip(originals, pairs, strict=True):
        assert np.abs(pair[:, 4:46].astype(int) - original[:, 4:46]).mean() < 6  # encoded once more
        assert np.abs(pair[:, 64:].astype(int) - 128).max() <= 4  # past the codec's block that both halves share


def test_no_more_than_the_frames_asked_for_are_written(tmp_path: Path, grey: Path) -> None:
    write_mp4(tmp_path / "road.mp4", film(60), fps=10)
    assert probe(reconstruct(tmp_path / "road.mp4", grey, tmp_path / "pair.mp4", max_frames=3)).frames == 3


def test_pieces_keep_each_frame_once_behind_their_lead_in() -> None:
    numbered = [np.full((1, 1, 3), index, np.uint8) for index in range(50)]
    cut = list(pieces(iter(numbered), length=16, lead_in=9))
    assert [index for piece in cut for index in piece.frames[piece.num_lead_in :, 0, 0, 0]] == list(range(50))
    assert [int(piece.frames[0, 0, 0, 0]) for piece in cut] == [0, 16, 32]
    assert [len(piece.frames) for piece in cut] == [25, 25, 18]


@pytest.mark.parametrize("model", ["Cosmos-1.0-Tokenizer-CV8x8x8", "Cosmos-0.1-Tokenizer-CV4x8x8"])
def test_long_video_gives_the_same_in_pieces_as_whole(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(reconstruct_module, "WINDOWS_AT_ONCE", 1)
    network = starting_tokenizer(run_config("d", model=model).model, seed=0)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 5 and weight.shape[2] == 3:  # along time: let frames feel each other more
                weight *= 3
    tokenizer = Tokenizer(network)
    levels = np.random.default_rng(0).integers(256, size=170)
    frames = [np.full((16, 16, 3), level, np.uint8) for level in levels]
    together = np.stack(list(side_by_side(iter(frames), tokenizer, on_frames=lambda count: None)))
    np.testing.assert_array_equal(together[:, :, :16], np.stack(frames))
    np.testing.assert_allclose(together[:, :, 16:].astype(int), tokenizer.reconstruct(np.stack(frames)), atol=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is no file: name a video"), (b"not a video at all", "can't be opened as a video.*: name a video")],
)
def test_what_is_no_video_is_refused_in_one_line(
    tmp_path: Path, grey: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "road.mp4").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refusal:
        reconstruct(tmp_path / "road.mp4", grey, tmp_path / "pair.mp4")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "pair.mp4").exists()


def test_video_is_not_written_over_itself(tmp_path: Path, grey: Path) -> None:
    video = tmp_path / "road.mp4"
    write_mp4(video, film(60), fps=10)
    with pytest.raises(ConfigError, match="is the video itself: name another file"):
        reconstruct(video, grey, video)


def test_folder_goes_on_past_broken_videos_and_keeps_what_is_there(tmp_path: Path, grey: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "videos" / "out"
    for name, num_frames in (("north/road", 12), ("south/road", 5)):
        write_mp4(videos / f"{name}.mp4", film(60, num_frames=num_frames), fps=10)
    (videos / "broken.mp4").write_bytes(b"not a video at all")
    seen: list[tuple[int, int]] = []
    first = reconstruct_all([videos], grey, out, on_frames=lambda *counts: seen.append(counts))
    assert first.written == [out / "north-road.mp4", out / "south-road.mp4"]
    assert [(path, "can't be opened" in reason) for path, reason in first.refused] == [(videos / "broken.mp4", True)]
    assert (seen[0], seen[-1], seen == sorted(seen)) == ((12, 17), (17, 17), True)
    before = {path: path.stat().st_mtime_ns for path in first.written}
    write_mp4(videos / "west.mp4", film(60, num_frames=3), fps=10)
    second = reconstruct_all([videos], grey, out)
    assert (second.written, second.kept) == ([out / "west.mp4"], first.written)
    assert {path: path.stat().st_mtime_ns for path in first.written} == before
    third = reconstruct_all([videos], grey, out, overwrite=True, max_frames=2)
    assert (len(third.written), third.kept) == (3, [])
    assert [probe(path).frames for path in third.written] == [2, 2, 2]


def test_video_that_breaks_off_is_named_and_the_next_one_is_written(tmp_path: Path, grey: Path) -> None:
    write_mp4(tmp_path / "a.mp4", film(60, num_frames=40), fps=10)
    write_mp4(tmp_path / "b.mp4", film(60, num_frames=5), fps=10)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    start, size = raw.index(b"mdat") + 4, int.from_bytes(raw[raw.index(b"mdat") - 4 :][:4], "big") - 8
    raw[start : start + size] = b"\xff" * size  # frames are promised and none of them decodes
    (tmp_path / "a.mp4").write_bytes(raw)
    seen: list[tuple[int, int]] = []
    found = reconstruct_all([tmp_path], grey, tmp_path / "out", on_frames=lambda *counts: seen.append(counts))
    assert (found.written, [path.name for path, _ in found.refused]) == ([tmp_path / "out" / "b.mp4"], ["a.mp4"])
    assert "a.mp4 is damaged" in found.refused[0][1]
    assert seen[-1] == (45, 45)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.mp4"]


def test_no_video_that_can_be_reconstructed_is_an_error(tmp_path: Path, grey: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all")
    with pytest.raises(ConfigError, match=r"none of 1 videos can be reconstructed, for one: .*broken.mp4 can't be"):
        reconstruct_all([tmp_path], grey, tmp_path / "out")
    write_mp4(tmp_path / "out" / "pair.mp4", film(60), fps=10)
    with pytest.raises(ConfigError, match=r"all videos of .*out lie in .*out: choose another folder for --out"):
        reconstruct_all([tmp_path / "out"], grey, tmp_path / "out")


def test_large_frames_are_reconstructed_in_tiles_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(starting_tokenizer(run_config("d").model, seed=0).state_dict(), folder / "model.pt")
    write_mp4(tmp_path / "road.mp4", film(60, num_frames=9, height=40, width=64), fps=10)
    tiles = ["--tile-size", "32", "--tile-overlap", "8"]
    for name, options in (("tiled", tiles), ("whole", [])):
        arguments = ["reconstruct", str(tmp_path / "road.mp4"), "--weights", str(folder), *options]
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    tiled, whole = (np.stack(list(read_frames(tmp_path / name / "road.mp4"))) for name in ("tiled", "whole"))
    frames = np.stack(list(read_frames(tmp_path / "road.mp4")))
    expected = Tokenizer.from_weights(folder, tile_size=32, tile_overlap=8).reconstruct(frames)
    errors = [np.abs(coarse(video[:, :, 64:]) - coarse(expected)).mean() for video in (tiled, whole)]
    assert errors[0] < 0.5 * errors[1], errors


def coarse(video: np.ndarray) -> np.ndarray:
    """Brightness in blocks of 4 x 4 pixels, which the codec leaves as they are."""
    t, h, w, _ = video.shape
    return video.mean(axis=3).reshape(t, h // 4, 4, w // 4, 4).mean(axis=(2, 4))


def test_command_names_what_it_wrote_left_out_and_found_there(tmp_path: Path, grey: Path) -> None:
    write_mp4(tmp_path / "road.mp4", film(60, num_frames=3), fps=10)
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all")
    out = tmp_path / "out"
    arguments = ["reconstruct", str(tmp_path), "--weights", str(grey), "--out", str(out)]
    first, second = CliRunner().invoke(app, arguments), CliRunner().invoke(app, arguments)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert f"{out}/road.mp4\nleft out: {tmp_path}/broken.mp4 can't be opened as a video" in first.stdout
    assert f"1 were in {out} already; --overwrite writes them anew" in second.stdout
