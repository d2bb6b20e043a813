"""How good the reconstructions of unseen clips are."""

import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import TrainerConfig
from cosmos_hpc.data.loader import to_unit_range
from cosmos_hpc.tokenizer import Autoencoded, DiscreteTokenizer
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.metrics import code_use, psnr, ssim
from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.telemetry import ValidationScores

MOST = 0.03
"""Share of the time that validations by the clock take at most: where one is slow, the next is put off."""

NAMES = ("psnr", "ssim", "lpips")


class Validation:
    """PSNR, SSIM, VGG16's distance where the loss looks through it, use of codes; over the same clips each time."""

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Tensor]],
        trainer: TrainerConfig,
        groups: Groups,
        *,
        eye: Eye | None = None,
        keeps_pictures: bool = False,
    ) -> None:
        """Measure on these clips.

        Args:
            loaders: this rank's clips, by how the names of their scores begin: `val`, and `general` where there is one.
            trainer: settings.
            groups: the ranks.
            eye: VGG16, for its distance.
            keeps_pictures: whether `pictures` are taken.
        """
        self.pictures: np.ndarray | None = None
        """First and last frame of the first clip of this rank, each beside its reconstruction: uint8 [2 H, 2 W, 3]."""

        self._keeps_pictures = keeps_pictures
        self._loaders = loaders
        self._trainer = trainer
        self._groups = groups
        self._eye = eye
        self._ended = time.monotonic()
        self._took_s = 0.0

    @property
    def is_wanted(self) -> bool:
        """Whether `val_every_n_minutes` have passed on this rank's clock since the last one; rank 0's counts."""
        if self._trainer.val_check_interval is not None or not self._groups.rank.is_first:
            return False
        least_s = max(60 * self._trainer.val_every_n_minutes, self._took_s * (1 / MOST - 1))
        return time.monotonic() - self._ended >= least_s

    def is_due(self, step: int) -> bool:
        """After every `val_check_interval` steps, where these are set, and after the last one."""
        interval = self._trainer.val_check_interval
        return step == self._trainer.max_steps or (interval is not None and step % interval == 0)

    @torch.no_grad()
    def run(
        self, module: nn.Module, on_batch: Callable[[], None], average: nn.Module | None = None
    ) -> ValidationScores:
        """Means over the validation clips of all ranks; each clip counts once, however ranks and batches share them.

        Args:
            module: network.
            on_batch: called after each batch of this rank.
            average: the network with averaged weights; it sees the same clips.

        Raises:
            ConfigError: if no rank has a clip.
        """
        started, self.pictures = time.monotonic(), None
        networks = {"": module} if average is None else {"": module, "_ema": average}
        scores: dict[str, float] = {}
        for split, loader in self._loaders.items():
            scores |= self._measure(split, loader, networks, on_batch)
        self._ended = time.monotonic()
        self._took_s = self._ended - started
        return ValidationScores(**scores)

    def _measure(
        self, split: str, loader: Iterable[Tensor], networks: dict[str, nn.Module], on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Scores of the networks on one dataset, by their names in metrics.jsonl."""
        module = networks[""]
        names = [
            f"{split}_{name}{kind}" for kind in networks for name in (NAMES if self._eye is not None else NAMES[:2])
        ]
        counts_codes = split == "val" and isinstance(module, DiscreteTokenizer)
        counts = torch.zeros(_num_codes(module), device=self._groups.device)
        sums = torch.zeros(1 + len(names), dtype=torch.float64, device=self._groups.device)
        for batch in loader:
            clips = to_unit_range(batch.to(self._groups.device))
            outputs = [self._outputs(network, clips) for network in networks.values()]
            if self._keeps_pictures and split == "val" and self.pictures is None:
                self.pictures = _side_by_side(clips[0], outputs[0].reconstructions[0])
            found = [score.sum() for each in outputs for score in self._scores(clips, each.reconstructions)]
            if counts_codes and isinstance(module, DiscreteTokenizer):
                indices = module.quantizer.codes_to_indices(outputs[0].latents).flatten().long()
                counts.scatter_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
            sums += torch.stack([torch.ones_like(found[0]) * len(clips), *found])
            on_batch()
        count, *totals = self._groups.total(sums).tolist()
        if not count:  # the same on every rank
            setting = "data.path" if split == "val" else "data.general_path"
            raise ConfigError(
                f"{setting}: no video of the split val gives a clip: all are shorter than data.num_frames or can't be "
                "decoded (see the warnings above): set fewer frames or add videos"
            )
        scores = {name: total / count for name, total in zip(names, totals, strict=True)}
        if split == "val":
            scores["val_clips"] = count
        if counts_codes:
            use = code_use(self._groups.total(counts))
            scores |= {"val_code_use": use.share, "val_perplexity": use.perplexity}
        return scores

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


def _side_by_side(clip: Tensor, reconstruction: Tensor) -> np.ndarray:
    """Of [3, T, H, W] in about [-1, 1]: first frames above last ones."""
    rows = [torch.cat([each[:, index] for each in (clip, reconstruction)], dim=2) for index in (0, -1)]
    values = (torch.cat(rows, dim=1).float().clamp(-1, 1) + 1) * 127.5
    pixels: np.ndarray = values.round().to(torch.uint8).movedim(0, 2).cpu().numpy()
    return pixels


def _num_codes(module: nn.Module) -> int:
    return module.quantizer.num_indices if isinstance(module, DiscreteTokenizer) else 0
