"""A forward and a backward on made-up clips, for what has to be found out before training."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_hpc.tokenizer.losses import Losses
from cosmos_hpc.training.parallel import Groups


class Trial(NamedTuple):
    """What came out of it."""

    reconstructions: Tensor
    """[B, 3, T, H, W]."""

    gradient: list[Tensor]
    """Of the weights that are trained and were used."""


def run_trial(module: nn.Module, losses: Losses, clips: Tensor, step: int, groups: Groups, precision: str) -> Trial:
    """Forward, losses and backward as in training; leaves gradients and random numbers of a run as they are.

    Args:
        module: the network, unwrapped.
        losses: terms and their weights.
        clips: [B, 3, T, H, W] in [-1, 1].
        step: whose terms are computed.
        groups: the ranks; nothing is sent to them.
        precision: `trainer.precision`.
    """
    devices = [groups.device] if groups.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)  # for what a VAE samples
        with groups.autocast(precision):
            outputs = module(losses.inputs(clips, step))
        pull = losses.pull(clips, outputs, step, is_last=False)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    gradient = torch.autograd.grad(pull.ends, weights, pull.slopes, allow_unused=True)
    return Trial(outputs.reconstructions.detach().clone(), [each.clone() for each in gradient if each is not None])


def soft_clips(shape: tuple[int, int, int], count: int, device: torch.device) -> Tensor:
    """Soft colours that drift, [count, 3, T, H, W] in [-1, 1]: unlike noise, something that a tokenizer knows."""
    coarse = torch.rand(count, 3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(2 * coarse - 1, shape, mode="trilinear").to(device)


def free_memory(device: torch.device) -> None:
    """Give back to the GPU what is not in use, and count its peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
