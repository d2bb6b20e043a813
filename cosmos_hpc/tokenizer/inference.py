"""Encode and decode whole videos of any length and size."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
from cosmos_hpc.tokenizer.weights import load_tokenizer


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
    """A network in eval mode with what real videos need around it: scaling, padding, cropping, windows in time.

    Long videos go through in windows, so memory stays bounded and the result does not depend on the length.
    """

    def __init__(
        self,
        network: ContinuousTokenizer | DiscreteTokenizer,
        *,
        window_frames: int = 65,
        overlap_frames: int = 24,
    ) -> None:
        """Wrap a network where it lies, in its own dtype.

        Args:
            network: set to eval mode.
            window_frames: frames that go through at once; more give the same result and take more memory.
            overlap_frames: frames that lead in each window but the first.
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

    @classmethod
    def from_weights(
        cls,
        source: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load any weights: a run, a checkpoint, an export or a released tokenizer.

        Raises:
            ConfigError: if they are not those of a Cosmos video tokenizer.
        """
        return cls(load_tokenizer(Path(source)).to(device, dtype))

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
            frames = video[window.start * stride : 1 + (window.stop - 1) * stride]
            latents = self._encode_clip(self._padded(frames, 1 + (window.stop - window.start - 1) * stride))
            parts.append(latents[..., window.kept_from - window.start :, :, :].squeeze(0).cpu())
        return EncodedVideo(torch.cat(parts, -3), num_frames, height, width)

    @torch.inference_mode()
    def decode(self, encoded: EncodedVideo) -> np.ndarray:
        """Reconstruct the video that `encode` was given: uint8 [T, H, W, 3]."""
        latents = encoded.latents.unsqueeze(0)
        stride = self.architecture.temporal_compression
        parts = []
        for window in windows(latents.shape[-3], self.window_length, self.overlap):
            clip = self._decode_clip(latents[..., window.start : window.stop, :, :])
            num_lead_in = 0 if window.kept_from == 0 else 1 + (window.kept_from - window.start - 1) * stride
            parts.append(self._to_uint8(clip[0, :, num_lead_in:, : encoded.height, : encoded.width]))
        return torch.cat(parts)[: encoded.num_frames].numpy()

    def reconstruct(self, video: np.ndarray | Tensor) -> np.ndarray:
        """A video [T, H, W, 3] through encoder and decoder: uint8 of the same shape."""
        return self.decode(self.encode(video))

    def _encode_clip(self, clip: Tensor) -> Tensor:
        """[1, 3, T, H, W] of valid size to latents [1, 16, T', H', W'] or indices [1, T', H', W']."""
        if isinstance(self.network, DiscreteTokenizer):
            return self.network.encode_indices(clip)
        return self.network.encode(clip)

    def _decode_clip(self, latents: Tensor) -> Tensor:
        """Undo `_encode_clip`."""
        weight = self.network.post_quant_conv.conv3d.weight
        if isinstance(self.network, DiscreteTokenizer):
            return self.network.decode_indices(latents.to(weight.device))
        return self.network.decode(latents.to(weight))

    def _padded(self, frames: Tensor, num_frames: int) -> Tensor:
        """Frames [T, H, W, 3] as a clip of valid size where the network is; edges and the last frame are repeated."""
        weight = self.network.post_quant_conv.conv3d.weight
        clip = frames.to(weight.device).permute(3, 0, 1, 2).unsqueeze(0)
        clip = clip.float() / 127.5 - 1 if frames.dtype == torch.uint8 else clip.float()
        step = self.architecture.spatial_compression
        _, _, present, height, width = clip.shape
        padding = (0, -width % step, 0, -height % step, 0, num_frames - present)
        return F.pad(clip, padding, mode="replicate").to(weight.dtype)

    def _to_uint8(self, clip: Tensor) -> Tensor:
        """[3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3] on the CPU."""
        levels = ((clip.float() + 1) * 127.5).round().clamp(0, 255)
        return levels.to(torch.uint8).permute(1, 2, 3, 0).cpu()
