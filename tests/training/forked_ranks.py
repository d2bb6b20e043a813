"""Ranks for a test, in processes of their own that start quickly."""

import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from cosmos_hpc.job.meeting import meeting_port
from cosmos_hpc.ranks import Rank


def start_ranks(function: Callable[..., None], count: int, *arguments: object) -> None:
    """Call a function, with who it is and these arguments, on ranks that can meet.

    They are forked from a clean process that has torch loaded: pytest's own has threads, which a fork would lose.
    """
    mp.set_forkserver_preload(["preloaded", "cosmos_hpc.training.checkpoint", "cosmos_hpc.data.loader"])
    with meeting_port() as port:
        mp.start_processes(_run, (function, count, port, arguments), nprocs=count, start_method="forkserver")


def _run(index: int, function: Callable[..., None], count: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(Rank(index, index, count), *arguments)
