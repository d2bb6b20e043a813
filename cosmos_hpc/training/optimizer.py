"""AdamW and the learning-rate schedule, by Megatron-Core."""

import torch

from cosmos_hpc.config.schema import OptimConfig
from cosmos_hpc.training.lean_import import lean_import
from cosmos_hpc.training.parallel import DistributedDataParallel, cuda_calls_on

with lean_import():
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


class Optimizer:
    """One update of the weights: reduced gradients clipped, the rate of this step, AdamW."""

    def __init__(self, ddp: DistributedDataParallel, config: OptimConfig, device: torch.device) -> None:
        self._device = device
        with cuda_calls_on(device):
            self.megatron: MegatronOptimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    min_lr=0.0,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.betas[0],
                    adam_beta2=config.betas[1],
                    adam_eps=config.eps,
                    clip_grad=config.clip_grad,
                ),
                [ddp],
            )
        # Also at a constant rate: the scheduler is what keeps decay off weights of one dimension.
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=0.0,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=config.warmup_steps + 1,
            lr_decay_style="constant",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return float(self.megatron.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.megatron.zero_grad()

    def step(self) -> float:
        """Update the weights; update n (counted from 1) of the warm-up runs at n / warmup_steps of the rate.

        Returns:
            Global norm of the gradient before clipping.
        """
        self.scheduler.step(increment=1)
        with cuda_calls_on(self._device):
            _, grad_norm, _ = self.megatron.step()
        return float(grad_norm)
