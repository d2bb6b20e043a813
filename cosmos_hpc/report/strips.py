"""The worst clips for the eye: PNG strips with an error map, and side-by-side mp4s."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cosmos_hpc.data.loader import to_unit_range
from cosmos_hpc.data.sources import Video
from cosmos_hpc.data.video_file import write_mp4
from cosmos_hpc.report.evaluate import Source, Task, compute_device, through, to_pictures
from cosmos_hpc.report.evaluation_clips import clip_of
from cosmos_hpc.report.scores import EvaluationSet

COLUMNS = 5
"""Frames of a clip that its strip shows."""

ERROR_GAIN = 4
"""Factor that makes the error visible."""

CAPTION_PX = 16
"""Height of the line above each row."""

NARROWEST_PX, WIDEST_PX = 128, 320
"""Frames are enlarged or made smaller to these in strips; the mp4s have them as they are."""

FPS = 12.0
"""Of the mp4s: half of real time, for the eye."""


class Worst(NamedTuple):
    """Pictures of a clip."""

    name: str
    strip: Path
    video: Path


def write_worst(found: EvaluationSet, sources: Sequence[Source], task: Task, count: int, out: Path) -> list[Worst]:
    """Pictures of the clips with the lowest PSNR under the last of the weights.

    Args:
        found: the evaluation.
        sources: the weights, in its order.
        task: of the evaluation.
        count: clips.
        out: folder that gets `strips/` and `videos/`.
    """
    names = [found.videos[index] for index in found.evaluations[-1].worst(count)]
    by_name = {video.name: video for video in task.videos()}
    videos = [by_name[name] for name in names]
    rows = [[_original(video, task) for video in videos]]
    rows += [_reconstructions(source, videos, task) for source in sources]
    written = []
    for rank, (name, *pictures) in enumerate(zip(names, *rows, strict=True), start=1):
        file = f"{rank:02d}-{name.replace('/', '-')}"
        worst = Worst(name, out / "strips" / f"{file}.png", out / "videos" / f"{file}.mp4")
        worst.strip.parent.mkdir(parents=True, exist_ok=True)
        worst.strip.write_bytes(strip(pictures, ["original", *(source.label for source in sources)]))
        write_mp4(worst.video, np.concatenate(pictures, axis=2), FPS)
        written.append(worst)
    return written


def _original(video: Video, task: Task) -> np.ndarray:
    """The clip of a video as it is: uint8 [T, H, W, 3]."""
    return clip_of(video, task.shape).frames.permute(1, 2, 3, 0).numpy()


def strip(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """A PNG: a row of frames for the original, and for each of the others a row and one of its error.

    Args:
        pictures: uint8 [T, H, W, 3] each, the original first.
        captions: of each.
    """
    original = pictures[0]
    chosen = sorted({round(place) for place in np.linspace(0, len(original) - 1, COLUMNS)})
    rows = [(f"{captions[0]}, frames {', '.join(str(index + 1) for index in chosen)}", original[chosen])]
    for caption, other in zip(captions[1:], pictures[1:], strict=True):
        error = np.abs(other[chosen].astype(int) - original[chosen]) * ERROR_GAIN
        rows += [(caption, other[chosen]), (f"error of {caption} x {ERROR_GAIN}", error.clip(0, 255).astype(np.uint8))]
    sheets = [_captioned(caption, np.concatenate(list(frames), axis=1)) for caption, frames in rows]
    png = io.BytesIO()
    Image.fromarray(np.concatenate(sheets)).save(png, format="PNG")
    return png.getvalue()


def _captioned(caption: str, row: np.ndarray) -> np.ndarray:
    """A row of frames under its caption."""
    image = Image.fromarray(row)
    width = min(max(image.width, COLUMNS * NARROWEST_PX), COLUMNS * WIDEST_PX)
    pixels = Image.Resampling.NEAREST if width > image.width else Image.Resampling.BOX
    image = image.resize((width, round(image.height * width / image.width)), pixels)
    sheet = Image.new("RGB", (image.width, image.height + CAPTION_PX), "white")
    ImageDraw.Draw(sheet).text((3, 2), caption, fill="black")
    sheet.paste(image, (0, CAPTION_PX))
    return np.asarray(sheet)


def _reconstructions(source: Source, videos: Sequence[Video], task: Task) -> list[np.ndarray]:
    """Each video's clip as the weights render it: uint8 [T, H, W, 3]."""
    network = source.load().to(compute_device()).eval()
    clips = (to_unit_range(clip_of(video, task.shape).frames[None].to(compute_device())) for video in videos)
    return [to_pictures(through(network, clip, task.num_windows).reconstructions) for clip in clips]
