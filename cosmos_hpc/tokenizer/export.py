"""Weights out of the kit, in the forms that other programs of the Cosmos family load."""

import errno
import fcntl
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.build import build
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.diffusers_folder import diffusers_class, write_diffusers
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.export_check import Case
from cosmos_hpc.tokenizer.latent_statistics import (
    FILE,
    LatentStatistics,
    read_latent_statistics,
    write_latent_statistics,
)
from cosmos_hpc.tokenizer.taps import parameters_for_own_taps
from cosmos_hpc.tokenizer.traceable import traceable_modules

logger = logging.getLogger(__name__)

FORMS = ("jit", "pt", "safetensors", "diffusers")

ROOM_BYTES = 32 * 2**20
"""Beside the tensors: programs and the inputs of the check."""


def export_jit(
    tokenizer: ContinuousTokenizer | DiscreteTokenizer, out: Path, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """Write encoder.jit, decoder.jit and autoencoder.jit as released: see `export`."""
    return export(tokenizer, out, "jit", dtype)


def export(
    tokenizer: ContinuousTokenizer | DiscreteTokenizer,
    out: Path,
    form: str,
    dtype: torch.dtype = torch.float32,
    statistics: LatentStatistics | None = None,
) -> list[Path]:
    """Write the network's files into a folder, each under its name only once it has been checked.

    They are loaded in a fresh process and compared with the network on 1, 9 and 33 frames of two sizes.

    Args:
        tokenizer: on any device; not changed.
        out: made where it is missing; files of the same names are replaced.
        form: `jit` (encoder.jit, decoder.jit, autoencoder.jit), `pt` (model.pt as cosmos-predict1 lays it out),
            `safetensors` (model.safetensors) or `diffusers` (config.json, diffusion_pytorch_model.safetensors; CV
            alone, and needs diffusers).
        dtype: of the weights: torch.float32 or torch.bfloat16.
        statistics: of this network's latents (`latent_statistics`), written as mean_std.pt beside; CV alone.

    Returns:
        The files.

    Raises:
        ConfigError: on another form, on one that the network does not have, on statistics of a DV network, if `out`
            can't be written, or if what the files compute differs from what the network does.
    """
    check_form(tokenizer, form)
    writers: dict[str, Callable[[ContinuousTokenizer | DiscreteTokenizer, Path], None]] = {
        "jit": _write_jit,
        "pt": _write_pt,
        "safetensors": _write_safetensors,
        "diffusers": partial(_write_diffusers, statistics=statistics),
    }
    if statistics is not None and isinstance(tokenizer, DiscreteTokenizer):
        raise ConfigError(f"{tokenizer.architecture.name} has no {FILE}: export it without latent statistics")
    network = _cast_copy(tokenizer, dtype)
    with _one_line_errors(out), _hidden_folder(out) as folder:
        written = folder / "files"
        written.mkdir()
        _check_room(network, out, form)
        writers[form](network, written)
        difference = _largest_difference(network, written, folder / "cases.pt", form)
        files = sorted(written.iterdir(), key=lambda file: file.name, reverse=True)  # the autoencoder last
        if statistics is not None:
            files.insert(0, _write_statistics(statistics, written))
        elif (out / FILE).exists():
            logger.warning("%s stays, though measured on an earlier export's latents", out / FILE)
        for file in files:
            file.chmod(0o644)
            file.replace(out / file.name)
    logger.info("exported %s, largest difference from the network %.1e", ", ".join(f.name for f in files), difference)
    return [out / file.name for file in files]


@contextmanager
def _one_line_errors(out: Path) -> Iterator[None]:
    """A folder that can't be written is the user's to mend; torch and safetensors have errors of their own for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if not isinstance(error, OSError) and not re.search("No space left|quota|failed writing", reason):
            raise
        raise ConfigError(f"{out} can't be written ({reason}): free some space, or name another folder") from error


def _check_room(network: ContinuousTokenizer | DiscreteTokenizer, out: Path, form: str) -> None:
    """Refuse a disk that is too full beforehand: `torch.jit.save` ends the whole process on one."""
    tensors = network.state_dict().values()
    num_copies = 2 if form == "jit" else 1  # of each half alone, and of both together
    needed = num_copies * sum(tensor.nbytes for tensor in tensors) + ROOM_BYTES
    if (free := shutil.disk_usage(out).free) < needed:
        raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB are free, {needed / 2**20:.0f} MiB are needed")


@contextmanager
def _hidden_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` that is gone afterwards; if we are killed, the next export into `out` removes it.

    Its lock ends with the process that holds it, so an export that still runs elsewhere is left alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".export-*"):
        with suppress(OSError), (left / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder, Path(folder, "lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks: nobody else will get one either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(folder)


def _write_statistics(statistics: LatentStatistics, folder: Path) -> Path:
    """Write mean_std.pt and read it back."""
    path = folder / FILE
    write_latent_statistics(statistics, path)
    if not all(map(torch.equal, read_latent_statistics(path), statistics)):
        raise ConfigError(f"{folder.parent.parent} gets no export: {FILE} reads back other values than written")
    return path


def _cast_copy(
    tokenizer: ContinuousTokenizer | DiscreteTokenizer, dtype: torch.dtype
) -> ContinuousTokenizer | DiscreteTokenizer:
    """A copy on the CPU; its filters are those of the cast taps, as for anyone who loads the file."""
    with torch.random.fork_rng(devices=[]):
        copy = build(tokenizer.architecture).to(dtype)
    cast_tensors = {
        name: tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in tokenizer.state_dict().items()
    }
    copy.load_state_dict(cast_tensors)
    return copy.eval().requires_grad_(False)


def _write_jit(network: ContinuousTokenizer | DiscreteTokenizer, folder: Path) -> None:
    step = network.architecture.spatial_compression
    clip = torch.zeros(1, 3, 9, 2 * step, 3 * step, dtype=network.post_quant_conv.conv3d.weight.dtype)
    with torch.no_grad():
        latents = network.encode_indices(clip) if isinstance(network, DiscreteTokenizer) else network.encode(clip)
        modules = traceable_modules(network)
        for name, module, example in (
            ("encoder", modules.encoder, clip),
            ("decoder", modules.decoder, latents),
            ("autoencoder", modules.autoencoder, clip),
        ):
            traced = torch.jit.trace(module.eval(), example, check_trace=False)
            torch.jit.save(traced, folder / f"{name}.jit")


def _write_pt(network: ContinuousTokenizer | DiscreteTokenizer, folder: Path) -> None:
    model = {f"network.{name}": parameter for name, parameter in parameters_for_own_taps(network).items()}
    torch.save({"model": model}, folder / "model.pt")


def _write_safetensors(network: ContinuousTokenizer | DiscreteTokenizer, folder: Path) -> None:
    from safetensors.torch import save_file  # needed for this form alone

    save_file(network.state_dict(), folder / "model.safetensors")


def check_form(tokenizer: ContinuousTokenizer | DiscreteTokenizer, form: str) -> None:
    """Refuse a form that `export` can't write for the network, before the work starts.

    Raises:
        ConfigError: with the forms that there are, or what diffusers lacks.
    """
    if form not in FORMS:
        raise ConfigError(f"{form!r} is no form to export to: take {', '.join(FORMS)}")
    if form != "diffusers":
        return
    if isinstance(tokenizer, DiscreteTokenizer):
        raise ConfigError(
            f"diffusers has no network for {tokenizer.architecture.name}: export DV to jit, pt or safetensors"
        )
    diffusers_class()


def _write_diffusers(
    network: ContinuousTokenizer | DiscreteTokenizer, folder: Path, statistics: LatentStatistics | None
) -> None:
    assert isinstance(network, ContinuousTokenizer)
    write_diffusers(network, statistics, folder)


def _largest_difference(network: ContinuousTokenizer | DiscreteTokenizer, files: Path, cases: Path, form: str) -> float:
    """Compute the cases with the network, let a fresh process do it with the files, and compare."""
    dtype = network.post_quant_conv.conv3d.weight.dtype
    if form == "diffusers":  # computes in float32, which diffusers' layers have on every device
        network = _cast_copy(network, torch.float32)
    torch.save(
        [tuple(_case(network, num_frames, size)) for num_frames in (1, 9, 33) for size in ((2, 3), (4, 2))], cases
    )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    program = [sys.executable, "-m", "cosmos_hpc.tokenizer.export_check"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    checked = subprocess.run(
        [*program, form, str(files), str(cases), str(tolerance)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if checked.returncode != 0:
        reason = (checked.stderr.strip() or f"it ended with status {checked.returncode}").splitlines()[-1]
        raise ConfigError(f"{files.parent.parent} gets no export, because its check failed: {reason}")
    return float(checked.stdout.split()[-1])


@torch.no_grad()
def _case(network: ContinuousTokenizer | DiscreteTokenizer, num_frames: int, size: tuple[int, int]) -> Case:
    step = network.architecture.spatial_compression
    shape = (1, 3, num_frames, size[0] * step, size[1] * step)
    clip = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = clip.to(network.post_quant_conv.conv3d.weight.dtype)
    if isinstance(network, DiscreteTokenizer):
        latents = network.encode_indices(clip)
        return Case(clip, latents, network.decode_indices(latents))
    latents = network.encode(clip)
    return Case(clip, latents, network.decode(latents))
