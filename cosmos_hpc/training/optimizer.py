"""AdamW, clipping and the learning-rate schedule, by Megatron-Core, without a word from the device to the host."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cosmos_hpc.config.schema import OptimConfig
from cosmos_hpc.training.lean_import import lean_import
from cosmos_hpc.training.parallel import DistributedDataParallel, Groups, cuda_calls_on

with lean_import():
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

SHARDING = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
"""How the distributed optimizer is saved: the other forms fail, or lose weights where there are several buckets."""


class Optimizer:
    """One update of the weights: reduced gradients clipped, the rate of this step, AdamW; left out if not finite.

    Megatron-Core's own clipping reads the norm on the host, and its float32 optimizer steps on a NaN. Here norm and
    verdict stay on the device and are passed to torch's fused AdamW, which divides by the one and obeys the other.
    """

    def __init__(
        self, ddp: DistributedDataParallel, config: OptimConfig, groups: Groups, *, decay_steps: int | None = None
    ) -> None:
        """Update the weights of `ddp`.

        Args:
            ddp: network with reduced gradients.
            config: settings.
            groups: the ranks.
            decay_steps: update at which the rate has fallen to `min_lr`; a constant rate needs none.
        """
        self._ddp = ddp
        self._groups = groups
        self._clip_grad = config.clip_grad
        self._is_distributed = config.use_distributed_optimizer
        settings = megatron_optimizer.OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=0.0,
            use_distributed_optimizer=config.use_distributed_optimizer,
        )
        with cuda_calls_on(groups.device), _torchs_adamw():
            self.megatron = megatron_optimizer.get_megatron_optimizer(settings, [ddp])
        (self._inner,) = self.megatron.chained_optimizers
        self._adam = self._inner.optimizer
        for group in self._adam.param_groups:
            group["fused"] = True
        # Also at a constant rate: the scheduler is what keeps decay off weights of one dimension.
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=decay_steps or config.warmup_steps + 1,
            lr_decay_style=config.lr_schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self._num_updates = 0
        self._verdicts: list[bool] = []

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return float(self.megatron.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._ddp.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights, unless loss or gradient is not finite; nothing waits for the device.

        Args:
            loss: of the global batch, the same on every rank, and whatever else is to be finite; on the device.

        Returns:
            Global norm of the gradient before clipping, and 1.0 where the update was left out, else 0.0: scalars on
            the device.
        """
        norm = self.gradient_norm()
        skipped = 1.0 - (norm.isfinite() & loss.isfinite().all()).float()
        self.update(norm, skipped)
        return norm, skipped

    @torch.no_grad()
    def update(self, norm: Tensor, skipped: Tensor) -> None:
        """Clip, and update the weights.

        Update n (counted from 1, without those left out) of the warm-up runs at n / warmup_steps of the rate; a falling
        rate is at its least in update `decay_steps`.

        Args:
            norm: from `gradient_norm`.
            skipped: 1.0 to leave the update out, else 0.0: a scalar on the device.
        """
        self._adam.found_inf = skipped
        # torch's clip_grad_norm_ multiplies by clip / (norm + 1e-6); AdamW divides
        self._adam.grad_scale = ((norm + 1e-6) / self._clip_grad).clamp(min=1.0) if self._clip_grad else None
        if self._adam.grad_scale is not None:
            self._adam.grad_scale = self._adam.grad_scale.nan_to_num(nan=1.0, posinf=1.0)
        self._advance_schedule()
        with cuda_calls_on(self._groups.device):
            self._inner.step()  # the chain around it would read a norm on the host

    def gradient_norm(self) -> Tensor:
        """2-norm over the gradients of all weights, after their reduction: a scalar on the device."""
        if not self._is_distributed:
            return torch.stack([buffer.grad_data.norm() for buffer in self._ddp.buffers]).norm()
        rank = self._groups.rank
        shards = [
            shard_buffer(bucket.grad_data, rank.world_size)[rank.rank]
            for buffer in self._ddp.buffers
            for bucket in buffer.buckets
        ]
        own = torch.stack([shard.norm() for shard in shards]).square().sum()
        return self._groups.total(own).sqrt()

    def learn(self, was_skipped: bool) -> None:
        """Tell, once the host knows it, whether an update was left out; for each update in turn, one update late."""
        self._verdicts.append(was_skipped)

    def _advance_schedule(self) -> None:
        """The schedule takes back an update that was left out, always two updates later, however early it is known.

        So a run that was stopped in between, and knew it earlier, has the same rates.
        """
        if self._num_updates >= 2:
            self.scheduler.num_steps -= int(self._verdicts.pop(0))
        self._num_updates += 1
        self.scheduler.step(increment=1)

    def sharded_state(self, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Moments and schedule for Megatron-Core's checkpoint.

        Args:
            model: the network's own sharded state.
            is_loading: the moments are made first where there are none yet.
        """
        if not self._adam.state:
            self._make_moments()
        with _torchs_adamw():
            state = self.megatron.sharded_state_dict(model, is_loading=is_loading, metadata=dict(SHARDING))
        return {
            "optimizer": state,
            "scheduler": self.scheduler.state_dict(),
            "schedule_lag": {"num_updates": self._num_updates, "verdicts": list(self._verdicts)},
        }

    @torch.no_grad()
    def load(self, loaded: dict[str, Any]) -> None:
        """Take over what `sharded_state` gave, as read from a checkpoint."""
        state = loaded["optimizer"]
        moments = state.pop("param_state", None)
        state.pop("param_state_sharding_type", None)
        if not self._is_distributed:  # Megatron-Core 0.16.1 leaves a count of 0 updates out, and then misses it
            state["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
        with _torchs_adamw():
            self._inner.load_state_dict(state)
        if moments is not None:  # in one call, Megatron-Core 0.16.1 stumbles over the `step` of torch's AdamW
            steps = {weight: own.pop("step") for weight, own in self._adam.state.items()}
            self._inner.load_parameter_state_from_dp_reshardable(moments)
            for weight, step in steps.items():
                self._adam.state[weight]["step"] = step
        for own in self._adam.state.values():
            own["step"] = own["step"].clone()  # one tensor each: the fused update adds to it in place
        self.scheduler.load_state_dict(loaded["scheduler"])
        self._num_updates, self._verdicts = loaded["schedule_lag"]["num_updates"], loaded["schedule_lag"]["verdicts"]

    def _make_moments(self) -> None:
        """Zero moments, without moving a weight: an optimizer can't be saved or loaded before them."""
        found_inf = torch.ones((), device=self._groups.device)
        self._adam.found_inf, self._adam.grad_scale = found_inf, None
        for group in self._adam.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        self._adam.step()
        self._adam.zero_grad()


@contextlib.contextmanager
def _torchs_adamw() -> Iterator[None]:
    """Megatron-Core takes torch's AdamW, even if an image has Transformer Engine's, which is saved otherwise."""
    with (
        mock.patch.object(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", False),
    ):
        yield
