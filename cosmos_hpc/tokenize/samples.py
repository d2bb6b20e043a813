"""One video as it is stored.

A sample of a shard is `KEY.latents.npy` (CV) or `KEY.indices.npy` (DV) beside `KEY.json`: what webdataset's own
decoders read without code of ours. numpy has no bfloat16; latents that were computed in it are stored in float16, as
large and exact down to 2^-17 in size, below which they are rounded by less than 2^-24. Indices are int32, which
embedding tables take as it is. A safetensors file holds the network's own type instead.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from webdataset import TarWriter

from cosmos_hpc.data.clips import UndecodableError


class Sample(NamedTuple):
    """One video as it is stored."""

    field: str
    """`latents` or `indices`."""

    values: Tensor
    """CV: [16, T', H', W']; DV: int32 [T', H', W']."""

    facts: dict[str, str | int | float]
    """Where it comes from, and what decoding needs: cut what comes out to num_frames, height and width."""


def npy_fields(sample: Sample) -> dict[str, bytes]:
    """A sample as the fields of a shard.

    Raises:
        UndecodableError: if latents are too large for float16.
    """
    values = sample.values.half() if sample.values.dtype == torch.bfloat16 else sample.values
    if not values.isfinite().all():
        raise UndecodableError("its latents exceed float16, in which bf16 is stored: use --dtype fp32")
    array = io.BytesIO()
    np.save(array, values.numpy())
    return {f"{sample.field}.npy": array.getvalue(), "json": json.dumps(sample.facts).encode()}


def safetensors_fields(sample: Sample) -> dict[str, bytes]:
    """A sample as the bytes of a safetensors file, the facts in its metadata under `json`."""
    from safetensors.torch import save  # needed for this format alone

    metadata = {"json": json.dumps(sample.facts)}  # one entry, since several are written in an order of chance
    return {"safetensors": save({sample.field: sample.values.contiguous()}, metadata=metadata)}


def weights_sha256(network: nn.Module) -> str:
    """Who the weights are: SHA-256 over names, types, shapes and bytes of the state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Shard:
    """A tar under a partial name, until `finish`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.num_bytes = 0
        self._file = self.partial.open("wb")
        # equal videos, equal shards; PAX, since keys that just fitted USTAR behind .mp4 don't behind .latents.npy
        self._writer = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")

    def add(self, key: str, fields: dict[str, bytes]) -> None:
        """Append a sample."""
        self._writer.write({"__key__": key, **fields})
        self.num_bytes += total_bytes(fields)

    def finish(self) -> int:
        """Give it its name; returns its size."""
        self._writer.close()
        return replace_by(self._file, self.partial, self.path)

    def discard(self) -> None:
        """Leave nothing of it."""
        self._file.close()
        self.partial.unlink(missing_ok=True)


def replace_by(file: io.BufferedWriter, partial: Path, path: Path) -> int:
    """Close a file that is whole and give it its name, so that not even a power cut leaves half of it there."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    num_bytes = partial.stat().st_size
    partial.replace(path)
    return num_bytes


def total_bytes(fields: dict[str, bytes]) -> int:
    """Size of a sample, without what tar adds."""
    return sum(map(len, fields.values()))
