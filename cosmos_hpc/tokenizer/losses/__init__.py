"""What training lessens. Each term is a function of clips and what became of them; `Losses` sums them by weight."""

from cosmos_hpc.tokenizer.losses.pixels import mean_absolute_difference
from cosmos_hpc.tokenizer.losses.total import Losses

__all__ = ["Losses", "mean_absolute_difference"]
