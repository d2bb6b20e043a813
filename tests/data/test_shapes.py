"""Shapes of clips change from step to step, alike on all ranks, and whatever a run has gone through."""

from collections import Counter
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from batches import equal, in_pieces, take
from small_videos import NUM_TRAIN, pictures, start_of, video_of
from test_position import PHASES, by_stream, run_ranks

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.loader import ValidationLoader
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.shapes import StepShapes
from cosmos_hpc.data.video_file import write_mp4

SHAPES = {"9x32x32": 2.0, "5x48x16": 1.0, "1x16x48": 1.0}


def shapes_of(batches) -> list[str]:
    return ["x".join(map(str, batch.shape[2:])) for batch in batches]


def expected_shapes(config, num_steps: int, seed: int = 7) -> list[str]:
    kinds = [ClipKind(*shape) for shape in config.clip_shapes]
    steps = StepShapes(kinds, list(config.clip_shapes.values()), seed, 1, 1)
    return ["x".join(map(str, steps.of_step(step).shape[1:])) for step in range(num_steps)]


def test_shapes_come_as_often_as_their_weights_say():
    kinds = [ClipKind(9, 32, 32), ClipKind(5, 48, 16), ClipKind(1, 16, 48)]
    steps = StepShapes(kinds, [2.0, 1.0, 1.0], seed=3, batches_per_step=1, num_streams=1)
    seen = Counter(steps.of_step(step) for step in range(2000))
    assert [seen[kind] / 2000 for kind in kinds] == pytest.approx([0.5, 0.25, 0.25], abs=0.05)


@pytest.mark.parametrize(("world_size", "num_workers", "micro"), [(1, 2, 2), (2, 2, 1)])
def test_all_batches_of_a_step_have_its_shape_on_every_rank(data_config, train_loader, world_size, num_workers, micro):
    config = data_config(
        shapes=SHAPES, global_batch_size=4, micro_batch_size=micro, num_workers=num_workers, clips_per_decode=3
    )
    per_step, steps = 4 // (micro * world_size), 12
    for rank in range(world_size):
        found = shapes_of(take(train_loader(config, rank=rank, world_size=world_size), steps * per_step))
        assert found == [shape for shape in expected_shapes(config, steps) for _ in range(per_step)]
    assert len(set(expected_shapes(config, steps))) == 3


@pytest.mark.parametrize(("num_workers", "clips_per_decode"), [(0, 1), (2, 3)])
def test_interrupted_run_of_changing_shapes_gives_the_clips_of_an_unbroken_one(
    data_config, train_loader, num_workers, clips_per_decode
):
    config = data_config(
        shapes=SHAPES, global_batch_size=2, micro_batch_size=1, num_workers=num_workers,
        clips_per_decode=clips_per_decode, clip_buffer_size=7, flip=0.5,
    )  # fmt: skip
    unbroken = take(train_loader(config), 28)
    assert equal(in_pieces(lambda: train_loader(config), (2, 4, 8, 2, 12)), unbroken)  # whole steps, as checkpoints are


def test_changing_ranks_consume_the_same_samples_whatever_the_shapes(data_config, train_loader, tmp_path):
    """The ledger of a run of one shape: which video and which start come when depends on no shape."""
    several = {"clips_per_decode": 3, "clip_buffer_size": 7, "shuffle_buffer_size": 4}
    clips: list[torch.Tensor] = []
    for world_size, num_batches, micro, num_workers in PHASES:
        layout = {"num_streams": 4} if num_workers is None else {"num_workers": num_workers}
        size = {"micro_batch_size": micro, "global_batch_size": micro * world_size}
        config = data_config(shapes=SHAPES, **several, **layout, **size)
        clips += run_ranks(config, world_size, num_batches, tmp_path)
    assert set(shapes_of(clip[None] for clip in clips)) == set(SHAPES)
    plain = data_config(micro_batch_size=1, **several)
    for rank, ledger in enumerate(by_stream(clips)):
        unbroken = [batch[0] for batch in take(train_loader(plain, rank=rank, world_size=4), len(ledger))]
        assert [(video_of(clip), start_of(clip)) for clip in ledger] == [
            (video_of(clip), start_of(clip)) for clip in unbroken
        ]


def test_shorter_and_wider_shapes_are_cut_out_of_the_same_pictures(data_config, train_loader):
    shapes = {"9x32x32": 1.0, "5x48x16": 1.0, "1x16x48": 1.0}
    config = partial(data_config, global_batch_size=1, micro_batch_size=1, shuffle_buffer_size=1)
    clips = [batch[0] for batch in take(train_loader(config(shapes=shapes)), 2 * NUM_TRAIN)]
    plain = [batch[0] for batch in take(train_loader(config()), 2 * NUM_TRAIN)]
    for clip, other in zip(clips, plain, strict=True):
        frames = clip[1].float().mean((1, 2)) / 10  # green says which frame
        assert frames.round().tolist() == [start_of(other) + n for n in range(clip.shape[1])]
        columns = clip[2, 0].float().mean(0)  # blue says how far right: 4 levels a pixel, nothing is stretched
        assert (columns[-1] - columns[0]).item() == pytest.approx(4.05 * (clip.shape[-1] - 1), abs=12)


def test_validation_keeps_to_one_shape(data_config):
    batches = list(ValidationLoader(data_config(shapes=SHAPES), rank=0, world_size=1))
    assert set(shapes_of(batches)) == {"9x32x32"}


# images


def encoded_picture(number: int, codec: str) -> bytes:
    """A picture of one grey, as a file."""
    target = BytesIO()
    with av.open(target, "w", format="image2pipe") as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj444p" if codec == "mjpeg" else "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 200 + 5 * number, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return target.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight bright pictures, half of them png, half jpg, without a dataset.yaml by hand."""
    from webdataset import TarWriter

    root = tmp_path_factory.mktemp("images")
    for part, numbers in (("train", range(8)), ("val", range(1))):
        (root / part).mkdir()
        with TarWriter(str(root / part / "a.tar"), encoder=False) as writer:
            for number in numbers:
                ending, codec = (("png", "png"), ("jpg", "mjpeg"))[number % 2]
                writer.write({"__key__": f"{part}{number}", ending: encoded_picture(number, codec)})
    prepare(root, num_workers=1)
    return root


def greys(clips) -> list[int]:
    return [round((clip.float().mean().item() - 200) / 5) for clip in clips]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_the_clips_of_one_frame_each_once_a_pass(data_config, train_loader, images, num_workers):
    config = data_config(
        shapes={"9x32x32": 1.0, "1x32x48": 2.0}, image_path=str(images), micro_batch_size=2, global_batch_size=2,
        num_workers=num_workers, clips_per_decode=3, clip_buffer_size=7, shuffle_buffer_size=1,
    )  # fmt: skip
    unbroken = take(train_loader(config), 40)
    assert shapes_of(unbroken) == expected_shapes(config, 40)
    stills = [clip for batch in unbroken for clip in batch if batch.shape[2] == 1]
    if num_workers == 0:  # else each stream has passes of its own
        assert all(set(greys(stills[n : n + 8])) == set(range(8)) for n in range(0, len(stills) - 7, 8))
    assert set(greys(stills)) == set(range(8))
    assert all(video_of(clip) < NUM_TRAIN for batch in unbroken for clip in batch if batch.shape[2] > 1)
    assert equal(in_pieces(lambda: train_loader(config), (7, 3, 1, 29)), unbroken)


def test_position_among_other_images_is_refused(data_config, train_loader, images):
    config = partial(data_config, shapes={"9x32x32": 1.0, "1x32x32": 1.0})
    state = train_loader(config(image_path=str(images))).state()
    with pytest.raises(ConfigError, match=r"image_samples 8 -> None.*bring back the dataset of 8 training images"):
        train_loader(config()).restore([state])


# refusals


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["data.shapes={33x256: 1}"], r"data.shapes names 33x256, but takes frames x height x width: such as"),
        (["data.shapes={33x256x256: 0}"], r"data.shapes gives 33x256x256 the weight 0.0: set it above 0"),
        (["data.shapes={32x256x256: 1}"], r"data.shapes: 32x256x256, frames, is 32, .* takes 1 \+ 8k: set 25 or 33"),
        (["data.shapes={33x250x256: 1}"], r"data.shapes: 33x250x256, height, is 250, .* multiples of 8: set 248 or"),
        (["data.image_path=x", "data.shapes={33x256x256: 1}"], "data.shapes holds no shape of one frame: add one"),
        (["data.image_path=x", "data.shapes={1x256x256: 1}"], "data.shapes holds images alone: name that dataset"),
    ],
)
def test_impossible_shapes_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(load_experiment(None, ["data.path=x", *settings]), {})


def test_shapes_are_read_from_yaml_and_command_line():
    config = resolve(load_experiment(None, ["data.path=x", "data.shapes={33x256x256: 3, 1x512x256: 1}"]), {})
    assert config.data.clip_shapes == {(33, 256, 256): 3.0, (1, 512, 256): 1.0}


def test_video_shorter_than_the_longest_shape_is_left_out_whatever_the_step(data_config, train_loader, tmp_path):
    for part, lengths in (("train", (20, 20, 8)), ("val", (20,))):
        for number, num_frames in enumerate(lengths):
            film = tmp_path / "videos" / part / f"{part}{number}.mp4"
            write_mp4(film, pictures(number, num_frames=num_frames), fps=25, crf=10)
        pack([tmp_path / "videos" / part], tmp_path / part, probe=False)
    prepare(tmp_path, num_workers=1)
    config = data_config(path=str(tmp_path), shapes={"9x32x32": 1.0, "1x32x32": 3.0}, micro_batch_size=1)
    assert {video_of(batch[0]) for batch in islice(train_loader(config), 12)} == {0, 1}
