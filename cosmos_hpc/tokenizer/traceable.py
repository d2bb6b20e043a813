"""The three modules of a released TorchScript folder: what each takes and returns, and the names of its tensors."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.quantizer import FiniteScalarQuantizer

Posterior = tuple[Tensor, Tensor]
"""Stands where other tokenizers return mean and logarithm of the variance: two zeros, each of shape [1]."""


class TraceableModules(NamedTuple):
    """To be traced and saved as encoder.jit, decoder.jit and autoencoder.jit."""

    encoder: nn.Module
    decoder: nn.Module
    autoencoder: nn.Module


def traceable_modules(tokenizer: ContinuousTokenizer | DiscreteTokenizer) -> TraceableModules:
    """The network's modules in the released arrangement; they share its weights."""
    if isinstance(tokenizer, DiscreteTokenizer):
        return TraceableModules(DiscreteEncoder(tokenizer), DiscreteDecoder(tokenizer), DiscreteAutoencoder(tokenizer))
    return TraceableModules(
        ContinuousEncoder(tokenizer), ContinuousDecoder(tokenizer), ContinuousAutoencoder(tokenizer)
    )


class ContinuousEncoder(nn.Module):
    """Clips to latents."""

    def __init__(self, tokenizer: ContinuousTokenizer) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.quant_conv = tokenizer.quant_conv

    def forward(self, clips: Tensor) -> tuple[Tensor, Posterior]:
        """[B, 3, T, H, W] to latents [B, 16, T', H', W'] and the empty posterior."""
        return self.quant_conv(self.encoder(clips)), (torch.zeros(1), torch.zeros(1))


class ContinuousDecoder(nn.Module):
    """Latents to clips."""

    def __init__(self, tokenizer: ContinuousTokenizer) -> None:
        super().__init__()
        self.post_quant_conv = tokenizer.post_quant_conv
        self.decoder = tokenizer.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """[B, 16, T', H', W'] to [B, 3, T, H, W]."""
        return self.decoder(self.post_quant_conv(latents))


class ContinuousAutoencoder(nn.Module):
    """Clips to reconstructions."""

    def __init__(self, tokenizer: ContinuousTokenizer) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.decoder = tokenizer.decoder
        self.quant_conv = tokenizer.quant_conv
        self.post_quant_conv = tokenizer.post_quant_conv

    def forward(self, clips: Tensor) -> tuple[Tensor, Posterior, Tensor]:
        """[B, 3, T, H, W] to reconstructions, the empty posterior and latents."""
        latents = self.quant_conv(self.encoder(clips))
        return self.decoder(self.post_quant_conv(latents)), (torch.zeros(1), torch.zeros(1)), latents


class DiscreteEncoder(nn.Module):
    """Clips to indices."""

    def __init__(self, tokenizer: DiscreteTokenizer) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.quant_conv = tokenizer.quant_conv
        self.quantizer = tokenizer.quantizer

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, T, H, W] to int32 indices [B, T', H', W'], codes [B, 6, T', H', W'] and the empty loss."""
        codes = self.quantizer(self.quant_conv(self.encoder(clips)))
        return self.quantizer.codes_to_indices(codes), codes, empty_quantisation_loss(codes)


class IndexDecoder(nn.Module):
    """Holds the quantiser under the name that decoder.jit has for it."""

    def __init__(self, quantizer: FiniteScalarQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, indices: Tensor) -> Tensor:
        """Integers [B, T', H', W'] to codes [B, 6, T', H', W']."""
        return self.quantizer.indices_to_codes(indices)


class DiscreteDecoder(nn.Module):
    """Indices to clips."""

    def __init__(self, tokenizer: DiscreteTokenizer) -> None:
        super().__init__()
        self.inv_quant = IndexDecoder(tokenizer.quantizer)
        self.post_quant_conv = tokenizer.post_quant_conv
        self.decoder = tokenizer.decoder

    def forward(self, indices: Tensor) -> Tensor:
        """Integers [B, T', H', W'] to [B, 3, T, H, W]."""
        codes = self.inv_quant(indices).type_as(self.post_quant_conv.conv3d.weight)
        return self.decoder(self.post_quant_conv(codes))


class DiscreteAutoencoder(nn.Module):
    """Clips to reconstructions."""

    def __init__(self, tokenizer: DiscreteTokenizer) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.decoder = tokenizer.decoder
        self.quant_conv = tokenizer.quant_conv
        self.post_quant_conv = tokenizer.post_quant_conv
        self.quantizer = tokenizer.quantizer

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, T, H, W] to reconstructions, the empty loss and int32 indices [B, T', H', W']."""
        codes = self.quantizer(self.quant_conv(self.encoder(clips)))
        reconstructions = self.decoder(self.post_quant_conv(codes))
        return reconstructions, empty_quantisation_loss(codes), self.quantizer.codes_to_indices(codes)


def empty_quantisation_loss(codes: Tensor) -> Tensor:
    """Float32 zeros [B, 1, 1, 1, W'], as released; FSQ has no loss.

    Made from the codes, since a trace would keep the device and size of a new tensor for ever.
    """
    return (codes.float() * 0).mean(dim=(1, 2, 3), keepdim=True)
