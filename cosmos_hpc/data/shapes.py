"""The shape of each step's clips: drawn by (seed, step), so the same on all ranks, whatever their number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cosmos_hpc.data.choosing import ClipKind, seed_of


@dataclass(frozen=True)
class StepShapes:
    """Which kind of clips each batch of a rank's streams has.

    A rank's batches come from its streams in turn, and so many of them make a step.
    """

    kinds: Sequence[ClipKind]
    """All there are."""

    weights: Sequence[float]
    """Of each in the draw."""

    seed: int
    """Of the draws."""

    batches_per_step: int
    """Of one rank."""

    num_streams: int
    """Of one rank."""

    first_step: int = 0
    """Step of the first batches."""

    first_stream: int = 0
    """Index among the rank's of the stream that gives the first of them."""

    def start_at(self, first_step: int, first_stream: int) -> "StepShapes":
        """The same from another position on."""
        return replace(self, first_step=first_step, first_stream=first_stream)

    def of_batch(self, stream: int, number: int) -> ClipKind:
        """What a batch looks like, counted from 0 in its stream since this position."""
        turn = (stream - self.first_stream) % self.num_streams
        return self.of_step(self.first_step + (number * self.num_streams + turn) // self.batches_per_step)

    def of_step(self, step: int) -> ClipKind:
        """What all batches of a step look like."""
        if len(self.kinds) == 1:
            return self.kinds[0]
        draw = torch.Generator().manual_seed(seed_of(self.seed, "shapes", step))
        bounds = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        point = torch.rand((), generator=draw, dtype=torch.float64) * bounds[-1]
        return self.kinds[int(torch.searchsorted(bounds, point, right=True))]
