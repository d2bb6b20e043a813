"""The scripts that sbatch is given: one for all runs that ask for the same, cut where an array gets too large."""

import functools
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.directives import directives

if TYPE_CHECKING:
    from submitit import AutoExecutor  # takes half a second

SUPERVISOR = "-u -m cosmos_hpc.job"
"""What the script starts, with the run folder behind it."""


@dataclass(frozen=True)
class Batch:
    """Runs that go to sbatch as one job, or as one array where there are several."""

    runs: tuple[RunFolder, ...]
    """In the order of their indices in the array."""

    text: str
    """The script."""

    script: Path
    """Where it is written and sent from, under a name that its text decides."""

    max_parallel: int | None
    """Elements that may run at the same time."""

    follows: bool
    """Whether it waits for the batch before it, since both share one `max_parallel`."""

    def ids(self, job: str) -> dict[str, str]:
        """Job id of each run, by its label.

        Args:
            job: what sbatch said.
        """
        if len(self.runs) == 1:
            return {self.runs[0].label: job}
        return {run.label: f"{job}_{index}" for index, run in enumerate(self.runs)}


def batches(
    runs: Sequence[tuple[RunConfig, RunFolder]],
    code: Path,
    max_parallel: int | None,
    *,
    largest: int,
    num_living: int = 0,
) -> list[Batch]:
    """What is sent for some runs of one experiment. Writes nothing.

    Args:
        runs: settings and folder of each.
        code: folder of the snapshot that the jobs run from.
        max_parallel: runs of the experiment at the same time; none: no limit.
        largest: elements that an array may have.
        num_living: runs of the experiment that are in the queue already.
    """
    groups = [part for group in _alike(runs) for part in _parts(group, largest)]
    limits = _limits(groups, max_parallel, num_living)
    return [_batch(group, code, limit, follows) for group, (limit, follows) in zip(groups, limits, strict=True)]


def single_scripts(runs: Sequence[tuple[RunConfig, RunFolder]], code: Path) -> dict[RunFolder, str]:
    """The script of each run alone, which `run.sh` in its folder holds."""
    texts: dict[RunFolder, str] = {}
    for group in _alike(runs):
        run, first = group[0]
        text, path = _text([(run, first)], code, None), shlex.quote(str(first.path))
        texts |= {folder: text.replace(path, shlex.quote(str(folder.path))) for _, folder in group}
    return texts


def script_around(run: RunConfig, experiment: ExperimentFolder, code: Path, command: Sequence[str]) -> str:
    """The script of a job with a run's options that does something else: Python's arguments in place of the supervisor.

    Args:
        run: its settings.
        experiment: takes the job's output.
        code: folder of the snapshot that the job runs from.
        command: what Python is given.
    """
    lines = [*_code_lines(code), shlex.join([sys.executable, "-u", *command])]
    return str(_executor(run, experiment, None)._executor._make_submission_file_text("\n".join(lines), "")) + "\n"


def start_lines(code: Path, run: str) -> list[str]:
    """What a script does to start the supervisor of a run with some code.

    Args:
        code: folder of the snapshot.
        run: its folder, as a word of bash.
    """
    return [*_code_lines(code), f"{shlex.quote(sys.executable)} {SUPERVISOR} {run}"]


def run_of(script: Path, job: str) -> RunFolder | None:
    """The run of a job that came of a script; none if the script is gone or is none of ours.

    Args:
        script: as squeue names it.
        job: its id, `A_T` for an element of an array.
    """
    runs = _runs_in(script)
    index = int(job.partition("_")[2] or 0)
    return RunFolder(Path(runs[index])) if index < len(runs) else None


@functools.lru_cache(maxsize=64)  # all elements of an array come of the same one
def _runs_in(script: Path) -> list[str]:
    try:
        text = script.read_text()
    except OSError:
        return []
    table = re.search(r"^runs=\(\n(.*?)^\)$", text, re.MULTILINE | re.DOTALL)
    alone = re.search(rf" {SUPERVISOR} (.*)$", text, re.MULTILINE)
    return shlex.split(table[1] if table else alone[1] if alone else "")


def _alike(runs: Iterable[tuple[RunConfig, RunFolder]]) -> list[list[tuple[RunConfig, RunFolder]]]:
    """Runs that ask for the same of the scheduler, together."""
    groups: dict[str, list[tuple[RunConfig, RunFolder]]] = {}
    for run, folder in runs:
        groups.setdefault(json.dumps(directives(run), sort_keys=True), []).append((run, folder))
    return list(groups.values())


def _parts(group: list[tuple[RunConfig, RunFolder]], largest: int) -> Iterator[list[tuple[RunConfig, RunFolder]]]:
    for first in range(0, len(group), largest):
        yield group[first : first + largest]


def _limits(
    groups: Sequence[Sequence[object]], max_parallel: int | None, num_living: int
) -> list[tuple[int | None, bool]]:
    """For each array how many of its elements may run at the same time, and whether it waits for those before it.

    Arrays that start together share the number out; where it is too small for that, or where runs are in the queue
    already, one array follows the other.
    """
    if max_parallel is None or sum(map(len, groups)) + num_living <= max_parallel:
        return [(None, False)] * len(groups)
    if num_living or max_parallel < len(groups):
        return [(max_parallel, num_living > 0 or index > 0) for index in range(len(groups))]
    share, more = divmod(max_parallel, len(groups))
    return [(share + (index < more), False) for index in range(len(groups))]


def _batch(group: list[tuple[RunConfig, RunFolder]], code: Path, max_parallel: int | None, follows: bool) -> Batch:
    text = _text(group, code, max_parallel)
    folders = tuple(folder for _, folder in group)
    digits = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Batch(folders, text, folders[0].experiment.scripts / f"{digits}.sh", max_parallel, follows)


def _text(group: list[tuple[RunConfig, RunFolder]], code: Path, max_parallel: int | None) -> str:
    """The script as submitit writes it, around our command in the place of its own.

    submitit's own would read a pickle that it names after the job, and so only once sbatch has answered: a submission
    that is killed before that leaves jobs which can't start. Here the script itself says which run is whose.
    """
    run, folder = group[0]
    executor = _executor(run, folder.experiment, max_parallel)._executor
    if len(group) > 1:
        executor.parameters["map_count"] = len(group)  # as submitit does for an array
    paths = [shlex.quote(str(folder.path)) for _, folder in group]
    if len(group) == 1:
        lines = start_lines(code, paths[0])
    else:
        lines = ["runs=(", *paths, ")", *start_lines(code, '"${runs[$SLURM_ARRAY_TASK_ID]}"')]
    return str(executor._make_submission_file_text("\n".join(lines), "")) + "\n"


def _code_lines(code: Path) -> list[str]:
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # the code above, rather than that in the folder where sbatch was called",
    ]


def _executor(run: RunConfig, experiment: ExperimentFolder, max_parallel: int | None) -> "AutoExecutor":
    """Submitit with the options of a run; it makes no folder before it sends."""
    from submitit import AutoExecutor

    try:
        executor = AutoExecutor(folder=experiment.submitit, cluster="slurm")
    except RuntimeError as error:
        raise ConfigError(f"cluster.executor is slurm, but {error} Set `cluster: local` for this machine") from None
    executor.update_parameters(**directives(run, max_parallel))
    return executor
