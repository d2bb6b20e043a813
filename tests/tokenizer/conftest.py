"""Small networks for the tests of the tokenizer."""

import os
from collections.abc import Callable

import pytest
import torch

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import ContinuousTokenizer, DiscreteTokenizer, starting_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Several threads on a shared machine wait for each other longer than they compute; processes inherit it."""
    num_threads, setting = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(num_threads)
    if setting is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = setting


@pytest.fixture
def small() -> Callable[[str], ContinuousTokenizer | DiscreteTokenizer]:
    """A fresh network by its name, such as CV8x8x8, of width 4."""
    return lambda name: starting_tokenizer(ModelConfig(model=name, channels=4), seed=0)
