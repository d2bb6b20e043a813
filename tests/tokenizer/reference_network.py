"""The tokenizers' specification transcribed as it reads, without any thought of speed: what the fast form is timed and
checked against. The fast form's state dict loads into it: the names are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_hpc.tokenizer.architecture import FSQ_LEVELS, LATENT_CHANNELS, NUM_DECODER_BLOCKS, NUM_LEVELS, Architecture

TAP, GAIN = 0.7071067690849304, 2.8284270763397217
BANDS = [(t, h, w) for t in (0, 1) for h in (0, 1) for w in (0, 1)]


class CausalConv(nn.Module):
    """A 3-D convolution, the clip extended in front by copies of its first frame and by zeros around each frame."""

    def __init__(self, in_channels, out_channels, kernel, stride=(1, 1, 1), padding=0):
        super().__init__()
        self.front = (kernel[0] - 1) + (1 - stride[0])
        self.padding = padding
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1]] * self.front + [x], 2)
        return self.conv3d(F.pad(x, (self.padding,) * 4))


def factorised(in_channels, out_channels):
    return nn.Sequential(
        CausalConv(in_channels, out_channels, (1, 3, 3), padding=1),
        CausalConv(out_channels, out_channels, (3, 1, 1)),
    )


def pointwise(in_channels, out_channels):
    return CausalConv(in_channels, out_channels, (1, 1, 1))


class Norm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        x = self.norm(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
        return x.reshape(b, t, c, h, w).permute(0, 2, 1, 3, 4)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = Norm(in_channels), factorised(in_channels, out_channels)
        self.norm2, self.conv2 = Norm(out_channels), factorised(out_channels, out_channels)
        self.nin_shortcut = pointwise(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Over the positions of each frame, or over the frames at each position, none of which sees a later one."""

    def __init__(self, channels, over_time):
        super().__init__()
        self.over_time = over_time
        self.norm = Norm(channels)
        self.q, self.k, self.v, self.proj_out = (pointwise(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        fold = (0, 3, 4, 2, 1) if self.over_time else (0, 2, 3, 4, 1)
        batch, tokens = (b * h * w, t) if self.over_time else (b * t, h * w)
        q, k, v = (
            project(self.norm(x)).permute(fold).reshape(batch, tokens, c) for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.over_time)
        attended = attended.reshape((b, h, w, t, c) if self.over_time else (b, t, h, w, c))
        return x + self.proj_out(attended.permute((0, 4, 3, 1, 2) if self.over_time else (0, 4, 1, 2, 3)))


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = nn.Sequential(Attention(channels, over_time=False), Attention(channels, over_time=True))
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels, in_space, in_time):
        super().__init__()
        self.in_space, self.in_time = in_space, in_time
        if in_space:
            self.conv1 = CausalConv(channels, channels, (1, 3, 3), (1, 2, 2))
        if in_time:
            self.conv2 = CausalConv(channels, channels, (3, 1, 1), (2, 1, 1))
        if in_space or in_time:
            self.conv3 = pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_space:
            x = F.pad(x, (0, 1, 0, 1))
            x = self.conv1(x) + F.avg_pool3d(x, (1, 2, 2))
        if self.in_time:
            x = torch.cat((x[:, :, :1], x), 2)
            x = self.conv2(x) + F.avg_pool3d(x, (2, 1, 1))
        return self.conv3(x) if self.in_space or self.in_time else x


class Upsample(nn.Module):
    def __init__(self, channels, in_space, in_time):
        super().__init__()
        self.in_space, self.in_time = in_space, in_time
        if in_time:
            self.conv1 = CausalConv(channels, channels, (3, 1, 1))
        if in_space:
            self.conv2 = CausalConv(channels, channels, (1, 3, 3), padding=1)
        if in_space or in_time:
            self.conv3 = pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time:
            x = x.repeat_interleave(2, 2)[:, :, 1:]
            x = x + self.conv1(x)
        if self.in_space:
            x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
            x = x + self.conv2(x)
        return self.conv3(x) if self.in_space or self.in_time else x


class Haar(nn.Module):
    """Filters of two taps along each axis, as grouped convolutions."""

    def __init__(self, patch_size, is_patcher):
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("wavelets", torch.full((2,), TAP))
        self.register_buffer("_arange", torch.arange(2))
        if is_patcher:
            self.register_buffer("patch_size_buffer", torch.tensor([patch_size], dtype=torch.int32))

    def kernels(self, channels: int, like: Tensor) -> Tensor:
        """[8 * channels, 1, 2, 2, 2]: of every band for every channel."""
        filters = torch.stack((self.wavelets, self.wavelets * (1 - 2 * self._arange))).to(like)
        kernels = [torch.einsum("i,j,k->ijk", filters[t], filters[h], filters[w]) for t, h, w in BANDS]
        return torch.stack(kernels).repeat(channels, 1, 1, 1).unsqueeze(1)

    def patch(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1]] * (self.patch_size - 1) + [x], 2)
        for _ in range(self.patch_size.bit_length() - 1):
            c = x.shape[1]
            x = F.conv3d(x, self.kernels(c, x), stride=2, groups=c) / GAIN
            x = x.unflatten(1, (c, 8)).transpose(1, 2).flatten(1, 2)
        return x

    def unpatch(self, x: Tensor) -> Tensor:
        for _ in range(self.patch_size.bit_length() - 1):
            c = x.shape[1] // 8
            x = x.unflatten(1, (8, c)).transpose(1, 2).flatten(1, 2)
            x = F.conv_transpose3d(x, self.kernels(c, x), stride=2, groups=c) * GAIN
        return x[:, :, self.patch_size - 1 :]


class Encoder(nn.Module):
    def __init__(self, architecture: Architecture):
        super().__init__()
        widths = (architecture.channels, *architecture.widths)
        self.patcher3d = Haar(architecture.patch_size, is_patcher=True)
        self.conv_in = factorised(architecture.patch_channels, architecture.channels)
        self.down = nn.ModuleList()
        for i in range(NUM_LEVELS):
            level = nn.Module()
            level.block = nn.ModuleList(
                [ResidualBlock(widths[i], widths[i + 1]), ResidualBlock(widths[i + 1], widths[i + 1])]
            )
            if i < NUM_LEVELS - 1:
                level.downsample = Downsample(widths[i + 1], *architecture.down_resampling[i])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = factorised(widths[-1], LATENT_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(self.patcher3d.patch(x))
        for i, level in enumerate(self.down):
            for block in level.block:
                x = block(x)
            if i < NUM_LEVELS - 1:
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, architecture: Architecture):
        super().__init__()
        widths = (*architecture.widths, architecture.widths[-1])
        self.unpatcher3d = Haar(architecture.patch_size, is_patcher=False)
        self.conv_in = factorised(LATENT_CHANNELS, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i in range(NUM_LEVELS):
            level = nn.Module()
            level.block = nn.ModuleList(
                ResidualBlock(widths[i + 1] if j == 0 else widths[i], widths[i]) for j in range(NUM_DECODER_BLOCKS)
            )
            if i > 0:
                level.upsample = Upsample(widths[i], *architecture.up_resampling[NUM_LEVELS - 1 - i])
            self.up.append(level)
        self.norm_out = Norm(widths[0])
        self.conv_out = factorised(widths[0], architecture.patch_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for i in reversed(range(NUM_LEVELS)):
            for block in self.up[i].block:
                x = block(x)
            if i > 0:
                x = self.up[i].upsample(x)
        return self.unpatcher3d.unpatch(self.conv_out(F.silu(self.norm_out(x))))


class ReferenceTokenizer(nn.Module):
    def __init__(self, architecture: Architecture):
        super().__init__()
        width = LATENT_CHANNELS if architecture.kind == "CV" else len(FSQ_LEVELS)
        self.encoder, self.decoder = Encoder(architecture), Decoder(architecture)
        self.quant_conv, self.post_quant_conv = pointwise(LATENT_CHANNELS, width), pointwise(width, LATENT_CHANNELS)
        self.is_discrete = architecture.kind == "DV"

    def encode(self, clips: Tensor) -> Tensor:
        z = self.quant_conv(self.encoder(clips))
        if not self.is_discrete:
            return z
        levels = torch.tensor(FSQ_LEVELS, device=z.device).view(-1, 1, 1, 1)
        h = (levels - 1) * (1 + 1e-3) / 2
        o = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.atanh(o / h)) * h - o
        return ((bounded + (bounded.round() - bounded).detach()) / (levels // 2)).to(z.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
