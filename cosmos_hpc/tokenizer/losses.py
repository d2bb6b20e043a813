"""What training lessens."""

from typing import NamedTuple

from torch import Tensor

from cosmos_hpc.config.schema import LossConfig


class LossTerms(NamedTuple):
    """Scalars on the device of the clips; reading one waits for the device."""

    total: Tensor
    """Weighted sum of the terms: what to call backward on."""

    l1: Tensor
    """Mean absolute difference, not weighted, detached."""


def mean_absolute_difference(clips: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean of |clips - reconstructions| over everything, a scalar in float32 or better.

    In two stages: one over the picture, one over the rest. Compiled for a GPU, a single reduction of so many values
    takes five times as long.

    Args:
        clips: [B, 3, T, H, W].
        reconstructions: the same shape.

    Raises:
        ValueError: if the shapes differ, as the difference would silently broadcast.
    """
    if clips.shape != reconstructions.shape:
        raise ValueError(
            f"clips are {list(clips.shape)} but reconstructions {list(reconstructions.shape)}: "
            "pass clips and what became of them"
        )
    pictures = (clips - reconstructions).abs().flatten(3).mean(3)
    return (pictures.float() if pictures.itemsize < 4 else pictures).mean()


def reconstruction_loss(clips: Tensor, reconstructions: Tensor, loss: LossConfig) -> LossTerms:
    """The loss of one micro-batch.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1].
        reconstructions: the same shape.
        loss: weight of each term.
    """
    l1 = mean_absolute_difference(clips, reconstructions)
    return LossTerms(total=loss.l1.weight * l1, l1=l1.detach())
