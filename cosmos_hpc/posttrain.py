"""What `sbatch slurm/posttrain.sbatch JOB.yaml [key=value ...]` runs first: lays out its run, and how that starts."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos_hpc import api
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder, write_atomically
from cosmos_hpc.launch.batch import single_scripts, start_lines
from cosmos_hpc.launch.container import check_container
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.launch.provenance import provenance
from cosmos_hpc.launch.snapshot import take_snapshot
from cosmos_hpc.launch.step import needed_paths
from cosmos_hpc.preflight import check_inputs

PATIENCE_S = 120.0
"""How long the elements of an array wait for each other to lay their runs out."""


def main(arguments: Sequence[str]) -> None:
    """Lay the run out, at the size of this job, with a copy of the code as it is now.

    Args:
        arguments: file to write, with the lines that start the supervisor whenever the job starts; then the experiment
            file and settings on top of it.

    Raises:
        ConfigError: outside a job of SLURM, or for settings that can't work.
    """
    if len(arguments) < 2 or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("this is for a job of SLURM: sbatch slurm/posttrain.sbatch JOB.yaml [key=value ...]")
    start, job, *overrides = arguments
    folder, code = _laid_out(job, [*_size_of_job(), *overrides, "cluster.executor=slurm"])
    write_atomically(Path(start), "\n".join(start_lines(code, shlex.quote(str(folder.path)))) + "\n")


def _laid_out(job: str, overrides: Sequence[str]) -> tuple[RunFolder, Path]:
    """The folder of this job's run, and its code; the other runs are made with it, so that all agree on their names."""
    experiment = api.plan(job, overrides).experiment
    with locked(experiment.submit_lock, patience_s=PATIENCE_S):
        planned = api.plan(job, overrides)
        configs, folders = [run.config for run in planned.runs], [run.folder for run in planned.placed]
        mine = _element(len(configs))
        check_inputs(configs[mine])
        check_container(configs[mine].container, needed_paths(configs[mine], folders[mine]))
        code = take_snapshot(experiment)
        start = {**provenance(), "code": str(code)}
        for index, (config, folder) in enumerate(zip(configs, folders, strict=True)):
            if index == mine or not folder.config.exists():
                lay_out(config, folder, start)
                folder.script.write_text(single_scripts([(config, folder)], code)[folder])
    return folders[mine], code


def _element(num_runs: int) -> int:
    """Which run of a sweep this element of an array is."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None and num_runs > 1:
        raise ConfigError(
            f"the sweep makes {num_runs} runs: sbatch --array=0-{num_runs - 1} slurm/posttrain.sbatch ..."
        )
    if int(task or 0) >= num_runs:
        raise ConfigError(f"this is element {task}, but the file makes {num_runs} runs: --array=0-{num_runs - 1}")
    return int(task or 0)


def _size_of_job() -> list[str]:
    """Nodes, ranks a node, and the GPUs of this one."""
    told = {"trainer.num_nodes": "JOB_NUM_NODES", "trainer.devices": "NTASKS_PER_NODE"}
    size = {key: os.environ.get(f"SLURM_{name}") for key, name in told.items()}
    size["cluster.gpus_per_node"] = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return [f"{key}={value}" for key, value in size.items() if value]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
