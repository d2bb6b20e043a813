"""Where jobs run, what they ask for, and how often they start again."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cosmos_hpc.config.container_schema import refuse_secrets
from cosmos_hpc.config.fields import neutral, require


@dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """How often the ranks are started again after faults of each kind that follow without a new checkpoint between."""

    node_failure: int = 5
    """Restarts after the loss of a node."""

    gpu_error: int = 3
    """Restarts after a GPU that failed (Xid, uncorrectable ECC, CUDA error)."""

    lost_ranks: int = 3
    """Restarts after a NCCL or gloo error that no rank explains."""

    hang: int = 2
    """Restarts after ranks without a sign of life."""

    killed: int = 3
    """Restarts after a rank that was killed from outside."""

    supervisor_killed: int = 3
    """Restarts by SLURM after a supervisor that was killed."""

    out_of_memory: int = 1
    """Restarts after memory of a host or a GPU that ran out; at the same step twice is the last."""

    disk_full: int = 3
    """Restarts after a full disk or quota, each once there is room again."""

    code_fault: int = 2
    """Restarts after any other error; the same one at the same step twice is the last."""

    backoff_s: float = 5.0
    """Seconds before the first restart after a fault; doubles with each further one, up to 64 times as many."""

    disk_wait_s: float = 300.0
    """Seconds to wait for room after a full disk before the run stops."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            require(value >= 0, f"cluster.restarts.{item.name} is {value}, but can't be negative")


@dataclass(frozen=True, kw_only=True)
class HangConfig:
    """When ranks without a sign of life count as hung; learned for each phase from the silences seen in it."""

    first_limit_s: float = 1800.0
    """Seconds of silence in a phase that this run has not been through yet, such as its first start."""

    least_limit_s: float = 300.0
    """Seconds below which a learned limit never falls."""

    factor: float = 5.0
    """Learned limit over the longest silence that ended by itself; each hang doubles it until a new checkpoint."""

    def __post_init__(self) -> None:
        for name in ("first_limit_s", "least_limit_s"):
            value = getattr(self, name)
            require(value > 0, f"cluster.hang.{name} is {value}, but must be above 0")
        require(self.factor >= 1, f"cluster.hang.factor is {self.factor}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where jobs run and what they ask for. Named in YAML by a file under slurm/, or `local`."""

    executor: str = "local"
    """`slurm`, or `local` for processes on this machine."""

    partition: str | None = None
    """SLURM partition; none leaves the choice to the cluster."""

    account: str | None = None
    """SLURM account that is charged."""

    qos: str | None = None
    """SLURM quality of service."""

    constraint: str | None = None
    """Node features that are required, such as h100."""

    reservation: str | None = None
    """Reservation to run in."""

    exclude: str | None = None
    """Nodes that are never used, such as node[3,7-9]."""

    time_limit_min: int = 240
    """Wall clock of one job in minutes, at most the partition's; the job requeues itself and goes on after it."""

    grace_s: int = 300
    """Seconds before the time limit at which the ranks are told to save."""

    cpus_per_task: int | None = None
    """CPU cores per rank."""

    gpus_per_node: int | None = None
    """GPUs asked for on each node; none: one per rank."""

    directives: dict[str, Any] = field(default_factory=dict)
    """Further sbatch options by their long names with underscores."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables set for the ranks, such as NCCL's."""

    container_mode: str | None = None
    """How this cluster runs images: `pyxis` or `enroot`. It counts where container.image is set and container.mode is
    not."""

    health_check_s: float = 10.0
    """Seconds that each node has, before every start of the ranks, to show that it is well; 0 leaves the check out."""

    restarts: RestartConfig = neutral(RestartConfig())
    """Budgets of restarts after faults."""

    hang: HangConfig = neutral(HangConfig())
    """Limits of silence."""

    def __post_init__(self) -> None:
        require(
            self.executor in ("slurm", "local"),
            f"cluster.executor is {self.executor!r}: set slurm or local",
        )
        require(
            self.container_mode in (None, "pyxis", "enroot"),
            f"cluster.container_mode is {self.container_mode!r}: set pyxis or enroot",
        )
        for name in ("time_limit_min", "grace_s"):
            value = getattr(self, name)
            require(value >= 1, f"cluster.{name} is {value}, but must be at least 1")
        refuse_secrets(self.environment, "cluster.environment")
        require(self.health_check_s >= 0, f"cluster.health_check_s is {self.health_check_s}, but can't be negative")
