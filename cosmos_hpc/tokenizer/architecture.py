"""What tells one released video tokenizer from another: its kind, compression and width, and what follows from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import ModelConfig

WIDTH_FACTORS = (2, 4, 4)
NUM_LEVELS = len(WIDTH_FACTORS)
NUM_ENCODER_BLOCKS = 2
NUM_DECODER_BLOCKS = 3
LATENT_CHANNELS = 16
FSQ_LEVELS = (8, 8, 8, 5, 5, 5)


class Resampling(NamedTuple):
    """Whether one boundary between two levels changes the size in space, and whether in time."""

    in_space: bool
    in_time: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One Cosmos video tokenizer. The released ones have channels 128 and, where not said otherwise, patch_size 4."""

    kind: str
    """`CV` (continuous latents) or `DV` (discrete indices)."""

    temporal_compression: int = 8
    """Frames per latent frame, after the first one."""

    spatial_compression: int = 8
    """Pixels per latent cell, along height and along width."""

    channels: int = 128
    """Base width; the levels are 2, 4 and 4 times as wide."""

    patch_size: int = 4
    """Share of the compression, along each axis, that the Haar transform does."""

    is_variational: bool = False
    """CV in training: latents have a variance as well, which no export keeps."""

    upsamples_time_first: bool = False
    """The decoder doubles the frames from its deepest boundary on, as older releases did."""

    def __post_init__(self) -> None:
        stages = [stage for resampling in self.up_resampling for stage in (resampling.in_space, resampling.in_time)]
        if sum(stages[0::2]) != self.spatial_stages or sum(stages[1::2]) != self.temporal_stages:
            raise ConfigError(
                f"a {self.name} network with patch size {self.patch_size} has no decoder that undoes its encoder: "
                "use patch size 4"
            )

    @classmethod
    def of(cls, model: ModelConfig) -> "Architecture":
        """The architecture that the settings name."""
        return cls(
            kind=model.kind,
            temporal_compression=model.temporal_compression,
            spatial_compression=model.spatial_compression,
            channels=model.channels,
            is_variational=model.formulation == "VAE",
        )

    @property
    def name(self) -> str:
        """As released tokenizers are called, for example `CV8x8x8`."""
        return f"{self.kind}{self.temporal_compression}x{self.spatial_compression}x{self.spatial_compression}"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, shallowest first."""
        return tuple(self.channels * factor for factor in WIDTH_FACTORS)

    @property
    def patch_channels(self) -> int:
        """Channels that the Haar transform makes of red, green and blue."""
        return 3 * self.patch_size**3

    @property
    def spatial_stages(self) -> int:
        """Boundaries that halve height and width."""
        return int(math.log2(self.spatial_compression // self.patch_size))

    @property
    def temporal_stages(self) -> int:
        """Boundaries that halve the frames."""
        return int(math.log2(self.temporal_compression // self.patch_size))

    @property
    def down_resampling(self) -> tuple[Resampling, ...]:
        """Of the encoder's boundaries, from level 0 (which lies below it) on."""
        return tuple(Resampling(i < self.spatial_stages, i < self.temporal_stages) for i in range(NUM_LEVELS - 1))

    @property
    def up_resampling(self) -> tuple[Resampling, ...]:
        """Of the decoder's boundaries, in the order of their execution: deepest first."""
        boundaries = []
        for depth in range(NUM_LEVELS - 1):
            in_time = depth < self.temporal_stages if self.upsamples_time_first else 0 < depth <= self.temporal_stages
            only_space = depth < self.spatial_stages > self.temporal_stages
            boundaries.append(Resampling(in_time or only_space, in_time))
        return tuple(boundaries)

    def check_clips(self, shape: Sequence[int]) -> None:
        """Refuse clips that the network would silently return at another size.

        Args:
            shape: of the clips, [B, 3, T, H, W].

        Raises:
            ConfigError: unless T = 1 + k x temporal compression, and H and W are multiples of the spatial one.
        """
        if len(shape) != 5 or shape[1] != 3:
            raise ConfigError(f"clips are {list(shape)}, but {self.name} takes [B, 3, T, H, W]: put the colours second")
        frames, height, width = shape[2:]
        t, s = self.temporal_compression, self.spatial_compression
        if frames < 1 or frames % t != 1:
            raise ConfigError(
                f"clips have {frames} frames, but {self.name} takes 1 + {t}k: "
                f"cut or repeat frames to {_neighbours(frames, t, 1)}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < s or size % s != 0:
                raise ConfigError(
                    f"clips have {name} {size}, but {self.name} takes multiples of {s}: "
                    f"crop or pad to {_neighbours(size, s, 0)}"
                )

    def check_latents(self, shape: Sequence[int]) -> None:
        """Refuse what can't be latents (CV) or codes (DV) of this network.

        Args:
            shape: [B, 16, T', H', W'] for CV, [B, 6, T', H', W'] for DV.

        Raises:
            ConfigError: on any other number of dimensions or channels.
        """
        channels = LATENT_CHANNELS if self.kind == "CV" else len(FSQ_LEVELS)
        if len(shape) != 5 or shape[1] != channels:
            raise ConfigError(
                f"latents are {list(shape)}, but {self.name} decodes [B, {channels}, T', H', W']: "
                "pass what encode returned"
            )


def _neighbours(size: int, step: int, start: int) -> str:
    """The valid sizes around one that is not, `below or above`."""
    below = (size - start) // step * step + start
    return f"{below} or {below + step}" if below >= max(start, 1) else f"{below + step}"
