"""Who am I among the ranks, and how do I log: rank 0 tells the story, every rank may warn."""

import ctypes
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rank:
    """One process of a step."""

    rank: int
    """Global index."""

    local_rank: int
    """Index on its node."""

    world_size: int
    """Number of ranks."""

    @property
    def is_first(self) -> bool:
        """True on rank 0, the one that writes."""
        return self.rank == 0

    @property
    def is_on_first_node(self) -> bool:
        """True on the ranks beside rank 0: nodes are filled one after the other."""
        return self.rank == self.local_rank


def current_rank() -> Rank:
    """This process as torchrun or srun describes it; alone where neither started it."""
    for names in (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")):
        if all(name in os.environ for name in names):
            return Rank(*(int(os.environ[name]) for name in names))
    return Rank(rank=0, local_rank=0, world_size=1)


def set_up_logging(rank: Rank | None = None) -> None:
    """Log to standard error: rank 0 from INFO on, other ranks from WARNING on, each line with rank and host.

    Args:
        rank: none for the supervisor and the commands, which have no rank.
    """
    level = logging.INFO if rank is None or rank.is_first else logging.WARNING
    who = "" if rank is None else f" rank {rank.rank}@{socket.gethostname()}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("cosmos_hpc")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def redirect_output(log: Path) -> None:
    """Send everything that this process and its children print from here on to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def ranks_per_node() -> int:
    """How many ranks torchrun has started on this node; all of them where it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", current_rank().world_size))


def was_started_by_torchrun() -> bool:
    """Whether torch's elastic launcher is this process's parent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the process that started this one dies: nothing goes on behind a dead supervisor (Linux).

    Args:
        parent: its process id, if it is known; should it be dead already, this process ends here.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
