"""What is checked of a run's inputs before anything starts; light enough for a login node."""

import dataclasses
import functools
import os
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import ModelConfig, RunConfig
from cosmos_hpc.data.dataset_index import (
    check_dataset,
    is_metadataset,
    is_remote,
    metadataset_parts,
    split_sizes,
    tells_its_size,
)
from cosmos_hpc.launch.images import squashfs_of


def check_inputs(run: RunConfig, *, data_is_to_come: bool = False) -> None:
    """Refuse a run whose data is not there or too little, or whose tracking has no key.

    Args:
        run: its settings.
        data_is_to_come: whether the run waits for a job that may still have to write its data.

    Raises:
        ConfigError: with the setting, what it points to, and the mend.
    """
    check_tracking(run)
    if not (data_is_to_come and run.data.path is not None):
        check_data(run)


def check_tracking(run: RunConfig) -> None:
    """Refuse a run whose tracking has no key.

    Raises:
        ConfigError: with the variable.
    """
    if run.wandb.mode == "online" and not os.environ.get(run.wandb.api_key_env):
        raise ConfigError(f"wandb.mode is online, but {run.wandb.api_key_env} is not set: export it, or set offline")


def check_data(run: RunConfig) -> None:
    """Refuse a run whose data is not there, or too little for its ranks and their workers.

    Raises:
        ConfigError: with the setting, what it points to, and the mend.
    """
    check_dataset(run.data.path)
    if run.data.general_path is not None:
        check_dataset(run.data.general_path, needed=("val",), setting="data.general_path")
    if run.data.image_path is not None:
        check_dataset(run.data.image_path, needed=("train",), setting="data.image_path")
    path = str(run.data.path)
    streams = run.num_streams
    samples = split_sizes(Path(path))["train"] if tells_its_size(path) else None
    if samples is not None and samples < max(streams, run.trainer.world_size):
        ranks = run.trainer.world_size
        raise ConfigError(
            f"{path} has {samples} training videos, fewer than data.num_workers x ranks = {streams or ranks}: "
            f"set data.num_workers to {samples // ranks} or less, or add videos"
        )


def with_num_steps(run: RunConfig) -> RunConfig:
    """The run with `trainer.max_steps` as it follows from `trainer.max_epochs`, where that is given.

    Raises:
        ConfigError: if the dataset is not there, or its number of videos can't be told beforehand.
    """
    epochs = run.trainer.max_epochs
    if epochs is None:
        return run
    check_dataset(run.data.path, needed=("train",))
    path = str(run.data.path)
    if not tells_its_size(path):
        what = "is not counted beforehand" if is_remote(path) else "blends datasets and has no end"
        raise ConfigError(f"trainer.max_epochs is {epochs}, but {path} {what}: set trainer.max_steps instead")
    steps = -(-epochs * split_sizes(Path(path))["train"] // run.data.global_batch_size)
    trainer = dataclasses.replace(run.trainer, max_steps=min(run.trainer.max_steps, steps))
    return dataclasses.replace(run, trainer=trainer)


def with_local_image(run: RunConfig) -> RunConfig:
    """The run with its container's image as a squashfs file, where it was imported, and mounts of a dataset's parts.

    Raises:
        ConfigError: if `container.image` can be no image.
    """
    container = run.container
    if container.mode == "none":
        return run
    file = squashfs_of(container)
    datasets = (run.data.path, run.data.general_path, run.data.image_path)
    blended = [part for path in datasets if path for part in _parts_of(Path(path))]
    mounts = dict.fromkeys((*container.mounts, *(f"{path}:{path}" for path in blended)))
    image = container.image if file is None else str(file)
    return dataclasses.replace(run, container=dataclasses.replace(container, image=image, mounts=tuple(mounts)))


def _parts_of(path: Path) -> list[Path]:
    if not is_metadataset(path):
        return []
    parts = [part for split in ("train", "val") for part in metadataset_parts(path, split)]
    return [part.resolve() for part in parts if "://" not in str(part) and ":/" not in str(part)]


def with_local_weights(run: RunConfig) -> RunConfig:
    """The run with its starting weights and its loss networks as paths on this file system.

    A repository's name becomes what `cosmos-hpc fetch` brought: jobs download nothing, and the commit in the path is
    part of what names the run. Networks of terms whose weight is never above zero are not looked for.

    Raises:
        ConfigError: if there is neither such a path nor such a repository in the cache.
    """
    weights = starting_weights(run.model)
    if weights != run.model.jit_ckpt_pth:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, jit_ckpt_pth=weights))
    loss = run.loss
    for term, file in loss_networks(run).items():
        loss = dataclasses.replace(loss, **{term: dataclasses.replace(getattr(loss, term), weights=file)})
    return run if loss == run.loss else dataclasses.replace(run, loss=loss)


def starting_weights(model: ModelConfig) -> str | None:
    """What a run starts from, as a path on this file system; none: random weights.

    Raises:
        ConfigError: if there is neither such a path nor such a repository in the cache.
    """
    weights = model.jit_ckpt_pth
    if weights is None or Path(weights).exists():
        return weights
    _refuse_missing_path("model.jit_ckpt_pth", weights, "name a folder with autoencoder.jit")
    return _cached(weights)


def loss_networks(run: RunConfig) -> dict[str, str]:
    """The file of each network that the loss looks through, by the term that names it.

    Raises:
        ConfigError: if one is neither there nor in the cache.
    """
    loss, steps, files = run.loss, run.trainer.max_steps, {}
    if loss.looks_through_vgg(steps):
        mend = "loss.lpips.weight=0 and loss.gram.weight=0"
        files["lpips"] = _network("loss.lpips.weights", loss.lpips.weights, mend)
    if loss.flow.is_used(steps):
        files["flow"] = _network("loss.flow.weights", str(loss.flow.weights), "loss.flow.weight=0")
    return files


def _network(setting: str, name: str, other_mend: str) -> str:
    """The file of a loss network, by its path or its repository's name."""
    if Path(name).is_file():
        return name
    _refuse_missing_path(setting, name, f"name a file, or set {other_mend}")
    try:
        return _cached_network(name)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}; or set {other_mend}") from None


def _refuse_missing_path(setting: str, name: str, mend: str) -> None:
    if Path(name).is_absolute() or name.startswith("."):
        raise ConfigError(f"{setting} is {name}, which does not exist: {mend}")


@functools.cache  # a sweep asks for the same ones a thousand times
def _cached(repository: str) -> str:
    from cosmos_hpc.launch.fetch import cached  # half a second of imports, which most plans don't need

    return str(cached(repository))


@functools.cache
def _cached_network(name: str) -> str:
    from cosmos_hpc.launch.fetch import cached_network

    return str(cached_network(name))
