"""The Haar wavelet transform in time, height and width that stands before the encoder and behind the decoder.

Every tap of the filters is +a or -a, so a transform is sums and differences of neighbours times a power of a.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

TAP = 0.7071067690849304
"""1 / sqrt(2) in float32, as a fresh network holds it."""

GAIN_PER_LEVEL = 2.8284270763397217
"""2 x sqrt(2) in float32: what the released networks divide each analysis by, and multiply each synthesis with."""


def split_pairs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbours along one dimension of even size; each result is half as long."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return even + odd, even - odd


def merge_pairs(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """Undo `split_pairs`, up to a factor of 2."""
    return torch.stack((low + high, low - high), dim + 1).flatten(dim, dim + 1)


def analyse(x: Tensor) -> Tensor:
    """One level of the transform without its scale.

    Args:
        x: [B, C, T, H, W], even T, H and W.

    Returns:
        [B, 8C, T/2, H/2, W/2]; channel band * C + c, bands LLL LLH LHL LHH HLL HLH HHL HHH (letters: time, height,
        width).
    """
    bands = [x]
    for dim in (2, 3, 4):
        bands = [half for band in bands for half in split_pairs(band, dim)]
    return torch.cat(bands, 1)


def synthesise(x: Tensor) -> Tensor:
    """Undo `analyse`, up to a factor of 8: [B, 8C, T, H, W] to [B, C, 2T, 2H, 2W]."""
    bands = list(x.chunk(8, 1))
    for dim in (4, 3, 2):
        bands = [merge_pairs(low, high, dim) for low, high in zip(bands[0::2], bands[1::2], strict=True)]
    return bands[0]


def analyse_rounding(x: Tensor, tap: float) -> Tensor:
    """`analyse` with its scale, in the steps of the released networks in bfloat16: rounded after every axis."""
    bands = [x]
    for dim in (2, 3, 4):
        bands = [(half * tap).type_as(x) for band in bands for half in split_pairs(band.float(), dim)]
    return torch.cat(bands, 1) / GAIN_PER_LEVEL


def synthesise_rounding(x: Tensor, tap: float) -> Tensor:
    """`synthesise` with its scale, rounded after every product and sum, as `analyse_rounding`."""
    bands = list(x.chunk(8, 1))
    for dim in (4, 3, 2):
        bands = [merge_pairs(low * tap, high * tap, dim) for low, high in zip(bands[0::2], bands[1::2], strict=True)]
    return bands[0] * GAIN_PER_LEVEL


def haar_matrix(size: int) -> Tensor:
    """All levels without their scale, from the values of a block to its bands: [3 size^3, 3 size^3] of -1, 0 and 1."""
    count = 3 * size**3
    blocks = torch.eye(count).view(count, 3, size, size, size)
    for _ in range(int(math.log2(size))):
        blocks = analyse(blocks)
    return blocks.flatten(1)


def multiply_blocks(x: Tensor, matrix: Tensor, size: int) -> Tensor:
    """The transform as one matrix product, which reads and writes a GPU's memory once.

    Args:
        x: [B, C, T, H, W], multiples of size.
        matrix: [C size^3, D], from the values of a block to its bands.
        size: of a block along each axis.

    Returns:
        [B, D, T / size, H / size, W / size], in B, T, H, W, C memory.
    """
    blocks = x.unflatten(4, (-1, size)).unflatten(3, (-1, size)).unflatten(2, (-1, size))
    with torch.autocast(x.device.type, enabled=False):
        return (blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4) @ matrix).permute(0, 4, 1, 2, 3)


def multiply_bands(x: Tensor, matrix: Tensor, size: int) -> Tensor:
    """The way back: bands [B, D, T, H, W] to [B, C, T size, H size, W size] by a matrix [D, C size^3]."""
    with torch.autocast(x.device.type, enabled=False):
        blocks = x.permute(0, 2, 3, 4, 1) @ matrix
    blocks = blocks.unflatten(4, (-1, size, size, size)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def rounds_at_each_step(x: Tensor) -> bool:
    """Whether the network as a whole computes in bfloat16; under autocast the transform stays in float32."""
    return x.itemsize < 4 and not torch.is_autocast_enabled(x.device.type)


def float32_or_better(x: Tensor) -> Tensor:
    """Lift the bfloat16 of autocast: the transform is cheap, and its rounding would show in every pixel."""
    return x.float() if x.itemsize < 4 else x


class HaarFilters(nn.Module):
    """Holds the taps under their released names. A checkpoint may hold rounded ones: these then set the scale."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_levels = int(math.log2(patch_size))
        self.tap = TAP
        self.register_buffer("wavelets", torch.tensor([TAP, TAP]))
        self.register_buffer("_arange", torch.arange(2))
        self.matrix = haar_matrix(patch_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.matrix = fn(self.matrix).float()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "wavelets" in state_dict:
            self.tap = float(state_dict[prefix + "wavelets"][0])  # here, so that no forward waits for the device


class HaarPatcher(HaarFilters):
    """Clips to patches of patch_size along each axis. A constant clip gives its value in 3 channels, elsewhere 0."""

    def __init__(self, patch_size: int) -> None:
        super().__init__(patch_size)
        self.register_buffer("patch_size_buffer", torch.tensor([patch_size], dtype=torch.int32))

    def forward(self, clips: Tensor) -> Tensor:
        """Transform the clip, its first frame repeated so that it makes a patch of its own.

        Args:
            clips: [B, 3, T, H, W], T = 1 + k x patch_size, H and W multiples of patch_size.

        Returns:
            [B, 3 x patch_size^3, 1 + k, H / patch_size, W / patch_size], in B, T, H, W, C memory.
        """
        first = clips[:, :, :1].expand(-1, -1, self.patch_size - 1, -1, -1)
        patches = torch.cat((first, clips), 2)
        if rounds_at_each_step(clips):
            for _ in range(self.num_levels):
                patches = analyse_rounding(patches, self.tap)
        else:
            scale = (self.tap**3 / GAIN_PER_LEVEL) ** self.num_levels
            patches = float32_or_better(patches)
            if torch.is_autocast_enabled(clips.device.type):
                return multiply_blocks(patches, self.matrix * scale, self.patch_size)
            for _ in range(self.num_levels):
                patches = analyse(patches)
            patches = patches * scale
        return patches.contiguous(memory_format=torch.channels_last_3d)


class HaarUnpatcher(HaarFilters):
    """Patches back to clips."""

    def forward(self, patches: Tensor) -> Tensor:
        """Transform back and drop the copies of the first frame.

        Args:
            patches: [B, 3 x patch_size^3, T', H', W'].

        Returns:
            [B, 3, 1 + (T' - 1) x patch_size, H' x patch_size, W' x patch_size].
        """
        num_copies = self.patch_size - 1
        if rounds_at_each_step(patches):
            clips = patches.contiguous()
            for _ in range(self.num_levels):
                clips = synthesise_rounding(clips, self.tap)
            return clips[:, :, num_copies:]
        scale = (self.tap**3 * GAIN_PER_LEVEL) ** self.num_levels
        if torch.is_autocast_enabled(patches.device.type):
            matrix = self.matrix.T * scale
            return multiply_bands(float32_or_better(patches), matrix, self.patch_size)[:, :, num_copies:]
        clips = float32_or_better(patches).contiguous()
        for _ in range(self.num_levels):
            clips = synthesise(clips)
        return clips[:, :, num_copies:] * scale
