"""Weights & Biases, and secrets that stand where they should not."""

import os
import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from cosmos_hpc.config.container_schema import SECRET
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned
from cosmos_hpc.preflight import check_tracking

PATIENCE_S = 3.0
"""For a server to answer."""


def tracking_key(case: Case) -> Iterator[Finding]:
    """A run that must be tracked needs a key."""
    try:
        check_tracking(case.first)
    except ConfigError as error:
        yield failed("wandb", str(error))


def tracking(case: Case) -> Iterator[Finding]:
    """Where metrics go: a server that can be reached, or the run's folder."""
    wandb = case.first.wandb
    mode, key = wandb.mode, os.environ.get(wandb.api_key_env)
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    if mode == "disabled":
        yield passed("wandb", "disabled; metrics.jsonl is written in any case")
    elif mode == "offline":
        why = "" if key else f": {wandb.api_key_env} is not set"
        yield passed("wandb", f"offline, in each run's folder, for `wandb sync`{why}")
    elif not key:
        yield from tracking_key(case)
    else:
        url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
        error = _unreachable(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or url)
        if error is None:
            yield passed("wandb", f"online, {url} answers here")
        else:
            yield warned("wandb", f"{url} can't be reached from here ({error}): runs keep their metrics offline where "
                         "nodes can't either; set HTTPS_PROXY, or wandb.mode=offline")  # fmt: skip


def secrets(case: Case) -> Iterator[Finding]:
    """Values of sbatch's options stand in scripts and in SLURM's database; the schema watches over environments."""
    for run in case.distinct(lambda run: run.cluster.directives):
        words = re.split(r"[,\s]", " ".join(map(str, run.cluster.directives.values())))
        named = [name for name, _, value in (word.partition("=") for word in words) if value and SECRET.search(name)]
        if named:
            yield failed("secrets", f"cluster.directives sets {', '.join(named)}, which all can read in `scontrol show "
                         "job`: take it out, and export it in the shell that submits")  # fmt: skip
            return


def _unreachable(url: str) -> str | None:
    """Why nobody answers at a URL; none where somebody does."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE_S).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None
