"""What training lessens: the sum of the terms, and its gradient at the reconstructions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cosmos_hpc.config.loss_schema import LossConfig, LossTermConfig
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.tokenizer.architecture import FSQ_LEVELS
from cosmos_hpc.tokenizer.continuous import Autoencoded
from cosmos_hpc.tokenizer.losses.flow import FlowTerm, read_raft
from cosmos_hpc.tokenizer.losses.latents import kl_to_standard_normal, uneven_use
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.pixels import mean_absolute_difference
from cosmos_hpc.tokenizer.losses.vgg import Vgg16
from cosmos_hpc.tokenizer.losses.windows import cut_windows, join_windows, window_disagreement

NAMES = ("l1", "lpips", "gram", "flow", "consistency", "kl", "fsq_entropy")
"""Terms, as settings and metrics name them."""


class Losses:
    """The terms with their weights, and the networks that some look through.

    Each term is differentiated to the reconstructions alone, and those that look through a network some frames at a
    time, each graph freed before the next is made. One backward through the tokenizer follows, so memory is bounded
    whatever the clip's length. Nothing is read from the device.
    """

    def __init__(self, config: LossConfig, *, eye: Eye | None = None, flow: FlowTerm | None = None) -> None:
        """Sum the terms of these settings.

        Args:
            config: weights, by step.
            eye: VGG16, for lpips and gram.
            flow: RAFT, for flow.
        """
        self.eye = eye
        self._config = config
        self._flow = flow

    @classmethod
    def build(cls, run: RunConfig, device: torch.device) -> Self:
        """The loss of a run, with the networks of the terms whose weight is ever above zero.

        Raises:
            ConfigError: if the weights of such a network can't be read.
        """
        loss, steps, eye, flow = run.loss, run.trainer.max_steps, None, None
        if loss.looks_through_vgg(steps):
            # Not on a CPU, which takes many times as long over bfloat16.
            is_bf16 = run.trainer.precision == "bf16" and device.type == "cuda"
            dtype = torch.bfloat16 if is_bf16 else torch.float32
            network = Vgg16.read(Path(loss.lpips.weights)).to(device, dtype)
            eye = Eye(network, loss.lpips.chunk_frames)
        if loss.flow.is_used(steps):
            flow = FlowTerm(read_raft(Path(str(loss.flow.weights))).to(device), loss.flow.chunk_pairs)
        return cls(loss, eye=eye, flow=flow)

    def names(self, step: int) -> tuple[str, ...]:
        """The terms of a step: L1, and those whose weight is above zero then."""
        return tuple(name for name in NAMES if name == "l1" or self._weight(name, step) > 0)

    def inputs(self, clips: Tensor, step: int) -> Tensor:
        """What the network is given for these clips: the clips, or their overlapping windows."""
        windows = self._config.consistency
        return cut_windows(clips, windows.num_frames, windows.step) if windows.weight_at(step) > 0 else clips

    def backward(
        self, clips: Tensor, outputs: Autoencoded, step: int, *, scale: float = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """Add the gradient of the loss to the network's weights.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1].
            outputs: what the network made of `inputs(clips, step)`, with its graph.
            step: updates of the whole run before this one.
            scale: factor of the gradient, such as this micro batch's share of the step.
            mask: as the clips, in [0, 1]: what L1, lpips and gram are to look at.

        Returns:
            [1 + N] in float32 or better: the weighted sum, then the terms of `names(step)`, not weighted.

        Raises:
            ValueError: if the shapes differ.
        """
        weights = {name: self._weight(name, step) for name in self.names(step)}
        pulls = {name: scale * weight for name, weight in weights.items()}
        windows, latents = outputs.reconstructions.detach(), outputs.latents.detach()
        if "consistency" not in pulls:
            gradient = torch.zeros_like(windows)
            values = self._see(clips, windows, gradient, pulls, mask)
        else:
            gradient, values = self._see_windows(clips, windows, pulls, mask)
        latent_terms: dict[str, Callable[[Tensor], Tensor]] = {
            "kl": _kl,
            "fsq_entropy": partial(uneven_use, levels=FSQ_LEVELS),
        }
        latent_gradient = None
        for name in latent_terms.keys() & pulls.keys():  # one at most: kl is of CV, fsq_entropy of DV
            latent_gradient = torch.zeros_like(latents)
            values[name] = _differentiate(latent_terms[name], latents, latent_gradient, pulls[name])
        if latent_gradient is None:
            outputs.reconstructions.backward(gradient)
        else:
            torch.autograd.backward([outputs.reconstructions, outputs.latents], [gradient, latent_gradient])
        total = sum((weights[name] * values[name] for name in weights), start=torch.zeros_like(values["l1"]))
        return torch.stack([total, *(values[name] for name in weights)])

    def _see(
        self, clips: Tensor, reconstructions: Tensor, gradient: Tensor, pulls: dict[str, float], mask: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms of pictures by name; their gradients are added up."""
        l1 = partial(mean_absolute_difference, clips, mask=mask)
        values = {"l1": _differentiate(l1, reconstructions, gradient, pulls["l1"])}
        if "lpips" in pulls or "gram" in pulls:
            assert self.eye is not None, "build makes one where it is needed"
            lpips, gram = pulls.get("lpips", 0.0), pulls.get("gram", 0.0)
            seen = self.eye.differentiate(clips, reconstructions, gradient, lpips=lpips, gram=gram, mask=mask)
            values |= {"lpips": seen.lpips, "gram": seen.gram}
        if "flow" in pulls:
            assert self._flow is not None, "build makes one where it is needed"
            values["flow"] = self._flow.differentiate(clips, reconstructions, gradient, weight=pulls["flow"])
        return values

    def _see_windows(
        self, clips: Tensor, windows: Tensor, pulls: dict[str, float], mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of pictures put together from windows, and that of the windows; gradient at the windows."""
        num_clips, step = len(clips), self._config.consistency.step
        leaf = windows.clone().requires_grad_()
        whole = join_windows(leaf, num_clips, step)
        slope = torch.zeros_like(whole)
        values = self._see(clips, whole.detach(), slope, pulls, mask)
        (gradient,) = torch.autograd.grad(whole, leaf, slope)
        disagreement = partial(window_disagreement, num_clips=num_clips, step=step)
        values["consistency"] = _differentiate(disagreement, windows, gradient, pulls["consistency"])
        return gradient, values

    def _weight(self, name: str, step: int) -> float:
        term: LossTermConfig = getattr(self._config, name)
        return term.weight_at(step)


def _differentiate(term: Callable[[Tensor], Tensor], at: Tensor, gradient: Tensor, weight: float) -> Tensor:
    """The term's value; `weight` times its gradient is added."""
    leaf = at.detach().requires_grad_()
    value = term(leaf)
    (slope,) = torch.autograd.grad(weight * value, leaf)
    gradient += slope
    return value.detach()


def _kl(latents: Tensor) -> Tensor:
    """As of a posterior N(latents, 1): the released tokenizers give no variance."""
    mean = latents.float()
    return kl_to_standard_normal(mean, torch.zeros_like(mean)).mean()
