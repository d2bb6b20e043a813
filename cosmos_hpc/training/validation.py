"""How good the reconstructions of unseen clips are."""

from collections.abc import Callable

import torch
from torch import nn

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import TrainerConfig
from cosmos_hpc.data.loader import ValidationLoader, to_unit_range
from cosmos_hpc.tokenizer.metrics import psnr
from cosmos_hpc.training.parallel import Groups


class Validation:
    """PSNR over the same clips each time, spread over the ranks."""

    def __init__(self, loader: ValidationLoader, trainer: TrainerConfig, groups: Groups) -> None:
        self._loader = loader
        self._trainer = trainer
        self._groups = groups

    def is_due(self, step: int) -> bool:
        """After every `val_check_interval` steps and after the last one."""
        return step % self._trainer.val_check_interval == 0 or step == self._trainer.max_steps

    @torch.no_grad()
    def run(self, module: nn.Module, on_batch: Callable[[], None]) -> float:
        """Mean PSNR in dB over the validation clips of all ranks; each clip counts once, however batches fell.

        Args:
            module: network.
            on_batch: called after each batch of this rank.

        Raises:
            ConfigError: if no rank has a clip.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._groups.device)
        for batch in self._loader:
            clips = to_unit_range(batch.to(self._groups.device))
            with self._groups.autocast(self._trainer.precision):
                reconstructions = module(clips).reconstructions
            values = psnr(clips, reconstructions).double()
            sums += torch.stack([values.sum(), torch.ones_like(values).sum()])
            on_batch()
        total, count = self._groups.total(sums).tolist()
        if not count:  # the same on every rank
            raise ConfigError(
                "no video of the split val gives a clip: all are shorter than data.num_frames or can't be decoded "
                "(see the warnings above): set fewer frames or add videos"
            )
        return total / count
