"""Whether a micro batch fits the GPU: an estimate from measured figures, against the card's name."""

import math
import shutil
import subprocess
from collections.abc import Iterator

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.estimates import Gpu, gpu_of, memory_gb
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned

TIGHT = 0.9
"""Share of a card above which fragments of memory can end a run."""


def memory(case: Case) -> Iterator[Finding]:
    """The largest of the runs against the smallest card that they may get."""
    largest = max(case.distinct(lambda run: (run.model, run.data, run.trainer, run.optim, run.cluster)), key=memory_gb)
    data, needed = largest.data, memory_gb(largest)
    shape = " x ".join(map(str, max(data.clip_shapes, key=math.prod)))
    size = f"{data.micro_batch_size} x {shape}"
    what = f"about {needed:.1f} GB at {size} ({largest.trainer.precision}), an estimate"
    gpu = gpu_of(largest, case) or _of_this_machine(case, largest)
    if gpu is None:
        if largest.cluster.gpus_per_node != 0 and case.is_on_slurm:
            yield passed("memory", f"{what}; neither GRES nor profile names a card that is known here")
        return
    mend = "set data.micro_batch_size or the clip lower, trainer.activation_checkpointing=true, or choose larger cards"
    if needed > gpu.most_gb:
        yield failed("memory", f"{what}, but {gpu.name} has {gpu.most_gb:g} GB: {mend}")
    elif needed > TIGHT * gpu.least_gb:
        yield warned("memory", f"{what}; {gpu.name} has {gpu.least_gb:g} GB: {mend}")
    else:
        yield passed("memory", f"{what}; {gpu.name} has {gpu.least_gb:g} GB")


def _of_this_machine(case: Case, run: RunConfig) -> Gpu | None:
    """The smallest card here, for runs that stay here."""
    if case.is_on_slurm or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    sizes = [int(line) * 2**20 / 1e9 for line in done.stdout.split() if line.isdecimal()]
    return Gpu("the GPU here", min(sizes), min(sizes)) if sizes else None
