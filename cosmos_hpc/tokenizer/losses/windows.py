"""Overlapping windows in time: the same frames, reconstructed twice, are to look the same."""

from torch import Tensor


def cut_windows(clips: Tensor, num_frames: int, step: int) -> Tensor:
    """Windows of `num_frames` every `step` frames.

    Args:
        clips: [B, C, T, H, W].
        num_frames: frames of a window.
        step: frames from one to the next.

    Returns:
        [B x M, C, num_frames, H, W], the M = (T - num_frames) // step + 1 windows of a clip side by side.
    """
    return clips.unfold(2, num_frames, step).movedim((2, 5), (1, 3)).flatten(0, 1).contiguous()


def join_windows(windows: Tensor, num_clips: int, step: int) -> Tensor:
    """Put windows back together: where they overlap, their mean.

    Args:
        windows: [B x M, C, num_frames, H, W], as `cut_windows` gives them.
        num_clips: B.
        step: frames from one window to the next.

    Returns:
        [B, C, num_frames + (M - 1) x step, H, W].
    """
    parts = windows.unflatten(0, (num_clips, -1)).unbind(1)
    num_frames = windows.shape[2]
    length = num_frames + (len(parts) - 1) * step
    joined = windows.new_zeros(num_clips, windows.shape[1], length, *windows.shape[3:])
    count = windows.new_zeros(length)
    for index, part in enumerate(parts):
        frames = slice(index * step, index * step + num_frames)
        joined[:, :, frames] += part
        count[frames] += 1
    return joined / count[:, None, None]


def window_disagreement(windows: Tensor, num_clips: int, step: int) -> Tensor:
    """Mean absolute difference of neighbouring windows over the frames that both hold, a scalar.

    Args:
        windows: [B x M, C, num_frames, H, W].
        num_clips: B.
        step: frames, or latent frames, from one window to the next.
    """
    parts = windows.unflatten(0, (num_clips, -1))
    return (parts[:, :-1, :, step:] - parts[:, 1:, :, :-step]).abs().mean()
