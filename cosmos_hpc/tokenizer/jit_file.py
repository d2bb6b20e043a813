"""Reads the tensors of a TorchScript file without loading its program.

Such a file is a zip archive: `data.pkl` describes a tree of modules, each tensor's bytes lie in `data/<key>`, and the
program under `code/`. Only the first two are read, and of the pickle only the few names that describe tensors.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ScriptModule:
    """Stands for any module of the file: its attributes and nothing else."""

    attributes: dict[str, Any]

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor below, under the name that a state dict gives it."""
        for name, value in self.attributes.items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, ScriptModule):
                yield from value.tensors(f"{prefix}{name}.")


class ScriptUnpickler(pickle.Unpickler):
    """Rebuilds modules as `ScriptModule`s and tensors from the archive; refuses every other name."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive = archive
        self.folder = folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a global of the pickle stands for."""
        if module.split(".")[0] == "__torch__":
            return ScriptModule
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return unwrap
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a network's weights")

    def persistent_load(self, pid: Any) -> Tensor:
        """The bytes of one storage as a flat tensor."""
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor from its storage; what follows the strides concerns gradients."""
    return storage.as_strided(size, stride, offset)


def unwrap(value: Any, *_: Any) -> Any:
    """A typed list of TorchScript as the plain list that it wraps."""
    return value


def read_jit_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a TorchScript file, on the CPU; each tensor's checksum is verified.

    Raises:
        zipfile.BadZipFile: if the archive is damaged.
        pickle.UnpicklingError: if it holds anything but modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        folders = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1 or f"{folders[0]}/constants.pkl" not in archive.namelist():
            raise pickle.UnpicklingError("it is a zip archive, but not of TorchScript")
        root = ScriptUnpickler(archive, folders[0]).load()
    if not isinstance(root, ScriptModule):
        raise pickle.UnpicklingError("it holds no module")
    return dict(root.tensors())
