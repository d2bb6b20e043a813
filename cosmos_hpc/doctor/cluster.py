"""The profile against what SLURM says of itself: does the job fit, does it come back, is it told in time."""

import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.estimates import Leave, leave
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned
from cosmos_hpc.launch.batch import batches
from cosmos_hpc.launch.controller import whole_seconds
from cosmos_hpc.launch.directives import directives
from cosmos_hpc.launch.limits import largest_array, misfits, partition_names
from cosmos_hpc.launch.queue import num_partition_nodes
from cosmos_hpc.launch.snapshot import snapshot_folder
from cosmos_hpc.launch.submit import try_out

TITLES = {"partition": "partition", "time_limit_min": "time limit", "num_nodes": "nodes", "gpus_per_node": "GPUs",
          "cpus_per_node": "CPUs"}  # fmt: skip
"""What the table calls each limit of a partition."""

EARLY_S = 60
"""SLURM warns of the time limit up to so much before it was asked to, and never later."""


def limits(case: Case) -> Iterator[Finding]:
    """Partition, time limit, nodes, GPUs and CPUs, as `submit` refuses them."""
    runs = case.distinct(lambda run: (run.cluster, run.trainer.num_nodes, run.trainer.devices))
    found = {misfit.message: misfit for run in runs for misfit in misfits(run, case.partitions)}
    yield from (failed(TITLES[misfit.limit], misfit.message) for misfit in found.values())
    if not found:
        run = case.first
        size = f"{run.trainer.num_nodes} nodes x {run.trainer.devices} ranks"
        names = ", ".join(partition_names(run, case.partitions))
        yield passed("partition", f"{names}: {size} for {run.cluster.time_limit_min} min fit")


def nodes_up(case: Case) -> Iterator[Finding]:
    """Partitions that are open, and nodes that are not down or drained."""
    for name, told in case.chosen.items():
        if (state := told.get("State", "UP")) != "UP":
            yield warned("nodes up", f"partition {name} is {state}: nothing starts there until `scontrol` says UP")
    most = max(run.trainer.num_nodes for run in case.runs)
    usable = num_partition_nodes(",".join(case.chosen))
    if usable < most:
        yield warned("nodes up", f"{usable} nodes of {', '.join(case.chosen)} are up, {most} are needed: jobs wait "
                     "until others are back, see `sinfo --list-reasons`")  # fmt: skip
    elif case.chosen:
        yield passed("nodes up", f"{usable} nodes can be used")


def arrays(case: Case) -> Iterator[Finding]:
    """Runs against what an array, and the whole queue, may hold."""
    count, largest = len(case.runs), largest_array()
    most = int(case.cluster.get("MaxJobCount", 10000))
    if count > most:
        yield failed("arrays", f"{count} runs, but this cluster's queue holds {most} jobs (MaxJobCount): send fewer")
    elif count > largest:
        yield passed("arrays", f"{count} runs go as {-(-count // largest)} arrays of {largest} (MaxArraySize) at most")
    else:
        yield passed("arrays", f"{count} of at most {largest} elements (MaxArraySize)")


def requeue(case: Case) -> Iterator[Finding]:
    """A job that SLURM does not bring back is lost at the first preemption."""
    for run in case.distinct(lambda run: run.cluster):
        options = directives(run)["slurm_additional_parameters"]
        if options.get("no_requeue") or options.get("requeue") is not True:
            yield failed("requeue", "cluster.directives takes --requeue away: jobs would not come back after a "
                         "preemption or a lost node, so leave no_requeue and requeue out of it")  # fmt: skip
            return
    site = "" if case.cluster.get("JobRequeue") == "1" else "; the site's JobRequeue=0 does not matter then"
    yield passed("requeue", f"jobs are sent with --requeue{site}")


def preempt_mode(case: Case) -> Iterator[Finding]:
    """What becomes of a job whose nodes are wanted by another one."""
    for name, told in case.chosen.items():
        mode = _mode(case, told)
        if mode == "CANCEL":
            yield warned("preempt mode", f"partition {name} has PreemptMode=CANCEL: a preempted job does not come back "
                         "by itself, so `cosmos-hpc submit` again, or have it set to REQUEUE")  # fmt: skip
        elif mode.startswith(("SUSPEND", "GANG")):
            yield warned("preempt mode", f"partition {name} has PreemptMode={mode}: a suspended job keeps its GPU "
                         "memory, which the other one needs: have it set to REQUEUE")  # fmt: skip
        elif mode == "OFF":
            yield passed("preempt mode", f"jobs of {name} are not preempted")
        else:
            yield passed("preempt mode", f"{name}: {mode}")


def grace(case: Case) -> Iterator[Finding]:
    """What a preempted job has until it is killed, against what a step and a checkpoint take."""
    for name, told in case.chosen.items():
        if _mode(case, told) == "OFF":
            continue
        grace_s, source = _grace(case, told)
        for run, needed in _leaves(case):
            what = f"{name} gives a preempted job {grace_s} s ({source})"
            if needed.total_s is not None and needed.total_s > grace_s:
                minutes = run.checkpoint.every_n_minutes
                yield warned("grace", f"{what}, but {needed}: it would lose up to {minutes:g} min of work, so have "
                             f"GraceTime raised, or set checkpoint.every_n_minutes lower")  # fmt: skip
            else:
                yield passed("grace", f"{what}; {needed}")
            break  # the longest


def warning_time(case: Case) -> Iterator[Finding]:
    """How long before the time limit ranks are told to save."""
    for run, needed in _leaves(case):
        limit_s, grace_s = 60 * run.cluster.time_limit_min, run.cluster.grace_s
        if grace_s + EARLY_S >= limit_s:
            told = failed if grace_s >= limit_s else warned  # such jobs may save as they start, and get on slowly
            yield told("warning time", f"cluster.grace_s is {grace_s}, and the warning may come {EARLY_S} s earlier, "
                       f"but jobs last only {limit_s} s: set it lower, or cluster.time_limit_min higher")  # fmt: skip
        elif needed.total_s is not None and needed.total_s > grace_s:
            yield failed("warning time", f"cluster.grace_s is {grace_s}, but {needed}: set "
                         f"cluster.grace_s={int(2 * needed.total_s) + 1}")  # fmt: skip
        else:
            yield passed("warning time", f"ranks are told {grace_s} s before the time limit; {needed}")
        return


def accepted(case: Case) -> Iterator[Finding]:
    """What sbatch itself says of account, QOS, constraint and the like, without sending anything."""
    runs = [(run, folder) for run, folder in zip(case.runs, case.experiment.place(list(case.runs)), strict=True)]
    firsts = batches(runs, snapshot_folder(case.experiment), case.max_parallel, largest=largest_array())
    with tempfile.TemporaryDirectory() as scratch:
        for batch in firsts:
            script = Path(scratch) / batch.script.name
            script.write_text(batch.text)
            try:
                try_out(script)
            except ConfigError as error:
                yield failed("sbatch", str(error).replace(f" {script}", ""))
                return
    yield passed("sbatch", "takes the jobs (--test-only)")


def after(case: Case) -> Iterator[Finding]:
    """What the runs wait for."""
    if case.first.after:
        jobs = case.jobs_before
        yield passed("after", f"waits for jobs {', '.join(jobs)}" if jobs else "all of it is done")


@lru_cache(maxsize=1)
def _leaves(case: Case) -> list[tuple[RunConfig, Leave]]:
    """What runs need to leave with a checkpoint, the longest first."""
    runs = case.distinct(lambda run: (run.model, run.data.micro_batch_size, run.data.crop_size, run.data.num_frames,
                                      run.trainer.world_size, run.cluster.grace_s))  # fmt: skip
    found = [(run, leave(run, case)) for run in runs]
    return sorted(found, key=lambda pair: -(pair[1].total_s or 0.0))


def _mode(case: Case, told: dict[str, str]) -> str:
    """PreemptMode of a partition, where the cluster preempts at all; that of the QOS where this decides."""
    kind = case.cluster.get("PreemptType", "preempt/none")
    if "none" in kind or kind in ("", "(null)"):
        return "OFF"
    site = case.cluster.get("PreemptMode", "OFF").replace("GANG,", "").replace(",GANG", "")
    if kind == "preempt/qos":
        return _qos(case)[0] or site
    return told.get("PreemptMode") or site


def _grace(case: Case, told: dict[str, str]) -> tuple[int, str]:
    of_qos = _qos(case)[1] if case.cluster.get("PreemptType") == "preempt/qos" else ""
    seconds = whole_seconds(of_qos or told.get("GraceTime"))
    return (seconds, "GraceTime") if seconds else (whole_seconds(case.cluster.get("KillWait")), "KillWait")


def _qos(case: Case) -> tuple[str, str]:
    """PreemptMode and GraceTime of the runs' QOS; empty where they say nothing, or nobody keeps accounts."""
    name = case.first.cluster.qos or "normal"
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "qos", name, "format=PreemptMode,GraceTime"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "", ""
    mode, _, seconds = told.strip().partition("|")
    return ("" if mode == "cluster" else mode.upper()), seconds
