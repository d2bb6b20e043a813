"""Clips that a rank takes in one forward, where `data.micro_batch_size: auto` leaves that to a measurement."""

import dataclasses
import logging
import math
import time

import torch
from torch import Tensor

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.tokenizer import Losses, tokenizer_in_training
from cosmos_hpc.training.adversary import Adversary
from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.trial import free_memory, run_trial, soft_clips

logger = logging.getLogger(__name__)

MOST = 64
"""Clips in the largest micro batch that is tried."""

REPEATS = 3
"""Runs of each size, after one that warms up; the fastest counts."""

ROOM = 0.9
"""Share of a GPU's memory that may be reserved; fragments and CUDA graphs want the rest."""

NOISE = 0.03
"""Share by which a speed has to be higher to count as higher; of those that are alike the smallest is taken."""


def with_micro_batch(config: RunConfig, groups: Groups) -> RunConfig:
    """The settings with a number in place of `auto`: the fastest that fits on all ranks. Collective.

    Measured uncompiled, on the largest shape of `data.clip_shapes` and with all terms that the run comes to use. What
    the optimizer and the average will take of a GPU is taken meanwhile.

    Args:
        config: settings; returned as they are where they name a number.
        groups: the ranks.

    Raises:
        torch.OutOfMemoryError: if not even one clip fits.
    """
    if config.data.micro_batch_size != "auto":
        return config
    bench = _Bench(config, groups)
    speeds: dict[int, float] = {}
    for size in [size for size in config.fitting_micro_batches if size <= MOST]:
        seconds = groups.gather(bench.measure(size))
        if None in seconds:
            break
        speeds[size] = size / max(seconds)
        if speeds[size] < (1 - NOISE) * max(speeds.values()):
            break
    del bench
    free_memory(groups.device)
    if not speeds:
        raise torch.OutOfMemoryError("not even one clip of the largest shape fits: set a smaller one")
    best = min(size for size, speed in speeds.items() if speed >= (1 - NOISE) * max(speeds.values()))
    told = ", ".join(f"{size}: {speed:.2f}" for size, speed in speeds.items())
    logger.info("data.micro_batch_size is %d from here on; clips/s of a rank, uncompiled, by size: %s", best, told)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=best))


class _Bench:
    """Network and losses like those of the run, and as much as else lies beside them in a GPU's memory."""

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self._config, self._groups = config, groups
        self._module = tokenizer_in_training(config).to(groups.device)
        steps = config.trainer.max_steps
        adversary = Adversary(config, groups) if config.loss.adversarial.is_used(steps) else None
        self._losses = Losses.build(config, groups.device, None if adversary is None else adversary.term)
        self._step = max((0, steps - 1), key=lambda step: len(self._losses.names(step)))
        self._beside = self._states() if groups.device.type == "cuda" else []

    def measure(self, size: int) -> float | None:
        """Seconds of a step of `size` clips; none where they don't fit."""
        free_memory(self._groups.device)
        try:
            clips = soft_clips(max(self._config.data.clip_shapes, key=math.prod), size, self._groups.device)
            seconds = [self._seconds(clips) for _ in range(1 + REPEATS)][1:]
        except torch.OutOfMemoryError:
            return None
        return min(seconds) if self._has_room() else None

    def _seconds(self, clips: Tensor) -> float:
        started = time.perf_counter()
        run_trial(self._module, self._losses, clips, self._step, self._groups, self._config.trainer.precision)
        if self._groups.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _has_room(self) -> bool:
        if self._groups.device.type != "cuda":
            return True
        return torch.cuda.max_memory_reserved() <= ROOM * torch.cuda.mem_get_info()[1]

    def _states(self) -> list[Tensor]:
        """The size of gradients, AdamW's moments and the average."""
        optim, count = self._config.optim, sum(weight.numel() for weight in self._module.parameters())
        shared_by = self._groups.rank.world_size if optim.use_distributed_optimizer else 1
        sizes = (count, 2 * count // shared_by, count * (optim.ema_decay > 0))
        return [torch.empty(size, device=self._groups.device) for size in sizes]
