"""What a batch script starts: the supervisor of one run."""

import contextlib
import os
import sys
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.job import Supervisor
from cosmos_hpc.launch.marks import forget_earlier_cancel
from cosmos_hpc.launch.step import slurm_job_id

if __name__ == "__main__":
    folder = RunFolder(Path(sys.argv[1]))
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":  # a requeue is as if sent anew, and older than no cancel
        with contextlib.suppress(ConfigError):  # the controller is down: the mark stays, and is seen
            forget_earlier_cancel(folder, slurm_job_id())
    Supervisor(folder.path)()
