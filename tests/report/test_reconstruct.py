from pathlib import Path

import numpy as np
import pytest
import torch
from report_parts import film, grey_state, run_config, save_checkpoint

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.data.video_file import probe, read_frames, write_mp4
from cosmos_hpc.report import reconstruct as reconstruct_module
from cosmos_hpc.report.reconstruct import pieces, reconstruct, side_by_side
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
        assert np.abs(pair[:, 54:].astype(int) - 128).max() <= 4  # clear of the edge, where the codec mixes colours


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
