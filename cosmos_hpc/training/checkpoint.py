"""Checkpoints by Megatron-Core: written beside, published by one rename, so that a name means a whole checkpoint."""

import json
import logging
import multiprocessing
import os
import random
import shutil
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder, read_json
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.ranks import die_with_parent
from cosmos_hpc.training.lean_import import lean_import
from cosmos_hpc.training.parallel import Groups, cuda_calls_on

with lean_import():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.utils import sharded_state_dict_default

if TYPE_CHECKING:
    from cosmos_hpc.training.loop import TrainState

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever a checkpoint of this code can't be read by the code before."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: RunFolder, config: RunConfig, groups: Groups) -> None:
        self._folder = folder
        self._config = config
        self._groups = groups
        self._manager = _start_writers_queue()

    def is_due(self, step: int) -> bool:
        """After every `every_n_steps` steps and after the last one."""
        return step % self._config.checkpoint.every_n_steps == 0 or step == self._config.trainer.max_steps

    def save(self, state: "TrainState") -> None:
        """Write and publish a checkpoint, then drop the oldest beyond `keep`. Collective."""
        target = self._folder.checkpoint(state.step)
        unfinished = target.with_name(f"{target.name}.partial")
        if self._groups.rank.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._groups.barrier()
        with cuda_calls_on(self._groups.device):
            dist_checkpointing.save(self._sharded(state, is_loading=False), str(unfinished))
        torch.save({"loader": state.loader.state(), "rng": _rng_state()}, unfinished / self._rank_file())
        self._groups.barrier()
        if self._groups.rank.is_first:
            layout = {
                "format": FORMAT,
                "step": state.step,
                "consumed_samples": state.consumed_samples,
                "world_size": self._groups.rank.world_size,
            }
            self._folder.checkpoint_layout(unfinished).write_text(json.dumps(layout))
            self._publish(unfinished, target)
            logger.info("saved %s", target)
        self._groups.barrier()

    def load_newest(self, state: "TrainState") -> bool:
        """Put the newest checkpoint into the state; false where there is none. Collective.

        Raises:
            ConfigError: if it was written by another number of ranks or another format.
        """
        if self._groups.rank.is_first:
            self._remove_unfinished()
        source: Path | None = self._groups.from_first(self._folder.newest_checkpoint())
        if source is None:
            return False
        layout = read_json(self._folder.checkpoint_layout(source))
        self._check(layout, source)
        with cuda_calls_on(self._groups.device):
            loaded = dist_checkpointing.load(self._sharded(state, is_loading=True), str(source))
            state.module.load_state_dict({name.removeprefix("model."): t for name, t in loaded["model"].items()})
            state.optimizer.megatron.load_state_dict(loaded["optimizer"])
        state.optimizer.scheduler.load_state_dict(loaded["scheduler"])
        files = sorted(source.glob("rank_*.pt"))  # written by this run
        ranks = [torch.load(file, weights_only=False) for file in files]
        state.loader.restore([rank["loader"] for rank in ranks])
        _restore_rng(ranks[self._groups.rank.rank]["rng"])
        state.step, state.consumed_samples = layout["step"], layout["consumed_samples"]
        logger.info("resumed from %s: step %d, %d clips consumed", source, state.step, state.consumed_samples)
        return True

    def _sharded(self, state: "TrainState", *, is_loading: bool) -> dict[str, Any]:
        model = sharded_state_dict_default(state.module, prefix="model.")
        return {
            "model": model,
            "optimizer": state.optimizer.megatron.sharded_state_dict(model, is_loading=is_loading),
            "scheduler": state.optimizer.scheduler.state_dict(),
        }

    def _check(self, layout: dict[str, Any], source: Path) -> None:
        if layout.get("format") != FORMAT:
            raise ConfigError(
                f"{source} has checkpoint format {layout.get('format')}, but this version reads {FORMAT}: "
                "resume with the version that wrote it (provenance.json)"
            )
        if layout["world_size"] != self._groups.rank.world_size:
            raise ConfigError(
                f"{source} was written by {layout['world_size']} ranks, but {self._groups.rank.world_size} run: "
                f"set trainer.devices x trainer.num_nodes to {layout['world_size']}"
            )

    def _publish(self, unfinished: Path, target: Path) -> None:
        for file in (*unfinished.iterdir(), unfinished):
            _fsync(file)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        _fsync(target.parent)
        for old in sorted(self._folder.checkpoints.glob("step_????????"))[: -self._config.checkpoint.keep]:
            old.rename(old.with_name(f"{old.name}.partial"))  # a name means a whole checkpoint, on its way out as well
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """What a kill left of a save, or of a removal."""
        for leftover in self._folder.checkpoints.glob("step_????????.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _rank_file(self) -> str:
        return f"rank_{self._groups.rank.rank:05d}.pt"


def _start_writers_queue() -> SyncManager:
    """The process through which Megatron-Core's writers report back, started here in place of at its first save.

    Left to itself it spawns one that imports everything anew (seconds, 280 MB) and outlives a killed rank.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=partial(die_with_parent, os.getpid()))
    filesystem_async._results_queue = manager.Queue()
    return manager


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
