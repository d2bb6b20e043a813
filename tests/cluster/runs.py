"""Runs on the tests' cluster: submit, watch, and what they left in their folders."""

import json
import subprocess
import sys
from pathlib import Path

from slurm_cluster import SlurmCluster, wait_until

from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, runs_folder
from cosmos_hpc.config.run_state import RunState

RUN_LIMIT_S = 240
"""For what ranks do; they start in 10 s on a free machine, in several times that on a busy one."""


def cosmos_hpc(*arguments: str | Path) -> str:
    """What the command line says.

    Raises:
        AssertionError: with its words, if it fails.
    """
    command = [sys.executable, "-m", "cosmos_hpc.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def submit(job: Path, name: str, *overrides: str) -> list[RunFolder]:
    """Submit a job file under a name of its own; the folders of its runs."""
    cosmos_hpc("submit", job, f"name={name}", *overrides)
    return ExperimentFolder(runs_folder() / name).runs()


def job_id(folder: RunFolder) -> str:
    """The job or array element that a run was last sent as."""
    lines = [json.loads(line) for line in folder.experiment.submissions.read_text().splitlines()]
    return [line["jobs"][folder.label] for line in lines if folder.label in line.get("jobs", {})][-1]


def wait_for_step(cluster: SlurmCluster, folder: RunFolder, step: int) -> None:
    """Wait until a run has done so many steps."""
    wait_until(lambda: steps(folder)[-1:] >= [step], f"step {step}", RUN_LIMIT_S, lambda: story(cluster, folder))


def wait_for_end(cluster: SlurmCluster, folder: RunFolder, *states: str) -> None:
    """Wait until the scheduler says that a run's job is in one of these states."""
    job = job_id(folder)
    wait_until(lambda: cluster.job(job).state in states, f"{job} {states}", RUN_LIMIT_S, lambda: story(cluster, folder))


def steps(folder: RunFolder) -> list[int]:
    return [line["step"] for line in metrics(folder) if "loss" in line]


def steps_of_attempt(folder: RunFolder, attempt: int) -> list[int]:
    return [line["step"] for line in metrics(folder) if "loss" in line and line["attempt"] == attempt]


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(folder) if "loss" in line]


def outcomes(folder: RunFolder) -> list[str | None]:
    state = RunState.read(folder.state)
    return [attempt.outcome for attempt in state.attempts] if state else []


def on_node(cluster: SlurmCluster, job: str, node: str, *command: str) -> None:
    """Run a command inside a node of a job, whose process ids are its own."""
    inside = ["srun", f"--jobid={job}", "--overlap", "--mem=1", "--nodes=1", "--ntasks=1", f"--nodelist={node}"]
    cluster.call(*inside, *command)


def story(cluster: SlurmCluster, folder: RunFolder) -> str:
    """All that may explain a run that did not do what was expected."""
    logs = [*sorted(folder.path.glob("logs/*/*.log")), *sorted(folder.experiment.submitit.glob("*.*"))]
    words = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.suffix != ".pkl"]
    rows = [" ".join(row) for row in cluster.accounting(job_id(folder))]
    state = folder.state.read_text() if folder.state.exists() else "no state.json"
    return "\n".join([cluster.queue(), *rows, state, *words])


def metrics(folder: RunFolder) -> list[dict]:
    if not folder.metrics.exists():
        return []
    lines = folder.metrics.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
