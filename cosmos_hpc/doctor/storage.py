"""The folders that login node, nodes and containers share: visible, writable, and with room for what is to come."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cosmos_hpc
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import runs_folder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.estimates import checkpoint_bytes
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned
from cosmos_hpc.job.disk import can_write
from cosmos_hpc.launch.container import check_visible
from cosmos_hpc.launch.forecast import forecasts
from cosmos_hpc.launch.step import needed_paths

OF_ONE_MACHINE = (
    "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs",
)  # fmt: skip
"""Kinds of file systems that other machines don't see, unless they are exported under the same path."""

FILES = (4, 2)
"""Files of a checkpoint: so many, and so many for each rank."""

SPARE = 0.05
"""Share of a file system that should be left when all is written."""


def run_folders(case: Case) -> Iterator[Finding]:
    """Can runs be written at all; a quota tells only when something is."""
    root = _existing(case.experiment.path)
    probe = root / f".doctor.{os.getpid()}.probe"
    try:
        if not can_write(probe, 2**20):
            yield failed("run folders", f"{root} has no room left, or is over its quota: free some, or set "
                         "COSMOS_HPC_RUNS to another folder")  # fmt: skip
            return
    except OSError as error:
        yield failed("run folders", f"{root} can't be written ({error.strerror}): choose another folder by "
                     "COSMOS_HPC_RUNS")  # fmt: skip
        return
    yield passed("run folders", f"{case.experiment.path} can be written")


def shared(case: Case) -> Iterator[Finding]:
    """Folders that nodes have to see at the same path."""
    if not case.is_on_slurm:
        return
    kinds = {path: file_system(path) for path in _needed_everywhere(case)}
    alone = {path: kind for path, kind in kinds.items() if kind in OF_ONE_MACHINE}
    if alone:
        told = ", ".join(f"{path} ({kind})" for path, kind in alone.items())
        yield warned("shared folders", f"{told} may be on this machine alone: nodes have to see the same at the same "
                     "path, which `doctor --on-cluster` tries")  # fmt: skip
    else:
        yield passed("shared folders", ", ".join(sorted(set(kinds.values()))))


def visible_inside(case: Case) -> Iterator[Finding]:
    """A container has a /tmp of its own, and starts with all its mounts or not at all."""
    runs = [run for run in case.distinct(lambda run: (run.container, run.data)) if run.container.mode != "none"]
    for run in runs:
        try:
            check_visible(needed_paths(run, case.experiment.place([run])[0]))
        except ConfigError as error:
            yield failed("inside the container", str(error))
            return
    sources = dict.fromkeys(Path(mount.partition(":")[0]) for run in runs for mount in run.container.mounts)
    missing = [str(source) for source in sources if not source.exists()]
    if missing:
        yield failed("inside the container", f"container.mounts names {', '.join(missing)}, which is not there: no "
                     "rank would start, so create it or take it out")  # fmt: skip
    elif runs:
        yield passed("inside the container", "run folders, data and weights lie where they can be mounted")


def room(case: Case) -> Iterator[Finding]:
    """Bytes for the checkpoints that all runs keep, and for the one being written."""
    root = _existing(case.experiment.path)
    needed, source = _needed_bytes(case)
    space = os.statvfs(root)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    runs = f"{len(case.runs)} runs are" if len(case.runs) > 1 else "the run is"
    what = f"{runs} to write {gib(needed)} of checkpoints more ({source}), and {gib(free)} are free in {root}"
    if needed > free:
        yield failed("room", f"{what}: free some, set checkpoint.keep lower, or COSMOS_HPC_RUNS to another folder")
    elif free - needed < SPARE * total:
        yield warned("room", f"{what}: the file system will be full to {1 - (free - needed) / total:.0%}")
    else:
        yield passed("room", what)


def inodes(case: Case) -> Iterator[Finding]:
    """Files that may still be created."""
    space = os.statvfs(_existing(case.experiment.path))
    if not space.f_files:  # as many as there is room for
        return
    once, each = FILES
    needed = sum((_kept(run) + 1) * (once + each * run.trainer.world_size) + 50 for run in case.runs)
    what = f"some {needed} files to come, {space.f_favail} may still be created"
    if needed > space.f_favail:
        yield failed("inodes", f"{what} in {_existing(case.experiment.path)}: remove what is not needed there, or set "
                     "COSMOS_HPC_RUNS to another folder")  # fmt: skip
    else:
        yield passed("inodes", what)


def host_python(case: Case) -> Iterator[Finding]:
    """The supervisor runs on the first node, outside any container, with the Python of this command."""
    if not case.is_on_slurm:
        return
    base = Path(sys.base_prefix)
    what = f"{sys.executable} ({sys.version_info.major}.{sys.version_info.minor}, of {base})"
    if file_system(base) in OF_ONE_MACHINE:
        yield warned("host Python", f"{what} is of this machine: the nodes need the same one at the same path, outside "
                     "the container; `doctor --on-cluster` tries it")  # fmt: skip
    else:
        yield passed("host Python", f"{what} on {file_system(base)}")


def file_system(path: Path) -> str:
    """Kind of the file system that a path lies on, as the kernel calls it."""
    real = _existing(path).resolve()
    found = (Path("/"), "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        mount = Path(where.encode().decode("unicode_escape"))
        if real.is_relative_to(mount) and len(mount.parts) >= len(found[0].parts):
            found = mount, kind
    return found[1]


def gib(num_bytes: float) -> str:
    """Such as `1.6 GiB`."""
    return f"{num_bytes / 2**30:.1f} GiB"


def _needed_bytes(case: Case) -> tuple[float, str]:
    groups: dict[str, list[RunConfig]] = {}
    for run in case.runs:
        groups.setdefault(repr((run.model, run.optim.ema_decay > 0, run.checkpoint, run.loss.adversarial)), []).append(
            run
        )
    total, is_measured = 0.0, True
    for runs in groups.values():
        folder = case.experiment.place(runs[:1])[0]
        kept, forecast = _kept(runs[0]), forecasts(runs[:1], [folder], runs_folder())[0]
        is_measured = is_measured and forecast.checkpoint_bytes is not None
        one = checkpoint_bytes(runs[0]) if forecast.checkpoint_bytes is None else forecast.checkpoint_bytes / kept
        there = sum(len(list(place.checkpoints.glob("step_????????"))) for place in case.experiment.place(runs))
        total += max(len(runs), len(runs) * (kept + 1) - there) * one
    return total, "as measured" if is_measured else "estimated"


def _kept(run: RunConfig) -> int:
    return run.checkpoint.keep + (run.checkpoint.best_by is not None)


def _inside(case: Case) -> list[Path]:
    """What ranks read and write."""
    run = case.first
    inputs = (run.data.path, run.data.general_path, run.data.image_path, run.model.jit_ckpt_pth)
    named = [Path(path) for path in inputs if path is not None and Path(path).is_absolute()]
    return [case.experiment.path, *named]


def _needed_everywhere(case: Case) -> list[Path]:
    image = case.first.container.image
    images = [Path(image)] if image and Path(image).is_absolute() else []
    return [*_inside(case), *images, Path(cosmos_hpc.__file__).parents[1], Path(sys.executable).parent]


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
