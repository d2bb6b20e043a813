"""Mean and spread of a tokenizer's latents, by which diffusion models normalise them (`mean_std.pt`)."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.architecture import LATENT_CHANNELS
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer

FILE = "mean_std.pt"
"""Its name in a released folder."""

NUM_LATENT_FRAMES = 16
"""Of the longest chunk that the diffusion models take, 121 video frames."""


class LatentStatistics(NamedTuple):
    """Over clips and positions, for each channel and latent frame."""

    mean: Tensor
    """Float32 [16, 16]: channel, latent frame."""

    std: Tensor
    """The same."""


@torch.no_grad()
def latent_statistics(tokenizer: ContinuousTokenizer, clips: Iterable[Tensor]) -> LatentStatistics:
    """Measure them.

    The first latent frame stands for one video frame and so differs from the rest; frames beyond those that the clips
    have are taken to be like the last one.

    Args:
        tokenizer: on the device of the clips.
        clips: batches [B, 3, T, H, W] in [-1, 1], all of the same T.

    Raises:
        ConfigError: if there is no clip, or the network has diverged.
    """
    count, total, total_square = 0, torch.zeros(()), torch.zeros(())
    for batch in clips:
        latents = tokenizer.encode(batch).double()
        count += latents[:, 0, 0].numel()
        total = total + latents.sum(dim=(0, 3, 4)).cpu()
        total_square = total_square + latents.square().sum(dim=(0, 3, 4)).cpu()
    if count == 0:
        raise ConfigError("no clip came to measure the latents on: name a data set whose val split has samples")
    if not total_square.isfinite().all():
        raise ConfigError("the network's latents are not all finite: take the weights of an earlier checkpoint")
    mean = total / count
    std = (total_square / count - mean.square()).clamp(min=0).sqrt()
    frames = torch.arange(NUM_LATENT_FRAMES).clamp(max=mean.shape[1] - 1)
    return LatentStatistics(mean[:, frames].float(), std[:, frames].float())


def write_latent_statistics(statistics: LatentStatistics, path: Path) -> None:
    """Write `mean_std.pt` as released folders hold it: a pair, each of which is viewed as [16, latent frames]."""
    partial = path.with_name(f".{path.name}.partial")
    torch.save((statistics.mean, statistics.std), partial)
    partial.replace(path)


def read_latent_statistics(path: Path) -> LatentStatistics:
    """Read a `mean_std.pt` of ours or of a released folder.

    Raises:
        ConfigError: if it holds no such pair.
    """
    try:
        mean, std = (half.float().view(LATENT_CHANNELS, -1) for half in torch.load(path, weights_only=True))
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise ConfigError(f"{path} holds no mean and spread of latents: fetch or export it again") from error
    return LatentStatistics(mean, std)
