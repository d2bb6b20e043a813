"""The ranks of one attempt: the command that starts them (srun, or torch's elastic launcher), and signals to them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

import cosmos_hpc
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.container import container_environment, container_prefix
from cosmos_hpc.launch.local import children
from cosmos_hpc.ranks import die_with_parent

CALLERS_GPUS = "COSMOS_HPC_CUDA_VISIBLE_DEVICES"
"""What CUDA_VISIBLE_DEVICES was to the caller of a local submission, if it was set."""

OWN = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",  # a job downloads nothing
}
"""Variables that every rank has."""

RANKS = "cosmos-ranks"
"""Name of their step."""

SRUN = ("srun", "--export=ALL", "--cpu-bind=none")
"""A job that was sent with other exports gives its steps the whole environment all the same."""

KILL_WAIT_S = 60.0
"""How long srun may take to notice that the tasks it was told to kill are gone."""


def start_step(command: list[str], environment: dict[str, str], output: IO[str]) -> "subprocess.Popen[bytes]":
    """Start the ranks' launcher in a session of its own; it dies with the process that called.

    Args:
        command: from `step_command`.
        environment: from `step_environment`.
        output: where the launcher prints; ranks have logs of their own.

    Returns:
        The launcher. Locally, the ranks are its `children`.
    """
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


def signal_ranks(run: RunConfig, launcher: int, number: signal.Signals) -> None:
    """Send a signal to every rank of the step.

    Args:
        run: its settings.
        launcher: process id of `start_step`'s.
        number: which signal.
    """
    if run.cluster.executor == "local":
        _send(children(launcher), number)
    elif step := _newest_slurm_step():
        subprocess.run(["scancel", f"--signal={number.name.removeprefix('SIG')}", step], check=False)


def kill_step(run: RunConfig, step: "subprocess.Popen[bytes]") -> None:
    """End all ranks and the launcher at once, also those that are stopped or deaf."""
    below = _descendants(step.pid) if run.cluster.executor == "local" else []
    signal_ranks(run, step.pid, signal.SIGKILL)
    _send(below, signal.SIGKILL)
    deadline = time.monotonic() + (0 if run.cluster.executor == "local" else KILL_WAIT_S)
    while step.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    while step.poll() is None:
        _send([step.pid], signal.SIGKILL)
        time.sleep(0.05)


def slurm_job_id() -> str:
    """A_T for an array element: the raw id of the last element is the whole array's. Empty outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _newest_slurm_step() -> str | None:
    """JOB.STEP of the ranks, the highest number of their name: users start steps of their own to look around."""
    listed = subprocess.run(
        ["squeue", "--noheader", "--steps", f"--jobs={slurm_job_id()}", "--format=%i|%j"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = (line.strip().partition("|") for line in listed.stdout.splitlines())
    steps = [step for step, _, name in rows if name == RANKS]
    return max(steps, key=lambda step: int(step.rpartition(".")[2]), default=None)


def _descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [below for child in found for below in _descendants(child)]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # ended by itself just now
            os.kill(pid, number)


def step_command(
    run: RunConfig, folder: RunFolder, attempt: int, nodes: Sequence[str] = (), module: str = "cosmos_hpc.train"
) -> list[str]:
    """One process per GPU on every node, each `python -m cosmos_hpc.train` on the run folder.

    Args:
        run: its settings; `trainer.num_nodes` is what this attempt has.
        folder: the run.
        attempt: number of this start.
        nodes: the nodes to use, where some of the allocation are to be left out.
        module: what the processes run.
    """
    rank = ["-m", module, "--run-folder", str(folder.path), "--attempt", str(attempt)]
    if run.cluster.executor == "local":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.trainer.devices}"]
        return [sys.executable, *launcher, *rank]
    prefix = container_prefix(run.container, mounts(run, folder), folder.path, _overriding(run))
    python = sys.executable if run.container.mode == "none" else run.container.python
    return [*_srun(run, nodes), *prefix.srun_flags, *prefix.command, python, *rank]


def step_environment(run: RunConfig, master_address: str, master_port: int) -> dict[str, str]:
    """Variables of the ranks: this process's own, where they meet, and what the profiles set."""
    environment = dict(os.environ)
    if run.cluster.executor == "local":
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # submitit's, which hides every GPU
        if CALLERS_GPUS in environment:
            environment["CUDA_VISIBLE_DEVICES"] = environment[CALLERS_GPUS]
    chosen = {**run.cluster.environment, **run.container.environment}
    if "PYTHONPATH" in chosen and "PYTHONPATH" in environment:  # the code that was submitted, behind the user's own
        chosen["PYTHONPATH"] += os.pathsep + environment["PYTHONPATH"]
    pythonpath = chosen.get("PYTHONPATH", environment.get("PYTHONPATH", ""))
    has_gpus = run.cluster.gpus_per_node != 0
    return {
        **environment,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **OWN,
        "MASTER_ADDR": master_address,
        "MASTER_PORT": str(master_port),
        **container_environment(run.container, pythonpath, has_gpus=has_gpus),
        **chosen,
    }


def host_step(run: RunConfig, nodes: Sequence[str]) -> list[str]:
    """One process on each node of the job, outside the container, beside whatever runs there."""
    gpus = ["--gpus-per-node=0"] if run.cluster.gpus_per_node == 0 else []
    size = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
    return [*SRUN, "--overlap", "--mem=0", "--kill-on-bad-exit=0", *gpus, *size]


def _srun(run: RunConfig, nodes: Sequence[str]) -> list[str]:
    """What srun is told again, since it takes nothing over from submitit's sizes."""
    size = [
        f"--nodes={run.trainer.num_nodes}",
        f"--ntasks={run.trainer.world_size}",
        f"--ntasks-per-node={run.trainer.devices}",
        f"--gpus-per-node={run.gpus_per_node}",
    ]
    if run.cluster.cpus_per_task is not None:
        size.append(f"--cpus-per-task={run.cluster.cpus_per_task}")
    if nodes:
        size.append(f"--nodelist={','.join(nodes)}")
    return [*SRUN, f"--job-name={RANKS}", "--kill-on-bad-exit=1", "--unbuffered", *size]


def _overriding(run: RunConfig) -> list[str]:
    """Variables for which the image's own values don't count."""
    devices = ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "MELLANOX_VISIBLE_DEVICES", "TMPDIR"]
    key = [run.wandb.api_key_env] if run.wandb.api_key_env in os.environ else []
    return [*OWN, "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", *devices, *key, *run.cluster.environment]


def needed_paths(run: RunConfig, folder: RunFolder) -> dict[str, Path]:
    """What the ranks need of the shared file system, by what the user calls it."""
    named = {"data.path": run.data.path, "data.general_path": run.data.general_path,
             "data.image_path": run.data.image_path, "model.jit_ckpt_pth": run.model.jit_ckpt_pth}  # fmt: skip
    named |= {f"{path} of the loss": path for path in run.loss.network_files(run.trainer.max_steps)}
    # A snapshot in the Hugging Face cache links to files of its repository's folder.
    inputs = {name: _repository(Path(path)) for name, path in named.items() if path and "://" not in path}
    return {"the run folder": folder.path, **inputs}


def mounts(run: RunConfig, folder: RunFolder) -> tuple[str, ...]:
    """The package, the run and its inputs, at the same paths inside as outside."""
    package = Path(cosmos_hpc.__file__).parents[1]
    whole = dict.fromkeys((package, *needed_paths(run, folder).values()))
    return tuple(f"{path}:{path}" for path in whole)


def _repository(path: Path) -> Path:
    return next((above.parent for above in path.parents if above.name == "snapshots"), path)
