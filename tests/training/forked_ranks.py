"""Ranks for a test, in processes of their own that start quickly."""

from collections.abc import Callable

import torch.multiprocessing as mp


def start_ranks(function: Callable[..., None], arguments: tuple[object, ...], count: int) -> None:
    """Ranks forked from a clean process that has torch loaded: pytest's own has threads, which a fork would lose."""
    mp.set_forkserver_preload(["preloaded", "cosmos_hpc.training.checkpoint", "cosmos_hpc.data.loader"])
    mp.start_processes(function, arguments, nprocs=count, start_method="forkserver")
