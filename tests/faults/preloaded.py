"""What the fork server imports once, for all supervisors and ranks that are forked from it."""

import forked_run  # noqa: F401
import torch

from cosmos_hpc import train  # noqa: F401
from cosmos_hpc.data import loader  # noqa: F401
from cosmos_hpc.training import agreement, checkpoint, ema, loop, optimizer, recovery, telemetry, validation  # noqa: F401

torch.set_num_threads(1)  # no thread pool that a fork would lose
