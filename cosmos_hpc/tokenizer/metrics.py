"""How good reconstructions are."""

from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_hpc.tokenizer.losses.pixels import check_same_shape

SMALLEST_ERROR = 1e-10
"""Mean squared error that counts as none: 100 dB."""


def psnr(clips: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB: of each frame for itself, then the mean over frames.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1].
        reconstructions: the same shape; values outside [-1, 1] are clamped, as a viewer would.

    Returns:
        [B] float32, at most 100.

    Raises:
        ValueError: if the shapes differ.
    """
    check_same_shape(clips, reconstructions)
    error = (clips.float().clamp(-1, 1) - reconstructions.float().clamp(-1, 1)) / 2
    frame_mse = error.square().mean(dim=(1, 3, 4)).clamp(min=SMALLEST_ERROR)
    return (-10 * torch.log10(frame_mse)).mean(1)


def ssim(clips: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each clip: of each frame for itself, then the mean over frames.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, with its Gaussian
    window of 11 pixels, each colour for itself; in float, where other programs round to 8 bits.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1], H and W at least 6.
        reconstructions: the same shape; values outside [-1, 1] are clamped.

    Returns:
        [B] float32, at most 1.

    Raises:
        ValueError: if the shapes differ.
    """
    check_same_shape(clips, reconstructions)
    pairs = ((each.float().clamp(-1, 1) + 1) / 2 for each in (reconstructions, clips))
    ours, theirs = (each.movedim(2, 1) for each in pairs)  # [B, T, 3, H, W]
    return torch.stack([_frames_ssim(*pair).mean() for pair in zip(ours, theirs, strict=True)]).float()


class CodeUse(NamedTuple):
    """How much of a codebook is used."""

    share: float
    """Codes that occur, of all there are, in (0, 1]."""

    perplexity: float
    """Number of codes that, used evenly, would carry as much: e to the entropy of the codes."""


def code_use(counts: Tensor) -> CodeUse:
    """Use of a codebook; meaningful over many more cells than there are codes, as it can't exceed their number.

    Args:
        counts: [number of codes], how often each occurred, over everything that is measured.
    """
    shares = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return CodeUse(float((counts > 0).double().mean()), float(entropy.exp()))


def _frames_ssim(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each frame [T, 3, H, W] in [0, 1]: [T].

    In float64: torchmetrics takes variances as E[x^2] - E[x]^2, which in float32 costs flat pictures 4e-4.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # 1.5 s, which no start is to pay

    found: Tensor = structural_similarity_index_measure(
        ours.double(), theirs.double(), data_range=1.0, reduction="none"
    )
    return found
