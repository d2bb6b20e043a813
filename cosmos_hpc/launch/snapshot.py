"""The code that jobs run: the package and the folders beside it as they were at the submission."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cosmos_hpc
from cosmos_hpc.config.run_folder import ExperimentFolder

BESIDE = ("jobs", "slurm", "enroot")
"""Folders that a checkout has beside the package; a wheel has them inside."""

LEFT_OUT = ("__pycache__",)


def snapshot_folder(experiment: ExperimentFolder) -> Path:
    """Where a snapshot of the code as it is now lies, or would lie: equal code, equal folder."""
    digest = hashlib.sha256()
    for file, name in _files():
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return experiment.code / digest.hexdigest()[:8]


def take_snapshot(experiment: ExperimentFolder) -> Path:
    """Copy the code, uncommitted changes and new files included; a later edit does not reach the jobs that wait.

    Returns:
        A folder to put first on the path of Python.
    """
    target = snapshot_folder(experiment)
    if target.is_dir():
        return target
    experiment.code.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=experiment.code))
    try:
        partial.chmod(0o755)  # for colleagues; mkdtemp's own is for nobody else
        for file, name in _files():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, partial / name)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.is_dir():  # unless somebody else was faster
            raise
    return target


def _files() -> Iterator[tuple[Path, Path]]:
    """Each file, and its path in a snapshot."""
    package = Path(cosmos_hpc.__file__).parent
    for root in (package, *(package.parent / name for name in BESIDE if not (package / "shipped").is_dir())):
        for file in sorted(root.rglob("*")):
            name = file.relative_to(package.parent)
            if file.is_file() and not {*LEFT_OUT} & {*name.parts}:
                yield file, name
