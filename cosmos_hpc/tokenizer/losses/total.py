"""What training lessens: the sum of the terms, and its gradient at the reconstructions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from cosmos_hpc.config.loss_schema import LossConfig, LossTermConfig
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.tokenizer.architecture import FSQ_LEVELS
from cosmos_hpc.tokenizer.continuous import Autoencoded
from cosmos_hpc.tokenizer.losses.discriminator import AdversarialTerm
from cosmos_hpc.tokenizer.losses.flow import FlowTerm, read_raft
from cosmos_hpc.tokenizer.losses.latents import kl_to_standard_normal, uneven_use
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.pixels import absolute_difference_and_slope
from cosmos_hpc.tokenizer.losses.vgg import Vgg16
from cosmos_hpc.tokenizer.losses.windows import cut_windows, join_windows, window_disagreement

NAMES = ("l1", "lpips", "gram", "flow", "consistency", "kl", "fsq_entropy", "adversarial")
"""Terms, as settings and metrics name them."""


class Pull(NamedTuple):
    """The loss, and its gradient at the network's outputs."""

    ends: list[Tensor]
    """Outputs, with their graphs."""

    slopes: list[Tensor]
    """Gradient at each."""

    values: Tensor
    """[1 + N] in float32 or better: the weighted sum, then what `names(step)` says, not weighted."""


class Losses:
    """The terms with their weights, and the networks that some look through.

    Each term is differentiated to the reconstructions alone, and those that look through a network some frames at a
    time, each graph freed before the next is made. One backward through the tokenizer follows, so memory is bounded
    whatever the clip's length. Nothing is read from the device.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        eye: Eye | None = None,
        flow: FlowTerm | None = None,
        adversarial: AdversarialTerm | None = None,
    ) -> None:
        """Sum the terms of these settings.

        Args:
            config: weights, by step.
            eye: VGG16, for lpips and gram.
            flow: RAFT, for flow.
            adversarial: the discriminator, for adversarial.
        """
        self.eye = eye
        self._config = config
        self._flow = flow
        self._adversarial = adversarial
        self._compare_pixels = absolute_difference_and_slope

    def compile(self, backend: str = "inductor") -> None:
        """Fuse what lies between the convolutions of VGG16, and the comparison of pixels."""
        self._compare_pixels = torch.compile(absolute_difference_and_slope, dynamic=False, backend=backend)
        if self.eye is not None:
            self.eye.compile(backend)

    def interpret(self) -> None:
        """Undo `compile`."""
        self._compare_pixels = absolute_difference_and_slope
        if self.eye is not None:
            self.eye.feature_distance = None

    @classmethod
    def build(cls, run: RunConfig, device: torch.device, adversarial: AdversarialTerm | None = None) -> Self:
        """The loss of a run, with the networks of the terms whose weight is ever above zero.

        Args:
            run: settings.
            device: of the networks.
            adversarial: the discriminator, which is trained along, where its weight is ever above zero.

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
        return cls(loss, eye=eye, flow=flow, adversarial=adversarial)

    def trains_discriminator(self, step: int) -> bool:
        """Whether `backward` also adds to the gradients of the discriminator's weights."""
        return self._adversarial is not None and step >= self._config.adversarial.start_step

    def names(self, step: int) -> tuple[str, ...]:
        """What `backward` tells of a step: L1, the terms whose weight is above zero then, the discriminator's loss."""
        names = [name for name in NAMES if name == "l1" or self._weight(name, step) > 0]
        names += ["adversarial_weight"] if "adversarial" in names else []
        return (*names, "discriminator") if self.trains_discriminator(step) else tuple(names)

    def inputs(self, clips: Tensor, step: int) -> Tensor:
        """What the network is given for these clips: the clips, or their overlapping windows."""
        windows = self._config.consistency
        return cut_windows(clips, windows.num_frames, windows.step) if windows.weight_at(step) > 0 else clips

    def backward(
        self,
        clips: Tensor,
        outputs: Autoencoded,
        step: int,
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
        is_last: bool = True,
    ) -> Tensor:
        """Add the gradient of the loss to the network's weights, and that of its own to the discriminator's.

        Takes what `pull` takes.

        Returns:
            The values of `pull`.
        """
        pull = self.pull(clips, outputs, step, scale=scale, mask=mask, is_last=is_last)
        torch.autograd.backward(pull.ends, pull.slopes)
        return pull.values

    def pull(
        self,
        clips: Tensor,
        outputs: Autoencoded,
        step: int,
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
        is_last: bool = True,
    ) -> "Pull":
        """Differentiate the loss to what the network made, and that of the discriminator to its weights.

        Args:
            clips: [B, 3, T, H, W] in [-1, 1].
            outputs: what the network made of `inputs(clips, step)`, with its graph.
            step: updates of the whole run before this one.
            scale: factor of the gradient, such as this micro batch's share of the step.
            mask: as the clips, in [0, 1]: what L1, lpips and gram are to look at.
            is_last: whether this is the step's last micro batch.

        Raises:
            ValueError: if the shapes differ.
        """
        names = self.names(step)
        task = _Task({name: self._weight(name, step) for name in names if name in NAMES}, step, scale, mask, is_last)
        windows = outputs.reconstructions.detach()
        if "consistency" not in names:
            gradient = torch.zeros_like(windows)
            values = self._see(clips, windows, gradient, task)
        else:
            gradient, values = self._see_windows(clips, windows, task)
        ends, slopes = [outputs.reconstructions], [gradient]
        if "kl" in names:
            assert outputs.logvar is not None, "the settings refuse kl without a posterior"
            ends += [outputs.latents, outputs.logvar]
        if "fsq_entropy" in names:
            ends += [outputs.latents]
        for name in [name for name in LATENT_TERMS if name in names]:  # one at most: kl is of CV, fsq_entropy of DV
            leaf = torch.cat(ends[1:], 1).detach()
            slope = torch.zeros_like(leaf)
            values[name] = _differentiate(LATENT_TERMS[name], leaf, slope, task.pull(name))
            slopes += [part.type_as(end) for part, end in zip(slope.chunk(len(ends) - 1, 1), ends[1:], strict=True)]
        total = values.pop("weighted_adversarial", torch.zeros_like(values["l1"]))
        total = total + sum(weight * values[name] for name, weight in task.weights.items() if name != "adversarial")
        return Pull(ends, slopes, torch.stack([total, *(values[name] for name in names)]))

    def _see(self, clips: Tensor, reconstructions: Tensor, gradient: Tensor, task: "_Task") -> dict[str, Tensor]:
        """The terms of pictures by name; their gradients are added up."""
        l1, slope = self._compare_pixels(clips, reconstructions, task.mask)
        gradient.add_(slope, alpha=task.pull("l1"))
        values = {"l1": l1}
        if "lpips" in task.weights or "gram" in task.weights:
            assert self.eye is not None, "build makes one where it is needed"
            lpips, gram = task.pull("lpips"), task.pull("gram")
            seen = self.eye.differentiate(clips, reconstructions, gradient, lpips=lpips, gram=gram, mask=task.mask)
            values |= {"lpips": seen.lpips, "gram": seen.gram}
        if "flow" in task.weights:
            assert self._flow is not None, "build makes one where it is needed"
            values["flow"] = self._flow.differentiate(clips, reconstructions, gradient, weight=task.pull("flow"))
        return values | self._judge(clips, reconstructions, gradient, task)

    def _judge(self, clips: Tensor, reconstructions: Tensor, gradient: Tensor, task: "_Task") -> dict[str, Tensor]:
        """What the discriminator says, added to the gradient of all other terms of pictures; and what it learns."""
        if self._adversarial is None or not self.trains_discriminator(task.step):
            return {}
        values: dict[str, Tensor] = {}
        if "adversarial" in task.weights:
            weight = task.weights["adversarial"]
            found = self._adversarial.differentiate(reconstructions, gradient, weight=weight, scale=task.scale)
            values |= {"adversarial": found.adversarial, "adversarial_weight": found.weight}
            values |= {"weighted_adversarial": found.weighted}
        learn = self._adversarial.learn
        return values | {"discriminator": learn(clips, reconstructions, scale=task.scale, is_last=task.is_last)}

    def _see_windows(self, clips: Tensor, windows: Tensor, task: "_Task") -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of pictures put together from windows, and that of the windows; gradient at the windows."""
        num_clips, step = len(clips), self._config.consistency.step
        leaf = windows.clone().requires_grad_()
        whole = join_windows(leaf, num_clips, step)
        slope = torch.zeros_like(whole)
        values = self._see(clips, whole.detach(), slope, task)
        (gradient,) = torch.autograd.grad(whole, leaf, slope)
        disagreement = partial(window_disagreement, num_clips=num_clips, step=step)
        values["consistency"] = _differentiate(disagreement, windows, gradient, task.pull("consistency"))
        return gradient, values

    def _weight(self, name: str, step: int) -> float:
        term: LossTermConfig = getattr(self._config, name)
        return term.weight_at(step)


class _Task(NamedTuple):
    """What is asked of one `backward`."""

    weights: dict[str, float]
    """Of the terms that count in this step."""

    step: int
    scale: float
    mask: Tensor | None
    is_last: bool

    def pull(self, name: str) -> float:
        """Factor of a term's gradient; 0 where it does not count."""
        return self.scale * self.weights.get(name, 0.0)


def _differentiate(term: Callable[[Tensor], Tensor], at: Tensor, gradient: Tensor, weight: float) -> Tensor:
    """The term's value; `weight` times its gradient is added."""
    leaf = at.detach().requires_grad_()
    value = term(leaf)
    (slope,) = torch.autograd.grad(weight * value, leaf)
    gradient += slope
    return value.detach()


def _kl(posterior: Tensor) -> Tensor:
    """Of means and log-variances, side by side in the channels."""
    mean, logvar = posterior.float().chunk(2, 1)
    return kl_to_standard_normal(mean, logvar).mean()


LATENT_TERMS: dict[str, Callable[[Tensor], Tensor]] = {"kl": _kl, "fsq_entropy": partial(uneven_use, levels=FSQ_LEVELS)}
"""Terms that look at latents and not at pictures."""
