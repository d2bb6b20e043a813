"""Encode and decode whole videos of any length and size."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.tiles import Tile, blend_tiles
from cosmos_hpc.tokenizer.weights import load_tokenizer

TILE_OVERLAP = 64
"""Pixels that neighbouring tiles share unless told otherwise."""


class EncodedVideo(NamedTuple):
    """A video as latents or indices, and the size to cut it back to."""

    latents: Tensor
    """On the CPU. CV: latents [16, T', H', W']; DV: int32 indices [T', H', W'] in [0, 64000)."""

    num_frames: int
    height: int
    width: int


class Window(NamedTuple):
    """A stretch of latent frames that go through the network together; those before `kept_from` only lead in."""

    start: int
    stop: int
    kept_from: int


def windows(num_latent_frames: int, length: int, overlap: int) -> Iterator[Window]:
    """Cut a video into windows, each of which starts `overlap` latent frames before those that are kept of it.

    A window's first latent frame is coded as if the video began there, and the next ones still feel that; led in by
    a few frames that are thrown away, the rest is what the whole video at once would give, so no seam shows.

    Args:
        num_latent_frames: of the whole video, T'.
        length: most latent frames in one window.
        overlap: latent frames that lead in, less than `length`.
    """
    kept_from = 0
    while kept_from < num_latent_frames:
        start = max(0, kept_from - overlap)
        stop = min(start + length, num_latent_frames)
        yield Window(start, stop, kept_from)
        kept_from = stop


class Tokenizer:
    """A network in eval mode with what real videos need around it: scaling, padding, cropping, windows, tiles.

    Long videos go through in windows, so memory stays bounded and the result does not depend on the length. Large
    frames go through in tiles if asked; the network looks at whole frames, so tiles change the result a little.
    """

    def __init__(
        self,
        network: ContinuousTokenizer | DiscreteTokenizer,
        *,
        window_frames: int = 65,
        overlap_frames: int = 24,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> None:
        """Wrap a network where it lies, in its own dtype.

        Args:
            network: set to eval mode.
            window_frames: frames that go through at once; more give the same result and take more memory.
            overlap_frames: frames that lead in each window but the first.
            tile_size: pixels along the sides of the tiles that larger frames are cut into; None takes frames whole.
            tile_overlap: pixels over which neighbouring tiles are blended; `TILE_OVERLAP` if left out.

        Raises:
            ConfigError: on windows or tiles that can't overlap as asked.
        """
        self.network = network.eval()
        self.architecture = network.architecture
        stride = self.architecture.temporal_compression
        self.window_length = 1 + (window_frames - 1) // stride
        self.overlap = overlap_frames // stride
        if not 1 <= self.overlap < self.window_length:
            raise ConfigError(
                f"windows of {window_frames} frames can't overlap by {overlap_frames}: "
                f"let them overlap by at least {stride} and by less than their length"
            )
        if tile_size is None and tile_overlap is not None:
            raise ConfigError(
                f"tiles can't overlap by {tile_overlap} pixels without a tile size: give one, such as 512"
            )
        step = self.architecture.spatial_compression
        tile_overlap = TILE_OVERLAP if tile_overlap is None else tile_overlap
        self.tile_length = None if tile_size is None else tile_size // step
        self.tile_overlap = tile_overlap // step
        if self.tile_length is not None and not 1 <= self.tile_overlap < self.tile_length:
            raise ConfigError(
                f"tiles of {tile_size} pixels can't overlap by {tile_overlap}: "
                f"let them overlap by at least {step} and by less than their size"
            )

    @classmethod
    def from_weights(
        cls,
        source: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        ema: bool = False,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Self:
        """Load any weights: a run, a checkpoint, an export or a released tokenizer.

        Args:
            source: where they lie.
            device: to compute on.
            dtype: to compute in.
            ema: take the moving averages that training kept of the weights.
            tile_size: as for the class.
            tile_overlap: the same.

        Raises:
            ConfigError: if they are not those of a Cosmos video tokenizer, or there are no averages.
        """
        network = load_tokenizer(Path(source), ema=ema).to(device, dtype)
        return cls(network, tile_size=tile_size, tile_overlap=tile_overlap)

    @torch.inference_mode()
    def encode(self, video: np.ndarray | Tensor) -> EncodedVideo:
        """Compress a video.

        Args:
            video: [T, H, W, 3], uint8 or float in [-1, 1]; any T, H and W from 1 on.

        Raises:
            ConfigError: on another shape.
        """
        video = torch.as_tensor(video)
        if video.dim() != 4 or video.shape[3] != 3 or 0 in video.shape:
            raise ConfigError(f"a video of shape {list(video.shape)} can't be encoded: pass [T, H, W, 3]")
        num_frames, height, width, _ = video.shape
        stride = self.architecture.temporal_compression
        num_latent_frames = 1 + -(-(num_frames - 1) // stride)
        parts = []
        for window in windows(num_latent_frames, self.window_length, self.overlap):
            latents = self._encode_window(video[window.start * stride : 1 + (window.stop - 1) * stride])
            parts.append(latents[..., window.kept_from - window.start :, :, :].squeeze(0).cpu())
        return EncodedVideo(torch.cat(parts, -3), num_frames, height, width)

    @torch.inference_mode()
    def decode(self, encoded: EncodedVideo) -> np.ndarray:
        """Reconstruct the video that `encode` was given: uint8 [T, H, W, 3]."""
        latents = encoded.latents.unsqueeze(0)
        stride = self.architecture.temporal_compression
        parts = []
        for window in windows(latents.shape[-3], self.window_length, self.overlap):
            clip = self._decode_window(latents[..., window.start : window.stop, :, :])
            num_lead_in = 0 if window.kept_from == 0 else 1 + (window.kept_from - window.start - 1) * stride
            parts.append(self._to_uint8(clip[0, :, num_lead_in:, : encoded.height, : encoded.width]))
        return torch.cat(parts)[: encoded.num_frames].numpy()

    def reconstruct(self, video: np.ndarray | Tensor) -> np.ndarray:
        """A video [T, H, W, 3] through encoder and decoder: uint8 of the same shape."""
        return self.decode(self.encode(video))

    def _encode_window(self, frames: Tensor) -> Tensor:
        """[T, H, W, 3] of any size to latents [1, 16, T', H', W'] or indices [1, T', H', W']."""
        step = self.architecture.spatial_compression

        def encode_tile(tile: Tile) -> Tensor:
            y, x = (slice(side.start * step, side.stop * step) for side in tile)
            clip = self._padded(frames[:, y, x], tile)
            self.architecture.check_clips(clip.shape)
            return self.network.quant_conv(self.network.encoder(clip))

        height, width = (-(-size // step) for size in frames.shape[1:3])
        weight = self.network.post_quant_conv.conv3d.weight
        latents = self._in_tiles(height, width, 1, encode_tile).to(weight)
        if isinstance(self.network, DiscreteTokenizer):  # rounded after blending, since indices have no mean
            return self.network.quantizer.codes_to_indices(self.network.quantizer(latents))
        return latents

    def _decode_window(self, latents: Tensor) -> Tensor:
        """Undo `_encode_window`: to a clip [1, 3, T, H, W], H and W multiples of the compression."""
        weight = self.network.post_quant_conv.conv3d.weight

        def decode_tile(tile: Tile) -> Tensor:
            part = latents[..., tile.rows, tile.columns]
            if isinstance(self.network, DiscreteTokenizer):
                return self.network.decode_indices(part.to(weight.device))
            return self.network.decode(part.to(weight))

        height, width = latents.shape[-2:]
        return self._in_tiles(height, width, self.architecture.spatial_compression, decode_tile)

    def _in_tiles(self, height: int, width: int, scale: int, compute: Callable[[Tile], Tensor]) -> Tensor:
        """A frame of height x width latent cells, whole or in tiles."""
        length = max(height, width) if self.tile_length is None else self.tile_length
        return blend_tiles(height, width, length, self.tile_overlap, scale, compute)

    def _padded(self, frames: Tensor, tile: Tile) -> Tensor:
        """Frames [T, H, W, 3] as a clip that fills a tile, where the network is; edges and last frame are repeated."""
        weight = self.network.post_quant_conv.conv3d.weight
        clip = frames.to(weight.device).permute(3, 0, 1, 2).unsqueeze(0)
        clip = clip.float() / 127.5 - 1 if frames.dtype == torch.uint8 else clip.float()
        step = self.architecture.spatial_compression
        num_frames, height, width = clip.shape[2:]
        bottom, right = (
            (side.stop - side.start) * step - size for side, size in zip(tile, (height, width), strict=True)
        )
        padding = (0, right, 0, bottom, 0, (1 - num_frames) % self.architecture.temporal_compression)
        return F.pad(clip, padding, mode="replicate").to(weight.dtype)

    def _to_uint8(self, clip: Tensor) -> Tensor:
        """[3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3] on the CPU."""
        levels = ((clip.float() + 1) * 127.5).round().clamp(0, 255)
        return levels.to(torch.uint8).permute(1, 2, 3, 0).cpu()
