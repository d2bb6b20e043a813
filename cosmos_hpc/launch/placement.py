"""Where each run of an experiment lies, and what is left to do for it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import read_run_config, to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, write_atomically
from cosmos_hpc.config.run_state import RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.images import read_manifest
from cosmos_hpc.launch.local import is_locked
from cosmos_hpc.launch.marks import is_pending, newest_job
from cosmos_hpc.launch.provenance import provenance
from cosmos_hpc.launch.queue import JobStatus, job_statuses


@dataclass(frozen=True)
class PlacedRun:
    """A run, its folder, and what a submission would do with it."""

    config: RunConfig
    folder: RunFolder
    action: str
    """`start`, `resume`, `skip: finished`, `skip: failed`, `skip: running` or `skip: pending`."""

    living_job: str | None = None
    """Job in SLURM's queue that this run has already."""

    @property
    def is_sent(self) -> bool:
        """Whether a submission sends it."""
        return not self.action.startswith("skip")


def place(runs: Sequence[RunConfig], experiment: ExperimentFolder, *, retries_failed: bool = False) -> list[PlacedRun]:
    """Give each run its folder and see what is left to do for it, by marks that `settle` has brought up to date.

    Writes nothing.

    Args:
        runs: of one experiment.
        experiment: theirs.
        retries_failed: whether failed runs are to be sent again.
    """
    folders = experiment.place(list(runs))
    states = {folder: RunState.read(folder.state) for folder in folders}
    jobs = {folder: job for folder in folders if (job := slurm_job(folder, states[folder]))}
    known = job_statuses(jobs.values())
    return [_placed(run, folder, states[folder], jobs.get(folder), known, retries_failed)
            for run, folder in zip(runs, folders, strict=True)]  # fmt: skip


def left_the_sweep(placed: Sequence[PlacedRun], experiment: ExperimentFolder) -> list[RunFolder]:
    """Runs that lie in the experiment's folder, but that its file does not make any more."""
    wanted = {run.folder.path for run in placed}
    return [folder for folder in experiment.runs() if folder.path not in wanted]


def slurm_job(folder: RunFolder, state: RunState | None) -> str | None:
    """The newest job of a run that was sent to SLURM; its settings may name another executor by now."""
    job = newest_job(folder, state)
    return job if job and "\n  executor: slurm\n" in folder.config.read_text() else None  # 5 ms less than to parse it


def lay_out(run: RunConfig, folder: RunFolder, start: dict[str, Any] | None = None) -> RunConfig:
    """Make the run folder with its settings and provenance, or bring an existing one up to date.

    The number of sample streams, and that of the clips in a micro batch where it is measured, are fixed by the first
    start that saved something, so that a resume is the same run.

    Args:
        run: its settings.
        folder: where it goes.
        start: from `provenance`, which takes a while and is the same for all runs of a submission; none: taken now.

    Returns:
        The settings as written.

    Raises:
        ConfigError: if the newest checkpoint can't be resumed with these settings.
    """
    data = dataclasses.replace(run.data, num_streams=run.num_streams)
    checkpoint = folder.newest_checkpoint()
    if checkpoint is not None:
        _check_resume(run, folder)
        before = read_run_config(folder.config).data
        keeps = data.micro_batch_size == "auto" and before.micro_batch in run.fitting_micro_batches
        micro = before.micro_batch_size if keeps else data.micro_batch_size
        data = dataclasses.replace(data, num_streams=before.num_streams, micro_batch_size=micro)
    fixed = dataclasses.replace(run, data=data)
    write_atomically(folder.config, to_yaml(fixed))
    starts = json.loads(folder.provenance.read_text()) if folder.provenance.exists() else []
    write_atomically(folder.provenance, json.dumps([*starts, {**(start or provenance()), **_image(run)}], indent=1))
    return fixed


def _image(run: RunConfig) -> dict[str, Any]:
    """What the ranks run in, for the provenance."""
    if run.container.mode == "none" or run.container.image is None:
        return {}
    manifest = read_manifest(Path(run.container.image))
    return {"image": {"file": run.container.image, **(dataclasses.asdict(manifest) if manifest else {})}}


def _check_resume(run: RunConfig, folder: RunFolder) -> None:
    """Refuse before anything is written what the ranks would refuse after their start."""
    streams, ranks = read_run_config(folder.config).num_streams, run.trainer.world_size
    if streams and streams % ranks:
        fitting = ", ".join(str(number) for number in range(1, streams + 1) if streams % number == 0)
        raise ConfigError(
            f"{folder.label} shares its data among {streams} streams since its first start, which {ranks} ranks "
            f"(trainer.devices x trainer.num_nodes) can't divide evenly: use {fitting}"
        )


def _placed(
    run: RunConfig,
    folder: RunFolder,
    state: RunState | None,
    job: str | None,
    known: dict[str, JobStatus],
    retries_failed: bool,
) -> PlacedRun:
    found = known.get(job or "")
    if found is not None and not found.is_over:
        return PlacedRun(run, folder, f"skip: {'pending' if found.state == 'PENDING' else 'running'}", job)
    if is_locked(folder.supervisor_lock):
        return PlacedRun(run, folder, "skip: running")
    if found is None and is_pending(folder):
        return PlacedRun(run, folder, "skip: pending")
    if state is not None and state.status is Status.FINISHED:
        return PlacedRun(run, folder, "skip: finished")
    if state is not None and state.status is Status.FAILED and not retries_failed:
        return PlacedRun(run, folder, "skip: failed")
    return PlacedRun(run, folder, "start" if folder.newest_checkpoint() is None else "resume")
