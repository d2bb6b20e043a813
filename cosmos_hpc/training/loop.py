"""The training loop."""

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.loader import TrainLoader, loss_mask, to_unit_range
from cosmos_hpc.tokenizer.losses import Losses
from cosmos_hpc.training.adversary import Adversary
from cosmos_hpc.training.agreement import Agreement
from cosmos_hpc.training.checkpoint import CheckpointStore
from cosmos_hpc.training.compilation import Compilation
from cosmos_hpc.training.ema import WeightAverage
from cosmos_hpc.training.optimizer import Optimizer
from cosmos_hpc.training.parallel import DistributedDataParallel, Groups
from cosmos_hpc.training.preemption import Outcome
from cosmos_hpc.training.queued_steps import LateCopy, QueuedStep, StepQueue, Stopwatch
from cosmos_hpc.training.recovery import NonFiniteGuard, Verdict
from cosmos_hpc.training.telemetry import StepMetrics, Telemetry, ValidationScores
from cosmos_hpc.training.validation import Validation

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a checkpoint restores."""

    module: nn.Module
    """The network itself, unwrapped."""

    ddp: DistributedDataParallel
    """The network with reduced gradients."""

    optimizer: Optimizer
    """AdamW and its schedule."""

    average: WeightAverage | None
    """Moving average of the weights, if one is kept."""

    loader: TrainLoader
    """Where the next clips come from."""

    adversary: Adversary | None = None
    """The discriminator, if one is trained along."""

    step: int = 0
    """Updates done, those left out included."""

    consumed_samples: int = 0
    """Clips seen since step 0, over all ranks."""

    skipped_in_a_row: int = 0
    """Updates left out up to now, since the last one that was not."""

    def learn(self, metrics: StepMetrics) -> None:
        """Tell the schedules, one update late, whether an update was left out."""
        self.optimizer.learn(metrics.skipped)
        if self.adversary is not None and metrics.discriminator is not None:
            self.adversary.optimizer.learn(metrics.skipped)


@dataclass(frozen=True)
class Run:
    """What the loop works with but does not change."""

    config: RunConfig
    groups: Groups
    checkpoints: CheckpointStore
    losses: Losses
    validation: Validation
    telemetry: Telemetry
    agreement: Agreement
    guard: NonFiniteGuard
    compilation: Compilation


def train(state: TrainState, run: Run) -> Outcome:
    """Train until `max_steps` or until asked to stop; either way a checkpoint is left behind.

    The device is always one step behind the host: nothing in a step waits for it, and each step's numbers are read when
    the next one is queued. What the ranks must agree on travels while they compute.
    """
    batches, queue = iter(state.loader), StepQueue()
    max_steps = run.config.trainer.max_steps
    if state.step == 0:
        run.telemetry.log_start(_validate(state, run)[0])
    run.telemetry.phase("first_step", state.step)
    while state.step < max_steps:
        checkpoints = run.checkpoints
        run.agreement.start(
            wants_save=checkpoints.wants_save,
            wants_validation=run.validation.is_wanted,
            is_writing=checkpoints.is_writing,
            busy_s=queue.busy_s,
        )
        queue.append(train_step(state, batches, run))
        agreed = run.agreement.read()
        checkpoints.advance(is_writing=agreed.is_writing)
        run.telemetry.note_step_times(agreed.busy_s, checkpoints.saved_step)
        leaves = agreed.stop is not None or state.step == max_steps
        saves = leaves or agreed.wants_save or checkpoints.is_due(state.step)
        validates = agreed.wants_validation or run.validation.is_due(state.step)
        if _settle(state, run, queue, everything=saves or validates, validates=validates) is Verdict.ROLL_BACK:
            _roll_back(state, run, queue)
            continue
        saves = saves or checkpoints.is_best(state.step)
        if leaves or (saves and not state.skipped_in_a_row):  # a roll-back is to find weights from before the trouble
            _save(state, run, leaves=leaves)
        if agreed.stop is not None and state.step < max_steps:
            return agreed.stop
        run.telemetry.phase("train", state.step)
    return Outcome.FINISHED


def train_step(state: TrainState, batches: Iterator[Tensor], run: Run) -> QueuedStep:
    """One update over `global_batch_size` clips: forwards and backwards over the micro batches, then AdamW."""
    started, data_time_s = time.perf_counter(), 0.0
    data, device = run.config.data, run.groups.device
    num_microbatches = run.groups.num_microbatches(data)
    names = run.losses.names(state.step)
    sums = torch.zeros(1 + len(names), device=device)
    state.optimizer.zero_grad()
    adversary = state.adversary if run.losses.trains_discriminator(state.step) else None
    if adversary is not None:
        adversary.optimizer.zero_grad()
    busy = Stopwatch(device)
    for index in range(num_microbatches):
        waited = time.perf_counter()
        batch = run.groups.upload(next(batches))
        clips, mask = to_unit_range(batch), loss_mask(batch)
        data_time_s += time.perf_counter() - waited
        is_last = index == num_microbatches - 1
        with nullcontext() if is_last else state.ddp.no_sync():
            with run.groups.autocast(run.config.trainer.precision):
                outputs = state.ddp(run.losses.inputs(clips, state.step))
            sums += run.losses.backward(
                clips, outputs, state.step, scale=1 / num_microbatches, mask=mask, is_last=is_last
            )
    busy.stop()
    run.groups.finish_gradients(state.ddp)
    losses = run.groups.total(sums) / (num_microbatches * run.groups.rank.world_size)
    watched = losses if adversary is None else torch.cat([losses, adversary.finish_gradients().view(1)])
    grad_norm, skipped = state.optimizer.step(watched)
    if adversary is not None:
        adversary.step(skipped)
    state.step += 1
    state.consumed_samples += data.global_batch_size
    if state.average is not None:
        state.average.update(state.step, skipped)
    return QueuedStep(
        step=state.step,
        terms=names,
        numbers=LateCopy(torch.cat([losses, torch.stack([grad_norm, skipped])])),
        busy=busy,
        started=started,
        data_time_s=data_time_s,
        lr=state.optimizer.lr,
        num_clips=data.global_batch_size,
        consumed_samples=state.consumed_samples,
    )


def _settle(state: TrainState, run: Run, queue: StepQueue, *, everything: bool, validates: bool) -> Verdict:
    """Note the steps whose numbers are there, validate after the last of them if that is due, and judge them."""
    verdict = Verdict.GO_ON
    for metrics in queue.arrived(everything=everything):
        state.learn(metrics)
        verdict = run.guard.judge(state, metrics)
        if validates and metrics.step == state.step and verdict is Verdict.GO_ON:
            scores, seconds = _validate(state, run)
            metrics = metrics._replace(validation=scores, validation_time_s=seconds)
            run.checkpoints.note(state.step, scores)
        run.telemetry.log(metrics)
        if verdict is Verdict.ROLL_BACK:
            break
    return verdict


def _validate(state: TrainState, run: Run) -> tuple[ValidationScores, float]:
    """Scores of the weights and, once they differ, of their average; and the seconds that it took."""
    started = time.perf_counter()
    run.telemetry.phase("validate", state.step)
    average = state.average.module if state.average is not None and state.step > 0 else None
    with run.compilation.paused():
        scores = run.validation.run(state.module, run.telemetry.tick, average)
    run.telemetry.show(run.validation.pictures)
    return scores, time.perf_counter() - started


def _save(state: TrainState, run: Run, *, leaves: bool) -> None:
    """Begin a checkpoint; before leaving, also end it."""
    run.telemetry.phase("save", state.step)
    save = run.checkpoints.save if leaves else run.checkpoints.begin
    save(state, run.telemetry.metrics_bytes, run.telemetry.wandb_id)


def _roll_back(state: TrainState, run: Run, queue: StepQueue) -> None:
    """Back to the newest checkpoint, and on with other clips than those that led here."""
    step = state.step
    run.checkpoints.finish(may_fail=True)
    layout = run.checkpoints.load_newest(state, keeps_data_position=True)
    if layout is None:
        raise run.guard.nothing_to_go_back_to(step)
    queue.clear()
    run.telemetry.roll_back_to(state.step, layout["metrics_bytes"])
    logger.warning("rolled back from step %d to %d, and past the clips that were not finite", step, state.step)
