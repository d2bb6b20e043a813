"""The random generators of a process, for a checkpoint."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """State of every generator that a rank may draw from."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them; those of GPUs only where there are as many."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
