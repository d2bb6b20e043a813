"""mean_std.pt says how the latents of a data set are spread."""

import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.latent_statistics import (
    latent_statistics,
    read_latent_statistics,
    write_latent_statistics,
)


def test_statistics_are_those_of_all_latents_of_a_channel_and_frame(small, tmp_path):
    network = small("CV8x8x8")
    clips = torch.rand(5, 3, 17, 16, 24) * 2 - 1
    statistics = latent_statistics(network, clips.split(2))
    latents = network.encode(clips).detach().transpose(0, 1)  # [16, B, T', H', W']
    for frame, measured in ((0, 0), (1, 1), (2, 2), (15, 2)):
        values = latents[:, :, measured].flatten(1)
        assert statistics.mean[:, frame].allclose(values.mean(1), atol=1e-5)
        assert statistics.std[:, frame].allclose(values.std(1, correction=0), atol=1e-5)

    write_latent_statistics(statistics, tmp_path / "mean_std.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["mean_std.pt"]
    mean, std = torch.load(tmp_path / "mean_std.pt", weights_only=True)
    assert mean.shape == std.shape == (16, 16)
    assert all(map(torch.equal, read_latent_statistics(tmp_path / "mean_std.pt"), statistics))


def test_missing_clips_and_damaged_files_are_refused(small, tmp_path):
    with pytest.raises(ConfigError, match="no clip came to measure the latents on"):
        latent_statistics(small("CV8x8x8"), [])
    with pytest.raises(ConfigError, match="latents are not all finite: take the weights of an earlier checkpoint"):
        latent_statistics(small("CV8x8x8"), [torch.full((1, 3, 9, 16, 16), float("nan"))])
    (tmp_path / "mean_std.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="holds no mean and spread of latents"):
        read_latent_statistics(tmp_path / "mean_std.pt")
