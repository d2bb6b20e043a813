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
    pairs = zip(*_unit_frames(reconstructions, clips), strict=True)
    return torch.stack([_frames_ssim(*pair).mean() for pair in pairs]).float()


def psnr_inside(clips: Tensor, reconstructions: Tensor, inside: Tensor) -> Tensor:
    """PSNR over what a mask counts: of each frame for itself, then the mean over the frames that it counts any of.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1].
        reconstructions: the same shape.
        inside: bool [B, 1, T, H, W].

    Returns:
        [B] float32 in dB, at most 100; nan for a clip with nothing inside.
    """
    check_same_shape(clips, reconstructions)
    error = ((clips.float().clamp(-1, 1) - reconstructions.float().clamp(-1, 1)) / 2).square().mean(1, keepdim=True)
    count = inside.sum(dim=(1, 3, 4))
    mse = (error * inside).sum(dim=(1, 3, 4)) / count  # nan for a frame without
    return (-10 * torch.log10(mse.clamp(min=SMALLEST_ERROR))).nanmean(1)


def ssim_inside(clips: Tensor, reconstructions: Tensor, inside: Tensor) -> Tensor:
    """Structural similarity around the pixels that a mask counts, as `psnr_inside` takes its means.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1], H and W at least 6.
        reconstructions: the same shape.
        inside: bool [B, 1, T, H, W].

    Returns:
        [B] float32; nan for a clip with nothing inside.
    """
    found = []
    for own, clip, mask in zip(*_unit_frames(reconstructions, clips), inside.movedim(2, 1), strict=True):
        maps = _ssim_maps(own, clip).mean(1, keepdim=True)
        found.append(((maps * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))).nanmean())
    return torch.stack(found).float()


def flicker(clips: Tensor, reconstructions: Tensor) -> Tensor:
    """How far the change from frame to frame is off: what an eye sees as flicker or jitter where all frames look good.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1].
        reconstructions: the same shape; values outside [-1, 1] are clamped.

    Returns:
        [B] float32: mean |(y[t+1] - y[t]) - (x[t+1] - x[t])| in [0, 2], both in [0, 1]; nan for a single frame.
    """
    return _jumps(clips, reconstructions).mean(1)


def border_error(clips: Tensor, reconstructions: Tensor, window_frames: int) -> Tensor:
    """How much more the change from frame to frame is off where a window of frames ends than it is inside windows.

    Args:
        clips: [B, 3, T, H, W] in [-1, 1].
        reconstructions: the same shape, of windows that were encoded and decoded each by itself.
        window_frames: frames of a window.

    Returns:
        [B] float32: `flicker` across the borders over that within windows; 1: no seam. nan for a single window.
    """
    jumps = _jumps(clips, reconstructions)
    crosses = torch.arange(1, jumps.shape[1] + 1, device=jumps.device) % window_frames == 0
    return jumps[:, crosses].mean(1) / jumps[:, ~crosses].mean(1).clamp(min=SMALLEST_ERROR)


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


def _jumps(clips: Tensor, reconstructions: Tensor) -> Tensor:
    """Error of the change from each frame to the next: [B, T - 1]."""
    check_same_shape(clips, reconstructions)
    error = (reconstructions.float().clamp(-1, 1) - clips.float().clamp(-1, 1)) / 2
    return error.diff(dim=2).abs().mean(dim=(1, 3, 4))


def _unit_frames(reconstructions: Tensor, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [B, T, 3, H, W] in [0, 1]."""
    check_same_shape(clips, reconstructions)
    ours, theirs = ((each.float().clamp(-1, 1) + 1) / 2 for each in (reconstructions, clips))
    return ours.movedim(2, 1), theirs.movedim(2, 1)


def _frames_ssim(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each frame [T, 3, H, W] in [0, 1]: [T].

    In float64: torchmetrics takes variances as E[x^2] - E[x]^2, which in float32 costs flat pictures 4e-4.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # 1.5 s, which no start is to pay

    found: Tensor = structural_similarity_index_measure(
        ours.double(), theirs.double(), data_range=1.0, reduction="none"
    )
    return found


def _ssim_maps(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each pixel of frames [T, 3, H, W] in [0, 1]: the same shape."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, maps = structural_similarity_index_measure(
        ours.double(), theirs.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    found: Tensor = maps
    return found
