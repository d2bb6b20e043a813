"""Finite scalar quantisation: each of a few channels is rounded to a few levels, and the digits make an index.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

MARGIN = 1e-3
"""Share by which the bound exceeds the outermost level, so that it can be reached."""


class FiniteScalarQuantizer(nn.Module):
    """Rounds channel i to levels[i] values. Index 0 is the code with every channel at its lowest level.

    The constants are float32 tensors, so type promotion lifts bfloat16 latents to float32 and leaves float64 alone,
    under autocast as well.
    """

    _levels: Tensor
    _basis: Tensor
    implicit_codebook: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.num_indices = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32))
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32))
        every_code = self.indices_to_codes(torch.arange(self.num_indices).view(-1, 1, 1, 1)).flatten(1)
        self.register_buffer("implicit_codebook", every_code.bfloat16())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.implicit_codebook = self.implicit_codebook.bfloat16()  # released so at any precision, and exact
        return self

    def bound(self, latents: Tensor) -> Tensor:
        """Squash into the range of the levels, centred so that rounding uses each of them.

        Args:
            latents: [B, C, T', H', W'], C the number of channels.

        Returns:
            The same shape; channel i within about +-(levels[i] - 1) / 2, shifted down by 1/2 where levels[i] is even.
        """
        levels = self._levels.view(-1, 1, 1, 1)
        half_range = (levels - 1) * (1 + MARGIN) / 2
        offset = (levels + 1) % 2 / 2
        return torch.tanh(latents + torch.atanh(offset / half_range)) * half_range - offset

    def forward(self, latents: Tensor) -> Tensor:
        """Quantise; the gradient is that of `bound`, as if nothing had been rounded.

        Args:
            latents: [B, C, T', H', W'].

        Returns:
            Codes, the same shape and dtype, multiples of 1/4 or 1/2 in [-1, 1]; exact in bfloat16.
        """
        bounded = self.bound(latents)
        rounded = bounded + (bounded.round() - bounded).detach()
        return (rounded / self._half_levels()).type_as(latents)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """[B, C, T', H', W'] to int32 [B, T', H', W'] in [0, number of codes); channel 0 is the lowest digit."""
        half_levels = self._half_levels()
        digits = codes * half_levels + half_levels
        return (digits.float() * self._basis.view(-1, 1, 1, 1)).sum(1).to(torch.int32)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Integers [B, T', H', W'] to float32 codes [B, C, T', H', W'].

        Channels lie last in memory, as encoding leaves them: in another order the decoder's bfloat16 sums would round
        otherwise, 2 % of the largest value apart.
        """
        digits = indices.unsqueeze(-1) // self._basis % self._levels
        half_levels = self._levels // 2
        return ((digits - half_levels) / half_levels).movedim(-1, 1)

    def _half_levels(self) -> Tensor:
        return (self._levels // 2).view(-1, 1, 1, 1)
