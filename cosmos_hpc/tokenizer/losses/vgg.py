"""VGG16 as an eye: the features of five of its layers.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014.
"""

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cosmos_hpc.config.errors import ConfigError

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
"""Channels of each convolution."""

SEEN = (3, 8, 15, 22, 29)
"""Layers whose output is seen, numbered as torchvision does: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

LAYER_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
"""What each of these counts in a distance."""

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and spread of ImageNet's red, green and blue in [-1, 1]: Zhang et al., "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric", 2018, in its published code."""


class Vgg16(nn.Module):
    """The convolutions of VGG16, frozen. Its weights have no gradient; its input has one where it asks for it."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which is computed."""
        return next(self.parameters()).dtype

    @classmethod
    def read(cls, path: Path) -> Self:
        """The network with the weights of a file.

        Args:
            path: safetensors or a PyTorch state dict, with torchvision's or timm's names; what follows the
                convolutions is left there.

        Raises:
            ConfigError: if the file is not VGG16's.
        """
        network = cls()
        found = read_state_dict(path, "loss.lpips.weights")
        wanted = network.state_dict()
        misfits = [name for name, own in wanted.items() if name not in found or found[name].shape != own.shape]
        if misfits:
            raise ConfigError(
                f"loss.lpips.weights is {path}, which holds no VGG16 ({misfits[0]} is missing or of another shape): "
                "name a file such as timm/vgg16.tv_in1k, or set loss.lpips.weight to 0"
            )
        network.load_state_dict({name: found[name] for name in wanted})
        return network

    def forward(self, frames: Tensor) -> list[Tensor]:
        """What the five layers see.

        Args:
            frames: [N, 3, H, W] in [-1, 1], H and W at least 16.

        Returns:
            [N, 64, H, W], [N, 128, H/2, W/2], [N, 256, H/4, W/4], [N, 512, H/8, W/8], [N, 512, H/16, W/16], in the
            type of the weights.
        """
        values = ((frames - self.shift) / self.scale).to(self.dtype)
        seen = []
        for index, layer in enumerate(self.features):
            values = layer(values)
            if index in SEEN:
                seen.append(values)
        return seen


def read_state_dict(path: Path, setting: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a PyTorch one, by name; nothing else is unpickled.

    Raises:
        ConfigError: if it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{setting} is {path}, which can't be read ({reason}): fetch it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{setting} is {path}, which holds no state dict: name a file of tensors by name")
    return found
