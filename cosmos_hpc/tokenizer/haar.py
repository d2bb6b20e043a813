"""The Haar wavelet transform in time, height and width that stands before the encoder and behind the decoder.

Every tap of the filters is +a or -a, so a transform is sums and differences of neighbours times a power of a.
"""

import math
from typing import Any

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
            patches = float32_or_better(patches)
            for _ in range(self.num_levels):
                patches = analyse(patches)
            patches = patches * (self.tap**3 / GAIN_PER_LEVEL) ** self.num_levels
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
        clips = float32_or_better(patches).contiguous()
        for _ in range(self.num_levels):
            clips = synthesise(clips)
        return clips[:, :, num_copies:] * (self.tap**3 * GAIN_PER_LEVEL) ** self.num_levels
