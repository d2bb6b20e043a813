"""The commands that deal with runs, for Python, under the names that they have on the command line.

    from cosmos_hpc import api

    sent = api.submit("jobs/roads.yaml", ["optim.lr=3e-5"])
    for row in api.wait("roads"):
        print(row.run, row.status, row.val_psnr)

What the user can mend is a `ConfigError`. None of them imports torch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmos_hpc.advice import advice
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, runs_folder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.config.sweep import PlannedRun, expand
from cosmos_hpc.doctor import Verdict, quick_findings
from cosmos_hpc.job import Supervisor
from cosmos_hpc.launch.after import jobs_before
from cosmos_hpc.launch.batch import Batch
from cosmos_hpc.launch.explain import Explanation
from cosmos_hpc.launch.explain import explain as explain_run
from cosmos_hpc.launch.follow import follow
from cosmos_hpc.launch.forecast import Forecast, forecasts
from cosmos_hpc.launch.limits import misfits, partitions
from cosmos_hpc.launch.logs import read_log
from cosmos_hpc.launch.marks import settle
from cosmos_hpc.launch.placement import PlacedRun, left_the_sweep, place
from cosmos_hpc.launch.requests import checkpoint_now as save_run
from cosmos_hpc.launch.requests import requeue as requeue_run
from cosmos_hpc.launch.status import RunStatus, cancel_all, find_runs, run_statuses
from cosmos_hpc.launch.submit import Submission, planned_batches
from cosmos_hpc.launch.submit import submit as send
from cosmos_hpc.preflight import check_inputs, with_local_image, with_local_weights, with_num_steps

__all__ = [
    "ConfigError",
    "Plan",
    "cancel",
    "checkpoint_now",
    "explain",
    "logs",
    "plan",
    "requeue",
    "runs",
    "status",
    "submit",
    "wait",
]


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment file, and what `submit` would do."""

    experiment: ExperimentFolder
    """Where they lie."""

    runs: list[PlannedRun]
    """Settings of each, and what the sweep chose."""

    placed: list[PlacedRun]
    """Folder of each, and what is left to do for it."""

    left: list[RunFolder]
    """Runs of earlier submissions that the sweep does not make any more."""

    max_parallel: int | None
    """Runs at the same time."""

    def forecasts(self) -> list[Forecast]:
        """How long each run will take, as far as that is known."""
        configs, folders = [run.config for run in self.runs], [run.folder for run in self.placed]
        return forecasts(configs, folders, runs_folder())

    def warnings(self) -> list[list[str]]:
        """What to know of each run's settings before they are used; first why `submit` would refuse it."""
        found = [advice(run.config, place.folder) for run, place in zip(self.runs, self.placed, strict=True)]
        distinct = {_inputs(run.config): run.config for run in self.runs}
        refused = {inputs: _refusal(config) for inputs, config in distinct.items()}
        for run, said in zip(self.runs, found, strict=True):
            said[:0] = refused[_inputs(run.config)]
        sent = [index for index, place in enumerate(self.placed)
                if place.is_sent and place.config.cluster.executor == "slurm"]  # fmt: skip
        try:
            there = partitions() if sent else {}
        except ConfigError as error:  # planned elsewhere than where it will be sent
            return [[str(error), *said] for said in found]
        for index in sent:
            found[index][:0] = [misfit.message for misfit in misfits(self.runs[index].config, there)]
        return found

    def batches(self) -> list[Batch]:
        """What sbatch would be given."""
        return planned_batches(self.placed, self.experiment, self.max_parallel)


def plan(job: Path | str, overrides: Sequence[str] = (), *, retries_failed: bool = False) -> Plan:
    """Look at an experiment file and at what there is of it already. Sends nothing.

    Args:
        job: experiment file.
        overrides: settings on top of it, such as `optim.lr=3e-5`.
        retries_failed: whether failed runs would be sent again.

    Raises:
        ConfigError: for settings that can't work.
    """
    planned, experiment, max_parallel = _read(job, overrides)
    settle([experiment])
    placed = place([run.config for run in planned], experiment, retries_failed=retries_failed)
    return Plan(experiment, planned, placed, left_the_sweep(placed, experiment), max_parallel)


def submit(
    job: Path | str,
    overrides: Sequence[str] = (),
    *,
    retries_failed: bool = False,
    prunes: bool = False,
    examines: bool = True,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Submission:
    """Send what is missing of an experiment file: finished, failed and living runs are left alone, others go on.

    Args:
        job: experiment file.
        overrides: settings on top of it.
        retries_failed: send failed runs again.
        prunes: cancel living runs that the sweep does not make any more.
        examines: have the quick part of `doctor` done first, where there is something to send.
        on_warning: told what it warns of.

    Raises:
        ConfigError: for settings that can't work, for what `doctor` finds failing, or where the scheduler refuses;
            nothing was sent then.
    """
    planned, experiment, max_parallel = _read(job, overrides)
    configs = [run.config for run in planned]
    waits = bool(jobs_before(configs[0].after, is_local=configs[0].cluster.executor == "local"))
    for config in {_inputs(config): config for config in configs}.values():
        check_inputs(config, data_is_to_come=waits)

    def check(sent: Sequence[PlacedRun]) -> None:
        found = quick_findings([run.config for run in sent], experiment) if examines else []
        for finding in found:
            if finding.has_failed:
                raise ConfigError(f"{finding.check}: {finding.message}; nothing was sent (--no-doctor sends anyway)")
        for finding in found:
            if finding.verdict is Verdict.WARN:
                on_warning(f"{finding.check}: {finding.message}")

    options = {"retries_failed": retries_failed, "prunes": prunes}
    return send(configs, experiment, max_parallel, Supervisor, check=check, **options)


def runs(name: str | None = None) -> list[RunFolder]:
    """Runs by EXPERIMENT, EXPERIMENT/RUN (a beginning is enough) or a run's folder; all of them without a name.

    Raises:
        ConfigError: if nothing fits.
    """
    if name is not None:
        return find_runs(name, runs_folder())
    return [run for folder in sorted(runs_folder().glob("*")) for run in ExperimentFolder(folder).runs()]


def one_run(name: str) -> RunFolder:
    """The run of that name.

    Raises:
        ConfigError: if it fits none, or several.
    """
    found = runs(name)
    if len(found) > 1:
        raise ConfigError(f"{name} names {len(found)} runs: choose one of {', '.join(one.label for one in found)}")
    return found[0]


def status(name: str | None = None) -> list[RunStatus]:
    """How runs stand, named as in `runs`."""
    return run_statuses(runs(name))


def wait(name: str) -> list[RunStatus]:
    """Stay until runs are over; how they ended. Ctrl-C asks them to save and stop."""
    folders = runs(name)
    follow(folders, f"cosmos-hpc submit, for {name}")
    return run_statuses(folders)


def cancel(name: str) -> dict[str, str]:
    """End runs for good, saved; what happens to each, by its label."""
    return {folder.label: said for folder, said in cancel_all(runs(name)).items()}


def requeue(name: str) -> dict[str, str]:
    """Have runs save and start again, through the queue where there is one; what happens to each, by its label."""
    return {folder.label: requeue_run(folder) for folder in runs(name)}


def checkpoint_now(name: str) -> dict[str, str]:
    """Have runs save after their next step, and go on; what happens to each, by its label."""
    return {folder.label: save_run(folder) for folder in runs(name)}


def explain(name: str) -> Explanation:
    """Why each attempt of a run ended, what was done about it and what it cost.

    Raises:
        ConfigError: if the name fits several runs.
    """
    return explain_run(one_run(name))


def logs(name: str, rank: int = 0, attempt: int | None = None, *, follows: bool = False) -> Iterator[str]:
    """The log of a rank in pieces.

    Args:
        name: of one run.
        rank: whose log.
        attempt: start of the ranks, from 0; none: the newest.
        follows: go on until the run is over.

    Raises:
        ConfigError: if the name fits several runs, or there is no such log.
    """
    return read_log(one_run(name), rank, attempt, follow=follows)


def _read(job: Path | str, overrides: Sequence[str]) -> tuple[list[PlannedRun], ExperimentFolder, int | None]:
    experiment = load_experiment(Path(job), overrides)
    planned = [
        dataclasses.replace(run, config=with_local_image(with_local_weights(with_num_steps(run.config))))
        for run in expand(experiment)
    ]
    folder = ExperimentFolder(runs_folder() / planned[0].config.name)
    return planned, folder, experiment.sweep.max_parallel


def _inputs(run: RunConfig) -> str:
    """The same for runs that read the same things."""
    return repr((run.data, run.wandb, run.trainer.world_size))


def _refusal(run: RunConfig) -> list[str]:
    """Why `submit` would refuse what a run reads."""
    try:
        check_inputs(run, data_is_to_come=bool(run.after))
    except ConfigError as error:
        return [str(error)]
    return []
