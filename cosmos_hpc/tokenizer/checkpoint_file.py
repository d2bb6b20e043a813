"""Reads the network's tensors out of a training checkpoint, without Megatron and without a process group.

A checkpoint is a folder in the format of `torch.distributed.checkpoint`; the network's tensors go by `model.<name>`.
"""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

PREFIX = "model."

TRUSTED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
TRUSTED_NAMES: Collection[tuple[str, str]] = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class Ignored:
    """Stands for anything that the table of contents holds beyond what is needed, such as Megatron's own plans."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class MetadataUnpickler(pickle.Unpickler):
    """Rebuilds the table of contents; every other name of the pickle becomes `Ignored`, so that none can run code."""

    def find_class(self, module: str, name: str) -> Any:
        """What a global of the pickle stands for."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in TRUSTED_NAMES:
            return super().find_class(module, name)
        if module in TRUSTED_MODULES:
            value = super().find_class(module, name)
            if isinstance(value, type) and value.__module__ == module:
                return value
        return Ignored


class CheckpointReader(dcp.FileSystemReader):
    """The ordinary reader, but for a table of contents that can't run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata`."""
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """The network's state dict, on the CPU."""
    reader = CheckpointReader(folder)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
