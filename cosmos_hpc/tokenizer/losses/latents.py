"""What latents are to look like."""

import math

import torch
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of a diagonal Gaussian posterior from N(0, I), for each latent value.

    Kingma & Welling, "Auto-Encoding Variational Bayes", appendix B.

    Args:
        mean: [B, C, T', H', W'].
        logvar: [B, C, T', H', W'], natural log of the variance.

    Returns:
        [B, C, T', H', W'] in nats, neither weighted nor reduced.

    Raises:
        ValueError: if the shapes differ.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean is {list(mean.shape)} but logvar is {list(logvar.shape)}: pass both halves of one encoding"
        )
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def uneven_use(codes: Tensor, levels: tuple[int, ...]) -> Tensor:
    """How unevenly the quantizer's levels are used: 0 where all are alike, towards 1 where each channel knows one.

    One minus the entropy of the levels over its maximum, mean over channels. A level is counted softly, as a value d
    levels away counts exp(-d^2); the rounding passes gradients on as if it were not there.

    Args:
        codes: [B, C, T', H', W'] in [-1, 1], as the quantizer gives them.
        levels: number of levels of each channel.

    Returns:
        A scalar.
    """
    shares = []
    for channel, count in zip(codes.movedim(1, 0).flatten(1).float(), levels, strict=True):
        positions = torch.arange(count, dtype=channel.dtype, device=channel.device)
        digits = (channel + 1) * (count // 2)
        use = torch.softmax(-(digits[:, None] - positions).square(), dim=1).mean(0)
        shares.append(1 + (use * use.log()).sum() / math.log(count))
    return torch.stack(shares).mean()
