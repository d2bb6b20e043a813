"""A checkpoint is written while training goes on: a forked process holds the state as it was and puts it on disk."""

import atexit
import multiprocessing
import os
import queue
from collections.abc import Callable
from functools import partial
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

    results: Any
    """Megatron-Core's own account, which its last step wants back."""

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
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write, args=(request.async_fn, staged, extra, folder, rank, sender, os.getpid())
        )
        self._process.start()
        atexit.register(self._process.kill)  # a rank that fails is not to wait for what it can't publish
        sender.close()
        self._request = request

    @property
    def is_running(self) -> bool:
        """Whether the writer has not reported yet."""
        return self._process.is_alive() and not self._receiver.poll()

    def wait(self) -> str | None:
        """Wait for the writer; why it failed, or none."""
        try:
            self._written: Written = self._receiver.recv()
        except EOFError:
            self._process.join()
            self._written = Written(None, f"the process that writes checkpoints ended with {self._process.exitcode}")
        self._process.join()
        atexit.unregister(self._process.kill)
        return self._written.error

    def finalize(self) -> None:
        """Let Megatron-Core write its table of contents. Collective, after every rank's `wait` was good."""
        if self._request.async_fn is not None:
            filesystem_async._results_queue.put(self._written.results)
        for finalize in self._request.finalize_fns:
            finalize()


def use_plain_queue() -> None:
    """Let Megatron-Core take the writers' account from a queue in this process, where `finalize` puts it.

    Left to itself it spawns a process for it that imports everything anew (5 s, 280 MB) and outlives a killed rank.
    """
    filesystem_async._results_queue = queue.Queue()


def _write(
    write: Callable[..., None] | None,
    staged: list[Any],
    extra: Callable[[], list[Path]],
    folder: Path,
    rank: int,
    sender: Connection,
    parent: int,
) -> None:
    die_with_parent(parent)
    os.register_at_fork(after_in_child=partial(die_with_parent, None))  # Megatron-Core forks a process a file
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    account: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        files = extra()
        if write is not None:
            write(rank, staged, account)
        results = None if write is None else account.get_nowait()
        if isinstance(results, Exception):
            raise results
        files += [Path(file_name) for file_name, _, _ in staged]
        write_digests(folder, rank, {file.name: digest(file) for file in files})
        sender.send(Written(results, None))
    except Exception as error:  # the rank decides what follows
        sender.send(Written(None, f"{type(error).__name__}: {error}"))
    finally:
        sender.close()
        os._exit(0)  # without the clean-up of what belongs to the parent
