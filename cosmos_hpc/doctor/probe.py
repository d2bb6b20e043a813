"""The probe job: two nodes for two minutes with the job's own options, watched until it is over."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.rank_reports import last_lines
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.dataset_index import split_sizes, tells_its_size
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.finding import Finding, failed
from cosmos_hpc.doctor.probe_report import JobReport, findings, read_ranks
from cosmos_hpc.launch.batch import script_around
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.launch.provenance import provenance
from cosmos_hpc.launch.queue import JobStatus, cancel_jobs, job_statuses
from cosmos_hpc.launch.snapshot import take_snapshot
from cosmos_hpc.launch.submit import sbatch

NUM_NODES = 2

LIMIT_MIN = 10
"""Of the job: two minutes are usual, and cold file systems and large images take longer."""

GRACE_S = 60

POLL_S = 2.0
"""The controller serves everybody."""

PATIENCE_S = 120.0
"""How long a controller that does not answer is asked again."""

LONG = 10**7
"""Steps and minutes that no probe gets to."""


class Probe(NamedTuple):
    """A probe job that was sent."""

    folder: RunFolder
    """Where it leaves its reports and logs."""

    run: RunConfig
    """Its settings."""

    job: str
    """Its id."""


def probe(case: Case, on_look: Callable[[str], None]) -> list[Finding]:
    """Send a probe job, wait for it, and tell what it found. Ctrl-C, and whatever else ends the wait, cancels it.

    Args:
        case: from `examine`; its first run is tried.
        on_look: told how the job stands.

    Raises:
        ConfigError: if sbatch refuses it.
    """
    sent = _send(case)
    try:
        status = _wait(sent, on_look)
    except BaseException:
        cancel_jobs([sent.job])
        raise
    found = list(_told(sent, status, case.first.cluster.grace_s))
    if not any(finding.has_failed for finding in found):
        shutil.rmtree(sent.folder.path)
    return found


def probe_run(case: Case) -> RunConfig:
    """The first run on so many nodes, without end, and without what a probe has no use for."""
    run = case.first
    num_nodes = min(NUM_NODES, max((row.num_nodes for row in case.rows), default=NUM_NODES))
    ranks = num_nodes * run.trainer.devices
    data, steps = run.data, max(run.trainer.max_steps, LONG)
    trainer = dataclasses.replace(run.trainer, num_nodes=num_nodes, min_nodes=None, max_steps=steps, max_epochs=None,
                                  limit_val_batches=1, val_check_interval=LONG, compile="off")  # fmt: skip
    return dataclasses.replace(
        run,
        name=f"{run.name}-doctor",
        trainer=trainer,
        data=dataclasses.replace(
            data,
            global_batch_size=data.micro_batch * ranks,
            num_streams=None,
            general_path=None,
            num_workers=min(data.num_workers, _samples(data.path) // ranks),
        ),
        checkpoint=dataclasses.replace(run.checkpoint, every_n_minutes=LONG, every_n_steps=None, best_by=None),
        wandb=dataclasses.replace(run.wandb, mode="disabled"),
        cluster=dataclasses.replace(
            run.cluster,
            time_limit_min=min(run.cluster.time_limit_min, LIMIT_MIN),
            grace_s=GRACE_S,
            health_check_s=max(run.cluster.health_check_s, 30.0),
            directives={**run.cluster.directives, "requeue": None, "no_requeue": True},
        ),
        after=(),
    )


def _send(case: Case) -> Probe:
    run = probe_run(case)
    experiment = case.experiment
    experiment.doctor.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=experiment.doctor)))
    code = take_snapshot(experiment)
    lay_out(run, folder, {**provenance(), "code": str(code)})
    experiment.submitit.mkdir(parents=True, exist_ok=True)
    command = ["-m", "cosmos_hpc.doctor.probe_job", str(folder.path)]
    folder.script.write_text(script_around(run, experiment, code, command))
    log = folder.path / "job.log"
    return Probe(folder, run, sbatch(f"--output={log}", f"--error={log}", str(folder.script)))


def _wait(sent: Probe, on_look: Callable[[str], None]) -> JobStatus:
    silent_since = None
    while True:
        try:
            status = job_statuses([sent.job])[sent.job]
        except ConfigError:  # a controller that is busy
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > PATIENCE_S:
                raise
            time.sleep(POLL_S)
            continue
        silent_since = None
        if status.is_over:
            return status
        stage = JobReport.read(sent.folder.path).stage
        how = f"waits ({status.reason})" if status.state == "PENDING" else f"on {status.nodes}: {stage}"
        on_look(f"probe job {sent.job} {how}")
        time.sleep(POLL_S)


def _told(sent: Probe, status: JobStatus, grace_s: int) -> Iterator[Finding]:
    report = JobReport.read(sent.folder.path)
    if report.stage != "done":
        words = last_lines(sent.folder.path / "job.log").strip().rpartition("\n")[2] or "it printed nothing"
        yield failed("probe job", f"{sent.job} is {status.state}, in the stage {report.stage!r} ({words}): see "
                     f"{sent.folder.path}/job.log and logs/")  # fmt: skip
    if report.hosts:
        for finding in findings(sent.run, report, read_ranks(sent.folder.path), grace_s):
            where = f" ({sent.folder.attempt_logs(0)})" if finding.has_failed else ""
            yield finding._replace(message=finding.message + where)


def _samples(path: str | None) -> int:
    """Training videos, as far as the probe must not start more workers; many where that can't be told."""
    return split_sizes(Path(path))["train"] if path is not None and tells_its_size(path) else LONG
