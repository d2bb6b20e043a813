"""Every setting of a run: its name, type, default, meaning, and the values it refuses.

Fields whose metadata says `identity: False` don't change the result and so don't name the run
(see `run_folder.run_hash`); those that say `expands: True` take environment variables and `~`.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from cosmos_hpc.config.container_schema import ContainerConfig, refuse_secrets
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


DECODERS = ("decord", "pyav", "torchcodec")
CLIP_STARTS = ("any", "keyframe")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset and the clips taken from it."""

    path: str | None = expands(None, is_path=True)
    """Dataset folder that `cosmos-hpc prepare` (or `energon prepare`) has indexed, here or as s3://BUCKET/FOLDER or
    msc://PROFILE/FOLDER; or a Metadataset, a YAML file that blends such folders."""

    general_path: str | None = expands(None, is_path=True, identity=False)
    """Second dataset, of video unlike the first: its split val is validated beside, to see what is forgotten."""

    num_frames: int = 33
    """Frames per clip, T = 1 + k x temporal compression: the tokenizers are causal in time."""

    crop_size: int = 256
    """Height and width of a clip in pixels, a multiple of the tokenizer's spatial compression."""

    shapes: dict[str, float] = field(default_factory=dict)
    """Shapes of training clips, TxHxW, each with its weight, such as {33x256x256: 3, 9x256x448: 1}: one is drawn for
    each step. None: num_frames and crop_size, which validation keeps to. Videos need the frames of the longest."""

    image_path: str | None = expands(None, is_path=True)
    """Dataset of images from which the shapes of one frame, such as 1x512x512, are cut; none: from the videos."""

    masks: bool = False
    """Weigh L1, VGG16's and Gram's terms by KEY.mask.png or KEY.mask.mp4 of a sample: white counts, black does not."""

    micro_batch_size: int = neutral(1)
    """Clips per rank in one forward."""

    global_batch_size: int = 8
    """Clips per step over all ranks; a multiple of micro_batch_size x ranks."""

    num_workers: int = neutral(8)
    """Decoding processes per rank, where num_streams does not decide."""

    num_streams: int | None = None
    """Independent sample streams over all ranks, fixed at the first start: num_workers x ranks where not given."""

    shuffle_buffer_size: int = 100
    """Encoded videos held per worker to draw from."""

    decoder: str = neutral("decord")
    """`decord`, `pyav` or `torchcodec`; where it can't decode a video, another one tries."""

    frame_stride: int = 1
    """Frames of the video from one frame of a clip to the next."""

    fps: float | None = None
    """Frames of a clip per second of the video, in place of frame_stride; slower videos give each frame once."""

    resize: int | None = None
    """What the shorter side of the picture is brought to before clips are cut out, in pixels; none: left as it is."""

    flip: float = 0.0
    """Share of the clips that are mirrored, left for right."""

    clip_start: str = "keyframe"
    """`any` frame, or near a `keyframe` where these are over two clips apart on average: cheaper, with fewer starts."""

    clips_per_decode: int = 4
    """Clips out of one decoded stretch of a video: cheaper, but they lie close in time. A pass has them all."""

    clip_buffer_size: int = 32
    """Decoded clips held per worker, 6.5 MB each at 33x256x256, to draw from where clips_per_decode is above 1."""

    decode_timeout_s: float = neutral(5.0)
    """Seconds of the processor that decoding a clip may take; then its video is left out for the rest of the run."""

    max_bad_share: float = neutral(0.5)
    """Share of a rank's videos, and at least ten, that have to be unusable for the run to stop; 1: no limit."""

    def __post_init__(self) -> None:
        at_least_one = ("num_frames", "crop_size", "micro_batch_size", "global_batch_size", "shuffle_buffer_size")
        for name in (*at_least_one, "frame_stride", "clips_per_decode", "clip_buffer_size"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name} is {value}, but must be at least 1")
        require(
            self.num_workers >= 0, f"data.num_workers is {self.num_workers}: set 0 (decode in the rank itself) or more"
        )
        require(self.decoder in DECODERS, f"data.decoder is {self.decoder}, but takes one of {', '.join(DECODERS)}")
        require(
            self.clip_start in CLIP_STARTS,
            f"data.clip_start is {self.clip_start}, but takes one of {', '.join(CLIP_STARTS)}",
        )
        require(
            self.fps is None or (self.fps > 0 and self.frame_stride == 1),
            f"data.fps is {self.fps} and data.frame_stride is {self.frame_stride}: set a positive fps or a stride",
        )
        require(
            self.resize is None or self.resize >= self.crop_size,
            f"data.resize is {self.resize}, less than data.crop_size {self.crop_size}: set at least as much",
        )
        require(0 <= self.flip <= 1, f"data.flip is {self.flip}: set a share from 0 to 1")
        self._check_shapes()
        require(self.decode_timeout_s > 0, f"data.decode_timeout_s is {self.decode_timeout_s}: set a number of seconds")
        require(
            0 <= self.max_bad_share <= 1,
            f"data.max_bad_share is {self.max_bad_share}: set a share from 0 to 1",
        )

    @property
    def clip_shapes(self) -> dict[tuple[int, int, int], float]:
        """T, H and W of training clips, and the weight of each."""
        if not self.shapes:
            return {(self.num_frames, self.crop_size, self.crop_size): 1.0}
        return {_sides(shape): weight for shape, weight in self.shapes.items()}

    def _check_shapes(self) -> None:
        for shape, weight in self.shapes.items():
            require(
                re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", shape) is not None,
                f"data.shapes names {shape}, but takes frames x height x width: such as 33x256x256",
            )
            require(weight > 0, f"data.shapes gives {shape} the weight {weight}: set it above 0, or leave it out")
        require(
            self.image_path is None or any(frames == 1 for frames, _, _ in self.clip_shapes),
            "data.image_path is set, but data.shapes holds no shape of one frame: add one, such as 1x512x512: 1",
        )
        require(
            self.image_path is None or any(frames > 1 for frames, _, _ in self.clip_shapes),
            "data.image_path is set, but data.shapes holds images alone: name that dataset as data.path instead",
        )


def _sides(shape: str) -> tuple[int, int, int]:
    frames, height, width = map(int, shape.split("x"))
    return frames, height, width


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
        micro, ranks, total = self.data.micro_batch_size, self.trainer.world_size, self.data.global_batch_size
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
