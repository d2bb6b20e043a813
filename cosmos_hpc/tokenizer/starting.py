"""The network that a run starts from."""

from pathlib import Path

import torch

from cosmos_hpc.config.schema import ModelConfig, RunConfig
from cosmos_hpc.tokenizer.build import build_tokenizer
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.layers import recompute_blocks
from cosmos_hpc.tokenizer.trainable import freeze_all_but
from cosmos_hpc.tokenizer.weights import load_weights


def starting_tokenizer(model: ModelConfig, seed: int) -> ContinuousTokenizer | DiscreteTokenizer:
    """Build the network on the CPU: the same for the same settings, at any time and on any rank.

    Args:
        model: which network, and the weights to start from where it starts from any.
        seed: of the fresh weights.

    Raises:
        ConfigError: if the weights don't fit the network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(model)
    if model.jit_ckpt_pth is not None:
        load_weights(tokenizer, Path(model.jit_ckpt_pth))
    return tokenizer


def tokenizer_in_training(run: RunConfig) -> ContinuousTokenizer | DiscreteTokenizer:
    """The same as a run trains it: with what it leaves as it is frozen, and recomputing what it does not keep.

    Raises:
        ConfigError: if the weights don't fit the network, or a pattern of `model.trainable` names none of them.
    """
    tokenizer = starting_tokenizer(run.model, run.trainer.seed)
    freeze_all_but(tokenizer, run.model.trainable_patterns)
    if run.trainer.activation_checkpointing:
        recompute_blocks(tokenizer)
    return tokenizer
