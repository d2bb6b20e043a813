"""A judge of short videos: which of its patches look real. And what generator and judge learn from its words.

Patches: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, here in time as well.
Hinge: Lim & Ye, "Geometric GAN", 2017. Weight by gradients: Esser et al., "Taming Transformers for High-Resolution
Image Synthesis", 2021, equation 7, here at the reconstruction and for each clip.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

from cosmos_hpc.config.loss_schema import AdversarialConfig
from cosmos_hpc.tokenizer.losses.pixels import check_same_shape

Context = Callable[[], AbstractContextManager[Any]]

NUM_GROUPS = 8
"""Groups of each normalisation. Unlike a batch's, their statistics don't depend on how a step is cut."""

LARGEST_RATIO = 1e4
"""Where the judge has next to no gradient, the adversarial one is not blown up further."""


class PatchDiscriminator(nn.Module):
    """3-D PatchGAN: three halvings in space and time, one wider layer, one verdict a patch. No running statistics."""

    def __init__(self, channels: int) -> None:
        """Of this width at the first layer, twice and four and eight times as wide behind it; a multiple of 8."""
        super().__init__()
        layers: list[nn.Module] = [_halving(3, channels), nn.LeakyReLU(0.2)]
        for before, after in ((channels, 2 * channels), (2 * channels, 4 * channels)):
            layers += [_halving(before, after), nn.GroupNorm(NUM_GROUPS, after), nn.LeakyReLU(0.2)]
        layers += [nn.Conv3d(4 * channels, 8 * channels, 3, padding=1), nn.GroupNorm(NUM_GROUPS, 8 * channels)]
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv3d(8 * channels, 1, 3, padding=1))

    def forward(self, clips: Tensor) -> Tensor:
        """Verdicts [B, 1, T'', H/8, W/8] on clips [B, 3, T, H, W] in [-1, 1], T >= 1: above 0 for real."""
        verdicts: Tensor = self.layers(clips)
        return verdicts


class Judgement(NamedTuple):
    """Scalars."""

    adversarial: Tensor
    """Minus the mean verdict on the reconstructions."""

    weight: Tensor
    """What it was multiplied with, mean over clips."""

    weighted: Tensor
    """The product of the two, clip by clip, and its mean: what the sum of the loss gets."""


class AdversarialTerm:
    """The two passes through the judge, one piece of one clip at a time, each graph freed before the next is made."""

    def __init__(
        self,
        judge: nn.Module,
        config: AdversarialConfig,
        *,
        autocast: Context = nullcontext,
        no_sync: Context = nullcontext,
    ) -> None:
        """Judge through this network.

        Args:
            judge: clips to verdicts, unwrapped.
            config: whether the weight is adaptive, and the length of what is judged at once.
            autocast: context of the judge's forwards.
            no_sync: context of a backward in which ranks are not to add up the judge's gradients yet.
        """
        self._judge = judge
        self._is_adaptive = config.adaptive
        self._max_frames = config.max_frames
        self._autocast = autocast
        self._no_sync = no_sync

    def differentiate(self, reconstructions: Tensor, gradient: Tensor, *, weight: float, scale: float) -> Judgement:
        """What the generator is to learn from the judge; the judge's own weights get no gradient and start no hook.

        Args:
            reconstructions: [B, 3, T, H, W], detached.
            gradient: the same shape: that of all other terms, times `scale`. The weighted gradient is added.
            weight: factor; if adaptive, of the ratio of the norms of a clip's two gradients, the others' and this one.
            scale: factor of the gradient beside the weight.
        """
        frozen = {name: own.detach() for name, own in self._judge.named_parameters()}
        verdicts, factors = [], []
        for index, clip in enumerate(reconstructions.split(1)):
            own = torch.zeros_like(clip)
            total = clip.new_zeros((), dtype=torch.float32)
            for frames in self._pieces(clip):
                piece = clip[:, :, frames].detach().requires_grad_()
                with self._autocast():
                    found = functional_call(self._judge, frozen, (piece,))
                value = -_share(clip, frames) * found.float().mean()
                (own[:, :, frames],) = torch.autograd.grad(value, piece)
                total += value.detach()
            factor = clip.new_full((), weight, dtype=torch.float32)
            if self._is_adaptive:
                rest = gradient[index].norm() * (len(reconstructions) / scale)
                factor *= (rest / own.norm().clamp(min=1e-12)).clamp(max=LARGEST_RATIO)
            gradient[index] += (scale / len(reconstructions)) * factor * own[0]
            verdicts.append(total)
            factors.append(factor)
        found, used = torch.stack(verdicts), torch.stack(factors)
        return Judgement(found.mean(), used.mean(), (found * used).mean())

    def learn(self, clips: Tensor, reconstructions: Tensor, *, scale: float, is_last: bool) -> Tensor:
        """Add the gradient of the hinge loss to the judge's weights.

        Args:
            clips: [B, 3, T, H, W], which it is to call real.
            reconstructions: the same shape, detached, which it is not.
            scale: factor of the gradient.
            is_last: whether no other clips follow in this step: ranks add up behind the last piece.

        Returns:
            The hinge loss: 1 where the judge knows nothing, 0 where it is sure and right.
        """
        check_same_shape(clips, reconstructions)
        total = clips.new_zeros((), dtype=torch.float32)
        pieces = [(index, frames) for index in range(len(clips)) for frames in self._pieces(clips)]
        for number, (index, frames) in enumerate(pieces, start=1):
            real, made = (each[index : index + 1, :, frames] for each in (clips, reconstructions))
            with nullcontext() if is_last and number == len(pieces) else self._no_sync():
                with self._autocast():
                    verdicts = self._judge(real), self._judge(made)
                value = hinge(verdicts[0].float(), verdicts[1].float()) * (_share(clips, frames) / len(clips))
                (scale * value).backward()
            total += value.detach()
        return total

    def _pieces(self, clips: Tensor) -> Iterator[slice]:
        """Ranges of frames, as few as may be and as even as may be."""
        num_frames = clips.shape[2]
        count = -(-num_frames // self._max_frames)
        for index in range(count):
            yield slice(index * num_frames // count, (index + 1) * num_frames // count)


def hinge(on_real: Tensor, on_made: Tensor) -> Tensor:
    """Loss of a judge: mean over verdicts of how far they fall short of 1 on real clips, of -1 on made ones; halved."""
    return 0.5 * (relu(1 - on_real).mean() + relu(1 + on_made).mean())


def _halving(before: int, after: int) -> nn.Conv3d:
    return nn.Conv3d(before, after, (3, 4, 4), stride=2, padding=1)


def _share(clips: Tensor, frames: slice) -> float:
    """The piece's share of the clip's mean."""
    return (frames.stop - frames.start) / clips.shape[2]
