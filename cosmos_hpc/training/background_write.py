"""A checkpoint is written while training goes on: a forked process holds the state as it was and puts it on disk."""

import atexit
import gc
import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cosmos_hpc.ranks import die_with_parent
from cosmos_hpc.training.checkpoint_files import digest, write_digests
from cosmos_hpc.training.lean_import import lean_import

with lean_import():
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest


class Written(NamedTuple):
    """What the writer of one rank reports at its end."""

    results: list[Any]
    """Megatron-Core's own account of what is where, for its table of contents."""

    error: str | None
    """Why the rank's part could not be written; none if it was."""


class BackgroundWrite:
    """One rank's part of one checkpoint, on its way to disk."""

    def __init__(self, request: AsyncRequest, extra: Callable[[], list[Path]], folder: Path, rank: int) -> None:
        """Copy what is on the GPU to the host, and fork the writer.

        Args:
            request: what Megatron-Core wants written.
            extra: writes further files of this rank and names them.
            folder: unfinished checkpoint.
            rank: this process.
        """
        staged = request.preload_fn() if request.preload_fn is not None else []
        self._staged = (
            staged  # pinned memory is shared with the fork: kept, so that nothing else is put there meanwhile
        )
        transforms = request.async_fn.args[0] if request.async_fn is not None else []
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write, args=(transforms, staged, extra, folder, rank, sender, os.getpid())
        )
        self._process.start()
        atexit.register(self._process.kill)  # a rank that fails is not to wait for what it can't publish
        sender.close()

    @property
    def is_running(self) -> bool:
        """Whether the writer has not reported yet."""
        return self._process.is_alive() and not self._receiver.poll()

    def wait(self) -> Written:
        """Wait for the writer, and what it reports."""
        try:
            written: Written = self._receiver.recv()
        except EOFError:
            self._process.join()
            written = Written([], f"the process that writes checkpoints ended with {self._process.exitcode}")
        self._process.join()
        self._staged = []
        atexit.unregister(self._process.kill)
        return written


def spawn_no_manager() -> None:
    """Keep Megatron-Core from spawning a process for the writers' accounts, which come by a pipe here.

    It imports everything anew (5 s, 280 MB) and outlives a killed rank.
    """
    filesystem_async._results_queue = queue.Queue()


def _write(
    transforms: list[Any],
    staged: Sequence[Any],
    extra: Callable[[], list[Path]],
    folder: Path,
    rank: int,
    sender: Connection,
    parent: int,
) -> None:
    die_with_parent(parent)
    gc.disable()  # it would clean up the GPU's tensors, which are the parent's
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    try:
        results = _write_tensors(transforms, staged)
        files = [*extra(), *(Path(file_name) for file_name, _, _ in staged)]
        write_digests(folder, rank, {file.name: digest(file) for file in files})
        sender.send(Written(results, None))
    except Exception as error:  # the rank decides what follows
        cause = _of_the_file_system(error)
        sender.send(Written([], f"{type(cause).__name__}: {cause}"))
    finally:
        sender.close()
        os._exit(0)  # without the clean-up of what belongs to the parent


def _write_tensors(transforms: list[Any], staged: Sequence[Any]) -> list[Any]:
    """Write files as Megatron-Core does, but in threads: for a process of its own that dies it would wait for ever."""

    def write(index: int, bucket: Any) -> list[Any]:
        account: queue.SimpleQueue[Any] = queue.SimpleQueue()
        begun: queue.Queue[int] = queue.Queue()
        begun.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, account, begun, True)
        _, results = account.get_nowait()
        if isinstance(results, Exception):
            raise results
        return list(results)

    with ThreadPoolExecutor(max(1, len(staged))) as pool:
        return [result for each in pool.map(write, range(len(staged)), staged) for result in each]


def _of_the_file_system(error: BaseException) -> BaseException:
    """What a full disk says, where torch.save says something else on top; the error itself where it was no disk's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return error if cause is None else cause
