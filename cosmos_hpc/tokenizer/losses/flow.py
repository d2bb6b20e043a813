"""Whether reconstructions move as their clips do.

The network is torchvision's RAFT-large: Teed & Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow",
2020. It runs in float32: in bfloat16 its lookups at coordinates above 16 would be rounded to 1/8 pixel.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.losses.vgg import read_state_dict

SCALE = 2
"""Flow is seen at half height and width, and given in pixels of the whole."""

FlowNetwork = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Two batches of frames [N, 3, h, w] to refinements of the flow [N, 2, h, w] from the one to the other, last best."""


def read_raft(path: Path) -> nn.Module:
    """RAFT-large with the weights of a file, frozen.

    Raises:
        ConfigError: if torchvision is not installed, or the file is not RAFT-large's.
    """
    try:
        from torchvision.models.optical_flow import raft_large
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        raise ConfigError(
            f"loss.flow.weight is above 0, but torchvision is not there ({error}): pip install 'cosmos-hpc[flow]'"
        ) from error
    network: nn.Module = raft_large(weights=None, progress=False)
    try:
        network.load_state_dict(read_state_dict(path, "loss.flow.weights"))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"loss.flow.weights is {path}, which holds no RAFT-large by torchvision: {reason}") from error
    return network.requires_grad_(False).eval()


class FlowTerm:
    """Flow between neighbouring frames, forwards and backwards, some pairs at a time."""

    def __init__(self, network: FlowNetwork, chunk_pairs: int) -> None:
        """Look through the network, at `chunk_pairs` pairs of frames or fewer at once."""
        self._network = network
        self._chunk_pairs = chunk_pairs

    def differentiate(self, clips: Tensor, reconstructions: Tensor, gradient: Tensor, *, weight: float) -> Tensor:
        """Mean absolute difference of the flows, and its gradient, chunk by chunk.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1], T > 1.
            reconstructions: the same shape, detached.
            gradient: the same shape; `weight` times the gradient is added to it.
            weight: factor of the gradient.

        Returns:
            A scalar: the mean over pairs of frames, both directions, both flow components and all pixels.
        """
        num_clips, _, num_frames = clips.shape[:3]
        total = torch.zeros((), dtype=reconstructions.dtype, device=clips.device)
        for index, frames in self._chunks(num_clips, num_frames):
            with torch.no_grad():
                expected = self.flow(clips[index, :, frames].movedim(0, 1))
            chunk = reconstructions[index, :, frames].movedim(0, 1).requires_grad_()
            differences = (expected - self.flow(chunk)).abs().mean((1, 2, 3))
            distance = differences.sum() / (num_clips * 2 * (num_frames - 1))
            (slope,) = torch.autograd.grad(weight * distance, chunk)
            gradient[index, :, frames] += slope.movedim(1, 0)
            total = total + distance.detach()
        return total

    def flow(self, frames: Tensor) -> Tensor:
        """Flow from each frame to the next and back.

        Args:
            frames: [N, 3, H, W].

        Returns:
            [2 (N - 1), 2, H, W] in pixels: first those forwards, then those backwards.
        """
        height, width = frames.shape[2:]
        small = interpolate(frames, (height // SCALE, width // SCALE), mode="bilinear")
        forwards = self._network(small[:-1], small[1:])[-1]
        backwards = self._network(small[1:], small[:-1])[-1]
        return SCALE * interpolate(torch.cat([forwards, backwards]), (height, width), mode="bilinear")

    def _chunks(self, num_clips: int, num_frames: int) -> Iterator[tuple[int, slice]]:
        """Number of a clip and a range of its frames; ranges share the frame at which they meet."""
        for index in range(num_clips):
            for start in range(0, num_frames - 1, self._chunk_pairs):
                yield index, slice(start, min(start + self._chunk_pairs, num_frames - 1) + 1)
