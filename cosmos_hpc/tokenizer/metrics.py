"""How good reconstructions are."""

import torch
from torch import Tensor

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
    if clips.shape != reconstructions.shape:
        raise ValueError(
            f"clips are {list(clips.shape)} but reconstructions {list(reconstructions.shape)}: "
            "pass clips and what became of them"
        )
    error = (clips.float().clamp(-1, 1) - reconstructions.float().clamp(-1, 1)) / 2
    frame_mse = error.square().mean(dim=(1, 3, 4)).clamp(min=SMALLEST_ERROR)
    return (-10 * torch.log10(frame_mse)).mean(1)
