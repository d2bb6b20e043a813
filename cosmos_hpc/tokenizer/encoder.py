"""The network from clips to features of the latent grid."""

from itertools import pairwise

from torch import Tensor, nn

from cosmos_hpc.tokenizer.architecture import LATENT_CHANNELS, NUM_ENCODER_BLOCKS, NUM_LEVELS, Architecture
from cosmos_hpc.tokenizer.haar import HaarPatcher
from cosmos_hpc.tokenizer.layers import FactorizedConv, FrameNorm, MiddleBlock, ResidualBlock
from cosmos_hpc.tokenizer.resampling import Downsample


class DownLevel(nn.Module):
    """Residual blocks at one size, then the step to the next smaller one."""

    def __init__(self, in_channels: int, out_channels: int, downsample: nn.Module) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * NUM_ENCODER_BLOCKS
        self.block = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(widths)))
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T', H', W']."""
        return self.downsample(self.block(x))


class Encoder(nn.Module):
    """Haar transform, levels of residual blocks, attention at the smallest size."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.patcher3d = HaarPatcher(architecture.patch_size)
        self.conv_in = FactorizedConv(architecture.patch_channels, architecture.channels)
        widths = (architecture.channels, *architecture.widths)
        self.down = nn.Sequential(
            *(DownLevel(widths[i], widths[i + 1], _downsample(architecture, i)) for i in range(NUM_LEVELS))
        )
        self.mid = MiddleBlock(widths[-1])
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = FactorizedConv(widths[-1], LATENT_CHANNELS)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] to features [B, 16, T', H', W']."""
        x = self.mid(self.down(self.conv_in(self.patcher3d(clips))))
        return self.conv_out(self.norm_out(x, silu=True))


def _downsample(architecture: Architecture, level: int) -> nn.Module:
    if level == NUM_LEVELS - 1:
        return nn.Identity()
    resampling = architecture.down_resampling[level]
    return Downsample(architecture.widths[level], resampling) if any(resampling) else nn.Identity()
