"""The layers that encoder and decoder are made of: causal convolutions, per-frame norm, residual and attention blocks.

Activations are [B, C, T, H, W] lying in B, T, H, W, C memory (`torch.channels_last_3d`). In that memory a frame-wise
convolution is a 2-D one over [B*T, C, H, W] and a time-wise one a 2-D one over [B, C, T, H*W], both views, which spares
the copies that 3-D convolutions cost. (Flattened with the channels last, so that a batch of one keeps the strides by
which libraries know the memory order.) The parameters keep the released 5-D shapes, held by a child `conv3d` that is
never called itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def channels_last(x: Tensor) -> Tensor:
    """[B, C, T, H, W] to [B, T, H, W, C]; a view."""
    return x.permute(0, 2, 3, 4, 1)


def channels_second(x: Tensor) -> Tensor:
    """[B, T, H, W, C] to [B, C, T, H, W]; a view."""
    return x.permute(0, 4, 1, 2, 3)


def repeat_first_frame(x: Tensor, count: int) -> Tensor:
    """Prepend `count` copies of frame 0: what makes a convolution in time causal."""
    return torch.cat([x[:, :, :1]] * count + [x], 2)


class _ChannelsLast(torch.autograd.Function):
    """A weight as cuDNN wants it, and its gradient as the weight lies.

    Left to autograd, cuDNN's gradient would be copied once more, when it is added to a weight of another memory order.
    """

    @staticmethod
    def forward(_context: Any, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def kernel(weight: Tensor) -> Tensor:
    """[C', C, kH, kW], in the memory order of the activations where that spares the GPU a copy."""
    return _ChannelsLast.apply(weight) if weight.is_cuda and weight.requires_grad else weight


class SpatialConv(nn.Module):
    """3x3 convolution of each frame by itself."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.conv3d = nn.Conv3d(in_channels, out_channels, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T, H', W']; H' = H and W' = W at stride 1 and padding 1."""
        return self.convolve(x, self.conv3d.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias."""
        frames = channels_last(x).flatten(0, 1).permute(0, 3, 1, 2)
        frames = F.conv2d(frames, kernel(self.conv3d.weight.squeeze(2)), bias, self.stride, self.padding)
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class TemporalConv(nn.Module):
    """Convolution of three frames, the present one and the two before; the clip starts with copies of frame 0."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, num_front_copies: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.num_front_copies = num_front_copies
        self.conv3d = nn.Conv3d(in_channels, out_channels, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T', H, W]; T' = T at stride 1 and two front copies."""
        return self.convolve(x, self.conv3d.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias."""
        x = repeat_first_frame(x, self.num_front_copies) if self.num_front_copies else x
        columns = channels_last(x).flatten(2, 3).permute(0, 3, 1, 2)
        columns = F.conv2d(columns, kernel(self.conv3d.weight.squeeze(4)), bias, (self.stride, 1))
        return columns.unflatten(3, x.shape[3:])


class PointwiseConv(nn.Module):
    """1x1x1 convolution: one matrix product for all positions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T, H, W]."""
        return channels_second(F.linear(channels_last(x), self.conv3d.weight.flatten(1), self.conv3d.bias))


class FactorizedConv(nn.Sequential):
    """3x3x3 convolution as one in space followed by one in time."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(SpatialConv(in_channels, out_channels), TemporalConv(out_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T, H, W].

        Under autocast the first bias goes through the second convolution by itself: copies of a frame stand before
        the clip, so it adds the same to every frame, and no pass over the frames adds it or sums its gradient.
        """
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        in_space, in_time = self
        assert isinstance(in_space, SpatialConv), "for the type checker"
        assert isinstance(in_time, TemporalConv), "for the type checker"
        weight, own, first = in_time.conv3d.weight, in_time.conv3d.bias, in_space.conv3d.bias
        assert own is not None, "for the type checker"
        assert first is not None, "for the type checker"
        bias = own + (weight.sum((2, 3, 4)) * first).sum(1)
        return in_time.convolve(in_space.convolve(x, None), bias)


class FrameNorm(nn.Module):
    """Group norm with one group, for each frame by itself: mean 0 and variance 1 over its channels and positions.

    Spelled out because the library's kernels have few and very long rows here: `layer_norm` took 87 of 120 ms of an
    eager training step on an H100, `group_norm` copies to another memory order, and `var_mean` is slow on the CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor, *, silu: bool = False) -> Tensor:
        """[B, C, T, H, W] to the same, through SiLU if asked; statistics of bfloat16 are taken in float32."""
        frames = channels_last(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return channels_second(_Normalise.apply(frames, self.norm.weight, self.norm.bias, self.norm.eps, silu))
        statistics = frame_statistics(frames, self.norm.eps)
        return channels_second(normalised(frames, *statistics, self.norm.weight, self.norm.bias, silu).type_as(x))


def frame_statistics(frames: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each frame of [B, T, H, W, C], as [B, T, 1, 1, 1] in float32 or better.

    In one pass over bfloat16, whose own rounding is far above that of the difference of squares.
    """
    if frames.itemsize < 4:
        wide = frames.float()
        mean = wide.mean((2, 3, 4), keepdim=True)
        variance = (wide.square().mean((2, 3, 4), keepdim=True) - mean.square()).clamp(min=0)
    else:
        mean = frames.mean((2, 3, 4), keepdim=True)
        variance = (frames - mean).square().mean((2, 3, 4), keepdim=True)
    return mean, torch.rsqrt(variance + eps)


def normalised(frames: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """(frames - mean) x scale x weight + bias, perhaps through SiLU, in float32 or better."""
    values = torch.addcmul(bias.to(mean.dtype), frames - mean, scale * weight)
    return F.silu(values) if silu else values


class _Normalise(torch.autograd.Function):
    """`normalised` by the frames' own statistics. Its gradient takes one pass for all sums and one for the rest."""

    @staticmethod
    def forward(context: Any, frames: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        mean, scale = frame_statistics(frames, eps)
        context.save_for_backward(frames, mean, scale, weight, bias)
        context.silu = silu
        return normalised(frames, mean, scale, weight, bias, silu).type_as(frames)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        frames, mean, scale, weight, bias = context.saved_tensors
        standard = (frames - mean) * scale
        slope = gradient.to(mean.dtype)
        if context.silu:
            values = standard * weight + bias
            gate = values.sigmoid()
            slope = slope * gate * (1 + values * (1 - gate))
        of_bias, of_weight = slope.sum((2, 3)), (slope * standard).sum((2, 3))  # [B, T, C]
        size = frames[0, 0].numel()
        shift, stretch = ((each * weight).sum(2)[:, :, None, None, None] / size for each in (of_bias, of_weight))
        own = scale * (slope * weight - shift - standard * stretch)
        totals = of_weight.sum((0, 1)).type_as(weight), of_bias.sum((0, 1)).type_as(bias)
        return own.type_as(frames), *totals, None, None


class Block(nn.Module):
    """What is computed again in the backward, where memory is short: of its inside only the input is kept."""

    recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T', H', W'], computed at once or also a second time."""
        if self.recomputes and torch.is_grad_enabled():
            result: Tensor = checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=False)
            return result
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """What the block is."""
        raise NotImplementedError


def recompute_blocks(network: nn.Module) -> None:
    """Activation checkpointing: keep the input of each block, and compute its inside again in the backward.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputes = True


class ResidualBlock(Block):
    """Two rounds of norm, SiLU and factorised convolution around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = FactorizedConv(in_channels, out_channels)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = FactorizedConv(out_channels, out_channels)
        self.nin_shortcut = PointwiseConv(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def compute(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T, H, W]."""
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return self.nin_shortcut(x) + h


class Attention(Block):
    """Single-head self-attention with a residual. The head is as wide as the network (512).

    At that width two matrix products and a softmax are faster than the fused kernels, whose backward alone took a
    seventh of a training step on an H100.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.norm = FrameNorm(channels)
        self.q = PointwiseConv(channels, channels)
        self.k = PointwiseConv(channels, channels)
        self.v = PointwiseConv(channels, channels)
        self.proj_out = PointwiseConv(channels, channels)

    def compute(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same."""
        normed = self.norm(x)
        attended = self.attend(*(channels_last(project(normed)) for project in (self.q, self.k, self.v)))
        return x + self.proj_out(channels_second(attended))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of the positions that see each other; all four are [B, T, H, W, C]."""
        raise NotImplementedError


class SpatialAttention(Attention):
    """Every position of a frame sees all positions of that frame."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Over the H*W positions of each frame."""
        logits = q.flatten(2, 3) @ k.flatten(2, 3).mT * self.scale  # [B, T, H*W, H*W]
        return (logits.softmax(-1) @ v.flatten(2, 3)).view_as(q)


class TemporalAttention(Attention):
    """Every position sees itself in its own frame and in those before."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Over the T frames at each position."""
        q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))  # [B, H, W, T, C]
        logits = q @ k.mT * self.scale
        is_later = torch.ones_like(logits, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(is_later, float("-inf")).softmax(-1)
        return (weights @ v).permute(0, 3, 1, 2, 4)


class MiddleBlock(nn.Module):
    """What lies at the bottom of encoder and decoder: attention between two residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = nn.Sequential(SpatialAttention(channels), TemporalAttention(channels))
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same."""
        return self.block_2(self.attn_1(self.block_1(x)))
