"""Lists of batches that tests compare."""

from itertools import islice

import torch


def take(loader, count: int) -> list[torch.Tensor]:
    return list(islice(loader, count))


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(*pair) for pair in zip(some, others, strict=True))
