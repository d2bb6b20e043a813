"""The distance of VGG16's features and its gradient, spelled out rather than left to autograd.

VGG16 at full size is most of the memory traffic of a training step. Autograd would keep every layer of both pictures
and pass over each several times. Here bias and ReLU ride on the convolution, and a layer that is compared leaves two
bytes behind for every four of its values: where the difference points, and which of the four was the largest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_hpc.tokenizer.losses.vgg import LAYER_WEIGHTS, SEEN, Vgg16

NUM_TAPS = 32
"""Of the first convolution, as a matrix product over 3x3 pixels of three channels: 27, and zeros to fill up."""

SIZE_MULTIPLE = 16
"""Of height and width, so that no layer's pooling leaves a row over."""


class _Pointwise(NamedTuple):
    """What lies between the convolutions, compiled or not."""

    spread: Callable[..., Tensor]
    compare: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    compare_last: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    pull: Callable[..., Tensor]
    pull_last: Callable[..., Tensor]
    rectify: Callable[..., Tensor]
    gather: Callable[..., Tensor]


class FeatureDistance:
    """Mean absolute difference of VGG16's features, and its gradient at the second of the two pictures."""

    def __init__(self, network: Vgg16) -> None:
        """Use these weights; they are copied."""
        layers = [(index, layer) for index, layer in enumerate(network.features) if isinstance(layer, nn.Conv2d)]
        weights = [layer.weight.detach() for _, layer in layers]
        self._first_bias, *self._biases = (layer.bias.detach() for _, layer in layers if layer.bias is not None)
        self._shift, self._scale, self._dtype = network.shift, network.scale, network.dtype
        taps = weights[0].permute(2, 3, 1, 0).flatten(0, 2)
        self._taps = F.pad(taps, (0, 0, 0, NUM_TAPS - len(taps)))
        self._weights = [_channels_last(weight) for weight in weights[1:]]
        self._turned = [_channels_last(weight.flip(2, 3).transpose(0, 1)) for weight in self._weights]
        self._is_seen = [index + 1 in SEEN for index, _ in layers[1:]]
        self._fused = _Pointwise(_spread, _compare, _compare_last, _pull, _pull_last, _rectify, _gather)

    def compile(self, backend: str) -> None:
        """Fuse what lies between the convolutions."""
        self._fused = _Pointwise._make(torch.compile(each, dynamic=False, backend=backend) for each in self._fused)

    @torch.no_grad()
    def __call__(self, expected: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Compare.

        Args:
            expected: [B, 3, T, H, W] in [-1, 1], H and W multiples of 16.
            seen: the same shape.

        Returns:
            Sum over all frames of the layers' mean absolute differences by their weights, a scalar; and its gradient
            at `seen`, [B, 3, T, H, W]; both in float32 or better.
        """
        fused = self._fused
        theirs, ours = self._first(expected), self._first(seen)
        kept, total = [ours], torch.zeros((), device=seen.device)
        slopes: list[float] = []
        for weight, bias, is_seen in zip(self._weights, self._biases, self._is_seen, strict=True):
            theirs, ours = convolve_relu(theirs, weight, bias), convolve_relu(ours, weight, bias)
            if not is_seen:
                kept.append(ours)
                continue
            slopes.append(LAYER_WEIGHTS[len(slopes)] / ours[0].numel())
            compare = fused.compare if len(slopes) < len(LAYER_WEIGHTS) else fused.compare_last
            difference, theirs, ours, marks = compare(theirs, ours)
            total = total + slopes[-1] * difference
            kept.append(marks)
        gradient = fused.pull_last(kept.pop(), slopes.pop(), self._dtype)
        for turned, is_seen in zip(reversed(self._turned), reversed([False, *self._is_seen[:-1]]), strict=True):
            gradient, own = F.conv2d(gradient, turned, padding=1), kept.pop()
            gradient = fused.pull(own, gradient, slopes.pop()) if is_seen else fused.rectify(own, gradient)
        return total, fused.gather(gradient.permute(0, 2, 3, 1) @ self._taps.T, self._scale, seen.shape[2])

    def _first(self, clips: Tensor) -> Tensor:
        taps = self._fused.spread(clips, self._shift, self._scale, self._dtype)
        values = torch._addmm_activation(self._first_bias, taps.flatten(0, 2), self._taps)  # with ReLU
        return values.view(*taps.shape[:3], -1).permute(0, 3, 1, 2)


def convolve_relu(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution with bias and ReLU, in one kernel where cuDNN has it; no gradient.

    Args:
        values: [N, C, H, W], channels last in memory, as is what is returned.
        weight: [C', C, 3, 3].
        bias: [C'].
    """
    if values.is_cuda:
        return torch.ops.aten.cudnn_convolution_relu(values, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    return _channels_last(F.conv2d(values, weight, bias, padding=1).relu_())


def _spread(clips: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The 3x3 pixels around each one, as VGG16 wants them: [B, 3, T, H, W] to [B T, H, W, 32]; zeros around a frame."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    height, width = frames.shape[2:]
    padded = F.pad((frames - shift) / scale, (1, 1, 1, 1)).to(dtype)
    tap = torch.arange(NUM_TAPS, device=frames.device)
    row = torch.arange(height, device=frames.device)[:, None, None] + (tap // 9).clamp(max=2)
    column = torch.arange(width, device=frames.device)[:, None] + tap // 3 % 3
    return torch.where(tap < 27, padded[:, tap % 3, row, column], 0)


def _gather(taps: Tensor, scale: Tensor, num_frames: int) -> Tensor:
    """The gradient of `_spread`: [B T, H, W, 32] to [B, 3, T, H, W], in float32 or better."""
    height, width = taps.shape[1:3]
    padded = F.pad(taps.to(torch.promote_types(taps.dtype, torch.float32)), (0, 0, 1, 1, 1, 1))
    total = torch.zeros_like(padded[:, 1:-1, 1:-1, :3])
    for tap in range(9):
        row, column = 2 - tap // 3, 2 - tap % 3
        total = total + padded[:, row : row + height, column : column + width, 3 * tap : 3 * tap + 3]
    return (total.permute(0, 3, 1, 2) / scale).unflatten(0, (-1, num_frames)).transpose(1, 2)


def _compare(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of absolute differences, both pooled 2x2, and the marks of our quadruples: int16 [N, H/2, W/2, C].

    A mark has three bits for each of four neighbours: 1 + the sign of the difference, and whether it is the (first)
    largest. A value of zero is marked as neither, since no gradient passes its ReLU.
    """
    theirs_of_four, ours_of_four = _quadruple(theirs), _quadruple(ours)
    largest_of_theirs, largest = _largest(theirs_of_four), _largest(ours_of_four)
    wide = torch.promote_types(ours.dtype, torch.float32)
    marks = torch.zeros_like(largest, dtype=torch.int16)
    is_found = torch.zeros_like(largest, dtype=torch.bool)
    difference = torch.zeros_like(largest, dtype=wide)
    for place, (their, our) in enumerate(zip(theirs_of_four, ours_of_four, strict=True)):
        distance = our.to(wide) - their.to(wide)
        difference = difference + distance.abs()
        is_alive = our > 0
        is_largest = (our == largest) & ~is_found
        is_found = is_found | is_largest
        sign = torch.where(is_alive, distance.sign(), 0).to(torch.int16)
        marks = marks | ((sign + 1 + torch.where(is_largest & is_alive, 4, 0).to(torch.int16)) << (3 * place))
    pooled = [each.permute(0, 3, 1, 2) for each in (largest_of_theirs, largest)]
    return difference.sum(-1).sum(), pooled[0], pooled[1], marks


def _compare_last(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a layer that nothing follows: sum of absolute differences, and the sign where our value is not zero."""
    wide = torch.promote_types(ours.dtype, torch.float32)
    distance = (ours.to(wide) - theirs.to(wide)).permute(0, 2, 3, 1)
    signs = torch.where(ours.permute(0, 2, 3, 1) > 0, distance.sign(), 0).to(torch.int8)
    return distance.abs().sum(-1).sum(), theirs, ours, signs


def _pull(marks: Tensor, pooled_gradient: Tensor, slope: float) -> Tensor:
    """Gradient before ReLU: of the pooled layer at its largest values, and of the difference at all."""
    wide = torch.promote_types(pooled_gradient.dtype, torch.float32)
    place = torch.arange(2, device=marks.device).view(2, 1)
    shift = (3 * (2 * place.view(2, 1, 1, 1) + place)).to(torch.int16)  # [2, 1, 2, 1] beside [N, H/2, 2, W/2, 2, C]
    own = (marks[:, :, None, :, None] >> shift) & 7
    from_above = torch.where(own >= 4, pooled_gradient.permute(0, 2, 3, 1)[:, :, None, :, None].to(wide), 0)
    gradient = (from_above + slope * ((own & 3) - 1).to(wide)).to(pooled_gradient.dtype)
    return gradient.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _pull_last(signs: Tensor, slope: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (slope * signs.to(wide)).to(dtype).permute(0, 3, 1, 2)


def _rectify(values: Tensor, gradient: Tensor) -> Tensor:
    """Gradient before ReLU."""
    return torch.where(values > 0, gradient, 0)


def _quadruple(values: Tensor) -> list[Tensor]:
    """The four neighbours of each 2x2 square of [N, C, H, W], each [N, H/2, W/2, C]."""
    values = values.permute(0, 2, 3, 1)
    return [values[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


def _largest(four: list[Tensor]) -> Tensor:
    return torch.maximum(torch.maximum(four[0], four[1]), torch.maximum(four[2], four[3]))


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)
