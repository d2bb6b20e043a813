"""The network from features of the latent grid to clips."""

from itertools import pairwise

from torch import Tensor, nn

from cosmos_hpc.tokenizer.architecture import LATENT_CHANNELS, NUM_DECODER_BLOCKS, NUM_LEVELS, Architecture
from cosmos_hpc.tokenizer.haar import HaarUnpatcher
from cosmos_hpc.tokenizer.layers import FactorizedConv, FrameNorm, MiddleBlock, ResidualBlock
from cosmos_hpc.tokenizer.resampling import Upsample


class UpLevel(nn.Module):
    """Residual blocks at one size, then the step to the next larger one."""

    def __init__(self, in_channels: int, out_channels: int, upsample: nn.Module) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * NUM_DECODER_BLOCKS
        self.block = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(widths)))
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T', H', W'] to [B, C', T, H, W]."""
        return self.upsample(self.block(x))


class Decoder(nn.Module):
    """The encoder's mirror image. Level 0 is the largest size and so runs last."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.unpatcher3d = HaarUnpatcher(architecture.patch_size)
        widths = architecture.widths
        self.conv_in = FactorizedConv(LATENT_CHANNELS, widths[-1])
        self.mid = MiddleBlock(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, NUM_LEVELS - 1)], widths[i], _upsample(architecture, i))
            for i in range(NUM_LEVELS)
        )
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = FactorizedConv(widths[0], architecture.patch_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, 16, T', H', W'] to clips [B, 3, T, H, W], about in [-1, 1] but not clamped."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        return self.unpatcher3d(self.conv_out(self.norm_out(x, silu=True)))


def _upsample(architecture: Architecture, level: int) -> nn.Module:
    if level == 0:
        return nn.Identity()
    resampling = architecture.up_resampling[NUM_LEVELS - 1 - level]
    return Upsample(architecture.widths[level], resampling) if any(resampling) else nn.Identity()
