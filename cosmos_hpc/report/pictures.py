"""Before and after: the middle frame of a few validation clips, as the starting weights and as each run renders it."""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.image import imsave
from torch import Tensor, nn

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.loader import ValidationLoader, to_unit_range
from cosmos_hpc.report.evaluate import compute_device
from cosmos_hpc.report.run_data import RunRecord, num_validation_samples
from cosmos_hpc.tokenizer import psnr, starting_tokenizer
from cosmos_hpc.tokenizer.weights import load_tokenizer

SEARCHED_CLIPS = 256
"""Pictures are spread over at most this many clips: each one on the way has to be decoded."""

ERROR_GAIN = 4
"""Factor that makes the error visible."""

TINY_PX = 160
"""Smaller frames are enlarged on the page, and then show their pixels rather than a blur."""


class Picture(NamedTuple):
    """One frame on the page."""

    caption: str
    """Whose frame it is."""

    png: bytes | None
    """The picture; none where it could not be made."""

    note: str
    """Its PSNR, or why there is no picture."""

    is_tiny: bool = False
    """True where the page enlarges it."""

    run: str | None = None
    """The run whose checkpoint made it, by name."""


class PictureRow(NamedTuple):
    """One clip, rendered by everybody."""

    title: str
    """Which clip and frame."""

    pictures: list[Picture]
    """Original, starting weights, runs, errors."""


class PictureRows(NamedTuple):
    """What the page shows of the clips."""

    rows: list[PictureRow]
    """One for each clip."""

    absence: str | None
    """Why there are no pictures though some were asked for."""


class Rendered(NamedTuple):
    """The middle frame of a clip as some network renders it."""

    frame: Tensor
    """[3, H, W] in [0, 1], on the CPU."""

    frame_psnr: float
    """dB, of this frame."""

    clip_psnr: float
    """dB, mean over the frames of the clip."""


class Rendering(NamedTuple):
    """All clips as one network renders them."""

    caption: str
    """Whose network."""

    runs: tuple[str, ...]
    """The runs that start from it, or the one that trained it."""

    frames: list[Rendered]
    """One for each clip; empty where the network could not be had."""

    reason: str
    """Why it could not."""


class _Spread(NamedTuple):
    """Clips taken evenly from the validation split."""

    positions: list[int]
    clips: list[Tensor]  # uint8 [3, T, H, W]
    num_clips: int | None


def before_and_after(records: Sequence[RunRecord], num_pictures: int, best: RunRecord | None) -> PictureRows:
    """Rows of pictures, for each kind of clips among the runs.

    Args:
        records: the runs of an experiment.
        num_pictures: clips; 0 for none.
        best: the run whose error is shown; none: the last one that has weights.
    """
    if num_pictures < 1:
        return PictureRows([], None)
    if all(record.folder.newest_checkpoint() is None for record in records):
        return PictureRows([], "no run has a checkpoint yet.")
    by_clips: dict[tuple[str | None, int, int], list[RunRecord]] = defaultdict(list)
    for record in records:
        data = record.config.data
        by_clips[data.path, data.num_frames, data.crop_size].append(record)
    try:
        rows = [
            row._replace(title=f"{row.title}{_whose(group) if len(by_clips) > 1 else ''}")
            for group in by_clips.values()
            for row in _rows(group, num_pictures, best)
        ]
    except ConfigError as error:
        return PictureRows([], str(error))
    return PictureRows(rows, None if rows else "no validation clip could be decoded.")


def spread_positions(num_clips: int, num_pictures: int) -> list[int]:
    """The middles of `num_pictures` equal parts of a list of clips, each position once."""
    return sorted({(2 * part + 1) * num_clips // (2 * num_pictures) for part in range(num_pictures)})


def _rows(group: Sequence[RunRecord], num_pictures: int, best: RunRecord | None) -> list[PictureRow]:
    spread = _spread_clips(group[0].config.data, num_pictures)
    before, after = _before(group, spread.clips), [_after(record, spread.clips) for record in group]
    errors = _whose_error(before, after, best)
    return [_row(index, spread, before, after, errors) for index in range(len(spread.clips))]


def _whose_error(before: Sequence[Rendering], after: Sequence[Rendering], best: RunRecord | None) -> list[Rendering]:
    """The best run, or the last one that has weights, behind the weights that it started from."""
    done = [rendering for rendering in after if rendering.frames]
    if not done:
        return []
    shown = next((rendering for rendering in done if best and best.name in rendering.runs), done[-1])
    start = next(rendering for rendering in before if shown.runs[0] in rendering.runs)
    return [start, shown] if start.frames else [shown]


def _row(
    index: int,
    spread: _Spread,
    before: Sequence[Rendering],
    after: Sequence[Rendering],
    errors: Sequence[Rendering],
) -> PictureRow:
    clip = spread.clips[index]
    middle = clip.shape[1] // 2
    original = clip[:, middle].float() / 255
    pictures = [Picture("original", _png(original), f"{clip.shape[3]} x {clip.shape[2]} pixels", is_tiny=_tiny(clip))]
    pictures += [_rendered_picture(rendering, index, run=None) for rendering in before]
    pictures += [_rendered_picture(rendering, index, run=rendering.runs[0]) for rendering in after]
    for rendering in errors:
        error = _png(ERROR_GAIN * (rendering.frames[index].frame - original).abs())
        caption = f"error x {ERROR_GAIN}, {rendering.caption}"
        pictures.append(Picture(caption, error, "black: no error", is_tiny=_tiny(clip)))
    of_all = "" if spread.num_clips is None else f" of {spread.num_clips}"
    title = f"Validation clip {spread.positions[index] + 1}{of_all}, frame {middle + 1} of {clip.shape[1]}"
    return PictureRow(title, pictures)


def _rendered_picture(rendering: Rendering, index: int, run: str | None) -> Picture:
    if not rendering.frames:
        return Picture(rendering.caption, None, rendering.reason, run=run)
    frame, frame_psnr, clip_psnr = rendering.frames[index]
    note = f"{frame_psnr:.2f} dB, clip {clip_psnr:.2f} dB"
    return Picture(rendering.caption, _png(frame), note, is_tiny=_tiny(frame), run=run)


def _spread_clips(data: DataConfig, num_pictures: int) -> _Spread:
    num_clips = num_validation_samples(data)
    wanted = (
        list(range(num_pictures))  # a blend of datasets does not tell how many there are
        if num_clips is None
        else spread_positions(min(num_clips, SEARCHED_CLIPS), num_pictures)
    )
    loader = ValidationLoader(
        dataclasses.replace(data, micro_batch_size=1), rank=0, world_size=1, limit_batches=wanted[-1] + 1
    )
    found = [(position, batch[0]) for position, batch in enumerate(loader) if position in wanted]
    return _Spread([position for position, _ in found], [clip for _, clip in found], num_clips)


def _before(group: Sequence[RunRecord], clips: Sequence[Tensor]) -> list[Rendering]:
    """The starting weights, once for all runs that share them."""
    sharers: dict[str, list[RunRecord]] = defaultdict(list)
    for record in group:
        model, seed = record.config.model, record.config.trainer.seed
        sharers[f"{model} {None if model.jit_ckpt_pth else seed}"].append(record)
    return [
        _rendering(
            f"starting weights{_whose(same) if len(sharers) > 1 else ''}",
            same,
            partial(starting_tokenizer, same[0].config.model, same[0].config.trainer.seed),
            clips,
        )
        for same in sharers.values()
    ]


def _after(record: RunRecord, clips: Sequence[Tensor]) -> Rendering:
    checkpoint = record.folder.newest_checkpoint()
    if checkpoint is None:
        return Rendering(record.name, (record.name,), [], "no checkpoint yet")
    return _rendering(record.name, [record], partial(load_tokenizer, checkpoint), clips)


def _rendering(
    caption: str, runs: Sequence[RunRecord], network: Callable[[], nn.Module], clips: Sequence[Tensor]
) -> Rendering:
    names = tuple(run.name for run in runs)
    try:
        return Rendering(caption, names, _render(network().to(compute_device()).eval(), clips), "")
    except ConfigError as error:
        return Rendering(caption, names, [], str(error))


@torch.inference_mode()
def _render(tokenizer: nn.Module, clips: Sequence[Tensor]) -> list[Rendered]:
    rendered = []
    for clip in clips:
        original = to_unit_range(clip[None].to(compute_device()))
        reconstruction = tokenizer(original).reconstructions
        middle = slice(clip.shape[1] // 2, clip.shape[1] // 2 + 1)
        frame = (reconstruction[0, :, middle.start].float().clamp(-1, 1) + 1) / 2
        frame_psnr = psnr(original[:, :, middle], reconstruction[:, :, middle])
        rendered.append(Rendered(frame.cpu(), frame_psnr.item(), psnr(original, reconstruction).item()))
    return rendered


def _png(frame: Tensor) -> bytes:
    """A frame [3, H, W] in [0, 1] as a file; brighter values are cut off."""
    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    png = io.BytesIO()
    imsave(png, pixels, format="png")
    return png.getvalue()


def _tiny(frame: Tensor) -> bool:
    return frame.shape[-1] < TINY_PX


def _whose(records: Sequence[RunRecord]) -> str:
    return f" ({', '.join(record.name for record in records)})"
