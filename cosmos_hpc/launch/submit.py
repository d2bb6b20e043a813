"""Send runs to the scheduler, each once: finished and living runs are left alone."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, write_atomically
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.after import jobs_before
from cosmos_hpc.launch.batch import Batch, batches, single_scripts
from cosmos_hpc.launch.container import check_container
from cosmos_hpc.launch.limits import check_fits, largest_array
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.marks import mark_sent, settle_locked
from cosmos_hpc.launch.placement import PlacedRun, lay_out, left_the_sweep, place
from cosmos_hpc.launch.provenance import provenance
from cosmos_hpc.launch.queue import cancel_jobs, own_jobs_by_script
from cosmos_hpc.launch.snapshot import snapshot_folder, take_snapshot
from cosmos_hpc.launch.status import cancel_all
from cosmos_hpc.launch.step import CALLERS_GPUS, needed_paths

MakeJob = Callable[[Path], Callable[[], None]]
"""Turns a run folder into the callable that runs it on this machine."""

Check = Callable[[Sequence[PlacedRun]], None]
"""Raises a ConfigError where some runs should not be sent."""

YEAR_MIN = 365 * 24 * 60
"""A local machine has no wall clock."""

WRITERS = 16
"""Run folders written at the same time: each waits for the disk, which may be at the other end of a network."""

MENDS = {
    "Invalid partition": "set cluster.partition",
    "Invalid account": "set cluster.account, see `sacctmgr show associations`",
    "Invalid qos": "set cluster.qos, see `sacctmgr show qos`",
    "Invalid feature": "set cluster.constraint, see `sinfo --format=%f`",
    "reservation": "set cluster.reservation, see `scontrol show reservations`",
    "node configuration": "ask for less: trainer.devices, trainer.num_nodes, cluster.cpus_per_task, cluster.directives",
    "Invalid node name": "set cluster.exclude, see `sinfo --Node`",
    "time limit": "set cluster.time_limit_min",
    "ubmit limit": "send fewer runs, or wait until others have ended",
    "unrecognized option": "see cluster.directives",
    "Unable to contact": "see `scontrol ping`",
}
"""What sbatch may say to what can be done about it."""


@dataclass(frozen=True)
class Submission:
    """What a submission did."""

    experiment: ExperimentFolder
    """Where the runs lie."""

    placed: list[PlacedRun]
    """Every run of the experiment file."""

    jobs: dict[str, str]
    """Job id of each run sent, by the run's label."""

    left: list[RunFolder]
    """Runs of earlier submissions that the sweep does not make any more."""

    pruned: dict[RunFolder, str]
    """What was done about them, where that was asked."""


def submit(
    runs: Sequence[RunConfig],
    experiment: ExperimentFolder,
    max_parallel: int | None,
    make_job: MakeJob,
    *,
    retries_failed: bool = False,
    prunes: bool = False,
    check: Check = lambda sent: None,
) -> Submission:
    """Send the runs that are left to do, as one array for all that ask for the same.

    Args:
        runs: of one experiment file.
        experiment: theirs.
        max_parallel: runs at the same time; none: no limit on a cluster, one on a local machine.
        make_job: the supervisor of a run folder, for runs of this machine.
        retries_failed: whether failed runs are sent again.
        prunes: whether living runs that left the sweep are cancelled.
        check: looks at the runs that are about to be sent, where there are any.

    Raises:
        ConfigError: if another submission is at work, or the scheduler refuses; nothing has been sent then.
    """
    with locked(experiment.submit_lock, patience_s=1.0) as ours:
        if not ours:
            raise ConfigError(f"{experiment.name} is being submitted at this moment: look at it with `cosmos-hpc "
                              f"status {experiment.name}` first")  # fmt: skip
        settle_locked(experiment, own_jobs_by_script() if experiment.scripts.is_dir() else {})
        placed = place(runs, experiment, retries_failed=retries_failed)
        jobs = _send(placed, experiment, max_parallel, make_job, check)
        left = left_the_sweep(placed, experiment)
        pruned = cancel_all(left) if prunes else {}
    return Submission(experiment, placed, jobs, left, pruned)


def planned_batches(placed: Sequence[PlacedRun], experiment: ExperimentFolder, max_parallel: int | None) -> list[Batch]:
    """What `submit` would hand to sbatch. Writes nothing.

    Raises:
        ConfigError: if nothing is left to send, or the runs are processes of this machine.
    """
    sent = [(run.config, run.folder) for run in placed if run.is_sent]
    if not sent:
        raise ConfigError(f"{experiment.name} has nothing to send: see `cosmos-hpc status {experiment.name}`")
    if sent[0][0].cluster.executor == "local":
        raise ConfigError(f"{experiment.name} runs on this machine, without sbatch: name a profile, see slurm/*.yaml")
    code, num_living = snapshot_folder(experiment), len(_living(placed))
    return batches(sent, code, max_parallel, largest=largest_array(), num_living=num_living)


def _send(
    placed: Sequence[PlacedRun],
    experiment: ExperimentFolder,
    max_parallel: int | None,
    make_job: MakeJob,
    check: Check,
) -> dict[str, str]:
    sent = [run for run in placed if run.is_sent]
    if not sent:
        return {}
    local = [run for run in sent if run.config.cluster.executor == "local"]
    if local and len(local) < len(sent):
        raise ConfigError("sweep: cluster.executor varies, but a sweep runs in one place: make two experiments")
    before = jobs_before(sent[0].config.after, is_local=bool(local))
    if not local:
        check_fits([run.config for run in sent])
        for run in {repr((run.config.container, run.config.data)): run for run in sent}.values():
            check_container(run.config.container, needed_paths(run.config, run.folder))
    check(sent)
    code = take_snapshot(experiment)
    start = {**provenance(), "code": str(code)}
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda run: lay_out(run.config, run.folder, start), sent))
    for run in sent:
        run.folder.cancel_mark.unlink(missing_ok=True)
    if local:
        write_atomically(experiment.max_parallel, str(max_parallel or 1))
        return _start_here(local, experiment, code, make_job)
    return _send_to_slurm(sent, experiment, max_parallel, code, before, _living(placed))


def _living(placed: Sequence[PlacedRun]) -> list[str]:
    return [run.living_job for run in placed if run.living_job]


def _send_to_slurm(
    sent: Sequence[PlacedRun],
    experiment: ExperimentFolder,
    max_parallel: int | None,
    code: Path,
    before: Sequence[str],
    living: Sequence[str],
) -> dict[str, str]:
    """Hand everything to sbatch, or nothing: what it refuses takes back what it took before."""
    runs = [(run.config, run.folder) for run in sent]
    arrays = batches(runs, code, max_parallel, largest=largest_array(), num_living=len(living))
    experiment.submitit.mkdir(parents=True, exist_ok=True)  # a job that can't open its log fails without a word
    for folder, text in single_scripts(runs, code).items():
        folder.script.write_text(text)
    for array in arrays:
        write_atomically(array.script, array.text)
        try_out(array.script)
    _note(experiment, {"time": time.time(), "scripts": {a.script.name: [run.label for run in a.runs] for a in arrays}})
    ids: dict[str, str] = {}
    last = sorted({job.partition("_")[0] for job in living})
    for array in arrays:
        for folder in array.runs:
            folder.pending_mark.write_text("")
        try:
            job = sbatch(*_dependency(before, last if array.follows else ()), str(array.script))
        except ConfigError:
            cancel_jobs(sorted({job.partition("_")[0] for job in ids.values()}))
            for run in sent:
                run.folder.pending_mark.unlink(missing_ok=True)
            raise
        sent_as = array.ids(job)
        for folder in array.runs:
            mark_sent(folder, sent_as[folder.label])
        ids |= sent_as
        last = [job]
    _note(experiment, {"time": time.time(), "jobs": ids})
    return ids


def _dependency(well: Sequence[str], ended: Sequence[str]) -> list[str]:
    """Options of sbatch for jobs that have to end well, and for jobs that have to end somehow."""
    parts = [":".join([kind, *jobs]) for kind, jobs in (("afterok", well), ("afterany", ended)) if jobs]
    words = [f"--dependency={','.join(parts)}"] if parts else []
    return [*words, "--kill-on-invalid-dep=yes"] if well else words  # else it would be pending for ever


def sbatch(*arguments: str) -> str:
    """The job that sbatch has made of a script; in its own words why not.

    Raises:
        ConfigError: with them, and what can be done.
    """
    said = _told_by_sbatch("--parsable", *arguments)
    job = re.search(r"^(\d+)(?:;\S+)?$", said, re.MULTILINE)  # a wrapper may greet on other lines
    if job is None:
        raise ConfigError(
            f"sbatch said {' '.join(said.split())!r} and no job's number: see `squeue --me`, then submit again"
        )
    return job[1]


def try_out(script: Path) -> None:
    """Ask sbatch whether it would take a script.

    Raises:
        ConfigError: with its words if not, and what can be done.
    """
    _told_by_sbatch("--test-only", str(script))


def _told_by_sbatch(*arguments: str) -> str:
    try:
        command = ["sbatch", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=outside_of_a_job())
    except FileNotFoundError:
        raise ConfigError("cluster.executor is slurm, but there is no sbatch here: set `cluster: local`") from None
    if done.returncode:
        words = " ".join(done.stderr.replace("sbatch: error: ", "").partition("Try ")[0].split())
        mend = next((mend for part, mend in MENDS.items() if part in words), "see the profile under `cluster`")
        raise ConfigError(f"sbatch refused {arguments[-1]}: {words}: {mend}; nothing was sent")
    return done.stdout


def outside_of_a_job() -> dict[str, str]:
    """The environment without what SLURM tells the job that this process may be a part of: it is not the new one's."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    of_a_job = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(of_a_job)}


def _start_here(
    sent: Sequence[PlacedRun], experiment: ExperimentFolder, code: Path, make_job: MakeJob
) -> dict[str, str]:
    """Start a supervisor for each run on this machine; they take turns by themselves."""
    import submitit  # takes half a second

    executor = submitit.LocalExecutor(folder=experiment.submitit)
    executor.update_parameters(timeout_min=YEAR_MIN)
    ids = {}
    for run in sent:
        run.folder.pending_mark.write_text("")
    with shielded(code):
        for run in sent:
            ids[run.folder.label] = job = executor.submit(make_job(run.folder.path)).job_id
            mark_sent(run.folder, job)
    _note(experiment, {"time": time.time(), "jobs": ids})
    return ids


@contextlib.contextmanager
def shielded(code: Path | None = None) -> Iterator[None]:
    """Processes started inside outlive Ctrl-C and the closing of the terminal, as jobs of a cluster do.

    They run the snapshot of the code if one is given, and learn which GPUs the caller sees by another name, since
    submitit overwrites the usual one.
    """
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    before, outside = dict(os.environ), outside_of_a_job()
    for name in before.keys() - outside.keys():
        del os.environ[name]
    if code is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [before.get("PYTHONPATH")])])
        os.environ["PYTHONSAFEPATH"] = "1"
    if "CUDA_VISIBLE_DEVICES" in before:
        os.environ[CALLERS_GPUS] = before["CUDA_VISIBLE_DEVICES"]
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH", CALLERS_GPUS):
            os.environ.pop(name, None)
        os.environ |= before
        for number, handler in kept.items():
            signal.signal(number, handler)


def _note(experiment: ExperimentFolder, line: dict[str, object]) -> None:
    experiment.submissions.parent.mkdir(parents=True, exist_ok=True)
    with experiment.submissions.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
