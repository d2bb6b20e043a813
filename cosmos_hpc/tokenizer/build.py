"""From settings to a network."""

import torch

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer.architecture import Architecture
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer


def build(architecture: Architecture) -> ContinuousTokenizer | DiscreteTokenizer:
    """A network with fresh random weights, drawn from torch's default generator."""
    return ContinuousTokenizer(architecture) if architecture.kind == "CV" else DiscreteTokenizer(architecture)


def build_tokenizer(model: ModelConfig) -> ContinuousTokenizer | DiscreteTokenizer:
    """The network that the settings name, with fresh random weights; `model.jit_ckpt_pth` is not read."""
    return build(Architecture.of(model))


def starting_tokenizer(model: ModelConfig, seed: int) -> ContinuousTokenizer | DiscreteTokenizer:
    """The network that a run starts from, on the CPU: the same for the same settings, at any time and on any rank.

    Args:
        model: which network, and the weights to start from where it starts from any.
        seed: of the fresh weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return build_tokenizer(model)
