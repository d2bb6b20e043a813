"""The command that starts the ranks of one attempt: srun on a cluster, torch's elastic launcher on one machine."""

import os
import sys
from pathlib import Path

import cosmos_hpc
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.container import container_prefix

CALLERS_GPUS = "COSMOS_HPC_CUDA_VISIBLE_DEVICES"
"""What CUDA_VISIBLE_DEVICES was to the caller of a local submission, if it was set."""


def step_command(run: RunConfig, folder: RunFolder, attempt: int) -> list[str]:
    """One process per GPU on every node, each `python -m cosmos_hpc.train` on the run folder."""
    rank = ["-m", "cosmos_hpc.train", "--run-folder", str(folder.path), "--attempt", str(attempt)]
    if run.cluster.executor == "local":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.trainer.devices}"]
        return [sys.executable, *launcher, *rank]
    prefix = container_prefix(run.container, _mounts(run, folder))
    python = sys.executable if run.container.mode == "none" else "python"
    return [*_srun(run), *prefix.srun_flags, *prefix.command, python, *rank]


def step_environment(run: RunConfig, master_address: str, master_port: int) -> dict[str, str]:
    """Variables of the ranks: this process's own, where they meet, and what the profiles set."""
    environment = dict(os.environ)
    if run.cluster.executor == "local":
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # submitit's, which hides every GPU
        if CALLERS_GPUS in environment:
            environment["CUDA_VISIBLE_DEVICES"] = environment[CALLERS_GPUS]
    return {
        **environment,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # a job downloads nothing
        "MASTER_ADDR": master_address,
        "MASTER_PORT": str(master_port),
        **run.cluster.environment,
        **run.container.environment,
    }


def _srun(run: RunConfig) -> list[str]:
    """What srun is told again, since it takes nothing over from submitit's sizes."""
    size = [
        f"--nodes={run.trainer.num_nodes}",
        f"--ntasks={run.trainer.world_size}",
        f"--ntasks-per-node={run.trainer.devices}",
    ]
    if run.cluster.cpus_per_task is not None:
        size.append(f"--cpus-per-task={run.cluster.cpus_per_task}")
    return ["srun", "--kill-on-bad-exit=1", "--unbuffered", "--cpu-bind=none", *size]


def _mounts(run: RunConfig, folder: RunFolder) -> tuple[str, ...]:
    """The package, the run and its inputs, at the same paths inside as outside."""
    package = Path(cosmos_hpc.__file__).parents[1]
    inputs = [Path(path) for path in (run.data.path, run.model.jit_ckpt_pth) if path is not None]
    # A snapshot in the Hugging Face cache links to files two levels up.
    whole = [path.parents[1] if path.parent.name == "snapshots" else path for path in inputs]
    return tuple(f"{path}:{path}" for path in (package, folder.path, *whole))
