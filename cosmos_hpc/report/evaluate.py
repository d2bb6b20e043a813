"""How good weights are on the split val of a dataset, one row for each source of weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import DataConfig
from cosmos_hpc.data.loader import ValidationLoader, to_unit_range
from cosmos_hpc.tokenizer import psnr
from cosmos_hpc.tokenizer.weights import load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What one source of weights makes of the validation clips."""

    source: Path
    """The weights, as they were named."""

    num_clips: int
    """Clips of the split val that could be decoded."""

    psnr_mean: float
    """dB, mean over the clips."""

    psnr_p5: float
    """dB, 5th percentile over the clips: how bad the bad ones are."""

    psnr_per_clip: tuple[float, ...]
    """dB, in the order of the dataset."""


def evaluate(
    sources: Sequence[Path], data: DataConfig, *, on_batch: Callable[[], None] | None = None
) -> list[Evaluation]:
    """Reconstruct the whole split val with each of the weights, in float32.

    Args:
        sources: runs, checkpoints, exports or folders of released weights.
        data: dataset, clip size, and the clips per forward (`micro_batch_size`).
        on_batch: called after each batch of each source.

    Returns:
        One row per source, in the order given.

    Raises:
        ConfigError: if weights or dataset can't be read, or the clips don't fit a network.
    """
    return [_evaluate_one(source, data, on_batch or (lambda: None)) for source in sources]


def compute_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def _evaluate_one(source: Path, data: DataConfig, on_batch: Callable[[], None]) -> Evaluation:
    device = compute_device()
    tokenizer = load_tokenizer(source).to(device).eval()
    values: list[float] = []
    for batch in ValidationLoader(data, rank=0, world_size=1):
        clips = to_unit_range(batch.to(device))
        values += psnr(clips, tokenizer(clips).reconstructions).tolist()
        on_batch()
    if not values:
        raise ConfigError(
            f"data.path is {data.path}, but no video of its split val has {data.num_frames} frames that decode: "
            "set a smaller data.num_frames, or pack other videos"
        )
    return Evaluation(
        source=source,
        num_clips=len(values),
        psnr_mean=float(np.mean(values)),
        psnr_p5=float(np.percentile(values, 5)),
        psnr_per_clip=tuple(values),
    )
