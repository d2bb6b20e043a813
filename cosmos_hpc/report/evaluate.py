"""How good weights are on videos that they were not trained on, and what became of their latent space."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.data.loader import to_unit_range
from cosmos_hpc.data.sources import Video, of_split
from cosmos_hpc.report.evaluation_clips import ClipShape, EvaluationClip, clips_of, value_of
from cosmos_hpc.report.latent_drift import LatentSums
from cosmos_hpc.report.probe import Probe
from cosmos_hpc.report.scores import NO_VALUE, Evaluation, EvaluationSet
from cosmos_hpc.tokenizer import ContinuousTokenizer, DiscreteTokenizer, psnr, ssim, starting_tokenizer
from cosmos_hpc.tokenizer.frechet import FeatureNetwork, frechet_distance
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.vgg import Vgg16
from cosmos_hpc.tokenizer.metrics import border_error, code_use, flicker, psnr_inside, ssim_inside
from cosmos_hpc.tokenizer.weights import load_tokenizer

Network = ContinuousTokenizer | DiscreteTokenizer

CHUNK_FRAMES = 16
"""Frames that go through VGG16 at once."""


class Source(NamedTuple):
    """Weights that are compared."""

    label: str
    load: Callable[[], Network]
    run: str | None = None
    """The run that trained them, by name."""

    step: int | None = None
    is_start: bool = False


class Instruments(NamedTuple):
    """What is measured beyond pixels; each is absent where its file or function is not given."""

    eye: Eye | None = None
    features: FeatureNetwork | None = None
    probe: Probe | None = None


PIXELS_ALONE = Instruments()


@dataclass(frozen=True)
class Task:
    """Which videos, and what is cut out of each."""

    data: Path
    """Dataset or folder of videos."""

    split: str = "val"
    """Of a prepared dataset."""

    num_frames: int = 33
    """Of a window."""

    num_windows: int = 1
    """Of a clip, each encoded and decoded by itself."""

    crop_size: int | None = 256
    """Height and width in pixels; none: whole frames."""

    fields: tuple[str, ...] = ()
    """Of the videos' JSON, by whose values the scores are told apart."""

    max_videos: int | None = None
    """Spread over all; none: all."""

    @property
    def shape(self) -> ClipShape:
        """Of a clip."""
        return ClipShape(self.num_frames * self.num_windows, self.crop_size)

    def videos(self) -> list[Video]:
        """The videos, in order.

        Raises:
            ConfigError: if there is none.
        """
        found = of_split(self.data, self.split)
        if self.max_videos is None or self.max_videos >= len(found):
            return found
        return [found[index * len(found) // self.max_videos] for index in range(self.max_videos)]


class Coded(NamedTuple):
    """A clip through a network, window by window."""

    latents: Tensor
    """[num_windows, C, T', H', W']."""

    reconstructions: Tensor
    """[1, 3, T, H, W]."""


def evaluate(
    sources: Sequence[Source],
    task: Task,
    instruments: Instruments = PIXELS_ALONE,
    *,
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationSet:
    """Reconstruct the videos with each of the weights, in float32.

    Args:
        sources: the first one is what the others are compared with.
        task: which videos.
        instruments: what else is measured.
        on_video: called with the videos that are done and their number over all sources.

    Raises:
        ConfigError: if weights or videos can't be read, or the clips don't fit a network.
    """
    videos = task.videos()
    measured: list[Evaluation] = []
    facts: list[EvaluationClip] = []
    left_out: list[tuple[str, str]] = []
    first: Network | None = None
    for number, source in enumerate(sources):
        network = source.load().to(compute_device()).eval()
        facts, left_out = [], []
        done, total = number * len(videos), len(sources) * len(videos)
        on_clip = partial(_tell, on_video, done, total)
        clips = _noted(clips_of(videos, task.shape, left_out), facts, on_clip)
        measured.append(_measure(source, network, first, measured, clips, task, instruments))
        first = first or network
    if not facts:
        longest = f" ({left_out[0][0]}: {left_out[0][1]})" if left_out else ""
        raise ConfigError(
            f"no video of {task.data} gives a clip of {task.shape.num_frames} frames{longest}: "
            "set a smaller --num-frames, or name other videos"
        )
    return EvaluationSet(
        data=str(task.data.resolve()),
        split=task.split,
        num_frames=task.num_frames,
        num_windows=task.num_windows,
        crop_size=task.crop_size,
        videos=[clip.name for clip in facts],
        slices={field: [value_of(clip.facts, field) or NO_VALUE for clip in facts] for field in task.fields},
        left_out=left_out,
        evaluations=measured,
    )


def run_source(folder: RunFolder, *, ema: bool = False) -> Source:
    """The newest checkpoint of a run, or the average that it kept."""
    label = f"{folder.label} (average)" if ema else folder.label
    return Source(label, partial(load_tokenizer, folder.path, ema=ema), folder.path.name, folder.newest_step())


def start_source(folder: RunFolder) -> Source:
    """What a run started from."""
    config = read_run_config(folder.config)
    label = f"start of {folder.label}" if config.model.jit_ckpt_pth is None else config.model.jit_ckpt_pth
    return Source(label, partial(starting_tokenizer, config.model, config.trainer.seed), step=0, is_start=True)


def weights_source(path: Path, label: str | None = None) -> Source:
    """Weights of any other kind."""
    return Source(label or str(path), partial(load_tokenizer, path))


def read_eye(path: Path) -> Eye:
    """VGG16 to look through.

    Raises:
        ConfigError: if the file holds something else.
    """
    return Eye(Vgg16.read(path).to(compute_device()).eval(), CHUNK_FRAMES)


def compute_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def through(network: Network, clips: Tensor, num_windows: int) -> Coded:
    """Encode and decode each window of a clip [1, 3, T, H, W] by itself.

    Raises:
        ConfigError: if a window does not fit the network, or the GPU's memory.
    """
    try:
        latents = torch.cat([network.encode(window) for window in clips.chunk(num_windows, dim=2)])
        return Coded(latents, _decoded(network, latents))
    except torch.OutOfMemoryError:
        shape = " x ".join(map(str, clips.shape[2:]))
        raise ConfigError(f"a clip of {shape} does not fit the GPU's memory: set a smaller --crop-size") from None


def to_pictures(clips: Tensor) -> np.ndarray:
    """A clip [1, 3, T, H, W] in [-1, 1] as a player shows it: uint8 [T, H, W, 3]."""
    levels = ((clips[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).cpu().numpy()


def _tell(on_video: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    on_video(before + count, total)


def _noted(
    clips: Iterator[EvaluationClip], facts: list[EvaluationClip], on_clip: Callable[[int], None]
) -> Iterator[EvaluationClip]:
    """The clips; what they say of themselves is kept without the pixels."""
    for clip in clips:
        yield clip
        facts.append(clip._replace(frames=torch.empty(0), inside=None))
        on_clip(len(facts))


@torch.inference_mode()
def _measure(
    source: Source,
    network: Network,
    first: Network | None,
    before: Sequence[Evaluation],
    clips: Iterator[EvaluationClip],
    task: Task,
    instruments: Instruments,
) -> Evaluation:
    per_video: dict[str, list[float]] = {}
    drift, features = LatentSums(), _Features(instruments.features)
    counts = torch.zeros(network.quantizer.num_indices if isinstance(network, DiscreteTokenizer) else 0)
    for index, clip in enumerate(clips):
        originals = to_unit_range(clip.frames[None].to(compute_device()))
        coded = through(network, originals, task.num_windows)
        found = _scores(originals, coded.reconstructions, clip.inside, task, instruments)
        if isinstance(network, DiscreteTokenizer):
            indices = network.quantizer.codes_to_indices(coded.latents).flatten().long().cpu()
            counts += torch.bincount(indices, minlength=len(counts))
        if first is not None:
            theirs = torch.cat([first.encode(window) for window in originals.chunk(task.num_windows, dim=2)])
            if theirs.shape == coded.latents.shape:
                drift.add(coded.latents, theirs)
                known = found["psnr"], before[0].per_video["psnr"][index]
                found |= _crossed(network, first, originals, coded.latents, theirs, known)
        features.add(originals, coded.reconstructions)
        for name, value in found.items():
            per_video.setdefault(name, []).append(value)
    over_all = features.distance()
    if counts.sum() > 0:
        use = code_use(counts)
        over_all |= {"code_use": use.share, "perplexity": use.perplexity}
    present = {name: values for name, values in per_video.items() if not all(map(math.isnan, values))}
    return Evaluation(source.label, present, source.run, source.step, source.is_start, over_all, drift.drift())


def _scores(
    originals: Tensor, reconstructions: Tensor, inside: Tensor | None, task: Task, instruments: Instruments
) -> dict[str, float]:
    found = {
        "psnr": psnr(originals, reconstructions),
        "ssim": ssim(originals, reconstructions),
        "flicker": flicker(originals, reconstructions),
        "border": border_error(originals, reconstructions, task.num_frames),
    }
    if instruments.eye is not None:
        found["lpips"] = instruments.eye.distances(originals, reconstructions)
    nothing = torch.full((1,), math.nan)
    mask = None if inside is None else inside[None].to(originals.device)
    found["psnr_inside"] = nothing if mask is None else psnr_inside(originals, reconstructions, mask)
    found["ssim_inside"] = nothing if mask is None else ssim_inside(originals, reconstructions, mask)
    scores = {name: float(value) for name, value in found.items()}
    if instruments.probe is not None:
        seen = [instruments.probe.look(to_pictures(each)) for each in (originals, reconstructions)]
        scores["agreement"] = instruments.probe.agreement(*seen)
    return scores


def _crossed(
    network: Network, first: Network, originals: Tensor, latents: Tensor, theirs: Tensor, known: tuple[float, float]
) -> dict[str, float]:
    """Each decoder on the other encoder's latents, and how many of these are others.

    Args:
        network: which encoded `latents`.
        first: which encoded `theirs`.
        originals: [1, 3, T, H, W].
        latents: [num_windows, C, T', H', W'].
        theirs: the same shape.
        known: PSNR of each network's own reconstruction, which is that on the same latents.
    """
    if latents.equal(theirs):
        found = dict(zip(("old_encoder", "old_decoder"), known, strict=True))
    else:
        found = {
            "old_encoder": float(psnr(originals, _decoded(network, theirs))),
            "old_decoder": float(psnr(originals, _decoded(first, latents))),
        }
    if isinstance(network, DiscreteTokenizer):
        ours, other = (network.quantizer.codes_to_indices(each) for each in (latents, theirs))
        found["changed"] = float((ours != other).double().mean())
    return found


def _decoded(network: Network, latents: Tensor) -> Tensor:
    """Windows put together again: [1, 3, T, H, W]."""
    return torch.cat([network.decode(window[None]) for window in latents], dim=2)


class _Features:
    """What the feature network sees, of all clips."""

    def __init__(self, network: FeatureNetwork | None) -> None:
        self._network = network
        self._ours: list[Tensor] = []
        self._theirs: list[Tensor] = []

    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        if self._network is not None:
            self._ours.append(self._network.features(reconstructions))
            self._theirs.append(self._network.features(originals))

    def distance(self) -> dict[str, float]:
        if len(self._ours) < 2:
            return {}
        return {"frechet": frechet_distance(torch.cat(self._ours), torch.cat(self._theirs))}
