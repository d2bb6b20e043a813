"""The terms of the loss: their weights over the steps of a run, and the networks that some look through."""

from dataclasses import dataclass, field

from cosmos_hpc.config.fields import expands, neutral, require


@dataclass(frozen=True, kw_only=True)
class LossTermConfig:
    """One term of the loss."""

    weight: float = 0.0
    """Factor of this term in the sum, up to the first boundary; 0 leaves it out."""

    boundaries: tuple[int, ...] = ()
    """Steps of the whole run at which the weight changes, rising."""

    values: tuple[float, ...] = ()
    """Weights from the boundaries on, one for each."""

    def __post_init__(self) -> None:
        require(
            self.weight >= 0 and all(value >= 0 for value in self.values),
            f"a loss weight is {min(self.weight, *self.values, 0.0)}, but can't be negative",
        )
        require(
            len(self.boundaries) == len(self.values),
            f"a loss term has {len(self.boundaries)} boundaries but {len(self.values)} values: "
            "set one weight from each boundary on; the one before the first is `weight`",
        )
        require(
            all(before < after for before, after in zip((-1, *self.boundaries), self.boundaries, strict=False)),
            f"boundaries of a loss term are {list(self.boundaries)}, but have to rise from 0 or more",
        )

    def weight_at(self, step: int) -> float:
        """Weight in the update that follows `step` others, whatever was resumed or cut into micro batches between."""
        weight = self.weight
        for boundary, value in zip(self.boundaries, self.values, strict=True):
            if step >= boundary:
                weight = value
        return weight

    def is_used(self, max_steps: int) -> bool:
        """Whether the weight is above zero in any step of a run of that length."""
        starts = (step for step in (0, *self._starts) if step < max_steps)
        return any(self.weight_at(step) > 0 for step in starts)

    @property
    def _starts(self) -> tuple[int, ...]:
        """Steps from which another weight holds."""
        return self.boundaries


@dataclass(frozen=True, kw_only=True)
class L1Config(LossTermConfig):
    """Mean absolute difference."""

    weight: float = 1.0
    """Factor of the mean absolute difference between clip and reconstruction, both in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig(LossTermConfig):
    """Distance in the features of VGG16."""

    weight: float = 0.1
    """Factor of the mean absolute difference of VGG16's features; 0 leaves it out, and needs no weights of VGG16."""

    weights: str = expands("timm/vgg16.tv_in1k", is_path=True, may_be_repository=True)
    """VGG16 trained on ImageNet, also for gram: a file, or REPOSITORY[:FILE] that `cosmos-hpc fetch` has brought."""

    chunk_frames: int = neutral(16)
    """Most frames that go through VGG16 at once: fewer take less memory for the same loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.chunk_frames >= 1, f"loss.lpips.chunk_frames is {self.chunk_frames}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GramConfig(LossTermConfig):
    """Distance of the features' correlations."""

    weight: float = 0.0
    """Factor of the squared difference of the Gram matrices of VGG16's features, over all frames of a clip."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig(LossTermConfig):
    """Distance of the optical flow."""

    weight: float = 0.0
    """Factor of the mean absolute difference of optical flow between frames, seen by RAFT-large at half size."""

    weights: str | None = expands(None, is_path=True, may_be_repository=True)
    """State dict of torchvision's RAFT-large: a file, or REPOSITORY[:FILE] that `cosmos-hpc fetch --raft` brought."""

    chunk_pairs: int = neutral(4)
    """Most pairs of frames that go through RAFT at once: fewer take less memory for the same loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.chunk_pairs >= 1, f"loss.flow.chunk_pairs is {self.chunk_pairs}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(LossTermConfig):
    """Agreement of overlapping windows."""

    weight: float = 0.0
    """Factor of the difference between reconstructions of the same frames from overlapping windows in time."""

    num_frames: int = 17
    """Frames of a window, 1 + k x temporal compression."""

    step: int = 8
    """Frames from one window to the next, a multiple of the temporal compression."""


@dataclass(frozen=True, kw_only=True)
class KlConfig(LossTermConfig):
    """Distance of the latents from a standard normal distribution."""

    weight: float = 0.0
    """Factor of the posterior's divergence from N(0, 1), in nats for each latent value, such as 1e-6; with
    model.formulation VAE."""


@dataclass(frozen=True, kw_only=True)
class FsqEntropyConfig(LossTermConfig):
    """Even use of the quantizer's levels."""

    weight: float = 0.0
    """Factor of 1 minus the entropy of the levels in use, as a share of its maximum; DV only."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(LossTermConfig):
    """A discriminator that learns to tell reconstructions from clips, and what it says of them."""

    weight: float = 0.0
    """Factor of the discriminator's verdict (3-D PatchGAN, hinge loss); above 0 in any step, one is trained along."""

    start_step: int = 0
    """Step from which the discriminator learns, and before which this term's weight is 0."""

    adaptive: bool = True
    """Multiply the weight by the ratio of the norms of two gradients at each reconstructed clip: that of all other
    terms over this one's. False: the weight as it is."""

    lr: float = 1e-4
    """Learning rate of the discriminator's AdamW; warm-up, betas and clipping are those of optim, and no decay."""

    channels: int = 64
    """Width of the discriminator's first layer, a multiple of 4."""

    max_frames: int = 16
    """Most consecutive frames that it sees at once; longer clips are cut into even pieces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start_step >= 0, f"loss.adversarial.start_step is {self.start_step}, but can't be negative")
        require(self.lr > 0, f"loss.adversarial.lr is {self.lr}, but must be above 0")
        require(
            self.channels >= 4 and self.channels % 4 == 0,
            f"loss.adversarial.channels is {self.channels}, but takes multiples of 4: set 64",
        )
        require(self.max_frames >= 1, f"loss.adversarial.max_frames is {self.max_frames}, but must be at least 1")

    def weight_at(self, step: int) -> float:
        """Weight in the update that follows `step` others."""
        return super().weight_at(step) if step >= self.start_step else 0.0

    @property
    def _starts(self) -> tuple[int, ...]:
        return (self.start_step, *self.boundaries)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms that are summed, each with a weight over the steps of the run."""

    l1: L1Config = field(default_factory=L1Config)
    """Mean absolute difference."""

    lpips: PerceptualConfig = field(default_factory=PerceptualConfig)
    """VGG16's features."""

    gram: GramConfig = field(default_factory=GramConfig)
    """Correlations of VGG16's features."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    """Optical flow."""

    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    """Overlapping windows."""

    kl: KlConfig = field(default_factory=KlConfig)
    """Distribution of the latents."""

    fsq_entropy: FsqEntropyConfig = field(default_factory=FsqEntropyConfig)
    """Use of the quantizer's levels."""

    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """A discriminator's verdict."""

    def network_files(self, max_steps: int) -> list[str]:
        """Weights of the networks that are ever needed, as named in the settings."""
        vgg = [self.lpips.weights] if self.looks_through_vgg(max_steps) else []
        return vgg + ([str(self.flow.weights)] if self.flow.is_used(max_steps) else [])

    def looks_through_vgg(self, max_steps: int) -> bool:
        """Whether VGG16 is ever needed."""
        return self.lpips.is_used(max_steps) or self.gram.is_used(max_steps)
