"""The SLURM options of a run: the one place that knows them."""

from typing import Any

from cosmos_hpc.config.schema import RunConfig

NO_LIMIT = 10**6
"""More than an array holds; where submitit is not told a number, it runs 256 at the same time."""

SETUP = ("trap : TERM",)
"""Bash outlives SIGTERM, so that the supervisor can finish its work."""

TEARDOWN = (
    "code=$?",
    "if [ $code -eq 137 ]; then  # the supervisor was killed, which left nobody to give the job back to the queue",
    "    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
    "    job=${job:-$SLURM_JOB_ID}  # never the raw id of an array's element: the last one's is the whole array's",
    '    if [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ]; then',
    '        scontrol requeue Incomplete "$job" && sleep 600  # SLURM ends this script',
    "    fi",
    "fi",
    "exit $code",
)
"""The last lines of the batch script; its exit code is the job's. A cancelled job is COMPLETING, not RUNNING."""


def task_directives(run: RunConfig) -> dict[str, Any]:
    """The options of a task on data, without GPUs.

    It is a step of its own, since SLURM warns steps alone before the time limit.
    """
    options = directives(run)
    del options["slurm_additional_parameters"]["gpus_per_node"]
    cpus = run.cluster.cpus_per_task  # srun takes no size over
    return options | {"slurm_use_srun": True, "slurm_srun_args": [f"--cpus-per-task={cpus}"] if cpus else []}


def directives(run: RunConfig, max_parallel: int | None = None) -> dict[str, Any]:
    """The options of one run, named as submitit's AutoExecutor names them.

    submitit itself is told one node and one task, the supervisor; the job's real size goes through the additional
    parameters (with underscores: a hyphened key would double the line).

    Args:
        run: what is submitted.
        max_parallel: elements of the array that may run at the same time; none: no limit.
    """
    cluster, trainer = run.cluster, run.trainer
    size: dict[str, Any] = {
        "requeue": True,
        "nodes": trainer.num_nodes,
        "ntasks_per_node": trainer.devices,
        "gpus_per_node": run.gpus_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "no_kill": None if trainer.min_nodes is None else True,  # the job outlives the loss of a node
        "reservation": cluster.reservation,
    }
    options: dict[str, Any] = {
        "name": run.name,
        "nodes": 1,
        "tasks_per_node": 1,
        "timeout_min": cluster.time_limit_min,
        "slurm_partition": cluster.partition,
        "slurm_account": cluster.account,
        "slurm_qos": cluster.qos,
        "slurm_constraint": cluster.constraint,
        "slurm_exclude": cluster.exclude,
        "slurm_signal_delay_s": cluster.grace_s,
        "slurm_use_srun": False,  # one supervisor in the batch step; it starts the ranks by its own srun
        "slurm_setup": list(SETUP),
        "slurm_teardown": list(TEARDOWN),
        "slurm_array_parallelism": max_parallel or NO_LIMIT,
        "slurm_additional_parameters": {k: v for k, v in {**size, **cluster.directives}.items() if v is not None},
    }
    return {name: value for name, value in options.items() if value is not None}
