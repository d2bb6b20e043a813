"""Why a video can't be used, and files that lie in memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Fault(StrEnum):
    """What a video is skipped for."""

    UNREADABLE = "unreadable"
    """Its shard doesn't give it: cut short, or no such field."""

    UNDECODABLE = "undecodable"
    """The decoder refuses it."""

    TOO_SHORT = "too short"
    """It has fewer frames than a clip."""

    HANGING = "hanging"
    """The decoder comes to no end with it."""

    CRASHING = "crashing"
    """The decoder dies of it."""


class UndecodableError(Exception):
    """A video, or the clip asked for, can't be had. The message is the reason, without the video's name."""

    def __init__(self, reason: str, fault: Fault = Fault.UNDECODABLE) -> None:
        super().__init__(reason, fault)
        self.fault = fault

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def memory_file(name: str) -> Iterator[str]:
    """A path to an empty file in memory: FFmpeg, and above all decord, does worse over Python's file objects."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
