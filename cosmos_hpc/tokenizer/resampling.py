"""Halving and doubling of frames, height and width between two levels of the network."""

import torch.nn.functional as F
from torch import Tensor

from cosmos_hpc.tokenizer.architecture import Resampling
from cosmos_hpc.tokenizer.layers import (
    Block,
    PointwiseConv,
    SpatialConv,
    TemporalConv,
    channels_last,
    channels_second,
    repeat_first_frame,
)


class Downsample(Block):
    """Each halving is the sum of a strided convolution and the mean of neighbours."""

    def __init__(self, channels: int, resampling: Resampling) -> None:
        super().__init__()
        if resampling.in_space:
            self.conv1 = SpatialConv(channels, channels, stride=2, padding=0)
        if resampling.in_time:
            self.conv2 = TemporalConv(channels, channels, stride=2, num_front_copies=0)
        self.conv3 = PointwiseConv(channels, channels)
        self.resampling = resampling

    def compute(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to H/2 and W/2 in space, from 1 + 2k to 1 + k frames in time."""
        if self.resampling.in_space:
            x = self.conv1(F.pad(x, (0, 1, 0, 1))) + mean_of_four(x)
        if self.resampling.in_time:
            x = repeat_first_frame(x, 2)
            x = self.conv2(x) + (x[:, :, 1::2] + x[:, :, 2::2]) / 2
        return self.conv3(x)


class Upsample(Block):
    """Each doubling repeats neighbours and adds a convolution of the result."""

    def __init__(self, channels: int, resampling: Resampling) -> None:
        super().__init__()
        if resampling.in_time:
            self.conv1 = TemporalConv(channels, channels)
        if resampling.in_space:
            self.conv2 = SpatialConv(channels, channels)
        self.conv3 = PointwiseConv(channels, channels)
        self.resampling = resampling

    def compute(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to 2H and 2W in space, from 1 + k to 1 + 2k frames in time."""
        if self.resampling.in_time:
            x = double_frames(x)[:, :, 1:]  # the first frame stands for itself alone
            x = x + self.conv1(x)
        if self.resampling.in_space:
            x = double_pixels(x)
            x = x + self.conv2(x)
        return self.conv3(x)


def mean_of_four(x: Tensor) -> Tensor:
    """2x2 average pooling, even H and W; spelled out because `avg_pool3d` lacks bfloat16 on the CPU."""
    top, bottom = x[..., 0::2, :], x[..., 1::2, :]
    return (top[..., 0::2] + top[..., 1::2] + bottom[..., 0::2] + bottom[..., 1::2]) / 4


def double_frames(x: Tensor) -> Tensor:
    """Repeat every frame: [B, C, T, H, W] to [B, C, 2T, H, W], in the same memory order."""
    frames = channels_last(x).unsqueeze(2).expand(-1, -1, 2, -1, -1, -1)
    return channels_second(frames.flatten(1, 2))


def double_pixels(x: Tensor) -> Tensor:
    """Nearest-neighbour enlargement: [B, C, T, H, W] to [B, C, T, 2H, 2W], in the same memory order."""
    pixels = channels_last(x).unsqueeze(4).unsqueeze(3).expand(-1, -1, -1, 2, -1, 2, -1)
    return channels_second(pixels.flatten(4, 5).flatten(2, 3))
