"""What is checked of a run's inputs before anything starts; light enough for a login node."""

import dataclasses
import os
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.dataset_index import check_dataset, is_metadataset, split_sizes


def check_inputs(run: RunConfig) -> None:
    """Refuse a run whose data is not there or too little, or whose tracking has no key.

    Raises:
        ConfigError: with the setting, what it points to, and the mend.
    """
    if run.wandb.mode == "online" and not os.environ.get(run.wandb.api_key_env):
        raise ConfigError(f"wandb.mode is online, but {run.wandb.api_key_env} is not set: export it, or set offline")
    check_dataset(run.data.path)
    path = Path(run.data.path or "")
    streams = run.num_streams
    samples = None if is_metadataset(path) else split_sizes(path)["train"]
    if samples is not None and samples < max(streams, run.trainer.world_size):
        ranks = run.trainer.world_size
        raise ConfigError(
            f"{path} has {samples} training videos, fewer than data.num_workers x ranks = {streams or ranks}: "
            f"set data.num_workers to {samples // ranks} or less, or add videos"
        )


def with_local_weights(run: RunConfig) -> RunConfig:
    """The run with its starting weights as a path on this file system.

    A repository's name becomes the folder that `cosmos-hpc fetch` filled: jobs download nothing, and the commit in the
    folder's path is part of what names the run.

    Raises:
        ConfigError: if there is neither such a path nor such a repository in the cache.
    """
    weights = run.model.jit_ckpt_pth
    if weights is None or Path(weights).exists():
        return run
    if Path(weights).is_absolute() or weights.startswith("."):
        raise ConfigError(f"model.jit_ckpt_pth is {weights}, which does not exist: name a folder with autoencoder.jit")
    from cosmos_hpc.launch.fetch import cached  # half a second of imports, which most plans don't need

    return dataclasses.replace(run, model=dataclasses.replace(run.model, jit_ckpt_pth=str(cached(weights))))
