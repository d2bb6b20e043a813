"""Checkpoints by Megatron-Core: written while training goes on, published by one rename, verified at each start."""

import io
import json
import logging
import math
import shutil
import threading
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from cosmos_hpc import __version__
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import RunFolder, read_json
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.training.background_write import BackgroundWrite, spawn_no_manager
from cosmos_hpc.training.checkpoint_files import (
    BestBy,
    damage,
    fsync,
    has_digests,
    point_and_prune,
    publish,
    remove_unfinished,
    set_aside,
)
from cosmos_hpc.training.lean_import import lean_import
from cosmos_hpc.training.parallel import Groups, cuda_calls_on
from cosmos_hpc.training.preemption import FileRequest
from cosmos_hpc.training.random_state import random_state, restore_random_state

with lean_import():
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.msc_utils import MultiStorageClientFeature
    from megatron.core.transformer.utils import sharded_state_dict_default

if TYPE_CHECKING:
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.telemetry import ValidationScores

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "megatron-core", "megatron-energon")
"""Whose versions a checkpoint tells."""

FORMAT = 3
"""Raised whenever a checkpoint of this code can't be read by the code before."""

RANKS_FILE = "ranks.pt"
"""Random generators and position in the data of every rank."""

MARGIN_BYTES = 16 * 2**20
"""Room asked for beside the tensors."""


class SaveError(OSError):
    """A checkpoint could not be written."""


class _Saver(TorchDistSaveShardedStrategy):
    """Megatron-Core's way to save, without the end of it: there rank 0 alone writes, and an error of it hangs all."""

    def __init__(self) -> None:
        # What is where in a checkpoint is worked out for the first saves only: the state's tensors stay the same.
        super().__init__("torch_dist", 1, cached_metadata=True)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self._writer, self._contents = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)

    def write_contents(self, results: list[list[Any]], folder: Path) -> None:
        """Write the table of contents; on rank 0.

        Args:
            results: the writers' accounts, by rank.
            folder: unfinished checkpoint.
        """
        self._writer.finish(self._contents, results)
        save_config(CheckpointingConfig(self.backend, self.version), str(folder))


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: RunFolder, config: RunConfig, groups: Groups) -> None:
        self._folder = folder
        self._config = config
        self._groups = groups
        self._begun = time.monotonic()
        self._request = FileRequest(folder.save_request)
        self._write: BackgroundWrite | None = None
        self._removal: threading.Thread | None = None
        self._target = Path()
        self._layout: dict[str, Any] = {}
        self._best_by = BestBy(config.checkpoint.best_by)
        self._best = -math.inf
        self._best_num_clips: float | None = None
        self._scores: tuple[int, dict[str, float]] = (0, {})
        self._is_best = False
        self.saved_step: int | None = None
        """Step of the newest published checkpoint."""

        self._saver = _Saver()
        self._strategy: Any = self._saver
        if groups.rank.world_size > 1:  # each rank writes a share of what all hold
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._strategy = FullyParallelSaveStrategyWrapper(self._saver, group, do_cache_distribution=True)
        self._is_first_save = True
        self._settings = to_yaml(config)
        spawn_no_manager()
        MultiStorageClientFeature.disable()  # a third of the time of a load, for files that are local anyway

    @property
    def wants_save(self) -> bool:
        """Whether a person asks for a save, or `every_n_minutes` have passed since one began; rank 0's view counts."""
        minutes = (time.monotonic() - self._begun) / 60
        is_time = minutes >= self._config.checkpoint.every_n_minutes
        return self._groups.rank.is_first and (is_time or self._request.is_there)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        return self._write is not None and self._write.is_running

    def is_due(self, step: int) -> bool:
        """After every `every_n_steps` steps and after the last one."""
        steps = self._config.checkpoint.every_n_steps
        return step == self._config.trainer.max_steps or (steps is not None and step % steps == 0)

    def note(self, step: int, scores: "ValidationScores") -> None:
        """Take down the scores of a step, for its checkpoint; all ranks have the same."""
        self._scores = step, scores.written()
        worth, num_clips = self._best_by.worth(self._scores[1]), self._scores[1].get("val_clips")
        if num_clips != self._best_num_clips:  # on other clips, scores are not to be compared
            self._best, self._best_num_clips = -math.inf, num_clips
        self._is_best = worth is not None and worth > self._best
        self._best = worth if self._is_best and worth is not None else self._best

    def is_best(self, step: int) -> bool:
        """Whether the validation of this step was the best so far by `best_by`."""
        return self._is_best and self._scores[0] == step

    def save(self, state: "TrainState", metrics_bytes: int, wandb_id: str | None) -> None:
        """Write and publish before anything goes on, as a run does that leaves. Collective.

        Raises:
            SaveError: if it could not be written.
        """
        self.begin(state, metrics_bytes, wandb_id, may_fail=False)
        self.finish(may_fail=False)
        self._wait_for_removal()

    def begin(self, state: "TrainState", metrics_bytes: int, wandb_id: str | None, *, may_fail: bool = True) -> None:
        """Take the state as it is now, and write it while training goes on, after the save before it. Collective.

        Args:
            state: what a resume puts back.
            metrics_bytes: length of metrics.jsonl with the line of this step.
            wandb_id: the run's name there, if it has one.
            may_fail: where the disk has no room, warn and leave it to the next save.

        Raises:
            SaveError: if there is no room.
        """
        self.finish(may_fail=True)
        self._begun = time.monotonic()
        if self._groups.rank.is_first:
            self._request.take()
        target = self._folder.checkpoint(state.step)
        unfinished = _unfinished(target)
        if self._groups.from_first(target.exists()):
            return
        obstacle = self._groups.from_first(self._make_folder(unfinished, state) if self._groups.rank.is_first else None)
        if obstacle is not None:
            self._complain(f"{target} can't be written: {obstacle}", may_fail=may_fail)
            return
        own = self._groups.gather({"loader": state.loader.state(), "rng": random_state()})
        with cuda_calls_on(self._groups.device), mock.patch.object(TorchCommonSaveStrategy, "save_common") as common:
            request = dist_checkpointing.save(
                self._sharded(state, is_loading=False),
                str(unfinished),
                self._strategy,
                validate_access_integrity=self._is_first_save,
                async_sharded_save=True,
            )
            self._is_first_save = False
            small = {RANKS_FILE: _packed(own), COMMON_STATE_FNAME: _packed(common.call_args.args[0])}
            extra = partial(self._write_small_files, unfinished, small) if self._groups.rank.is_first else list
            self._write = BackgroundWrite(request, extra, unfinished, self._groups.rank.rank)
        self._target = target
        self._layout = {
            "format": FORMAT,
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "skipped_in_a_row": state.skipped_in_a_row,
            "world_size": self._groups.rank.world_size,
            "use_distributed_optimizer": self._config.optim.use_distributed_optimizer,
            "metrics_bytes": metrics_bytes,
            "scores": self._scores[1] if self._scores[0] == state.step else {},
            "wandb_id": wandb_id,
            "versions": {"cosmos-hpc": __version__, **{name: version(name) for name in PACKAGES}},
            "settings": self._settings,
        }

    def advance(self, *, is_writing: bool) -> None:
        """Publish the save in flight once all ranks have written their part. Collective.

        Args:
            is_writing: whether a rank still writes, as the ranks agreed.
        """
        if not is_writing:
            self.finish(may_fail=True)

    def finish(self, *, may_fail: bool) -> None:
        """Wait for the save in flight, if there is one, and publish it. Collective.

        Args:
            may_fail: warn and go on where it could not be written; the one before stays the newest.

        Raises:
            SaveError: if a rank could not write its part.
        """
        if self._write is None:
            return
        write, self._write = self._write, None
        written = self._groups.gather(write.wait())
        errors = [f"rank {rank}: {each.error}" for rank, each in enumerate(written) if each.error]
        if not errors:
            results = [each.results for each in written]
            error = self._groups.from_first(self._publish(results) if self._groups.rank.is_first else None)
            errors = [] if error is None else [error]
        if errors:
            if self._groups.rank.is_first:
                self._remove_unfinished()
            self._complain(f"{self._target} could not be written: {errors[0]}", may_fail=may_fail)
            return
        self.saved_step = self._layout["step"]

    def _publish(self, results: list[list[Any]]) -> str | None:
        """What rank 0 does once all have written their part; why it can't, or none."""
        unfinished = _unfinished(self._target)
        try:
            self._saver.write_contents(results, unfinished)
            self._folder.checkpoint_layout(unfinished).write_text(json.dumps(self._layout, indent=1))
            publish(unfinished, self._target)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        try:
            point_and_prune(self._target, self._config.checkpoint.keep, self._best_by)
        except OSError as error:
            logger.warning("%s is saved, but those before it could not be tidied up: %s", self._target, error)
        self._removal = threading.Thread(target=remove_unfinished, args=[self._folder.checkpoints])
        self._removal.start()
        logger.info("saved %s", self._target)
        return None

    def load_newest(self, state: "TrainState", *, keeps_data_position: bool = False) -> dict[str, Any] | None:
        """Put the newest good checkpoint into the state; damaged ones are set aside. Collective.

        Args:
            state: overwritten.
            keeps_data_position: leave loader and generators where they are: a roll-back goes on with other clips.

        Returns:
            Facts of the checkpoint (checkpoint.json); none where there is no checkpoint.

        Raises:
            ConfigError: if it has another format or can't serve these settings.
        """
        if self._groups.rank.is_first:
            self._remove_unfinished()
        best = self._groups.from_first(self._best_by.best(self._folder.checkpoints))
        self._best, self._best_num_clips = (-math.inf, None) if best is None else (best.worth, best.num_clips)
        found = self.newest_good()
        if found is None:
            return None
        source, layout = found
        with cuda_calls_on(self._groups.device):
            loaded = dist_checkpointing.load(self._sharded(state, is_loading=True), str(source), self._loader(source))
            state.module.load_state_dict(_without_prefix(loaded["model"]))
            if state.average is not None:
                state.average.module.load_state_dict(_without_prefix(loaded["ema"]))
            state.optimizer.load(loaded)
            if state.adversary is not None:
                state.adversary.load(loaded["adversary"])
        state.step = self.saved_step = layout["step"]
        if not keeps_data_position:
            self._restore_ranks(state, source)
            state.consumed_samples = layout["consumed_samples"]
            state.skipped_in_a_row = layout["skipped_in_a_row"]
        logger.info("resumed from %s: step %d, %d clips consumed", source, state.step, state.consumed_samples)
        return layout

    def newest_good(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is as it was written, and its facts; damaged ones are set aside. Collective."""
        rank = self._groups.rank
        while True:
            source: Path | None = self._groups.from_first(self._folder.newest_checkpoint())
            if source is None:
                return None
            layout = _layout(self._folder.checkpoint_layout(source))
            found = "checkpoint.json can't be read" if layout is None else damage(source, rank.rank, rank.world_size)
            reasons = [reason for reason in self._groups.gather(found) if reason]
            if layout is not None and not (reasons and has_digests(source)):  # what damage changed is not to be judged
                self._check(layout, source)
            if not reasons and layout is not None:
                return source, layout
            if rank.is_first:
                set_aside(source, reasons[0])
            self._groups.barrier()

    def _check(self, layout: dict[str, Any], source: Path) -> None:
        if layout.get("format") != FORMAT:
            raise ConfigError(
                f"{source} has checkpoint format {layout.get('format')}, but this version reads {FORMAT}: "
                "resume with the version that wrote it (provenance.json)"
            )
        if layout["use_distributed_optimizer"] != self._config.optim.use_distributed_optimizer:
            raise ConfigError(
                f"{source} was written with optim.use_distributed_optimizer={layout['use_distributed_optimizer']}, "
                "and its moments can't be read otherwise: set it so again"
            )

    def _restore_ranks(self, state: "TrainState", source: Path) -> None:
        own = torch.load(source / RANKS_FILE, weights_only=False)  # written by this run, and as it was written
        state.loader.restore([each["loader"] for each in own])
        if len(own) == self._groups.rank.world_size:
            restore_random_state(own[self._groups.rank.rank]["rng"])

    def _sharded(self, state: "TrainState", *, is_loading: bool) -> dict[str, Any]:
        model = sharded_state_dict_default(state.module, prefix="model.")
        sharded = {"model": model, **state.optimizer.sharded_state(model, is_loading=is_loading)}
        if state.average is not None:
            sharded["ema"] = sharded_state_dict_default(state.average.module, prefix="ema.")
        if state.adversary is not None:
            sharded["adversary"] = state.adversary.sharded_state(is_loading=is_loading)
        return sharded

    def _loader(self, source: Path) -> Any:
        strategy = get_default_load_sharded_strategy(str(source))
        if self._groups.rank.world_size == 1:
            return strategy
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return FullyParallelLoadStrategyWrapper(strategy, group)

    def _make_folder(self, unfinished: Path, state: "TrainState") -> str | None:
        """Make the folder of a save; why that can't be, or none. Weights, their average and two moments are to fit."""
        copies = 3 if state.average is None else 4
        self._wait_for_removal()  # room that is being made counts, and the thread would take our folder as well
        values = copies * sum(weight.numel() for weight in state.module.parameters())
        values += 0 if state.adversary is None else state.adversary.num_saved()
        needed = 4 * values + MARGIN_BYTES
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            free = shutil.disk_usage(unfinished).free
        except OSError as error:
            return str(error)
        if free >= needed:
            return None
        self._remove_unfinished()
        return f"No space left on device, {free >> 20} MiB are free and it takes {needed >> 20} MiB"

    def _write_small_files(self, folder: Path, contents: dict[str, bytes]) -> list[Path]:
        """Rank 0's part beside the tensors, in its writer; the lines of metrics.jsonl up to here are safe with it."""
        if self._folder.metrics.exists():
            fsync(self._folder.metrics)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return [folder / name for name in contents]

    def _remove_unfinished(self) -> None:
        self._wait_for_removal()
        remove_unfinished(self._folder.checkpoints)

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _complain(self, message: str, *, may_fail: bool) -> None:
        if not may_fail:
            raise SaveError(f"{message}; the checkpoint before is whole: mend it and submit again")
        if self._groups.rank.is_first:
            logger.warning("%s; training goes on, and the next save tries again", message)


def _unfinished(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _layout(path: Path) -> dict[str, Any] | None:
    """Facts of a checkpoint; none where the file can't be read."""
    try:
        return read_json(path) or None
    except ValueError:
        return None


def _without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}


def _packed(content: Any) -> bytes:
    """As torch.save writes it; here, since a forked writer can't read what lies on a GPU."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
