"""The clips that an evaluation looks at: the middle of each video, with what its siblings say of it."""

import io
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.sources import Part, Video, opened
from cosmos_hpc.data.video_file import MiddleFrames, read_frames, read_middle
from cosmos_hpc.data.video_names import MASK_ENDINGS

AHEAD = 4
"""Clips that are decoded while the networks look at one."""

WHOLE_FRAMES_STEP = 16
"""Whole frames are cut to multiples of this, which every tokenizer takes."""


class EvaluationClip(NamedTuple):
    """One video as the networks see it."""

    name: str
    frames: Tensor
    """uint8 [3, T, H, W]."""

    inside: Tensor | None
    """bool [1, T, H, W] of the pixels in boxes or masks; none where there are none."""

    facts: dict[str, Any]
    """The JSON beside it; height and width, and the camera of several, where that does not give them."""


class ClipShape(NamedTuple):
    """What is cut out of each video."""

    num_frames: int
    crop_size: int | None
    """Height and width in pixels; none: whole frames."""


def clips_of(
    videos: Sequence[Video], shape: ClipShape, left_out: list[tuple[str, str]] | None = None
) -> Iterator[EvaluationClip]:
    """A clip of each video, in order; those that give none are added to `left_out` with the reason."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[Video, Future[EvaluationClip]]] = deque()
        coming = iter(videos)
        while True:
            while len(waiting) < AHEAD and (video := next(coming, None)) is not None:
                waiting.append((video, pool.submit(clip_of, video, shape)))
            if not waiting:
                return
            video, future = waiting.popleft()
            try:
                yield future.result()
            except UndecodableError as error:
                if left_out is not None:
                    left_out.append((video.name, str(error)))


def clip_of(video: Video, shape: ClipShape) -> EvaluationClip:
    """The middle of one video in time and in the picture, as validation takes it.

    Raises:
        UndecodableError: if it gives none.
        ConfigError: if its JSON or its mask can't be read.
    """
    with opened(video) as path:
        start, frames = _read(path, shape.num_frames)
    facts = _facts(video)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)
    full = pixels.shape[1:]
    inside = _inside(video, facts, start, full)
    seen = {"height": full[1], "width": full[2]} | ({} if video.camera is None else {"camera": video.camera})
    cut = None if inside is None else _cut(inside, shape.crop_size) > 127
    return EvaluationClip(video.name, _cut(pixels, shape.crop_size).contiguous(), cut, seen | facts)


def value_of(facts: dict[str, Any], field: str) -> str | None:
    """What a sample's JSON says of a field; dots lead into objects."""
    found: Any = facts
    for name in field.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return None if found is None else str(found).lower() if isinstance(found, bool) else str(found)


def _cut(pixels: Tensor, crop_size: int | None) -> Tensor:
    """The middle of uint8 [C, T, H, W]; pictures smaller than the square are enlarged until it fits."""
    if crop_size is None:
        height, width = (side // WHOLE_FRAMES_STEP * WHOLE_FRAMES_STEP for side in pixels.shape[-2:])
        if 0 in (height, width):
            raise UndecodableError(f"its frames are smaller than {WHOLE_FRAMES_STEP} pixels")
    else:
        height = width = crop_size
        shorter = min(pixels.shape[-2:])
        if shorter < crop_size:
            target = [max(crop_size, round(side * crop_size / shorter)) for side in pixels.shape[-2:]]
            pixels = interpolate(pixels.contiguous(), size=target, mode="bilinear", antialias=True)
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _facts(video: Video) -> dict[str, Any]:
    part = video.siblings.get("json")
    if part is None:
        return {}
    try:
        facts = json.loads(part.read())
    except ValueError as error:
        raise ConfigError(f"the JSON of {video.source} can't be read ({error}): mend or remove it") from None
    return facts if isinstance(facts, dict) else {}


def _inside(video: Video, facts: dict[str, Any], start: int, size: torch.Size) -> Tensor | None:
    """What boxes and masks mark of the clip's full frames, uint8 [1, T, H, W] of 0 and 255; none without any."""
    masks = [video.siblings[ending] for ending in MASK_ENDINGS if ending in video.siblings]
    if not masks and not facts.get("boxes"):
        return None
    inside = np.zeros(size, np.uint8)
    try:
        for box in facts.get("boxes") or []:
            _mark(inside, box, start)
        for part in masks:
            _lay_over(inside, part, start)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            f"boxes or mask of {video.source} can't be used ({error}): boxes are lists [left, top, right, bottom] in "
            'pixels, or {"frame": 3, "box": [...]}; a mask has the size of the video'
        ) from None
    return torch.from_numpy(inside)[None]


def _mark(inside: np.ndarray, box: Any, start: int) -> None:
    """A box in all frames, or in the one that it names, counted from the video's first."""
    frames = slice(None)
    if isinstance(box, dict):
        frame = int(box["frame"]) - start
        if not 0 <= frame < len(inside):
            return
        frames, box = slice(frame, frame + 1), box["box"]
    left, top, right, bottom = (max(0, round(float(side))) for side in box)
    inside[frames, top:bottom, left:right] = 255


def _lay_over(inside: np.ndarray, part: Part, start: int) -> None:
    if part.size == 0:
        raise ValueError("it is empty")
    raw = part.read()
    if raw[:4] == b"\x89PNG":
        from PIL import Image

        mask = np.asarray(Image.open(io.BytesIO(raw)).convert("L"))[None]
    else:
        mask = _mask_frames(part, start, len(inside))
    if mask.shape[1:] != inside.shape[1:]:
        raise ValueError(f"the mask has {mask.shape[2]} x {mask.shape[1]} pixels")
    np.maximum(inside, np.where(mask > 127, np.uint8(255), np.uint8(0)), out=inside)


def _mask_frames(part: Part, start: int, num_frames: int) -> np.ndarray:
    """[T, H, W] of a mask's video."""
    video = Video("", "", part.path, part.size, shard="", offset=part.offset)
    with opened(video) as path:
        frames = [frame[..., 0] for frame in read_frames(path, start, start + num_frames)]
    if len(frames) < num_frames:
        raise ValueError("the mask is shorter than the video")
    return np.stack(frames)


def _read(path: Path, num_frames: int) -> MiddleFrames:
    try:
        return read_middle(path, num_frames)
    except ValueError as error:
        raise UndecodableError(str(error).replace(f"{path} ", "it ", 1)) from error
