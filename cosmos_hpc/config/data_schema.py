"""The dataset and the clips taken from it."""

import re
from dataclasses import dataclass, field

from cosmos_hpc.config.fields import expands, neutral, require

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

    micro_batch_size: int | str = neutral(1)
    """Clips per rank in one forward; `auto`: the number that is measured to be the fastest, at the first start."""

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
        micro = self.micro_batch_size
        require(
            micro == "auto" or (isinstance(micro, int) and micro >= 1),
            f"data.micro_batch_size is {micro}: set a number of clips, at least 1, or auto",
        )
        at_least_one = ("num_frames", "crop_size", "global_batch_size", "shuffle_buffer_size")
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
    def micro_batch(self) -> int:
        """Clips per rank in one forward; 1 as long as that is still to be measured."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else 1

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
