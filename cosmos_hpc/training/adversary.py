"""The discriminator that is trained beside the tokenizer: its own data parallelism, AdamW and part of a checkpoint."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.tokenizer.losses.discriminator import AdversarialTerm, PatchDiscriminator
from cosmos_hpc.training.lean_import import lean_import
from cosmos_hpc.training.optimizer import Optimizer
from cosmos_hpc.training.parallel import Groups

with lean_import():
    from megatron.core.transformer.utils import sharded_state_dict_default


class Adversary:
    """A discriminator in training. `Losses` adds to its gradients by way of `term`, and the loop steps it."""

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        """Start from fresh weights, the same on every rank."""
        settings = config.loss.adversarial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            self.module = PatchDiscriminator(settings.channels)
        self._groups = groups
        self._ddp = groups.wrap(self.module)
        optim = dataclasses.replace(
            config.optim,
            lr=settings.lr,
            lr_schedule="constant",
            min_lr=0.0,
            weight_decay=0.0,
            use_distributed_optimizer=False,  # a few million weights
        )
        self.optimizer = Optimizer(self._ddp, optim, groups)
        autocast = partial(groups.autocast, config.trainer.precision)
        self.term = AdversarialTerm(self.module, settings, autocast=autocast, no_sync=self._ddp.no_sync)

    def finish_gradients(self) -> Tensor:
        """Wait until the reduced gradients are there; their global norm, a scalar on the device."""
        self._groups.finish_gradients(self._ddp)
        self._norm = self.optimizer.gradient_norm()
        return self._norm

    def step(self, skipped: Tensor) -> None:
        """Update the weights, unless the tokenizer's update is left out: the two stay in step.

        Args:
            skipped: 1.0 where it is, else 0.0, on the device.
        """
        self.optimizer.update(self._norm, skipped)

    def num_saved(self) -> int:
        """Values in a checkpoint: weights and two moments."""
        return 3 * sum(weight.numel() for weight in self.module.parameters())

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Weights, moments and schedule for Megatron-Core's checkpoint, by names that begin with `discriminator.`."""
        module = sharded_state_dict_default(self.module, prefix="discriminator.")
        return {"module": module, **self.optimizer.sharded_state(module, is_loading=is_loading)}

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over what `sharded_state` gave, as read from a checkpoint."""
        self.module.load_state_dict({name.partition(".")[2]: tensor for name, tensor in loaded["module"].items()})
        self.optimizer.load(loaded)
