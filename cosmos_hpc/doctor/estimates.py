"""What runs take of memory, disk and time: as last measured with the same settings, else estimated from few figures.

Measured were one H100 at 33 x 256 x 256, bfloat16, CV8x8x8 with VGG16 (benchmarks/README.md); what is said to be
assumed was not.
"""

import math
import re
from typing import NamedTuple

from cosmos_hpc.config.run_folder import runs_folder
from cosmos_hpc.config.schema import ModelConfig, RunConfig
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.launch.forecast import forecasts, measured_stop

RELEASED_WIDTH = 128
PARAMETERS = {(8, 8): 105_653_696, (4, 8): 104_669_888, (8, 16): 110_898_624}
"""Of the released tokenizers, by temporal and spatial compression; a DV differs by some hundreds."""

VOXELS = 33 * 256 * 256
"""Of the clip that was measured."""

CONTEXT_BYTES = 1.35e9
"""CUDA, NCCL, VGG16 and work space: what is left of 6.1 GB at one clip, after a clip and the states below."""

CLIP_BYTES = 2.63e9
"""Of each further clip in a micro batch. 14 GB at four are assumed, between what was measured compiled (11.1) and eager
(15.7), both without CUDA graphs."""

KEPT = 0.6
"""Share of that with trainer.activation_checkpointing; a guess on the safe side."""

CLIPS_PER_S = {"h200": 30.0, "h100": 30.0, "b200": 30.0, "a100": 12.0}
"""Of one GPU in training: near what an H100 was measured at, assumed for the others; any other counts as a tenth."""

SAVE_BYTES_PER_S = 4e8
"""Of a checkpoint to a disk, with its digests: 1.6 GB took 3.7 s."""

MEMORY_GB = {
    "gb200": (186, 186), "gb300": (279, 279), "b300": (270, 288), "b200": (180, 192), "gh200": (96, 144),
    "h200": (141, 141), "h100": (80, 96), "h800": (80, 80), "h20": (96, 141), "a100": (40, 80), "a800": (40, 80),
    "l40s": (48, 48), "l40": (48, 48), "a6000": (48, 48), "a40": (48, 48), "a30": (24, 24), "a10": (24, 24),
    "l4": (24, 24), "v100": (16, 32), "t4": (16, 16),
}  # fmt: skip
"""Least and most memory of cards of a name."""


class Gpu(NamedTuple):
    """A card by its name."""

    name: str
    """As above, or as the cluster calls it."""

    least_gb: float
    """Memory of the smallest card of that name, in 10^9 bytes."""

    most_gb: float
    """Of the largest."""


class Leave(NamedTuple):
    """What a run needs from being told until it is gone with a checkpoint."""

    step_s: float | None
    """Its longest step; none where nothing is known of it."""

    save_s: float
    """Its checkpoint."""

    source: str
    """Where both are from."""

    @property
    def total_s(self) -> float | None:
        """Both together."""
        return None if self.step_s is None else self.step_s + self.save_s

    def __str__(self) -> str:
        if self.step_s is None:
            return f"a checkpoint takes about {self.save_s:.0f} s, and how long a step takes was never measured"
        return f"a step and a checkpoint take {self.step_s:.1f} + {self.save_s:.1f} s ({self.source})"


def num_parameters(model: ModelConfig) -> float:
    """Of a network, roughly: it grows with the square of its width."""
    released = PARAMETERS.get((model.temporal_compression, model.spatial_compression), PARAMETERS[8, 8])
    return released * (model.channels / RELEASED_WIDTH) ** 2


def checkpoint_bytes(run: RunConfig) -> int:
    """Of one checkpoint: weights and moments of four bytes each, and the average."""
    copies = 3 + (run.optim.ema_decay > 0)
    return int(4 * copies * num_parameters(run.model))


def memory_gb(run: RunConfig) -> float:
    """What a rank holds on its GPU, in 10^9 bytes; without a discriminator and without optical flow."""
    ranks = run.trainer.world_size if run.optim.use_distributed_optimizer else 1
    states = num_parameters(run.model) * (8 + 8 / ranks + 4 * (run.optim.ema_decay > 0))
    width, bits = run.model.channels / RELEASED_WIDTH, 1 if run.trainer.precision == "bf16" else 2
    clips = run.data.micro_batch * largest_clip(run) / VOXELS * (KEPT if run.trainer.activation_checkpointing else 1)
    return (CONTEXT_BYTES + states + CLIP_BYTES * clips * max(width, 0.3) * bits) / 1e9


def largest_clip(run: RunConfig) -> int:
    """Voxels of the largest clip in training."""
    return max(math.prod(shape) for shape in run.data.clip_shapes)


def gpu_named(*words: str | None) -> Gpu | None:
    """The smallest card that types, features or partitions speak of; none where no known name is among them."""
    text = " ".join(word for word in words if word).lower()
    slices = [float(size) for size in re.findall(r"\dg[._](\d+)gb", text)]
    if slices:
        return Gpu(f"a slice of {min(slices):g} GB", min(slices), min(slices))
    found = [
        Gpu(name, *_sized(name, text)) for name in MEMORY_GB if re.search(rf"(?<![a-z0-9]){name}(?![0-9a-z])", text)
    ]
    return min(found, key=lambda gpu: gpu.least_gb, default=None)


def leave(run: RunConfig, case: Case) -> Leave:
    """What a run needs to leave: measured, else estimated."""
    root = runs_folder()
    size = forecasts([run], [case.experiment.place([run])[0]], root)[0].checkpoint_bytes
    kept = run.checkpoint.keep + (run.checkpoint.best_by is not None)
    save_s = (checkpoint_bytes(run) if size is None else size / kept) / SAVE_BYTES_PER_S
    measured = measured_stop(run, root)
    if measured is not None:
        return Leave(measured.step_s, measured.save_s or save_s, f"as measured in {measured.measured_in}")
    gpu = gpu_of(run, case)
    if gpu is None:
        return Leave(None, save_s, "estimated")
    per_s = CLIPS_PER_S.get(gpu.name, 3.0) * VOXELS / largest_clip(run)
    return Leave(run.data.global_batch_size / run.trainer.world_size / per_s, save_s, "estimated")


def gpu_of(run: RunConfig, case: Case) -> Gpu | None:
    """The card that a run's ranks get, by what the profile and the cluster call it; none where there is none."""
    if run.cluster.gpus_per_node == 0 or not case.is_on_slurm:
        return None
    wished = [str(value) for name, value in run.cluster.directives.items() if name.startswith(("gres", "gpus"))]
    return (
        gpu_named(*wished, run.cluster.constraint)
        or gpu_named(*(kind for row in case.rows for kind in row.gpu_types))
        or gpu_named(run.cluster.partition)
    )


def _sized(name: str, text: str) -> tuple[float, float]:
    """Memory of a card, which its name may say: a100_80g, a100-sxm4-40gb."""
    said = re.search(rf"{name}[\w-]*?[_-](\d{{2,3}})gb?(?![a-z0-9])", text)
    return (float(said[1]), float(said[1])) if said else MEMORY_GB[name]
