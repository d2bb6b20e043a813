"""The other nodes' watch over the first one, where the supervisor lives, of a job that outlives the loss of a node.

SLURM lets such a job (--no-kill) run on without its batch script, and so with nobody in charge, until its time limit.
Each other node runs a few lines of bash, beside the container, that give the job back to the queue once SLURM has taken
the first node out of it. They ask nobody but the controller, so what becomes of the first node, of this process or of
the network between the nodes can't mislead them.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.step import host_step, slurm_job_id, start_step

ASK_EVERY_S = 30
"""Between two questions to the controller, by all nodes together: they take turns."""

SCRIPT = """\
trap '' USR2  # the time limit's warning is for the ranks
sleep $(($3 * SLURM_PROCID))
while sleep $(($3 * SLURM_NTASKS)); do
    nodes=$(squeue --noheader --states=RUNNING --format=%N --jobs="$1") && [ -n "$nodes" ] || continue
    nodes=$(scontrol show hostnames "$nodes") || continue
    grep --quiet --line-regexp "$2" <<<"$nodes" || scontrol requeue Incomplete "$1"
done
"""
"""Takes the job (`A_T` for an element of an array), the first node and the seconds."""


def start_guard(run: RunConfig, first: str, others: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Have the other nodes of this job watch; it ends with the job, and goes on where some of them are lost.

    Args:
        run: its settings.
        first: this node.
        others: the nodes that watch it.
    """
    watch = ["bash", "-c", SCRIPT, "guard", slurm_job_id(), first, str(ASK_EVERY_S)]
    return start_step([*host_step(run, others), "--no-kill", *watch], dict(os.environ), sys.stderr)
