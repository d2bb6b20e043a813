"""Rebuilds weights and inputs of the recorded vectors in golden/ from the rules by which they were made.

The vectors were computed with the published networks in their release of March 2025. Weights and inputs are random
numbers whose generator is seeded by the tensor's name, so the files hold results alone.
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
SEED = 20250318


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng((zlib.crc32(name.encode()) ^ SEED) & 0xFFFFFFFF)


def recorded_weight(name: str, shape: torch.Size) -> Tensor:
    """Float32 weights of the parameter by that name."""
    noise = generator(name).standard_normal(tuple(shape))
    if name.endswith("norm.weight"):
        noise = 1 + 0.1 * noise
    elif name.endswith(".bias"):
        noise = 0.05 * noise
    else:
        gain = {"quant_conv.conv3d.weight": 4, "decoder.conv_out.1.conv3d.weight": 0.25}.get(name, 1)
        noise = gain * noise / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(noise.astype(np.float32))


@torch.no_grad()
def set_recorded_weights(module: nn.Module, prefix: str = "") -> None:
    """Give every parameter its recorded value; `prefix` stands before its name inside the module."""
    for name, parameter in module.named_parameters():
        parameter.copy_(recorded_weight(prefix + name, parameter.shape))


@torch.no_grad()
def set_recorded_vgg_weights(network: nn.Module) -> None:
    """The same for VGG16, by torchvision's names."""
    for name, parameter in network.named_parameters():
        noise = generator(name).standard_normal(tuple(parameter.shape))
        gain = 0.05 if name.endswith(".bias") else np.sqrt(2 / np.prod(parameter.shape[1:]))
        parameter.copy_(torch.from_numpy((gain * noise).astype(np.float32)))


def recorded_clip(kind: str, shape: str) -> Tensor:
    """Float32 [B, 3, T, H, W] in [-1, 1] of a shape written as 1x3x9x64x64."""
    b, c, t, h, w = map(int, shape.split("x"))
    draw = generator(f"input/{kind}/{shape}").integers
    level, in_x, in_y = (draw(0, most, (b, c))[:, :, None, None, None] for most in (256, 8, 8))
    in_t = draw(0, 16, (b, c))[:, :, None, None, None]
    noise = draw(0, 32, (b, c, t, h, w))
    x, y, frame = np.arange(w), np.arange(h)[:, None], np.arange(t)[:, None, None]
    levels = (level + in_x * x + in_y * y + in_t * frame + noise) % 256
    return torch.from_numpy((levels / 127.5 - 1).astype(np.float32))


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def error(ours: Tensor, recorded: np.ndarray) -> float:
    """Largest difference over the largest recorded value."""
    return largest_difference(ours, recorded) / max(float(np.abs(recorded).max()), 1e-30)


def largest_difference(ours: Tensor, recorded: np.ndarray) -> float:
    assert tuple(ours.shape) == recorded.shape
    return float(np.abs(ours.detach().double().numpy() - recorded).max())


def probe_error(ours: Tensor, probe: np.ndarray, stats: np.ndarray) -> float:
    """The same for values taken at equal steps; the recorded extremes are the third and fourth of the statistics."""
    values = ours.detach().contiguous().double().flatten().numpy()
    chosen = values[np.arange(len(probe)) * len(values) // len(probe)]
    return float(np.abs(chosen - probe).max() / np.abs(stats[2:4]).max())
