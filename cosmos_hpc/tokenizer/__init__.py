"""The Cosmos video tokenizers: networks, loss, metrics, weights in and out, inference."""

from cosmos_hpc.tokenizer.build import build_tokenizer, starting_tokenizer
from cosmos_hpc.tokenizer.continuous import Autoencoded, ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.losses import LossTerms, reconstruction_loss
from cosmos_hpc.tokenizer.metrics import psnr

__all__ = [
    "Autoencoded",
    "ContinuousTokenizer",
    "DiscreteTokenizer",
    "LossTerms",
    "build_tokenizer",
    "psnr",
    "reconstruction_loss",
    "starting_tokenizer",
]
