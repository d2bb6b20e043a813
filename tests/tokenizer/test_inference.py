"""Whole videos of any length and size go through, and no seam shows."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import Tokenizer, starting_tokenizer
from cosmos_hpc.tokenizer.inference import Window, windows
from cosmos_hpc.tokenizer.tiles import spans


def moving_pattern(num_frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Coloured waves that travel: uint8 [T, H, W, 3]."""
    draw = np.random.default_rng(seed).uniform
    y, x, t = np.mgrid[0:height, 0:width][0], np.mgrid[0:height, 0:width][1], np.arange(num_frames)[:, None, None]
    waves = [
        np.sin(draw(0.05, 0.3) * x + draw(0.05, 0.3) * y + draw(-0.15, 0.15) * t + draw(0, 6.28)) for _ in range(3)
    ]
    return (127.5 + 100 * np.stack(waves, -1)).round().astype(np.uint8)


def frame_psnr(video: np.ndarray, other: np.ndarray) -> np.ndarray:
    error = np.square(video.astype(float) - other).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-6))


def pixel_psnr(video: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(video.astype(float) - other)[:, where].mean())


@pytest.fixture(scope="module")
def trained():
    """A narrow network after some steps on the pattern, so that it has something to lose at a seam."""
    network = starting_tokenizer(ModelConfig(model="CV8x8x8", channels=8), seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(30):
        clip = torch.from_numpy(moving_pattern(17, 24, 24, step)).permute(3, 0, 1, 2)[None] / 127.5 - 1
        optimizer.zero_grad()
        (network(clip).reconstructions - clip).abs().mean().backward()
        optimizer.step()
    return network


def test_windows_overlap_and_keep_every_latent_frame_once():
    assert list(windows(6, length=4, overlap=2)) == [Window(0, 4, 0), Window(2, 6, 4)]
    assert list(windows(4, length=4, overlap=2)) == [Window(0, 4, 0)]
    for count in range(1, 30):
        kept = [frame for window in windows(count, 5, 3) for frame in range(window.kept_from, window.stop)]
        assert kept == list(range(count))
        assert all(window.stop - window.start <= 5 for window in windows(count, 5, 3))


def test_no_seam_shows_where_windows_meet(trained):
    video = moving_pattern(121, 24, 32, seed=99)
    whole = Tokenizer(trained, window_frames=121).reconstruct(video)
    tokenizer = Tokenizer(trained, window_frames=49, overlap_frames=24)
    pieced = tokenizer.reconstruct(video)
    starts = [1 + (window.kept_from - 1) * 8 for window in windows(16, 7, 3) if window.kept_from]
    assert len(starts) == 3
    at_seams = np.concatenate([np.arange(start - 4, start + 4) for start in starts])
    interior = np.setdiff1d(np.arange(121), at_seams)
    psnr, psnr_whole = frame_psnr(video, pieced), frame_psnr(video, whole)
    assert psnr_whole.mean() > 10  # the network has learnt something
    assert abs((psnr - psnr_whole)[at_seams].mean()) < 0.1
    assert abs((psnr - psnr_whole)[interior].mean()) < 0.1
    assert frame_psnr(whole, pieced)[at_seams].min() > 40


def test_no_seam_shows_where_tiles_meet(trained):
    height, width = 128, 192
    video = moving_pattern(17, height, width, seed=99)
    whole = Tokenizer(trained).reconstruct(video)
    tiled = Tokenizer(trained, tile_size=80, tile_overlap=32).reconstruct(video)
    is_shared = np.zeros((height, width), bool)  # by two tiles or more
    for axis in (is_shared, is_shared.T):
        pieces = spans(len(axis) // 8, 10, 4)
        for one, other in pairwise(pieces):
            axis[other.start * 8 : one.stop * 8] = True
    psnr, psnr_whole = (
        [pixel_psnr(video, other, where) for where in (is_shared, ~is_shared)] for other in (tiled, whole)
    )
    assert min(psnr_whole) > 10  # the network has learnt something
    assert abs(psnr[0] - psnr_whole[0]) < 0.1
    assert abs(psnr[1] - psnr_whole[1]) < 0.1
    steps, steps_whole = (np.abs(np.diff(v.astype(float), axis=2)).mean(axis=(0, 1, 3)) for v in (tiled, whole))
    assert (steps - steps_whole).max() < 0.25 * steps_whole.mean()  # from one column to the next


@pytest.mark.parametrize("kind", ["CV8x8x8", "DV8x16x16"])
def test_network_sees_one_tile_at_a_time(small, kind):
    network, seen = small(kind), []
    for module in (network.encoder.patcher3d, network.decoder.unpatcher3d):
        module.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0] if output.shape[1] > 3 else output).shape)
        )
    video = moving_pattern(9, 100, 70, seed=5)
    back = Tokenizer(network, tile_size=48, tile_overlap=16).reconstruct(video)
    assert back.shape == video.shape
    assert len(seen) == 2 * 3 * 2
    assert {tuple(shape[2:]) for shape in seen} == {(9, 48, 48)}


@pytest.mark.parametrize("kind", ["CV8x8x8", "DV8x16x16"])
def test_frame_that_fits_into_one_tile_is_taken_whole(small, kind):
    video = moving_pattern(9, 40, 48, seed=6)
    expected, found = (
        Tokenizer(small(kind)).encode(video),
        Tokenizer(small(kind), tile_size=64, tile_overlap=16).encode(video),
    )
    assert found.latents.equal(expected.latents)


@pytest.mark.parametrize("kind", ["CV8x8x8", "DV8x16x16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 50, 33), (17, 32, 32), (70, 16, 20)], ids=str)
def test_any_length_and_size_comes_back_as_it_was(small, kind, shape):
    video = moving_pattern(*shape, seed=1)
    tokenizer = Tokenizer(small(kind), window_frames=33, overlap_frames=8)
    encoded = tokenizer.encode(video)
    step, num_latent_frames = (8, 16)[kind == "DV8x16x16"], 1 + -(-(shape[0] - 1) // 8)
    cells = (num_latent_frames, -(-shape[1] // step), -(-shape[2] // step))
    assert tuple(encoded.latents.shape) == (cells if kind == "DV8x16x16" else (16, *cells))
    back = tokenizer.decode(encoded)
    assert back.dtype == np.uint8
    assert back.shape == video.shape


def test_one_window_is_the_network_itself(small):
    video = moving_pattern(9, 16, 24, seed=2)
    clip = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
    network = small("CV8x8x8")
    with torch.no_grad():
        expected = ((network(clip).reconstructions[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
    assert (Tokenizer(network).reconstruct(video) == expected.numpy()).all()


def test_float_video_and_tensors_are_taken(small):
    video = moving_pattern(9, 16, 16, seed=3)
    tokenizer = Tokenizer(small("CV8x8x8"))
    from_bytes = tokenizer.encode(video).latents
    assert tokenizer.encode(torch.from_numpy(video)).latents.equal(from_bytes)
    assert tokenizer.encode(video.astype(np.float32) / 127.5 - 1).latents.allclose(from_bytes, atol=1e-5)


def test_weights_are_loaded_at_the_precision_asked_for(weights_in):
    tokenizer = Tokenizer.from_weights(weights_in("run", "CV8x8x8"), dtype=torch.bfloat16)
    assert tokenizer.encode(moving_pattern(9, 16, 16, seed=4)).latents.dtype == torch.bfloat16
    assert tokenizer.reconstruct(moving_pattern(9, 16, 16, seed=4)).shape == (9, 16, 16, 3)


def test_what_is_no_video_is_refused(small):
    with pytest.raises(ConfigError, match=r"a video of shape \[3, 9, 16, 16\] can't be encoded: pass \[T, H, W, 3\]"):
        Tokenizer(small("CV8x8x8")).encode(np.zeros((3, 9, 16, 16), np.uint8))
    with pytest.raises(ConfigError, match="windows of 17 frames can't overlap by 24: let them overlap by at least 8"):
        Tokenizer(small("CV8x8x8"), window_frames=17)
    with pytest.raises(ConfigError, match="tiles of 64 pixels can't overlap by 64: let them overlap by at least 8"):
        Tokenizer(small("CV8x8x8"), tile_size=64, tile_overlap=64)
