"""What one rank runs: `python -m cosmos_hpc.train`, started by the supervisor or by torchrun.

torchrun --nproc-per-node 8 -m cosmos_hpc.train data.path=... model.jit_ckpt_pth=... trainer.max_epochs=...
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import logging
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, read_run_config, resolve, to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, runs_folder, write_atomically
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.local import is_locked
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.preflight import check_inputs, with_local_weights, with_num_steps
from cosmos_hpc.ranks import (
    Rank,
    current_rank,
    die_with_parent,
    ranks_per_node,
    redirect_output,
    set_up_logging,
    was_started_by_torchrun,
)
from cosmos_hpc.training.preemption import Outcome, StopRequest

if TYPE_CHECKING:
    from cosmos_hpc.training.loop import Run, TrainState
    from cosmos_hpc.training.parallel import Groups

logger = logging.getLogger("cosmos_hpc.train")  # __name__ is __main__ in a rank


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks of one run."""

    folder: RunFolder
    config: RunConfig
    number: int


Before = Callable[[Attempt, "Groups"], None]
"""What a rank does once it has met the others, before it trains."""


def main(before: Before = lambda attempt, groups: None) -> None:
    """Train, write how it ended, and exit 0 unless it failed: 1, or 2 where the mend is the user's.

    Args:
        before: for the probe of `doctor`, which measures first.
    """
    stop = StopRequest()
    stop.install()  # before the slow imports, so that no signal is lost or deadly in the first seconds
    arguments = _parse(sys.argv[1:])
    rank = current_rank()
    if was_started_by_torchrun():
        die_with_parent()
    if arguments.run_folder is not None:
        redirect_output(RunFolder(arguments.run_folder).rank_log(arguments.attempt, rank.rank))
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the supervisor asks for stacks where a run hangs
    set_up_logging(rank)
    _quieten()
    try:
        _run_rank(arguments, rank, stop, before)
    except Exception as error:
        if arguments.run_folder is not None:
            _write_failure(RunFolder(arguments.run_folder), arguments.attempt, rank, error)
        if not isinstance(error, ConfigError):
            raise
        if rank.is_first or arguments.run_folder is not None:  # on one terminal once, in each rank's own log
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cosmos_hpc.train",
        description="One rank of a training run. Settings are group.name=value, as in the experiment files.",
    )
    parser.add_argument("overrides", nargs="*", metavar="group.name=value", help="settings, such as optim.lr=3e-5")
    parser.add_argument("--run-folder", type=Path, help="run that a supervisor has laid out; takes no overrides")
    parser.add_argument("--attempt", type=int, default=0, help="number of this start, counted by the supervisor")
    parser.add_argument("--yes", action="store_true", help="accepted for the guide's sake; nothing is ever asked")
    arguments = parser.parse_args(argv)
    if arguments.overrides and arguments.run_folder is not None:
        parser.error("--run-folder takes no settings: its config.yaml holds them")
    return arguments


def _quieten() -> None:
    """Keep the libraries' harmless remarks out of the logs."""
    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\..*")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _run_rank(arguments: argparse.Namespace, rank: Rank, stop: StopRequest, before: Before) -> None:
    own_config = None if arguments.run_folder else _command_line_config(arguments.overrides, rank)
    from cosmos_hpc.training.parallel import Groups  # seconds of imports, after all that can be refused at once

    groups = Groups.start(rank)
    if own_config is None:
        folder = RunFolder(arguments.run_folder)
        attempt = Attempt(folder, read_run_config(folder.config), arguments.attempt)
    else:
        attempt = groups.from_first(_lay_out_attempt(own_config) if rank.is_first else None)
    before(attempt, groups)
    _run_attempt(_with_micro_batch(attempt, groups), groups, stop)
    groups.stop()


def _command_line_config(overrides: list[str], rank: Rank) -> RunConfig:
    """The settings of torchrun's own line, with as many ranks as torchrun has started."""
    devices = ranks_per_node()
    launched = [f"trainer.devices={devices}", f"trainer.num_nodes={rank.world_size // devices}"]
    config = resolve(load_experiment(None, [*launched, *overrides]), {})
    if config.trainer.world_size != rank.world_size:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes is {config.trainer.world_size}, but torchrun started "
            f"{rank.world_size} ranks: leave both settings out"
        )
    check_inputs(config)
    return with_local_weights(with_num_steps(config))


def _lay_out_attempt(config: RunConfig) -> Attempt:
    (folder,) = ExperimentFolder(runs_folder() / config.name).place([config])
    if is_locked(folder.supervisor_lock):
        raise ConfigError(f"{folder.label} is being trained by a supervisor: `cosmos-hpc cancel {folder.label}` first")
    return Attempt(folder, lay_out(config, folder), folder.next_attempt())


def _with_micro_batch(attempt: Attempt, groups: "Groups") -> Attempt:
    """With a number where the settings leave it to a measurement; config.yaml holds it from then on."""
    from cosmos_hpc.training.micro_batch import with_micro_batch

    config = with_micro_batch(attempt.config, groups)
    if config != attempt.config and groups.rank.is_first:
        write_atomically(attempt.folder.config, to_yaml(config))
    return dataclasses.replace(attempt, config=config)


def _run_attempt(attempt: Attempt, groups: "Groups", stop: StopRequest) -> None:
    """Build, train, and let rank 0 write how it ended; the supervisor decides by that file alone."""
    from cosmos_hpc.training.loop import train

    if groups.rank.is_first:
        stop.look_for(attempt.folder.requeue_request)
    state, run = _build(attempt, groups, stop)
    try:
        outcome = train(state, run)
    except Exception as error:
        _write_failure(attempt.folder, attempt.number, groups.rank, error, state.step)
        raise
    run.telemetry.phase("leave", state.step)
    if groups.rank.is_first:
        ending = {
            "outcome": outcome,
            "step": state.step,
            "message": None,
            **run.telemetry.facts(run.checkpoints.saved_step),
        }
        write_atomically(attempt.folder.outcome(attempt.number), json.dumps(ending))
    groups.barrier()
    run.telemetry.close()  # after the outcome is safe: wandb may wait for a network
    state.loader.close()
    mend = "" if outcome is Outcome.FINISHED else "; the same command goes on from there"
    logger.info("%s: step %d is saved in %s%s", outcome, state.step, attempt.folder.path, mend)


def _build(attempt: Attempt, groups: "Groups", stop: StopRequest) -> "tuple[TrainState, Run]":
    """Everything that the loop works with, in the order in which the parts need each other."""
    import torch

    from cosmos_hpc.data.loader import TrainLoader, ValidationLoader
    from cosmos_hpc.tokenizer import Losses, tokenizer_in_training
    from cosmos_hpc.training.adversary import Adversary
    from cosmos_hpc.training.agreement import Agreement
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.compilation import Subject, compile_training
    from cosmos_hpc.training.ema import WeightAverage
    from cosmos_hpc.training.loop import Run, TrainState
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.recovery import NonFiniteGuard
    from cosmos_hpc.training.telemetry import Telemetry
    from cosmos_hpc.training.validation import Validation

    config, rank = attempt.config, groups.rank
    telemetry = Telemetry(attempt.folder, config, rank, attempt.number)
    module = tokenizer_in_training(config)
    ddp = groups.wrap(module, use_distributed_optimizer=config.optim.use_distributed_optimizer)
    falls = config.optim.lr_schedule != "constant"
    optimizer = Optimizer(ddp, config.optim, groups, decay_steps=config.lr_decay_steps if falls else None)
    average = WeightAverage(module, config.optim.ema_decay) if config.optim.ema_decay else None
    quarantine = attempt.folder.quarantine
    loader = TrainLoader(
        config.data, seed=config.trainer.seed, rank=rank.rank, world_size=rank.world_size, quarantine=quarantine
    )
    held_out = {
        split: ValidationLoader(
            dataclasses.replace(config.data, path=path),
            rank=rank.rank,
            world_size=rank.world_size,
            limit_batches=config.trainer.limit_val_batches,
            quarantine=quarantine,
        )
        for split, path in (("val", config.data.path), ("general", config.data.general_path))
        if path is not None
    }
    checkpoints = CheckpointStore(attempt.folder, config, groups)
    adversary = Adversary(config, groups) if config.loss.adversarial.is_used(config.trainer.max_steps) else None
    losses = Losses.build(config, groups.device, None if adversary is None else adversary.term)
    validation = Validation(
        held_out, config.trainer, groups, eye=losses.eye, keeps_pictures=config.wandb.log_media and rank.is_first
    )
    state = TrainState(module, ddp, optimizer, average, loader, adversary)
    # Networks are made of seeds that are the same everywhere; what a VAE samples is not. A resume brings its own state.
    torch.manual_seed(config.trainer.seed + rank.rank)
    layout = checkpoints.load_newest(state)
    telemetry.resume_at(state.step, 0 if layout is None else layout["metrics_bytes"])
    compilation = compile_training(Subject(module, losses, average), config, groups, attempt.folder, state.step)
    telemetry.note_compilation(compilation.told)
    guard, agreement = NonFiniteGuard(config.trainer), Agreement(groups, stop)
    return state, Run(config, groups, checkpoints, losses, validation, telemetry, agreement, guard, compilation)


def _write_failure(folder: RunFolder, attempt: int, rank: Rank, error: Exception, step: int | None = None) -> None:
    """Tell the supervisor what this rank died of; the first word counts."""
    path = folder.failure(attempt, rank.rank)
    if path.exists():
        return
    failure = {
        "rank": rank.rank,
        "host": socket.gethostname(),
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "step": step,
    }
    with contextlib.suppress(OSError):  # a full disk may be what it died of; the log tells it as well
        write_atomically(path, json.dumps(failure))


if __name__ == "__main__":
    main()
