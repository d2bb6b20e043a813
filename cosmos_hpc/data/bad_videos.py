"""Videos that can't be used: skipped, counted by fault, each named once in the log and in the run's quarantine file."""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.energon.errors import FatalSampleError

from cosmos_hpc.data.clips import Fault

logger = logging.getLogger(__name__)

MIN_SKIPS_IN_A_ROW = 100
MIN_BAD = 10
"""Fewer don't end a run, be the rank's part of the dataset ever so small."""

USELESS = "no usable video among"
SPOILT = "more unusable videos than"
"""How the errors over a dataset that is not worth a run begin: the loader finds them in what Energon wraps around."""


class Video(NamedTuple):
    """Where a video is, as a person would look for it."""

    shard: str
    """Path of the tar within the dataset."""

    key: str
    """The sample's name in the tar."""

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}"


class SkippedVideos:
    """Notes what had to be left out, over all workers of a rank.

    A video that failed is not tried again by the same worker: it costs a pass nothing but its place in the buffer. One
    that hung is not tried again by the whole run.
    """

    def __init__(self, quarantine: Path | None = None, max_share: float = 1.0) -> None:
        """Workers that are forked afterwards count together.

        Args:
            quarantine: File that gets a JSON line for each video; none: the log alone names them.
            max_share: Part of the rank's videos that may be bad before the dataset is given up; 1: all.
        """
        shared = multiprocessing.get_context("fork")
        self._skips = shared.Array("q", len(Fault))
        self._num_bad = shared.Value("q", 0)
        self._quarantine = quarantine
        self._max_share = max_share
        self._reasons: dict[Video, tuple[Fault, str]] = {}
        self._named: set[Video] = set()
        self._in_a_row = 0
        self.expect(0, 1)

    def expect(self, num_videos: int, num_streams: int) -> None:
        """To be called before the workers start.

        Args:
            num_videos: Of the rank's part of the dataset.
            num_streams: Number of workers that share it.
        """
        self._most_bad = max(self._max_share * num_videos, MIN_BAD - 1)
        self._most_in_a_row = max(MIN_SKIPS_IN_A_ROW, 2 * num_videos // num_streams)  # two passes of a stream
        self._num_bad.value = 0
        self._in_a_row = 0
        if self._quarantine is not None and self._quarantine.exists():
            for line in self._quarantine.read_text(encoding="utf-8").splitlines():
                try:
                    found = json.loads(line)
                except ValueError:  # torn by a full disk or a node that crashed
                    continue
                video = Video(found["shard"], found["key"])
                self._named.add(video)
                if found["fault"] == Fault.HANGING:
                    self._reasons[video] = Fault.HANGING, found["reason"]

    @property
    def counts(self) -> Counter[Fault]:
        """Samples left out so far by fault, repeats in later passes included."""
        return +Counter(dict(zip(Fault, self._skips[:], strict=True)))

    def known(self, video: Video) -> bool:
        """True if the video is bad, as far as this worker knows; it is counted again."""
        if video not in self._reasons:
            return False
        self.add(video, *self._reasons[video])
        return True

    def add(self, video: Video, fault: Fault, reason: str) -> None:
        """Take note of a skipped sample.

        Raises:
            FatalSampleError: if too many videos are bad, or if a whole stream is: Energon lets it through.
        """
        with self._skips.get_lock():
            self._skips[list(Fault).index(fault)] += 1
        if video not in self._reasons:
            self._reasons[video] = fault, reason
            self._name(video, fault, reason)
            with self._num_bad.get_lock():
                self._num_bad.value += 1
                num_bad = self._num_bad.value
            if self._max_share < 1 and num_bad > self._most_bad:
                raise FatalSampleError(
                    f"{SPOILT} data.max_bad_share {self._max_share:g} allows, {video} for one: {reason}"
                )
        self._in_a_row += 1
        if self._in_a_row >= self._most_in_a_row:
            raise FatalSampleError(f"{USELESS} {self._in_a_row} in a row, {video} for one: {reason}")

    def reset_row(self) -> None:
        """A video was usable."""
        self._in_a_row = 0

    def on_error(self, error: Exception, sample: Any, sources: Sequence[Any] | None) -> None:
        """Energon's handler of what fails outside of `encode_sample`, such as a sample without the field."""
        video = Video(sources[0].shard_name, str(sources[0].file_names)) if sources else Video("", str(type(sample)))
        self.add(video, Fault.UNREADABLE, f"{type(error).__name__}: {error}")

    def _name(self, video: Video, fault: Fault, reason: str) -> None:
        if video in self._named:
            return
        self._named.add(video)
        logger.warning("skipped %s: %s", video, reason)
        if self._quarantine is not None:
            line = json.dumps({"shard": video.shard, "key": video.key, "fault": fault, "reason": reason})
            try:
                with self._quarantine.open("a", encoding="utf-8") as file:
                    with contextlib.suppress(OSError):  # a file system without locks
                        fcntl.lockf(file, fcntl.LOCK_EX)  # other workers, ranks and nodes write as well
                    file.write(f"{line}\n")
            except OSError as error:  # a full disk is not to end a run here; the log has named it
                logger.warning("%s can't be written: %s", self._quarantine, error.strerror)


class ForgivingReader:
    """Energon's reader of shards, for which a sample that can't be read is none: it would end the worker."""

    def __init__(self, reader: Any, skipped: SkippedVideos) -> None:
        self._reader = reader
        self._skipped = skipped

    def __getitem__(self, index: int) -> Any:
        try:
            return self._reader[index]
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            pointer = self._reader._get_itar_sample_pointer(index)
            video = Video(self._reader.tar_filenames[pointer.tar_file_id], f"at byte {pointer.byte_offset}")
            self._skipped.add(video, Fault.UNREADABLE, f"the shard is damaged: {error}")
            return None
