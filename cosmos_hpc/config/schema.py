"""Every setting of a run: its name, type, default, meaning, and the values it refuses.

Fields whose metadata says `identity: False` don't change the result and so don't name the run
(see `run_folder.run_hash`); those that say `expands: True` take environment variables and `~`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from cosmos_hpc.config.cluster_schema import ClusterConfig
from cosmos_hpc.config.container_schema import ContainerConfig
from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.fields import expands, neutral, require
from cosmos_hpc.config.loss_schema import LossConfig

TOKENIZER_NAME = re.compile(r"(?:^|-)(?P<kind>CV|DV)(?P<temporal>[48])x(?P<spatial>8|16)x(?P=spatial)(?:-720p)?$")

PARTS = {"all": ("*",), "decoder": ("decoder.*", "post_quant_conv.*"), "encoder": ("encoder.*", "quant_conv*")}
"""Names that model.trainable may give to patterns."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which tokenizer, and the weights it starts from."""

    model: str = "Cosmos-1.0-Tokenizer-CV8x8x8"
    """Released tokenizer by name: any name that ends in CV8x8x8, DV8x16x16, CV4x8x8 and the like."""

    jit_ckpt_pth: str | None = expands(None, is_path=True, may_be_repository=True)
    """Weights to start from: a folder with autoencoder.jit, an export, a run, a checkpoint, or the name of a repository
    that `cosmos-hpc fetch` has brought; none: random weights."""

    channels: int = 128
    """Base width of the network. The released tokenizers have 128; narrower ones are for trials on small machines."""

    formulation: str = "AE"
    """`AE`, as released, or for CV `VAE`: training also learns a variance of each latent and samples, and loss.kl acts.
    What is exported is the same either way, with the mean as latent."""

    trainable: Any = "all"
    """What training moves: `all`, `decoder`, `encoder`, or patterns of parameter names such as `[decoder.up.*]`.
    `decoder` keeps the latents, and so every world model and cache that was made for them."""

    def __post_init__(self) -> None:
        require(
            self.formulation == "AE" or (self.formulation == "VAE" and self.kind == "CV"),
            f"model.formulation is {self.formulation!r}: set AE, or VAE for a CV tokenizer",
        )
        listed = self.trainable if isinstance(self.trainable, (list, tuple)) else ()
        require(
            any(self.trainable == part for part in PARTS)
            or (len(listed) > 0 and all(isinstance(pattern, str) and pattern for pattern in listed)),
            f"model.trainable is {self.trainable!r}: set all, decoder, encoder, or a list of patterns of parameter "
            "names, such as [decoder.up.*]",
        )
        require(
            TOKENIZER_NAME.search(self.model) is not None,
            f"model.model is {self.model!r}, which names no Cosmos video tokenizer: "
            "set one that ends in CV8x8x8, DV8x16x16, CV4x8x8, CV8x16x16, DV4x8x8 or DV8x8x8",
        )
        require(
            self.channels >= 1,
            f"model.channels is {self.channels}, but a network needs at least one: the released width is 128",
        )

    @property
    def trainable_patterns(self) -> tuple[str, ...]:
        """Shell-style patterns of the names of the parameters that training moves."""
        return PARTS[self.trainable] if isinstance(self.trainable, str) else tuple(self.trainable)

    @property
    def may_train_encoder(self) -> bool:
        """Whether a pattern can match a parameter that latents depend on, by what it says before its first wildcard."""
        heads = [re.split(r"[*?[]", pattern)[0] for pattern in self.trainable_patterns]
        names = [name.rstrip("*") for name in PARTS["encoder"]]
        return any(name.startswith(head) or head.startswith(name) for head in heads for name in names)

    @property
    def kind(self) -> str:
        """`CV` (continuous latents) or `DV` (discrete indices)."""
        return TOKENIZER_NAME.search(self.model)["kind"]  # type: ignore[index]  # checked in __post_init__

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, after the first one."""
        return int(TOKENIZER_NAME.search(self.model)["temporal"])  # type: ignore[index]

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent cell, along height and along width."""
        return int(TOKENIZER_NAME.search(self.model)["spatial"])  # type: ignore[index]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long to train, on how many processes, and how often to look."""

    max_steps: int = 5000
    """Optimizer steps of the whole run; without limit where only max_epochs is given."""

    max_epochs: int | None = neutral(None)
    """Passes over the training videos: the run ends after these or max_steps, whichever comes first."""

    num_nodes: int = neutral(1)
    """Nodes of the job."""

    min_nodes: int | None = neutral(None)
    """Nodes with which a run that lost some goes on in the same job; none: it goes back to the queue for all."""

    devices: int = neutral(1)
    """Ranks per node: one per GPU, or processes on a machine without one."""

    precision: str = "bf16"
    """`bf16` (compute in bfloat16, weights stay float32) or `32`."""

    activation_checkpointing: bool = neutral(False)
    """Keep fewer activations and compute them again in the backward: slower, for clips that don't fit otherwise."""

    compile: str = neutral("auto")
    """`auto` (on a GPU, unless compiled code fails or differs from eager), `required` (stop then) or `off`."""

    seed: int = 1234
    """Seeds the fresh weights, the order of the samples and every random crop."""

    val_every_n_minutes: float = neutral(5.0)
    """Minutes between two validations, or more where these would take over 3 % of the time; the first one comes before
    step 1, the last one after the last step."""

    val_check_interval: int | None = neutral(None)
    """Steps between two validations, in place of the minutes."""

    limit_val_batches: int = neutral(8)
    """Batches per rank in one validation."""

    log_every_n_steps: int = neutral(10)
    """Steps between two lines in the log; metrics.jsonl holds every step."""

    max_skipped_steps: int = 3
    """Updates in a row that may be left out because the loss or gradient is not finite, before a roll-back."""

    max_rollbacks: int = 2
    """Times that a start goes back to its newest checkpoint, past the clips that did it, before it stops."""

    def __post_init__(self) -> None:
        require(self.max_rollbacks >= 0, f"trainer.max_rollbacks is {self.max_rollbacks}, but can't be negative")
        for name in (
            "max_steps",
            "max_epochs",
            "num_nodes",
            "devices",
            "val_check_interval",
            "limit_val_batches",
            "log_every_n_steps",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"trainer.{name} is {value}, but must be at least 1")
        require(
            self.val_every_n_minutes > 0, f"trainer.val_every_n_minutes is {self.val_every_n_minutes}: set it above 0"
        )
        require(
            self.min_nodes is None or 1 <= self.min_nodes <= self.num_nodes,
            f"trainer.min_nodes is {self.min_nodes}, but takes 1 to trainer.num_nodes = {self.num_nodes}",
        )
        require(
            self.precision in ("bf16", "32"),
            f"trainer.precision is {self.precision!r}: set bf16 (float32 weights, bfloat16 compute) or 32",
        )
        if self.compile == "False":  # what YAML takes an unquoted off for
            object.__setattr__(self, "compile", "off")
        require(
            self.compile in ("auto", "required", "off"),
            f"trainer.compile is {self.compile!r}: set auto, required or off",
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.devices


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-4
    """Learning rate after warm-up."""

    betas: tuple[float, float] = (0.5, 0.999)
    """Decay rates of Adam's two moments."""

    eps: float = 1e-8
    """Added to Adam's denominator."""

    weight_decay: float = 0.01
    """Decoupled decay, on weights of two or more dimensions only."""

    warmup_steps: int = 200
    """Steps over which the rate rises from 0 to lr."""

    lr_schedule: str = "constant"
    """What follows the warm-up: `constant`, or a fall to min_lr along a `cosine` or a `linear` ramp."""

    min_lr: float = 0.0
    """Where the rate falls to."""

    decay_steps: int | None = None
    """Step at which it is there, and stays; none: trainer.max_steps."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    ema_decay: float = 0.999
    """Decay of the moving average of the weights, reached by (1 + step) / (10 + step); 0 keeps no average."""

    use_distributed_optimizer: bool = False
    """Spread Adam's moments over the ranks: less memory each, for a gather of the weights in every step."""

    def __post_init__(self) -> None:
        require(
            0 <= self.ema_decay < 1, f"optim.ema_decay is {self.ema_decay}, but must lie in [0, 1): 0 keeps no average"
        )
        require(self.lr > 0, f"optim.lr is {self.lr}, but must be above 0")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {list(self.betas)}, but both must lie in [0, 1)",
        )
        require(self.eps > 0, f"optim.eps is {self.eps}, but must be above 0")
        require(
            self.lr_schedule in ("constant", "cosine", "linear"),
            f"optim.lr_schedule is {self.lr_schedule!r}: set constant, cosine or linear",
        )
        require(
            0 <= self.min_lr <= self.lr,
            f"optim.min_lr is {self.min_lr}, but must lie between 0 and optim.lr={self.lr}",
        )
        for name in ("weight_decay", "warmup_steps", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name} is {value}, but can't be negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_n_minutes: float = 10.0
    """Minutes between two checkpoints; preemption and the last step save as well."""

    every_n_steps: int | None = None
    """Steps between two checkpoints, in addition to the minutes."""

    keep: int = 3
    """Checkpoints kept, newest first."""

    best_by: str | None = "val_psnr"
    """Validation score whose best checkpoint is kept beside these, saved at its step: val_psnr, val_ssim or val_lpips,
    with _ema for that of the averaged weights, with general_ in place of val_ for those on data.general_path; none
    keeps no such one."""

    def __post_init__(self) -> None:
        require(self.every_n_minutes > 0, f"checkpoint.every_n_minutes is {self.every_n_minutes}, but must be above 0")
        require(
            self.every_n_steps is None or self.every_n_steps >= 1,
            f"checkpoint.every_n_steps is {self.every_n_steps}, but must be at least 1",
        )
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}, but must be at least 1")
        names = [f"{name}{kind}" for kind in ("", "_ema") for name in ("psnr", "ssim", "lpips")]
        scores = [f"{split}_{name}" for split in ("val", "general") for name in names]
        require(
            self.best_by is None or self.best_by in scores,
            f"checkpoint.best_by is {self.best_by!r}: set {', '.join(scores)} or null",
        )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. metrics.jsonl in the run folder is written whatever is set here."""

    mode: str = "auto"
    """`online`, `offline` (in the run's folder, for `wandb sync`), `disabled`, or `auto`: WANDB_MODE, else online where
    the key is set and the network is there, else offline."""

    project: str | None = None
    """Project that the run is filed under; none: WANDB_PROJECT_NAME of the environment, else cosmos-hpc."""

    entity: str | None = None
    """Team or user that owns the project."""

    api_key_env: str = "WANDB_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never a setting."""

    log_media: bool = False
    """Send a picture of a clip and its reconstruction with each validation. They then leave the machine."""

    def __post_init__(self) -> None:
        require(
            self.mode in ("auto", "online", "offline", "disabled"),
            f"wandb.mode is {self.mode!r}: set auto, online, offline or disabled",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: the settings of an experiment file after one choice of its sweep."""

    name: str = expands("train")
    """Experiment; its runs lie in runs/<name>/. Letters, digits, `_`, `-` and `.`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Network and starting weights."""

    data: DataConfig = field(default_factory=DataConfig)
    """Dataset and clips."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, ranks, validation."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""

    loss: LossConfig = field(default_factory=LossConfig)
    """Loss terms."""

    checkpoint: CheckpointConfig = neutral(CheckpointConfig())
    """Saving."""

    container: ContainerConfig = neutral(ContainerConfig())
    """Image of the ranks."""

    cluster: ClusterConfig = neutral(ClusterConfig())
    """Scheduler and what is asked of it."""

    wandb: WandbConfig = neutral(WandbConfig())
    """Online tracking."""

    after: tuple[str, ...] = neutral(())
    """Experiments that have to be finished first, or SLURM jobs by name or number, such as one that packs the data.
    Jobs wait in the queue; runs of this machine don't wait, and are refused until then."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[\w.-]+", self.name) is not None and not self.name.startswith("."),
            f"name is {self.name!r}, but names a folder: use letters, digits, _ and -",
        )
        self._check_clip_size()
        self._check_batch()
        self._check_loss()
        optim, best_by = self.optim, self.checkpoint.best_by or ""
        require(
            optim.ema_decay > 0 or not best_by.endswith("_ema"),
            f"checkpoint.best_by is {best_by}, but optim.ema_decay is 0: there is no average to validate",
        )
        require(
            self.loss.looks_through_vgg(self.trainer.max_steps) or "lpips" not in best_by,
            f"checkpoint.best_by is {best_by}, but loss.lpips.weight is 0: without VGG16 there is no such score",
        )
        require(
            self.data.general_path is not None or not best_by.startswith("general_"),
            f"checkpoint.best_by is {best_by}, but data.general_path is not set: name that dataset",
        )
        require(
            optim.lr_schedule == "constant" or self.lr_decay_steps > optim.warmup_steps,
            f"optim.warmup_steps is {optim.warmup_steps}, but optim.lr_schedule {optim.lr_schedule} ends at step "
            f"{self.lr_decay_steps} (optim.decay_steps, else trainer.max_steps): set fewer",
        )

    @property
    def num_streams(self) -> int:
        """Sample streams over all ranks: `data.num_streams`, else what the first start fixes it to."""
        chosen = self.data.num_streams
        return self.data.num_workers * self.trainer.world_size if chosen is None else chosen

    @property
    def fitting_micro_batches(self) -> list[int]:
        """Values of `data.micro_batch_size` that share a step evenly, on any number of nodes that the run may have."""
        trainer, total = self.trainer, self.data.global_batch_size
        nodes = range(trainer.num_nodes if trainer.min_nodes is None else trainer.min_nodes, trainer.num_nodes + 1)
        ranks = [number * trainer.devices for number in nodes]
        share = math.gcd(*(total // number for number in ranks if total % number == 0))
        return [size for size in range(1, share + 1) if share % size == 0]

    @property
    def gpus_per_node(self) -> int:
        """GPUs that a job asks for on each node."""
        asked = self.cluster.gpus_per_node
        return self.trainer.devices if asked is None else asked

    @property
    def lr_decay_steps(self) -> int:
        """Step at which the learning rate is at its least, where it falls."""
        return self.trainer.max_steps if self.optim.decay_steps is None else self.optim.decay_steps

    def _check_clip_size(self) -> None:
        data = self.data
        self._check_sides("data.num_frames", data.num_frames, "data.crop_size", data.crop_size)
        for frames, height, width in data.clip_shapes if data.shapes else ():
            where = f"data.shapes: {frames}x{height}x{width}"
            self._check_sides(f"{where}, frames,", frames, f"{where}, height,", height)
            self._check_sides(f"{where}, frames,", frames, f"{where}, width,", width)

    def _check_sides(self, frames_of: str, frames: int, side_of: str, side: int) -> None:
        temporal, spatial = self.model.temporal_compression, self.model.spatial_compression
        require(
            frames % temporal == 1,
            f"{frames_of} is {frames}, but {self.model.model} takes 1 + {temporal}k: "
            f"set {' or '.join(str(1 + near) for near in _multiples_around(frames - 1, temporal, least=0))}",
        )
        require(
            side % spatial == 0,
            f"{side_of} is {side}, but {self.model.model} takes multiples of {spatial}: "
            f"set {' or '.join(map(str, _multiples_around(side, spatial, least=spatial)))}",
        )

    def _check_batch(self) -> None:
        micro, ranks, total = self.data.micro_batch, self.trainer.world_size, self.data.global_batch_size
        require(
            total % (micro * ranks) == 0,
            f"data.global_batch_size is {total}, but must be a multiple of data.micro_batch_size x ranks "
            f"= {micro} x {ranks}: set {' or '.join(map(str, _multiples_around(total, micro * ranks, micro * ranks)))}",
        )
        streams = self.data.num_streams
        require(
            streams is None or (streams >= 0 and streams % ranks == 0),
            f"data.num_streams is {streams}, but must divide evenly over {ranks} ranks: "
            f"set a multiple of {ranks}, or change trainer.devices and trainer.num_nodes",
        )

    def _check_loss(self) -> None:
        loss, steps = self.loss, self.trainer.max_steps
        require(
            self.model.formulation == "VAE" or not loss.kl.is_used(steps),
            "loss.kl.weight is above 0, but model.formulation is AE, whose latents have no distribution: set "
            f"{'it to 0' if self.model.kind == 'DV' else 'VAE, or the weight to 0'}",
        )
        require(
            self.model.kind == "DV" or not loss.fsq_entropy.is_used(steps),
            f"loss.fsq_entropy.weight is above 0, but {self.model.model} has no codes: set it to 0",
        )
        for name in ("kl", "fsq_entropy"):
            require(
                self.model.may_train_encoder or not getattr(loss, name).is_used(steps),
                f"loss.{name}.weight is above 0, but model.trainable leaves the encoder as it is: set it to 0",
            )
        if loss.flow.is_used(steps):
            require(loss.flow.weights is not None, "loss.flow.weight is above 0: name RAFT-large in loss.flow.weights")
            setting = "data.shapes" if self.data.shapes else "data.num_frames and data.crop_size"
            for frames, *sides in self.data.clip_shapes:
                require(frames > 1, f"loss.flow.weight is above 0, but a clip of {setting} has 1 frame: nothing moves")
                for side in sides:
                    require(
                        side >= 256 and side % 16 == 0,
                        f"{setting} has a side of {side}, but loss.flow sees half of it, and RAFT takes 128 pixels "
                        "and more in multiples of 8: set 256 or a larger multiple of 16",
                    )
        if loss.consistency.is_used(steps):
            self._check_windows()

    def _check_windows(self) -> None:
        for frames in sorted({frames for frames, _, _ in self.data.clip_shapes}):
            self._check_windows_of(frames)

    def _check_windows_of(self, frames: int) -> None:
        temporal, windows = self.model.temporal_compression, self.loss.consistency
        setting = "those of data.shapes" if self.data.shapes else "data.num_frames"
        require(
            windows.num_frames % temporal == 1 and windows.num_frames < frames,
            f"loss.consistency.num_frames is {windows.num_frames}, but takes 1 + {temporal}k below {setting} "
            f"= {frames}: set {', '.join(str(1 + k) for k in range(0, frames - 1, temporal))}",
        )
        require(
            0 < windows.step < windows.num_frames
            and windows.step % temporal == 0
            and (frames - windows.num_frames) % windows.step == 0,
            f"loss.consistency.step is {windows.step}, but windows of {windows.num_frames} frames have to overlap, "
            f"cover all {frames} frames and lie multiples of {temporal} apart: set {temporal}",
        )


def _multiples_around(value: int, factor: int, least: int) -> list[int]:
    """The multiples of `factor` on both sides of a value, none below `least`."""
    below = value // factor * factor
    return sorted({max(least, below), max(least, below + factor)})


def identity(config: Any) -> dict[str, Any]:
    """The settings that change the result, nested as in YAML; every other setting is left out."""
    settings = {}
    for item in dataclasses.fields(config):
        if item.metadata.get("identity", True):
            value = getattr(config, item.name)
            settings[item.name] = identity(value) if dataclasses.is_dataclass(value) else value
    return settings
