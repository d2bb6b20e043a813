"""DV tokenizers: clips to integers in [0, 64000) and back."""

from torch import Tensor, nn

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.architecture import FSQ_LEVELS, LATENT_CHANNELS, Architecture
from cosmos_hpc.tokenizer.continuous import Autoencoded
from cosmos_hpc.tokenizer.decoder import Decoder
from cosmos_hpc.tokenizer.encoder import Encoder
from cosmos_hpc.tokenizer.layers import PointwiseConv
from cosmos_hpc.tokenizer.quantizer import FiniteScalarQuantizer


class DiscreteTokenizer(nn.Module):
    """An auto-encoder whose latents are rounded to one of 64000 codes per cell."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = Encoder(architecture)
        self.decoder = Decoder(architecture)
        self.quant_conv = PointwiseConv(LATENT_CHANNELS, len(FSQ_LEVELS))
        self.post_quant_conv = PointwiseConv(len(FSQ_LEVELS), LATENT_CHANNELS)
        self.quantizer = FiniteScalarQuantizer(FSQ_LEVELS)

    def encode(self, clips: Tensor) -> Tensor:
        """Compress.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1], T = 1 + k x temporal compression (1 + 8k), H and W multiples of the
                spatial compression (16).

        Returns:
            Codes [B, 6, T', H', W'] in [-1, 1], T' = 1 + k. The first latent frame stands for the first frame alone.

        Raises:
            ConfigError: on other sizes.
        """
        self.architecture.check_clips(clips.shape)
        return self.quantizer(self.quant_conv(self.encoder(clips)))

    def encode_indices(self, clips: Tensor) -> Tensor:
        """Compress clips [B, 3, T, H, W] to int32 indices [B, T', H', W'] in [0, 64000)."""
        return self.quantizer.codes_to_indices(self.encode(clips))

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruct.

        Args:
            codes: [B, 6, T', H', W'].

        Returns:
            [B, 3, T, H, W], about in [-1, 1] but not clamped.
        """
        self.architecture.check_latents(codes.shape)
        return self.decoder(self.post_quant_conv(codes.type_as(self.post_quant_conv.conv3d.weight)))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Reconstruct clips [B, 3, T, H, W] from integers [B, T', H', W'] in [0, 64000)."""
        if indices.dim() != 4:
            raise ConfigError(
                f"indices are {list(indices.shape)}, but are decoded as [B, T', H', W']: pass one clip's as [1, ...]"
            )
        return self.decode(self.quantizer.indices_to_codes(indices))

    def forward(self, clips: Tensor) -> Autoencoded:
        """Compress and reconstruct clips [B, 3, T, H, W] in [-1, 1]."""
        codes = self.encode(clips)
        return Autoencoded(self.decode(codes), codes)
