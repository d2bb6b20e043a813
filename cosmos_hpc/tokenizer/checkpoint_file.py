"""Reads the network's tensors out of a training checkpoint, without Megatron and without a process group.

A checkpoint is a folder in the format of `torch.distributed.checkpoint`; the network's tensors go by `model.<name>`,
their moving averages, where the run keeps any, by `ema.<name>`.
"""

import io
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

MODEL, EMA = "model.", "ema."
"""How the names of the network's tensors and of their averages begin."""

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


def read_checkpoint_tensors(folder: Path, prefix: str = MODEL) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it, on the CPU."""
    reader = CheckpointReader(folder)
    metadata = reader.read_metadata()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    check_bytes(folder, [place for index, place in metadata.storage_data.items() if index.fqn in tensors])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be here
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # which is no Exception, so that nothing would catch it
            raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def check_bytes(folder: Path, places: Iterable[Any]) -> None:
    """Compare each stored tensor with its checksum, since reading does not.

    Args:
        folder: of the checkpoint.
        places: file, offset and length of each tensor, which is a small zip archive of its own.

    Raises:
        zipfile.BadZipFile: if one differs.
    """
    for place in places:
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            archive = zipfile.ZipFile(io.BytesIO(file.read(place.length)))
        if (entry := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"Bad CRC-32 for {entry} of {place.relative_path}")
