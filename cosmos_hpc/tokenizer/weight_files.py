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


def read_weights(source: Path) -> dict[str, Tensor]:
    """The tensors of a network under their released names, on the CPU.

    Args:
        source: a folder with `FORMS`, a run, a checkpoint, or a single file ending in .jit, .safetensors or .pt.

    Raises:
        ConfigError: if there is nothing of the kind, or it can't be read.
    """
    if source.is_file():
        return _read(source, _reader_of(source))
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist: name a folder with {FORMS}, a run or a checkpoint")
    if (source / ".metadata").exists():
        return _read(source, read_checkpoint)
    if RunFolder(source).config.exists():
        checkpoint = RunFolder(source).newest_checkpoint()
        if checkpoint is None:
            raise ConfigError(
                f"{source} is a run without a checkpoint yet: wait for its first one, or name other weights"
            )
        return _read(checkpoint, read_checkpoint)
    for names in (("autoencoder.jit",), ("encoder.jit", "decoder.jit"), ("model.safetensors",), ("model.pt",)):
        files = [source / name for name in names]
        if all(file.exists() for file in files):
            return {name: tensor for file in files for name, tensor in _read(file, _reader_of(file)).items()}
    raise ConfigError(f"{source} holds no weights: put {FORMS} there, or name a run or a checkpoint")


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The network's tensors of a training checkpoint."""
    from cosmos_hpc.tokenizer.checkpoint_file import read_checkpoint_tensors  # takes two seconds to import

    return read_checkpoint_tensors(folder)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file  # needed for this format alone

    return load_file(path)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `model.pt` as cosmos-predict1 lays it out, or of a plain state dict.

    The former keeps the network under `model`, each name behind `network.`, among averaged copies and training state.
    """
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
        if (entry := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"Bad CRC-32 for {entry}")
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("model", content)
    prefix = "network." if any(name.startswith("network.") for name in content) else ""
    return {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}


def _reader_of(file: Path) -> Callable[[Path], dict[str, Tensor]]:
    readers = {".jit": read_jit_tensors, ".safetensors": read_safetensors, ".pt": read_state_dict}
    if file.suffix not in readers:
        raise ConfigError(
            f"{file} is no weight file that is known here: name one that ends in .jit, .safetensors or .pt"
        )
    return readers[file.suffix]


def _read(path: Path, reader: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read, and drop the second copy of the quantiser's constants that a decoder.jit holds."""
    try:
        tensors = reader(path)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{path} can't be read as weights ({reason}): fetch or export it again") from error
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("inv_quant.")}
