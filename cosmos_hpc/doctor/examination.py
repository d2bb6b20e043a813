"""All checks in their order, and which of them are quick enough to be done by every `submit`."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment
from cosmos_hpc.config.run_folder import ExperimentFolder, runs_folder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.config.sweep import expand
from cosmos_hpc.doctor import cluster, image, inputs, memory, storage, tracking
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.finding import Finding, failed, passed
from cosmos_hpc.preflight import with_local_image, with_local_weights, with_num_steps


class Check(NamedTuple):
    """Something that is looked at."""

    look: Callable[[Case], Iterator[Finding]]
    """Gives what is found, nothing where it does not apply."""

    title: str
    """What the findings are about, and what the bar says meanwhile."""

    is_quick: bool = False
    """Whether `submit` does it: in milliseconds, and not refused there anyway."""

    is_of_slurm: bool = False
    """Whether it is left out for runs of this machine."""


CHECKS = (
    Check(cluster.limits, "partition", is_of_slurm=True),
    Check(cluster.nodes_up, "nodes up", is_of_slurm=True),
    Check(cluster.arrays, "arrays", is_of_slurm=True),
    Check(cluster.requeue, "requeue", is_quick=True, is_of_slurm=True),
    Check(cluster.preempt_mode, "preempt mode", is_quick=True, is_of_slurm=True),
    Check(cluster.grace, "grace", is_quick=True, is_of_slurm=True),
    Check(cluster.warning_time, "warning time", is_quick=True, is_of_slurm=True),
    Check(cluster.accepted, "sbatch", is_of_slurm=True),
    Check(cluster.after, "after"),
    Check(storage.run_folders, "run folders", is_quick=True),
    Check(storage.shared, "shared folders"),
    Check(storage.visible_inside, "inside the container", is_quick=True, is_of_slurm=True),
    Check(storage.room, "room", is_quick=True),
    Check(storage.inodes, "inodes", is_quick=True),
    Check(image.present, "image", is_quick=True, is_of_slurm=True),
    Check(image.contents, "image contents", is_quick=True, is_of_slurm=True),
    Check(image.credentials, "credentials", is_of_slurm=True),
    Check(inputs.weights, "weights"),
    Check(inputs.networks, "loss networks"),
    Check(inputs.dataset, "dataset"),
    Check(inputs.shards, "shards"),
    Check(inputs.clips, "clips"),
    Check(memory.memory, "memory", is_quick=True),
    Check(tracking.secrets, "secrets", is_quick=True),
    Check(tracking.tracking, "wandb"),
    Check(storage.host_python, "host Python"),
)
"""In the order in which a run would come upon them."""

OnCheck = Callable[[str, int, int], None]
"""Told the check that begins, how many are done, and how many there are."""


def examine(
    job: Path, overrides: Sequence[str] = (), on_check: OnCheck = lambda title, done, total: None
) -> tuple[list[Finding], Case | None]:
    """Look at everything that can be told from here in less than a minute.

    Args:
        job: experiment file.
        overrides: settings on top of it.
        on_check: told of each check before it begins.

    Returns:
        What was found, and what was examined; none where the settings could not be read.

    Raises:
        ConfigError: if there is no such file.
    """
    if not job.is_file():
        load_experiment(job, overrides)  # which says so
    try:
        case = _case(job, overrides)
    except ConfigError as error:
        return [failed("sweep" if re.search(": (the )?sweep", str(error)) else "settings", str(error))], None
    varied = f"{len(case.runs)} runs" if len(case.runs) > 1 else "one run"
    found = [passed("settings", f"{job}: {varied} of {case.first.model.model}")]
    checks = [check for check in CHECKS if case.is_on_slurm or not check.is_of_slurm]
    for done, check in enumerate(checks):
        on_check(check.title, done, len(checks))
        told = {finding.message for finding in found if finding.has_failed}  # a silent controller, by many checks
        found += [finding for finding in _look(check, case) if finding.message not in told]
    on_check("done", len(checks), len(checks))
    return found, case


def quick_findings(runs: Sequence[RunConfig], experiment: ExperimentFolder) -> list[Finding]:
    """What every submission is told before anything is sent.

    Args:
        runs: as they would be sent.
        experiment: theirs.
    """
    case = Case(runs, experiment)
    quick = [check for check in CHECKS if check.is_quick and (case.is_on_slurm or not check.is_of_slurm)]
    return [finding for check in quick for finding in _look(check, case)]


def _look(check: Check, case: Case) -> list[Finding]:
    try:
        return list(check.look(case))
    except ConfigError as error:  # such as a controller that does not answer
        return [failed(check.title, str(error))]


def _case(job: Path, overrides: Sequence[str]) -> Case:
    experiment = load_experiment(job, overrides)
    runs = [_with_inputs(planned.config) for planned in expand(experiment)]
    return Case(runs, ExperimentFolder(runs_folder() / runs[0].name), experiment.sweep.max_parallel)


def _with_inputs(run: RunConfig) -> RunConfig:
    """As `submit` would send it, as far as its inputs are there; what is missing is found by a check of its own."""
    for resolved in (with_num_steps, with_local_weights, with_local_image):
        try:
            run = resolved(run)
        except ConfigError:
            continue
    return run
