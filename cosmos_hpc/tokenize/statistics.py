"""`mean_std.pt` for an export: taken along where the encoder is as it was, else measured on videos."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import read_run_config
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.sources import decoded, look_into, opened, spread
from cosmos_hpc.tokenizer import (
    ContinuousTokenizer,
    DiscreteTokenizer,
    LatentStatistics,
    latent_statistics,
    load_tokenizer,
    read_latent_statistics,
)
from cosmos_hpc.tokenizer.architecture import Architecture
from cosmos_hpc.tokenizer.latent_statistics import FILE, NUM_LATENT_FRAMES

logger = logging.getLogger(__name__)

NUM_VIDEOS = 64
"""Videos that are measured: at 256 x 256 pixels, 65,536 latents a channel and frame."""

CROP_SIZE = 256
"""Pixels, where no run says what it was trained on."""

OnVideo = Callable[[int, int], None]
"""Called with the videos that are done and their number."""


def statistics_for(
    source: Path,
    network: ContinuousTokenizer | DiscreteTokenizer,
    given: Path | None = None,
    *,
    num_frames: int | None = None,
    on_video: OnVideo = lambda done, total: None,
) -> LatentStatistics | None:
    """What belongs beside an export of the network, and none where that can't be had.

    Args:
        source: the weights: a folder's own mean_std.pt is taken along; a run is measured on the data that it was
            trained on, unless its encoder is still the one that it started from.
        network: loaded from there.
        given: a mean_std.pt, or videos to measure on, in place of all that.
        num_frames: as for `measure`.
        on_video: called after each video that is measured.

    Raises:
        ConfigError: if `given` can't be used; what can't be had without being asked for is told in the log.
    """
    if isinstance(network, DiscreteTokenizer):
        if given is not None:
            raise ConfigError(f"{network.architecture.name} has no {FILE}: leave --statistics out")
        return None
    if given is not None and given.suffix == ".pt":
        return read_latent_statistics(given)
    if given is not None:
        return measure(network, given, num_frames=num_frames, on_video=on_video)
    _checked(num_frames, network.architecture)
    run = _run_of(source)
    if run is None:
        return read_latent_statistics(source / FILE) if (source / FILE).exists() else None
    try:
        return _of_run(run, network, num_frames, on_video)
    except ConfigError as error:
        logger.warning("no %s: %s", FILE, error)
        return None


def measure(
    network: ContinuousTokenizer,
    videos: Path,
    *,
    num_frames: int | None = None,
    crop_size: int = CROP_SIZE,
    on_video: OnVideo = lambda done, total: None,
) -> LatentStatistics:
    """Measure a network's latents on the middle of `NUM_VIDEOS` videos, spread over all that there are.

    Args:
        network: on any device; it is measured on the GPU where there is one.
        videos: a prepared dataset, or any folder of packed shards or of video files.
        num_frames: from each video's beginning; none: as many as the released file has positions for, 121.
        crop_size: most pixels in height and width.
        on_video: called after each video.

    Raises:
        ConfigError: if no video is long enough, or the number of frames does not fit the network.
    """
    num_frames = _checked(num_frames, network.architecture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("measuring %s on %d frames of up to %d videos in %s", FILE, num_frames, NUM_VIDEOS, videos)
    clips = _clips(videos, num_frames, crop_size, network.architecture, on_video)
    home = network.post_quant_conv.conv3d.weight.device
    try:
        return latent_statistics(network.to(device).eval(), (clip.to(device) for clip in clips))
    finally:
        network.to(home)


def _of_run(
    run: RunFolder, network: ContinuousTokenizer, num_frames: int | None, on_video: OnVideo
) -> LatentStatistics:
    config = read_run_config(run.config)
    start = config.model.jit_ckpt_pth
    if start is not None and (Path(start) / FILE).exists() and _has_the_same_encoder(network, Path(start)):
        return read_latent_statistics(Path(start) / FILE)
    videos = Path(config.data.path or "")
    if not videos.is_dir():
        raise ConfigError(f"data.path of {run.label} is {videos}, no folder that is there: name one by --statistics")
    return measure(network, videos, num_frames=num_frames, crop_size=config.data.crop_size, on_video=on_video)


def _checked(num_frames: int | None, architecture: Architecture) -> int:
    """Frames to measure: 1 + 8k, as many as the file has positions for unless told otherwise."""
    stride = architecture.temporal_compression
    longest = 1 + (NUM_LATENT_FRAMES - 1) * stride
    if num_frames is not None and (num_frames not in range(1, longest + 1) or num_frames % stride != 1):
        raise ConfigError(f"--statistics-frames is {num_frames}, but takes 1 + {stride}k up to {longest}")
    return longest if num_frames is None else num_frames


def _run_of(source: Path) -> RunFolder | None:
    """The run that the weights are of, named itself or by one of its checkpoints."""
    folders = (source, source.resolve().parent.parent)
    return next((RunFolder(folder) for folder in folders if RunFolder(folder).config.exists()), None)


def _has_the_same_encoder(network: ContinuousTokenizer, start: Path) -> bool:
    tensors, other = network.state_dict(), load_tokenizer(start).state_dict()
    names = [name for name in tensors if name.startswith(("encoder.", "quant_conv."))]
    return all(name in other and tensors[name].equal(other[name]) for name in names)


def _clips(
    videos: Path, num_frames: int, crop_size: int, architecture: Architecture, on_video: OnVideo
) -> Iterator[Tensor]:
    """Clips [1, 3, T, H, W] in [-1, 1]; videos that are too short, too small or broken are passed over."""
    num_clips = longest = 0
    reason = ""
    for video in spread(videos, NUM_VIDEOS):
        try:
            with opened(video) as path:
                info = look_into(path)
                longest = max(longest, info.frames)
                if info.frames < num_frames:
                    continue
                clip = _cropped(list(decoded(path, num_frames)), num_frames, crop_size, architecture)
        except UndecodableError as error:
            reason = f", {video.source} for one: {error}"
            continue
        num_clips += 1
        yield clip
        on_video(num_clips, NUM_VIDEOS)
        if num_clips == NUM_VIDEOS:
            return
    if num_clips == 0:
        mend = "name longer videos by --statistics DATASET"
        if 0 < longest < num_frames:
            stride = architecture.temporal_compression
            mend += f", or measure fewer frames by --statistics-frames {1 + (longest - 1) // stride * stride}"
        raise ConfigError(
            f"no video in {videos} has {num_frames} frames to measure (at most {longest}{reason}): {mend}"
        )


def _cropped(frames: list[np.ndarray], num_frames: int, crop_size: int, architecture: Architecture) -> Tensor:
    """The middle of frames [H, W, 3] as a clip, its sides multiples of the compression."""
    if len(frames) < num_frames:
        raise UndecodableError(f"only {len(frames)} of its frames can be decoded")
    step = architecture.spatial_compression
    full_height, full_width, _ = frames[0].shape
    height, width = (min(size, crop_size) // step * step for size in (full_height, full_width))
    if height == 0 or width == 0:
        raise UndecodableError(f"its frames are smaller than {step} pixels")
    top, left = (full_height - height) // 2, (full_width - width) // 2
    cropped = np.stack([frame[top : top + height, left : left + width] for frame in frames])
    clip = torch.from_numpy(cropped).permute(3, 0, 1, 2).unsqueeze(0)
    return clip.float() / 127.5 - 1
