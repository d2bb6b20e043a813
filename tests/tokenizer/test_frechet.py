"""The Frechet distance against its formula, and networks given as files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.frechet import FeatureNetwork, frechet_distance

CPU = torch.device("cpu")


class MeanColour(nn.Module):
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.mean(dim=(2, 3, 4))


class LikeI3d(nn.Module):
    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        told = torch.tensor([float(rescale), float(resize), float(return_features)])
        return told.expand(x.shape[0], 3)


class Classes(nn.Module):
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.mean(dim=(1, 2, 3, 4))


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def by_the_formula(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), by symmetric eigenvalues."""
    first, second = np.cov(ours.T), np.cov(theirs.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    apart = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * overlap)


@pytest.mark.parametrize("num_videos", [5, 200])  # fewer and more than features
def test_distance_is_the_formulas(num_videos: int) -> None:
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(size=(num_videos, 12)), draw.normal(0.5, 2.0, size=(num_videos, 12))
    found = frechet_distance(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert found == pytest.approx(by_the_formula(ours, theirs), rel=1e-6)


def test_equal_features_have_none_and_shifted_ones_the_square_of_the_shift() -> None:
    features = torch.randn(20, 6, dtype=torch.float64)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0], dtype=torch.float64)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(features + shift, features) == pytest.approx(25.0, rel=1e-9)
    assert math.isnan(frechet_distance(features[:1], features))


def test_network_sees_clips_in_their_range(tmp_path: Path) -> None:
    network = FeatureNetwork(saved(MeanColour(), tmp_path / "colour.pt"), CPU)
    clips = torch.tensor([-0.5, 0.25, 3.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4)
    assert network.features(clips).tolist() == [[-0.5, 0.25, 1.0]]  # what a screen can't show is clamped


def test_published_i3d_is_told_the_range_and_to_return_features(tmp_path: Path) -> None:
    network = FeatureNetwork(saved(LikeI3d(), tmp_path / "i3d.pt"), CPU)
    assert network.features(torch.zeros(2, 3, 9, 32, 32)).tolist() == [[0.0, 1.0, 1.0]] * 2


def test_files_and_networks_that_give_no_features_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ConfigError, match=r"text.pt is no feature network \(.*\): name a TorchScript file"):
        FeatureNetwork(tmp_path / "text.pt", CPU)
    with pytest.raises(ConfigError, match=r"gone.pt is no feature network"):
        FeatureNetwork(tmp_path / "gone.pt", CPU)
    network = FeatureNetwork(saved(Classes(), tmp_path / "classes.pt"), CPU)
    with pytest.raises(ConfigError, match=r"returns no features \[B, D\]: wrap the network"):
        network.features(torch.zeros(2, 3, 1, 8, 8))
    with pytest.raises(ConfigError, match=r"does not take clips \[3, 8, 8\]"):
        network.features(torch.zeros(3, 8, 8))
