"""The supervisor: one per job, on the host, outside the container. It starts the ranks and decides what follows."""

from cosmos_hpc.job.supervisor import Supervisor

__all__ = ["Supervisor"]
