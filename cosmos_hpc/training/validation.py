"""How good the reconstructions of unseen clips are."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import TrainerConfig
from cosmos_hpc.data.loader import ValidationLoader, to_unit_range
from cosmos_hpc.tokenizer import Autoencoded, DiscreteTokenizer
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.metrics import code_use, psnr, ssim
from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.telemetry import ValidationScores


class Validation:
    """PSNR, SSIM, VGG16's distance where the loss looks through it, use of codes; over the same clips each time."""

    def __init__(
        self, loader: ValidationLoader, trainer: TrainerConfig, groups: Groups, *, eye: Eye | None = None
    ) -> None:
        self._loader = loader
        self._trainer = trainer
        self._groups = groups
        self._eye = eye

    def is_due(self, step: int) -> bool:
        """After every `val_check_interval` steps and after the last one."""
        return step % self._trainer.val_check_interval == 0 or step == self._trainer.max_steps

    @torch.no_grad()
    def run(
        self, module: nn.Module, on_batch: Callable[[], None], average: nn.Module | None = None
    ) -> ValidationScores:
        """Means over the validation clips of all ranks; each clip counts once, however batches fell.

        Args:
            module: network.
            on_batch: called after each batch of this rank.
            average: the network with averaged weights; it sees the same clips.

        Raises:
            ConfigError: if no rank has a clip.
        """
        networks = [module] if average is None else [module, average]
        num_scores = 2 if self._eye is None else 3
        counts = torch.zeros(_num_codes(module), device=self._groups.device)
        sums = torch.zeros(1 + len(networks) * num_scores, dtype=torch.float64, device=self._groups.device)
        for batch in self._loader:
            clips = to_unit_range(batch.to(self._groups.device))
            outputs = [self._outputs(network, clips) for network in networks]
            found = [score.sum() for each in outputs for score in self._scores(clips, each.reconstructions)]
            if isinstance(module, DiscreteTokenizer):
                indices = module.quantizer.codes_to_indices(outputs[0].latents).flatten().long()
                counts.scatter_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
            sums += torch.stack([torch.ones_like(found[0]) * len(clips), *found])
            on_batch()
        count, *totals = self._groups.total(sums).tolist()
        if not count:  # the same on every rank
            raise ConfigError(
                "no video of the split val gives a clip: all are shorter than data.num_frames or can't be decoded "
                "(see the warnings above): set fewer frames or add videos"
            )
        own, averaged = ([total / count for total in totals[start:][:num_scores]] for start in (0, num_scores))
        names = ("psnr", "ssim", "lpips")
        scores = {f"val_{name}": value for name, value in zip(names, own, strict=False)}
        scores |= {f"val_{name}_ema": value for name, value in zip(names, averaged, strict=False)}
        if isinstance(module, DiscreteTokenizer):
            use = code_use(self._groups.total(counts))
            scores |= {"val_code_use": use.share, "val_perplexity": use.perplexity}
        return ValidationScores(**scores)

    def _outputs(self, network: nn.Module, clips: Tensor) -> Autoencoded:
        with self._groups.autocast(self._trainer.precision):
            outputs: Autoencoded = network(clips)
        return outputs

    def _scores(self, clips: Tensor, reconstructions: Tensor) -> list[Tensor]:
        """PSNR, SSIM and perhaps the distance of each clip, in float64."""
        scores = [psnr(clips, reconstructions), ssim(clips, reconstructions)]
        if self._eye is not None:
            scores.append(self._eye.distances(clips, reconstructions))
        return [score.double() for score in scores]


def _num_codes(module: nn.Module) -> int:
    return module.quantizer.num_indices if isinstance(module, DiscreteTokenizer) else 0
