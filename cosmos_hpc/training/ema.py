"""A moving average of the weights, which often reconstructs better than the weights themselves."""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average in float32, on the device of the weights.

    Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992, in its exponential form; the
    decay grows as (1 + step) / (10 + step) up to its final value, so that the start does not linger.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the weights as they are.

        Args:
            module: the network that is trained.
            decay: final decay, in [0, 1).
        """
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay = decay
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        moving = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self._averages: list[Tensor] = [average for average, _ in moving]
        self._weights: list[Tensor] = [weight for _, weight in moving]
        self._move = _move_towards

    def compile(self, backend: str = "inductor") -> None:
        """Fuse an update into one pass over the weights."""
        self._move = torch.compile(_move_towards, dynamic=False, backend=backend)

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Move towards the weights, in place.

        Args:
            step: updates done.
            skipped: 1.0 where the update was left out, else 0.0, on the device: then the average stays as it is.
        """
        share = (1.0 - skipped) * (1.0 - min(self._decay, (1 + step) / (10 + step)))
        self._move(self._averages, self._weights, share)


def _move_towards(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """Averages += share x (weights - averages), in place."""
    differences = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(differences, share)
    torch._foreach_add_(averages, differences)
