"""The training loop."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.loader import TrainLoader, to_unit_range
from cosmos_hpc.tokenizer.losses import reconstruction_loss
from cosmos_hpc.training.checkpoint import CheckpointStore
from cosmos_hpc.training.optimizer import Optimizer
from cosmos_hpc.training.parallel import DistributedDataParallel, Groups
from cosmos_hpc.training.preemption import Outcome, StopRequest
from cosmos_hpc.training.telemetry import StepMetrics, Telemetry
from cosmos_hpc.training.validation import Validation


@dataclass
class TrainState:
    """Everything that a checkpoint restores."""

    module: nn.Module
    """The network itself, unwrapped."""

    ddp: DistributedDataParallel
    """The network with reduced gradients."""

    optimizer: Optimizer
    """AdamW and its schedule."""

    loader: TrainLoader
    """Where the next clips come from."""

    step: int = 0
    """Updates done."""

    consumed_samples: int = 0
    """Clips seen since step 0, over all ranks."""


@dataclass(frozen=True)
class Run:
    """What the loop works with but does not change."""

    config: RunConfig
    groups: Groups
    checkpoints: CheckpointStore
    validation: Validation
    telemetry: Telemetry
    stop: StopRequest


def train(state: TrainState, run: Run) -> Outcome:
    """Train until `max_steps` or until asked to stop; either way a checkpoint is left behind."""
    batches = iter(state.loader)
    if state.step == 0:
        run.telemetry.log_start(run.validation.run(state.module))
    while state.step < run.config.trainer.max_steps:
        run.telemetry.phase("train", state.step)
        metrics = train_step(state, batches, run)
        if run.validation.is_due(state.step):
            run.telemetry.phase("validate", state.step)
            metrics = metrics._replace(val_psnr=run.validation.run(state.module))
        run.telemetry.log(metrics)
        stopped = run.stop.agreed(run.groups.largest)
        if stopped or run.checkpoints.is_due(state.step):
            run.telemetry.phase("save", state.step)
            run.checkpoints.save(state)
        if stopped and state.step < run.config.trainer.max_steps:
            return stopped
    return Outcome.FINISHED


def train_step(state: TrainState, batches: Iterator[Tensor], run: Run) -> StepMetrics:
    """One update over `global_batch_size` clips: forwards and backwards over the micro batches, then AdamW."""
    started, data_time_s = time.perf_counter(), 0.0
    data, device = run.config.data, run.groups.device
    num_microbatches = data.global_batch_size // (data.micro_batch_size * run.groups.rank.world_size)
    sums = torch.zeros(2, device=device)
    state.ddp.zero_grad_buffer()
    state.optimizer.zero_grad()
    for index in range(num_microbatches):
        waited = time.perf_counter()
        clips = to_unit_range(next(batches).to(device, non_blocking=True))
        data_time_s += time.perf_counter() - waited
        is_last = index == num_microbatches - 1
        with nullcontext() if is_last else state.ddp.no_sync():
            with run.groups.autocast(run.config.trainer.precision):
                reconstructions = state.ddp(clips).reconstructions
            terms = reconstruction_loss(clips, reconstructions, run.config.loss)
            (terms.total / num_microbatches).backward()
        sums += torch.stack([terms.total.detach(), terms.l1.detach()])
    run.groups.finish_gradients(state.ddp)
    grad_norm = state.optimizer.step()
    state.step += 1
    state.consumed_samples += data.global_batch_size
    loss, l1 = (run.groups.total(sums) / (num_microbatches * run.groups.rank.world_size)).tolist()
    return StepMetrics(
        step=state.step,
        loss=loss,
        l1=l1,
        lr=state.optimizer.lr,
        grad_norm=grad_norm,
        step_time_s=time.perf_counter() - started,
        data_time_s=data_time_s,
        clips_per_s=data.global_batch_size / (time.perf_counter() - started),
        consumed_samples=state.consumed_samples,
    )
