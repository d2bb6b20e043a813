"""CV tokenizers: clips to continuous latents and back."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosmos_hpc.tokenizer.architecture import LATENT_CHANNELS, Architecture
from cosmos_hpc.tokenizer.decoder import Decoder
from cosmos_hpc.tokenizer.encoder import Encoder
from cosmos_hpc.tokenizer.layers import PointwiseConv

FIRST_LOGVAR = -6.0
"""Log-variance that every latent starts from: a spread of 0.05, so that a released tokenizer hardly feels it."""

LOGVAR_RANGE = (-30.0, 20.0)


class Autoencoded(NamedTuple):
    """What a forward returns."""

    reconstructions: Tensor
    """[B, 3, T, H, W], about in [-1, 1] but not clamped; float32 under autocast."""

    latents: Tensor
    """CV: latents [B, 16, T', H', W']; DV: codes [B, 6, T', H', W'] in [-1, 1]."""

    logvar: Tensor | None = None
    """Log of the variance of a posterior of which the latents are the mean, the same shape; where there is one."""


class ContinuousTokenizer(nn.Module):
    """An auto-encoder. A variational one also learns a variance of each latent, and samples while it is trained.

    Kingma & Welling, "Auto-Encoding Variational Bayes", 2013. Without the variance it is the plain one again.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = Encoder(architecture)
        self.decoder = Decoder(architecture)
        self.quant_conv = PointwiseConv(LATENT_CHANNELS, LATENT_CHANNELS)
        self.post_quant_conv = PointwiseConv(LATENT_CHANNELS, LATENT_CHANNELS)
        self.quant_conv_logvar = _first_logvar() if architecture.is_variational else None

    def encode(self, clips: Tensor) -> Tensor:
        """Compress.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1], T = 1 + k x temporal compression (1 + 8k), H and W multiples of the
                spatial compression (8).

        Returns:
            Latents [B, 16, T', H', W'], T' = 1 + k. The first latent frame stands for the first frame alone.

        Raises:
            ConfigError: on other sizes.
        """
        self.architecture.check_clips(clips.shape)
        return self.quant_conv(self.encoder(clips))

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruct.

        Args:
            latents: [B, 16, T', H', W'].

        Returns:
            [B, 3, T, H, W], about in [-1, 1] but not clamped.
        """
        self.architecture.check_latents(latents.shape)
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, clips: Tensor) -> Autoencoded:
        """Compress and reconstruct clips [B, 3, T, H, W] in [-1, 1]; with gradients, a variational one samples."""
        if self.quant_conv_logvar is None or not torch.is_grad_enabled():
            latents = self.encode(clips)
            return Autoencoded(self.decode(latents), latents)
        self.architecture.check_clips(clips.shape)
        features = self.encoder(clips)
        mean, logvar = self.quant_conv(features), self.quant_conv_logvar(features).clamp(*LOGVAR_RANGE)
        return Autoencoded(self.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)), mean, logvar)


def _first_logvar() -> PointwiseConv:
    layer = PointwiseConv(LATENT_CHANNELS, LATENT_CHANNELS)
    nn.init.zeros_(layer.conv3d.weight)
    assert layer.conv3d.bias is not None
    nn.init.constant_(layer.conv3d.bias, FIRST_LOGVAR)
    return layer
