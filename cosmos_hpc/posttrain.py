"""What `sbatch slurm/posttrain.sbatch JOB.yaml [key=value ...]` runs: lays a run out and becomes its supervisor."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cosmos_hpc import api
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.launch.batch import SUPERVISOR
from cosmos_hpc.launch.container import check_container
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.launch.provenance import provenance
from cosmos_hpc.launch.snapshot import take_snapshot
from cosmos_hpc.launch.step import needed_paths
from cosmos_hpc.preflight import check_inputs

PATIENCE_S = 120.0
"""How long the elements of an array wait for each other to lay their runs out."""


def main(arguments: Sequence[str]) -> NoReturn:
    """Lay the run out, at the size of this job, and become its supervisor, from a copy of the code.

    Raises:
        ConfigError: outside a job of SLURM, or for settings that can't work.
    """
    if not arguments or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("this is for a job of SLURM: sbatch slurm/posttrain.sbatch JOB.yaml [key=value ...]")
    folder, code = _laid_out(arguments[0], [*_size_of_job(), *arguments[1:], "cluster.executor=slurm"])
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    os.execv(sys.executable, [sys.executable, *SUPERVISOR.split(), str(folder.path)])


def _laid_out(job: str, overrides: Sequence[str]) -> tuple[RunFolder, Path]:
    """The folder of this job's run, and of its code; other runs are laid out with it, so that all agree on names."""
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
    nodes, tasks = (os.environ.get(f"SLURM_{name}") for name in ("JOB_NUM_NODES", "NTASKS_PER_NODE"))
    return [f"{key}={value}" for key, value in (("trainer.num_nodes", nodes), ("trainer.devices", tasks)) if value]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
