"""From settings to a network."""

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
