"""How far latents move when an encoder is trained, summed up over videos."""

import torch
from torch import Tensor

from cosmos_hpc.report.scores import LatentDrift


class LatentSums:
    """Sums over the latents of some weights and of the first ones, channel by channel."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._is_unchanged = True

    def add(self, latents: Tensor, first: Tensor) -> None:
        """Take in one clip's latents (CV) or codes (DV), both [B, C, T', H', W']."""
        self._is_unchanged = self._is_unchanged and bool(latents.equal(first))
        both = [each.double().movedim(1, 0).flatten(1) for each in (latents, first)]
        found = [torch.full((each.shape[0],), each.shape[1], dtype=torch.float64).to(each) for each in both]
        rows = [torch.stack([n, each.sum(1), each.square().sum(1)]) for n, each in zip(found, both, strict=True)]
        new = torch.stack(rows)
        self._sums = new if self._sums is None else self._sums + new

    def drift(self) -> LatentDrift | None:
        """Of the mean and the standard deviation; none before the first clip."""
        if self._sums is None:
            return None
        count, total, squares = self._sums.cpu().unbind(1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        (own_mean, first_mean), (own_std, first_std) = mean, std
        least = 1e-6  # a channel that never changes, such as an untrained quantizer's
        shift = (own_mean - first_mean) / first_std.clamp(min=least)
        ratio = own_std.clamp(min=least) / first_std.clamp(min=least)
        return LatentDrift(self._is_unchanged, tuple(shift.tolist()), tuple(ratio.tolist()))
