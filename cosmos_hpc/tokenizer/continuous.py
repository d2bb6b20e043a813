"""CV tokenizers: clips to continuous latents and back."""

from typing import NamedTuple

from torch import Tensor, nn

from cosmos_hpc.tokenizer.architecture import LATENT_CHANNELS, Architecture
from cosmos_hpc.tokenizer.decoder import Decoder
from cosmos_hpc.tokenizer.encoder import Encoder
from cosmos_hpc.tokenizer.layers import PointwiseConv


class Autoencoded(NamedTuple):
    """What a forward returns."""

    reconstructions: Tensor
    """[B, 3, T, H, W], about in [-1, 1] but not clamped; float32 under autocast."""

    latents: Tensor
    """CV: latents [B, 16, T', H', W']; DV: codes [B, 6, T', H', W'] in [-1, 1]."""


class ContinuousTokenizer(nn.Module):
    """An auto-encoder; there is no distribution over the latents and nothing is sampled."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = Encoder(architecture)
        self.decoder = Decoder(architecture)
        self.quant_conv = PointwiseConv(LATENT_CHANNELS, LATENT_CHANNELS)
        self.post_quant_conv = PointwiseConv(LATENT_CHANNELS, LATENT_CHANNELS)

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
        """Compress and reconstruct clips [B, 3, T, H, W] in [-1, 1]."""
        latents = self.encode(clips)
        return Autoencoded(self.decode(latents), latents)
