"""Weights into a network: strictly, so that a wrong file is refused rather than half used. And out of it again."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import TOKENIZER_NAME
from cosmos_hpc.tokenizer.architecture import FSQ_LEVELS, NUM_LEVELS, Architecture
from cosmos_hpc.tokenizer.build import build
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.export import check_form, export, export_jit
from cosmos_hpc.tokenizer.taps import own_tap
from cosmos_hpc.tokenizer.weight_files import read_weights

OF_TRAINING = "quant_conv_logvar."
"""How the tensors begin that only training has: no file needs them, and they are left where the network has none."""

__all__ = ["check_form", "dead_tensors", "export", "export_jit", "load_tokenizer", "load_weights"]


def load_weights(tokenizer: ContinuousTokenizer | DiscreteTokenizer, source: Path) -> None:
    """Replace all weights of a network.

    A file may lack the constants (filter taps, quantiser tables), as some releases do: the taps are then those of a
    network cast to the file's dtype. Where it has them, the taps are taken and the others compared. It may hold the
    convolutions that older releases built and never used.

    Args:
        tokenizer: of any dtype and on any device; the weights are cast and moved to it.
        source: whatever `read_weights` takes.

    Raises:
        ConfigError: names the tensors that are missing, too many, of another shape, or not finite.
    """
    _load(tokenizer, read_weights(source), source)


def load_tokenizer(source: Path, *, ema: bool = False) -> ContinuousTokenizer | DiscreteTokenizer:
    """The network that the weights belong to, in float32 on the CPU; its kind and sizes are read off the tensors.

    Args:
        source: whatever `read_weights` takes.
        ema: take the moving averages that training kept of the weights.

    Raises:
        ConfigError: if the tensors are not those of a Cosmos video tokenizer, or there are no averages.
    """
    tensors = read_weights(source, ema=ema)
    architecture = _architecture_of(tensors, source)
    with torch.random.fork_rng(devices=[]):
        tokenizer = build(architecture)
    _load(tokenizer, tensors, source)
    return tokenizer


def dead_tensors(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the parameters that releases of 2024 hold beyond those that the network uses.

    They built all three convolutions of every boundary between levels, whether or not it changes a size.
    """
    space, time, point = (1, 3, 3), (3, 1, 1), (1, 1, 1)
    for boundary in range(NUM_LEVELS - 1):
        down = architecture.down_resampling[boundary]
        up = architecture.up_resampling[boundary]
        down_channels = architecture.widths[boundary]
        up_channels = architecture.widths[NUM_LEVELS - 1 - boundary]
        down_name = f"encoder.down.{boundary}.downsample"
        up_name = f"decoder.up.{NUM_LEVELS - 1 - boundary}.upsample"
        for name, channels, kernel, is_used in (
            (f"{down_name}.conv1", down_channels, space, down.in_space),
            (f"{down_name}.conv2", down_channels, time, down.in_time),
            (f"{down_name}.conv3", down_channels, point, any(down)),
            (f"{up_name}.conv1", up_channels, time, up.in_time),
            (f"{up_name}.conv2", up_channels, space, up.in_space),
            (f"{up_name}.conv3", up_channels, point, any(up)),
        ):
            if not is_used:
                yield f"{name}.conv3d.weight", (channels, channels, *kernel)
                yield f"{name}.conv3d.bias", (channels,)


def _load(tokenizer: ContinuousTokenizer | DiscreteTokenizer, tensors: Mapping[str, Tensor], source: Path) -> None:
    dead = dict(dead_tensors(tokenizer.architecture))
    expected = tokenizer.state_dict()
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if dead.get(name) != tuple(tensor.shape) and (name in expected or not name.startswith(OF_TRAINING))
    }
    constants = {name for name, _ in tokenizer.named_buffers()}
    own = {name: tensor for name, tensor in expected.items() if name.startswith(OF_TRAINING)}
    shared = [name for name in expected if name in found]
    fitting = [name for name in shared if found[name].shape == expected[name].shape]
    problems = [
        *_listed("lacks", [name for name in expected if name not in {**found, **own} and name not in constants]),
        *_listed("also has", [name for name in found if name not in expected]),
        *_listed(
            "has in another shape",
            [
                f"{name} {list(found[name].shape)} (not {list(expected[name].shape)})"
                for name in shared
                if name not in fitting
            ],
        ),
        *_listed("has values that are not finite in", [name for name in fitting if not found[name].isfinite().all()]),
        *_listed(
            "has constants of another tokenizer in",
            [
                name
                for name in fitting
                if name in constants
                and not name.endswith(".wavelets")
                and not found[name].to(expected[name]).equal(expected[name])
            ],
        ),
    ]
    if problems:
        architecture = tokenizer.architecture
        raise ConfigError(
            f"{source} does not fit {architecture.name} with {architecture.channels} channels: "
            f"it {'; it '.join(problems)}. "
            "Name the weights of that tokenizer, or set model.model and model.channels to what these belong to"
        )
    stored = found["post_quant_conv.conv3d.weight"].dtype
    own |= {
        name: torch.full_like(expected[name], own_tap(stored)) if name.endswith(".wavelets") else expected[name]
        for name in constants
    }
    tokenizer.load_state_dict({**own, **found})


def _listed(problem: str, names: list[str]) -> list[str]:
    """The problem with the first names that have it; nothing if none has."""
    if not names:
        return []
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{problem} {', '.join(names[:3])}{rest}"]


def _architecture_of(tensors: Mapping[str, Tensor], source: Path) -> Architecture:
    try:
        patch_size = round((tensors["encoder.conv_in.0.conv3d.weight"].shape[1] / 3) ** (1 / 3))
        channels = tensors["encoder.conv_in.1.conv3d.weight"].shape[0]
        kind = "DV" if tensors["quant_conv.conv3d.weight"].shape[0] == len(FSQ_LEVELS) else "CV"
    except (KeyError, IndexError) as error:
        raise ConfigError(
            f"{source} lacks tensors by which a Cosmos video tokenizer is known, {error} among them: name other weights"
        ) from error
    halvings = [f"encoder.down.{i}.downsample.conv{{}}.conv3d.weight" for i in range(NUM_LEVELS - 1)]
    in_space, in_time = (sum(name.format(conv) in tensors for name in halvings) for conv in (1, 2))
    if in_space == in_time == len(halvings):  # a release of 2024 with all its dead convolutions: the names tell nothing
        named = [match for part in reversed(source.parts) if (match := TOKENIZER_NAME.search(part))]
        released = Architecture(kind=kind, spatial_compression=8 if kind == "CV" else 16, channels=channels)
        if not named:
            return released
        return replace(
            released,
            temporal_compression=int(named[0]["temporal"]),
            spatial_compression=int(named[0]["spatial"]),
        )
    deepest_in_time = f"decoder.up.{NUM_LEVELS - 1}.upsample.conv1.conv3d.weight" in tensors
    return Architecture(
        kind=kind,
        temporal_compression=patch_size * 2**in_time,
        spatial_compression=patch_size * 2**in_space,
        channels=channels,
        patch_size=patch_size,
        upsamples_time_first=deepest_in_time and in_time > 0,
    )
