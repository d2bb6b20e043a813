"""The Cosmos video tokenizers: networks, loss, metrics, weights in and out, inference."""

from cosmos_hpc.tokenizer.build import build_tokenizer
from cosmos_hpc.tokenizer.continuous import Autoencoded, ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.inference import EncodedVideo, Tokenizer
from cosmos_hpc.tokenizer.latent_statistics import LatentStatistics, latent_statistics, read_latent_statistics
from cosmos_hpc.tokenizer.losses import Losses
from cosmos_hpc.tokenizer.metrics import psnr, ssim
from cosmos_hpc.tokenizer.starting import starting_tokenizer, tokenizer_in_training
from cosmos_hpc.tokenizer.weights import check_form, export, export_jit, load_tokenizer, load_weights

__all__ = [
    "Autoencoded",
    "ContinuousTokenizer",
    "DiscreteTokenizer",
    "EncodedVideo",
    "LatentStatistics",
    "Losses",
    "Tokenizer",
    "build_tokenizer",
    "check_form",
    "export",
    "export_jit",
    "latent_statistics",
    "load_tokenizer",
    "load_weights",
    "psnr",
    "read_latent_statistics",
    "ssim",
    "starting_tokenizer",
    "tokenizer_in_training",
]
