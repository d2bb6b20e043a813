"""With what code, packages and machine a run was laid out, so that it can be told later and started again."""

import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import cosmos_hpc

PACKAGES = (
    "torch",
    "megatron-core",
    "megatron-energon",
    "webdataset",
    "decord",
    "submitit",
    "numpy",
    "omegaconf",
    "wandb",
)
"""Packages whose versions can change a result."""


def provenance() -> dict[str, Any]:
    """Version and uncommitted diff of this code, package versions, host, user, command, time."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "user": os.environ.get("USER") or os.getuid(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "cosmos_hpc": cosmos_hpc.__version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this package runs from; none outside a checkout."""
    root = Path(cosmos_hpc.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
