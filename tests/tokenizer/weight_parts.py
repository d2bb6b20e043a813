"""Weight files in every form, made the way their makers do."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from golden_vectors import FOLDER
from torch import Tensor, nn


def released(section: str) -> list[list[str]]:
    """Fields (name, dtype, shape) of each tensor in one list of golden/state_dicts.txt, such as `CV8x8x8 decoder`."""
    sections = (FOLDER / "state_dicts.txt").read_text().split("# ")
    lines = next(text for text in sections if text.startswith(section + "\n")).splitlines()
    return [line.split() for line in lines[1:]]


def write_training_state(network: nn.Module, folder: Path) -> None:
    """As cosmos-predict1 saves: without constants, with averaged copies and the optimizer's state."""
    parameters = dict(network.named_parameters())
    model = {f"network.{name}": parameter.data for name, parameter in parameters.items()}
    model |= {f"ema.network-{name.replace('.', '-')}": parameter.data * 0.5 for name, parameter in parameters.items()}
    torch.save({"model": model, "optimizer": {"state": {0: torch.ones(3)}}, "iteration": 7}, folder / "model.pt")


def write_state_dict(network: nn.Module, folder: Path) -> None:
    torch.save(network.state_dict(), folder / "model.pt")


def write_checkpoint(network: nn.Module, folder: Path, *, has_averages: bool = False) -> None:
    """The averages are half as large as the weights."""
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters() if has_averages else ():
        state |= {f"ema.{name}": parameter.data * 0.5, f"optimizer.exp_avg.model.{name}": parameter.data + 1}
    dcp.save({**state, "optimizer": {"step": torch.ones(3)}, "step": 40}, checkpoint_id=folder, no_dist=True)


def write_run(network: nn.Module, folder: Path) -> None:
    (folder / "config.yaml").write_text("{}")
    write_checkpoint(nn.Module(), folder / "checkpoints" / "step_00000020")  # older, and not the network
    write_checkpoint(network, folder / "checkpoints" / "step_00000040", has_averages=True)


def write_safetensors(network: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(network.state_dict(), folder / "model.safetensors")


JIT_FORMS = {
    "autoencoder.jit": ["autoencoder.jit"],
    "encoder.jit and decoder.jit": ["encoder.jit", "decoder.jit"],
}
"""Files of an export that make each form."""

WRITERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "model.pt of cosmos-predict1": write_training_state,
    "model.pt with a state dict": write_state_dict,
    "model.safetensors": write_safetensors,
    "checkpoint": write_checkpoint,
    "run": write_run,
}

FORMS = [*JIT_FORMS, *WRITERS]


def save_trace(module: nn.Module, example: Tensor, path: Path) -> None:
    torch.jit.save(torch.jit.trace(module.eval(), example, check_trace=False), path)


def without_program(jit_file: Path) -> None:
    """Take the program out of a TorchScript file and leave its tensors."""
    partial = jit_file.with_suffix(".partial")
    with zipfile.ZipFile(jit_file) as old, zipfile.ZipFile(partial, "w") as new:
        for name in old.namelist():
            if "/code/" not in name:
                new.writestr(name, old.read(name))
    shutil.move(partial, jit_file)
