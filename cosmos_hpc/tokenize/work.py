"""A call's way through its videos."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.pack_shard import MIB
from cosmos_hpc.data.sources import Video, decoded, find, look_into, opened
from cosmos_hpc.tokenize.ledger import Ledger, Outcome, Settings
from cosmos_hpc.tokenize.samples import (
    Sample,
    Shard,
    npy_fields,
    replace_by,
    safetensors_fields,
    total_bytes,
    weights_sha256,
)
from cosmos_hpc.tokenizer import EncodedVideo, Tokenizer, load_tokenizer
from cosmos_hpc.tokenizer.inference import TILE_OVERLAP

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_SHARD_SIZE_MIB = 256.0


class Progress(NamedTuple):
    """How far a call is."""

    num_done: int
    """Videos tokenized or left out by this call."""

    num_videos: int
    """Videos that this call has to do."""

    num_frames: int
    """Frames encoded by this call."""


class TokenizeSummary(NamedTuple):
    """What came of the videos."""

    videos: int
    """Tokenized by this call."""

    frames: int
    """In these videos."""

    files: int
    """Written by this call."""

    bytes: int
    """Size of these files."""

    kept: int
    """Videos that were dealt with by an earlier call."""

    skipped: list[tuple[str, str]]
    """Each video left out, by this call or an earlier one, with the reason."""


def tokenize(
    sources: Sequence[Path],
    weights: Path,
    out: Path,
    *,
    to: str = "shards",
    dtype: str = "bf16",
    shard_size_mib: float | None = None,
    max_frames: int | None = None,
    tile_size: int | None = None,
    tile_overlap: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TokenizeSummary:
    """Encode videos and write their latents or indices; what an earlier call has finished in `out` is kept.

    Args:
        sources: Video files and folders of them, or one folder of tar shards with videos in the field mp4, as
            `cosmos-hpc pack` writes them.
        weights: A run, a checkpoint, an export or a folder of released weights.
        out: Folder to write; made where missing. Shards of a folder keep their names and subfolders.
        to: `shards`, or `safetensors` with a file for each video.
        dtype: `bf16` or `fp32`, in which the network computes.
        shard_size_mib: Where videos come as files: a shard is closed before it grows beyond this; 256 if left out.
        max_frames: Frames of each video after which to stop; none: the whole video.
        tile_size: Pixels along the sides of the tiles that larger frames are cut into; none takes frames whole.
        tile_overlap: Pixels over which neighbouring tiles are blended; `TILE_OVERLAP` if left out.
        on_progress: Called after each stretch of frames and after each video.

    Raises:
        ConfigError: if there is no video, none can be tokenized, the weights can't be read, a limit is not positive,
            or `out` holds anything else than what an earlier call with the same weights and settings made.
    """
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"--max-frames is {max_frames}, which leaves nothing of a video: set 1 or more")
    videos = find(sources, out)
    max_bytes = _shard_bytes(shard_size_mib, to, videos)
    network = load_tokenizer(weights)
    settings = Settings(
        to=to,
        dtype=dtype,
        max_frames=max_frames,
        tile_size=tile_size,
        tile_overlap=TILE_OVERLAP if tile_size is not None and tile_overlap is None else tile_overlap,
        tokenizer=network.architecture.name,
        weights_sha256=weights_sha256(network),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer(network.to(device, DTYPES[dtype]), tile_size=tile_size, tile_overlap=tile_overlap)
    with Ledger(out, settings) as ledger:
        todo = _missing(videos, ledger, to)
        work = _Work(tokenizer, settings, ledger, len(todo), on_progress)
        if to == "safetensors":
            for video in todo:
                work.write_safetensors(video)
        else:
            for shard, members in groupby(todo, key=lambda video: video.shard):
                names = ledger.free_names() if shard is None else iter([f"{shard}.tar"])
                if shard is not None:
                    (out / f"{shard}.tar").unlink(missing_ok=True)  # torn, or of videos that have changed since
                work.write_shards(members, names, max_bytes)
        outcomes = [ledger.outcomes[video.name] for video in videos]
    skipped = [
        (video.source, found.reason) for video, found in zip(videos, outcomes, strict=True) if found.reason is not None
    ]
    if len(skipped) == len(videos):
        raise ConfigError(
            f"none of {len(skipped)} videos can be tokenized, {skipped[0][0]} for one: {skipped[0][1]}: name others"
        )
    return TokenizeSummary(
        work.num_videos, work.num_frames, work.num_files, work.num_bytes, len(videos) - len(todo), skipped
    )


def encode_frames(
    frames: Iterator[np.ndarray], tokenizer: Tokenizer, on_frames: Callable[[int], None] = lambda count: None
) -> EncodedVideo:
    """What `tokenizer.encode` makes of all frames at once, bit by bit, with one window of them in memory at a time.

    Args:
        frames: uint8 [H, W, 3] each, all of one size.
        tokenizer: Its windows are those that `encode` would cut.
        on_frames: Called with the number of frames that were encoded since the last call.

    Raises:
        UndecodableError: if there is no frame.
    """
    stride = tokenizer.architecture.temporal_compression
    window = 1 + (tokenizer.window_length - 1) * stride
    lead_in = 1 + (tokenizer.overlap - 1) * stride
    before: list[np.ndarray] = []
    parts: list[Tensor] = []
    num_frames = height = width = 0
    while new := list(islice(frames, window - len(before))):
        latents, _, height, width = tokenizer.encode(np.stack([*before, *new]))
        parts.append(latents[..., tokenizer.overlap if before else 0 :, :, :])
        before = [*before, *new][-lead_in:]
        num_frames += len(new)
        on_frames(len(new))
    if not parts:
        raise UndecodableError("it holds no frame")
    return EncodedVideo(torch.cat(parts, -3), num_frames, height, width)


class _Work:
    """One call's way through the videos that are missing."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        ledger: Ledger,
        num_todo: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.ledger = ledger
        self.num_todo = num_todo
        self.on_progress = on_progress
        self.num_videos = self.num_frames = self.num_files = self.num_bytes = 0
        self._num_done = self._num_encoded = 0

    def write_shards(self, videos: Iterable[Video], names: Iterator[str], max_bytes: float) -> None:
        """Fill shards in order, and note each once it is whole, with the videos that were left out on the way."""
        shard: Shard | None = None
        outcomes: list[Outcome] = []
        try:
            for video in videos:
                outcome, fields = self._outcome(video, npy_fields)
                if shard is not None and fields and shard.num_bytes + total_bytes(fields) > max_bytes:
                    self._note(shard.path, shard.finish(), outcomes)
                    shard, outcomes = None, []
                if fields:
                    shard = shard or Shard(self.ledger.out / next(names))
                    shard.add(video.key, fields)
                outcomes.append(outcome)
            if shard is not None:
                self._note(shard.path, shard.finish(), outcomes)
                shard = None
            elif outcomes:
                self._note(None, 0, outcomes)
        finally:
            if shard is not None:
                shard.discard()

    def write_safetensors(self, video: Video) -> None:
        """Write one video's file and note it."""
        outcome, fields = self._outcome(video, safetensors_fields)
        if not fields:
            self._note(None, 0, [outcome])
            return
        path = self.ledger.out / f"{video.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            file.write(fields["safetensors"])
            num_bytes = replace_by(file, partial, path)
        self._note(path, num_bytes, [outcome])

    def _outcome(
        self, video: Video, fields_of: Callable[[Sample], dict[str, bytes]]
    ) -> tuple[Outcome, dict[str, bytes]]:
        try:
            sample = self._tokenized(video)
            fields, reason, num_frames = fields_of(sample), None, int(sample.facts["num_frames"])
        except UndecodableError as error:
            fields, reason, num_frames = {}, str(error), 0
        self._num_done += 1
        self._report(0)
        return Outcome(video.name, video.size, num_frames, reason), fields

    def _tokenized(self, video: Video) -> Sample:
        architecture = self.tokenizer.architecture
        with opened(video) as path:
            info = look_into(path)
            encoded = encode_frames(decoded(path, self.settings.max_frames), self.tokenizer, self._report)
        field = "latents" if architecture.kind == "CV" else "indices"
        if not encoded.latents.isfinite().all():
            raise UndecodableError(f"its {field} are not all finite")
        time, height, width = encoded.latents.shape[-3:]
        facts: dict[str, str | int | float] = {
            "source": video.source,
            "num_frames": encoded.num_frames,
            "height": encoded.height,
            "width": encoded.width,
            "fps": info.fps,
            "padded_num_frames": 1 + (time - 1) * architecture.temporal_compression,
            "padded_height": height * architecture.spatial_compression,
            "padded_width": width * architecture.spatial_compression,
            "tokenizer": self.settings.tokenizer,
            "dtype": self.settings.dtype,
            "weights_sha256": self.settings.weights_sha256,
        }
        return Sample(field, encoded.latents, facts)

    def _note(self, path: Path | None, num_bytes: int, outcomes: list[Outcome]) -> None:
        self.ledger.add(None if path is None else str(path.relative_to(self.ledger.out)), num_bytes, outcomes)
        self.num_files += path is not None
        self.num_bytes += num_bytes
        self.num_videos += sum(outcome.reason is None for outcome in outcomes)
        self.num_frames += sum(outcome.num_frames for outcome in outcomes)

    def _report(self, num_frames: int) -> None:
        self._num_encoded += num_frames
        self.on_progress(Progress(self._num_done, self.num_todo, self._num_encoded))


def _missing(videos: list[Video], ledger: Ledger, to: str) -> list[Video]:
    """The videos that are still to be done; of a shard with any of them all, since a shard is written as a whole."""
    missing = [video for video in videos if not _is_done(video, ledger, to)]
    shards = {video.shard for video in missing} - {None} if to == "shards" else set()
    names = {video.name for video in missing}
    return [video for video in videos if video.name in names or video.shard in shards]


def _is_done(video: Video, ledger: Ledger, to: str) -> bool:
    found = ledger.outcomes.get(video.name)
    if found is None or found.size == video.size:
        return found is not None
    if to == "shards" and video.shard is None and found.reason is None:
        raise ConfigError(
            f"{ledger.out} holds {video.key} from a file of {found.size} bytes, but {video.path} has {video.size}: "
            "choose another folder for --out"
        )
    return False


def _shard_bytes(shard_size_mib: float | None, to: str, videos: list[Video]) -> float:
    """Bytes at which a shard is full."""
    if shard_size_mib is None:
        return DEFAULT_SHARD_SIZE_MIB * MIB if videos[0].shard is None else float("inf")
    if to != "shards" or videos[0].shard is not None:
        raise ConfigError("--shard-size-mib is for video files into shards: leave it out")
    if shard_size_mib <= 0:
        raise ConfigError(f"--shard-size-mib is {shard_size_mib}, in which nothing fits: set more than 0")
    return shard_size_mib * MIB
