"""Finds and reads a network's tensors in every form in which they are handed around. Nothing read can run code."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.tokenizer.jit_file import read_jit_tensors

FORMS = "autoencoder.jit, encoder.jit and decoder.jit, model.safetensors or model.pt"

PREDICT1_EMA = "ema.network-"


Reader = Callable[[Path, bool], dict[str, Tensor]]
"""Reads a network's tensors out of a file, or, if the second argument says so, the averages that lie beside them."""


def read_weights(source: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a network under their released names, on the CPU.

    Args:
        source: a folder with `FORMS`, a run, a checkpoint, or a single file ending in .jit, .safetensors or .pt.
        ema: moving averages in place of the weights; checkpoints and cosmos-predict1's model.pt may hold them.

    Raises:
        ConfigError: if there is nothing of the kind, it can't be read, or holds no averages.
    """
    if source.is_file():
        return _read(source, _reader_of(source), ema)
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist: name a folder with {FORMS}, a run or a checkpoint")
    if (source / ".metadata").exists():
        return _read(source, read_checkpoint, ema)
    if RunFolder(source).config.exists():
        checkpoint = RunFolder(source).newest_checkpoint()
        if checkpoint is None:
            raise ConfigError(
                f"{source} is a run without a checkpoint yet: wait for its first one, or name other weights"
            )
        return _read(checkpoint, read_checkpoint, ema)
    for names in (("autoencoder.jit",), ("encoder.jit", "decoder.jit"), ("model.safetensors",), ("model.pt",)):
        files = [source / name for name in names]
        if all(file.exists() for file in files):
            return {name: tensor for file in files for name, tensor in _read(file, _reader_of(file), ema).items()}
    raise ConfigError(f"{source} holds no weights: put {FORMS} there, or name a run or a checkpoint")


def read_checkpoint(folder: Path, averages: bool) -> dict[str, Tensor]:
    """The network's tensors of a training checkpoint."""
    from cosmos_hpc.tokenizer import checkpoint_file  # takes two seconds to import

    return checkpoint_file.read_checkpoint_tensors(folder, checkpoint_file.EMA if averages else checkpoint_file.MODEL)


def read_safetensors(path: Path, averages: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file  # needed for this format alone

    return {} if averages else load_file(path)


def read_jit(path: Path, averages: bool) -> dict[str, Tensor]:
    """The tensors of a TorchScript file."""
    return {} if averages else read_jit_tensors(path)


def read_state_dict(path: Path, averages: bool) -> dict[str, Tensor]:
    """The tensors of a `model.pt` as cosmos-predict1 lays it out, or of a plain state dict.

    The former keeps the network under `model`, each name behind `network.`, among training state and the averages,
    whose names begin with `ema.network-` and have dashes for dots.
    """
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
        if (entry := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"Bad CRC-32 for {entry}")
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("model", content)
    if averages:
        return {
            name.removeprefix(PREDICT1_EMA).replace("-", "."): value
            for name, value in content.items()
            if name.startswith(PREDICT1_EMA)
        }
    prefix = "network." if any(name.startswith("network.") for name in content) else ""
    return {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}


def _reader_of(file: Path) -> Reader:
    readers = {".jit": read_jit, ".safetensors": read_safetensors, ".pt": read_state_dict}
    if file.suffix not in readers:
        raise ConfigError(
            f"{file} is no weight file that is known here: name one that ends in .jit, .safetensors or .pt"
        )
    return readers[file.suffix]


def _read(path: Path, reader: Reader, ema: bool) -> dict[str, Tensor]:
    """Read, and drop the second copy of the quantiser's constants that a decoder.jit holds."""
    try:
        tensors = reader(path, False)
        averages = reader(path, True) if ema else {}
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{path} can't be read as weights ({reason}): fetch or export it again") from error
    if ema and not averages:
        raise ConfigError(
            f"{path} holds no averaged weights (EMA): leave --ema out, or name a run that trained with optim.ema_decay"
        )
    if ema:  # the constants have no average; a parameter without one is then missing, rather than taken as it is
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((".weight", ".bias"))}
    return {name: tensor for name, tensor in (tensors | averages).items() if not name.startswith("inv_quant.")}
