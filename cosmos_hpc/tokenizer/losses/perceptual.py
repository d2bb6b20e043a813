"""How different clips look to VGG16: its features, and how they go together (Gram matrices).

Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", 2016. The distance is not the
published LPIPS: features are compared as they are, without learned weights.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cosmos_hpc.tokenizer.losses.feature_distance import SIZE_MULTIPLE, FeatureDistance
from cosmos_hpc.tokenizer.losses.vgg import LAYER_WEIGHTS, Vgg16


class FeatureDistances(NamedTuple):
    """Scalars."""

    lpips: Tensor
    """Mean over frames of the features' mean absolute difference, summed over layers by their weights."""

    gram: Tensor
    """Mean over clips of the Gram matrices' mean squared difference, summed likewise."""


class Eye:
    """VGG16, looking at some frames at a time, so that memory does not grow with the clip."""

    def __init__(self, network: Vgg16, chunk_frames: int) -> None:
        """Look through the network, at `chunk_frames` frames or fewer at once."""
        self._network = network
        self._chunk_frames = chunk_frames
        self.feature_distance: FeatureDistance | None = None

    def compile(self, backend: str) -> None:
        """Compare features alone, without Gram matrices and mask, by `FeatureDistance`, its small parts compiled."""
        self.feature_distance = FeatureDistance(self._network)
        self.feature_distance.compile(backend)

    @torch.no_grad()
    def distances(self, clips: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each clip [B, 3, T, H, W] to its reconstruction in features, mean over frames: [B]."""
        per_clip: list[list[Tensor]] = [[] for _ in clips]
        for index, frames in self._chunks(clips):
            seen = self._network(_frames(clips, index, frames)), self._network(_frames(reconstructions, index, frames))
            per_clip[index].append(_feature_distance(*seen, None))
        return torch.stack([torch.cat(parts).mean() for parts in per_clip])

    def differentiate(
        self,
        clips: Tensor,
        reconstructions: Tensor,
        gradient: Tensor,
        *,
        lpips: float,
        gram: float,
        mask: Tensor | None = None,
    ) -> FeatureDistances:
        """Both distances, and the gradient of lpips x the one + gram x the other, chunk by chunk.

        The clip's features need no gradient and get no graph; a chunk's graph is gone before the next one is made.
        Gram matrices belong to whole clips, so they are summed over the chunks first, without a graph: the gradient
        of their difference is then the same for each chunk.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1].
            reconstructions: the same shape, detached.
            gradient: the same shape; the gradient is added to it.
            lpips: weight of the features.
            gram: weight of the Gram matrices; 0 leaves them out.
            mask: the same shape; its first channel weighs the features, whose mean is still over all of them.
        """
        num_frames = clips.shape[0] * clips.shape[2]
        pulls, gram_distance = self._pulls(clips, reconstructions, mask, gram)
        total = gram_distance.new_zeros(())
        is_even = all(size % SIZE_MULTIPLE == 0 for size in clips.shape[3:])
        if self.feature_distance is not None and not gram and mask is None and is_even:
            for part in self._chunks_over_clips(clips):
                distance, slope = self.feature_distance(clips[part], reconstructions[part])
                gradient[part].add_(slope, alpha=lpips / num_frames)
                total = total + distance / num_frames
            return FeatureDistances(total, gram_distance)
        for index, frames in self._chunks(clips):
            with torch.no_grad():
                expected = self._network(_frames(clips, index, frames))
            chunk = _frames(reconstructions, index, frames).requires_grad_()
            seen = self._network(chunk)
            masks = _masks(mask, index, frames, seen)
            distance = _feature_distance(expected, seen, masks).sum() / num_frames
            pull = lpips * distance
            if gram:
                flat = _flat(seen, masks)
                pull = pull + sum((own @ each * each).sum() for own, each in zip(pulls[index], flat, strict=True))
            (slope,) = torch.autograd.grad(pull, chunk)
            gradient[index, :, frames] += slope.movedim(1, 0)
            total = total + distance.detach()
        return FeatureDistances(total, gram_distance)

    @torch.no_grad()
    def _pulls(
        self, clips: Tensor, reconstructions: Tensor, mask: Tensor | None, gram: float
    ) -> tuple[list[list[Tensor]], Tensor]:
        """For each clip and layer the matrix P of which <P, F F^T> has the Gram term's gradient; and the distance."""
        distance = torch.zeros((), dtype=_wide(self._network), device=clips.device)
        if not gram:
            return [], distance
        ours, theirs = self._gram_matrices(reconstructions, mask), self._gram_matrices(clips, mask)
        num_clips = clips.shape[0]
        pulls: list[list[Tensor]] = []
        for index in range(num_clips):
            pulls.append([])
            for layer, (own, expected) in enumerate(zip(ours[index], theirs[index], strict=True)):
                difference = own.matrix - expected.matrix
                distance += LAYER_WEIGHTS[layer] * difference.square().mean() / num_clips
                slope = 2 * LAYER_WEIGHTS[layer] * difference / difference.numel() / num_clips
                pulls[-1].append(gram * slope / own.cells)
        return pulls, distance

    def _gram_matrices(self, clips: Tensor, mask: Tensor | None) -> list[list["_Gram"]]:
        """F F^T / (T h w) of each clip and layer, F being [C, T h w]."""
        sums: list[list[Tensor]] = [[] for _ in clips]
        cells: list[int] = []
        for index, frames in self._chunks(clips):
            seen = self._network(_frames(clips, index, frames))
            cells = [each.shape[2] * each.shape[3] * clips.shape[2] for each in seen]
            parts = [flat @ flat.T for flat in _flat(seen, _masks(mask, index, frames, seen))]
            sums[index] = [a + b for a, b in zip(sums[index], parts, strict=True)] if sums[index] else parts
        return [[_Gram(whole / count, count) for whole, count in zip(own, cells, strict=True)] for own in sums]

    def _chunks_over_clips(self, clips: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        """Some whole clips, or where one is too long a range of its frames, until all have been named."""
        num_clips, _, num_frames = clips.shape[:3]
        if num_frames > self._chunk_frames:
            for index, frames in self._chunks(clips):
                yield slice(index, index + 1), slice(None), frames
            return
        length = -(-num_clips // -(-num_clips // (self._chunk_frames // num_frames)))
        for start in range(0, num_clips, length):
            yield slice(start, min(start + length, num_clips)), slice(None), slice(None)

    def _chunks(self, clips: Tensor) -> Iterator[tuple[int, slice]]:
        """Number of a clip and a range of its frames, until all have been named; the ranges are about equal."""
        num_clips, _, num_frames = clips.shape[:3]
        length = -(-num_frames // -(-num_frames // self._chunk_frames))
        for index in range(num_clips):
            for start in range(0, num_frames, length):
                yield index, slice(start, min(start + length, num_frames))


class _Gram(NamedTuple):
    matrix: Tensor
    """[C, C]."""

    cells: int
    """T x height x width of the features."""


def _frames(clips: Tensor, index: int, frames: slice) -> Tensor:
    """[N, 3, H, W]."""
    return clips[index, :, frames].movedim(0, 1)


def _masks(mask: Tensor | None, index: int, frames: slice, seen: list[Tensor]) -> list[Tensor] | None:
    """The mask's first channel at the size of each layer, [N, 1, h, w]."""
    if mask is None:
        return None
    own = mask[index, :1, frames].movedim(0, 1)
    return [interpolate(own, each.shape[2:], mode="nearest").to(each.dtype) for each in seen]


def _feature_distance(expected: list[Tensor], seen: list[Tensor], masks: list[Tensor] | None) -> Tensor:
    """Of each frame: [N]."""
    total = torch.zeros((), dtype=_wide(seen[0]), device=seen[0].device)
    for layer, (theirs, ours) in enumerate(zip(expected, seen, strict=True)):
        difference = (theirs - ours).abs()
        if masks is not None:
            difference = masks[layer] * difference
        total = total + LAYER_WEIGHTS[layer] * difference.flatten(1).mean(1, dtype=total.dtype)
    return total


def _flat(seen: list[Tensor], masks: list[Tensor] | None) -> list[Tensor]:
    """Features as [C, N h w], in float32 or better: a difference of Gram matrices is small beside them."""
    masked = seen if masks is None else [each * own for each, own in zip(seen, masks, strict=True)]
    return [each.to(_wide(each)).movedim(1, 0).flatten(1) for each in masked]


def _wide(of: Tensor | Vgg16) -> torch.dtype:
    return torch.promote_types(of.dtype, torch.float32)
