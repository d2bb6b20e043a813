"""Lists of batches that tests compare."""

import pickle
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch


def take(loader, count: int) -> list[torch.Tensor]:
    return list(islice(loader, count))


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(*pair) for pair in zip(some, others, strict=True))


def in_pieces(open_loader: Callable[[], Any], counts: Iterable[int]) -> list[torch.Tensor]:
    """As many batches as each count says, each time from a loader of its own that goes on where the last one was."""
    pieces: list[torch.Tensor] = []
    state = None
    for count in counts:
        loader = open_loader()
        if state is not None:
            loader.restore([pickle.loads(state)])
        pieces += take(loader, count)
        state = pickle.dumps(loader.state())
        loader.close()
    return pieces
