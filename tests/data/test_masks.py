"""What lies beside a video tells the loss where to look: it is cut, mirrored and resized as the pictures are."""

from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from batches import take
from small_videos import NUM_FRAMES, pictures, trimmed

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.choosing import ClipKind
from cosmos_hpc.data.decoders import Box
from cosmos_hpc.data.decoding import ClipDecoder
from cosmos_hpc.data.loader import loss_mask
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import write_mp4

EDGE = 40
"""Column at which the still mask begins to count."""


def write_picture(path: Path, pixels: np.ndarray) -> None:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """Video 0 counts from a column on, video 1 in its last ten frames, video 2 has no mask, that of 3 is too small."""
    root = tmp_path_factory.mktemp("masked")
    still = np.zeros((48, 64, 3), np.uint8)
    still[:, EDGE:] = 255
    for part, numbers in (("train", range(4)), ("val", range(1))):
        folder = root / "videos" / part
        for number in numbers:
            write_mp4(folder / f"{part}{number}.mp4", pictures(number), fps=25, crf=4)
        write_picture(folder / f"{part}0.mask.png", still)
    folder = root / "videos/train"
    lit = (np.full((48, 64, 3), 255 * (frame >= 10), np.uint8) for frame in range(NUM_FRAMES))
    write_mp4(folder / "train1.mask.mp4", lit, fps=25, crf=4)
    write_picture(folder / "train3.mask.png", still[:32])
    for part in ("train", "val"):
        pack([root / "videos" / part], root / part)
    prepare(root, num_workers=1)
    return root


def masks_of(clips) -> dict[int, list[torch.Tensor]]:
    found: dict[int, list[torch.Tensor]] = {}
    for clip in clips:
        assert clip.shape[0] == 4
        found.setdefault(round(clip[0].float().mean().item() / 10), []).append(clip)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flip": 0.5, "clips_per_decode": 3, "resize": 40},
        {"shapes": {"9x32x48": 1.0, "1x48x16": 1.0}, "decoder": "pyav"},
    ],
)
def test_mask_is_cut_mirrored_and_resized_as_the_picture(data_config, train_loader, masked, settings):
    config = data_config(path=str(masked), masks=True, micro_batch_size=1, global_batch_size=1, **settings)
    found = masks_of(batch[0] for batch in take(train_loader(config), 36))
    assert set(found) == {0, 1, 2}
    for clip in found[0]:
        columns = clip[2].float() / (255 / 64)  # blue says how far right in the video
        inside, is_clear = columns > EDGE, (columns - EDGE).abs() > 3
        assert ((clip[3] > 127) == inside)[is_clear].all()
    assert any(0 < (clip[3] > 127).float().mean() < 1 for clip in found[0])
    for clip in found[1]:
        frames = (clip[1].float().mean((1, 2)) / 10).round()
        assert torch.equal(clip[3].float().mean((1, 2)) > 127, frames >= 10)
    assert all((clip[3] == 255).all() for clip in found[2])


def test_mask_that_does_not_fit_costs_its_video_with_the_reason(data_config, train_loader, masked, caplog):
    take(train_loader(data_config(path=str(masked), masks=True)), 8)
    named = {record.getMessage() for record in caplog.records}
    assert (
        "skipped train/shard-000000.tar/train3: its mask is of no use: it is 64 x 32 for a video of 64 x 48, upright"
    ) in named


@pytest.mark.parametrize("turns", range(4))
def test_a_box_is_where_it_was_once_the_picture_is_turned(turns):
    pixels, box = np.arange(5 * 7).reshape(5, 7), Box(1, 2, 3, 4)
    turned = box.turned(turns, 5, 7)
    assert np.array_equal(np.rot90(box.of(pixels), turns), turned.of(np.rot90(pixels, turns)))


def test_an_upright_picture_masks_a_video_that_is_stored_sideways(tmp_path):
    write_mp4(tmp_path / "stored.mp4", pictures(1), fps=25, crf=4)
    trimmed(tmp_path / "stored.mp4", tmp_path / "sideways.mp4", num_hidden=0, rotation=90)
    upright = np.rot90(next(pictures(1)))  # blue says how far right it is as stored
    mask = np.repeat((upright[..., 2:] > 255 * EDGE / 64).astype(np.uint8) * 255, 3, axis=-1)
    write_picture(tmp_path / "mask.png", mask)
    raw = [(tmp_path / name).read_bytes() for name in ("sideways.mp4", "mask.png")]
    for seed in range(3):
        (clip,) = ClipDecoder(60.0).clips(raw[0], [ClipKind(3, 48, 32, has_mask=True)], seed, raw[1])
        columns = clip[2].float() / (255 / 64)
        is_clear = (columns - EDGE).abs() > 3
        assert ((clip[3] > 127) == (columns > EDGE))[is_clear].all()


def test_masks_are_left_alone_unless_asked_for(data_config, train_loader, masked):
    (batch,) = take(train_loader(data_config(path=str(masked))), 1)
    assert batch.shape[1] == 3
    assert loss_mask(batch) is None


def test_dataset_whose_fields_are_mapped_is_refused_in_one_line(data_config, train_loader):
    with pytest.raises(ConfigError, match=r"dataset.yaml maps fields, so that masks are left behind") as error:
        take(train_loader(data_config(masks=True)), 1)
    assert "\n" not in str(error.value)


def test_camera_has_the_mask_that_bears_its_name(data_config, train_loader, masked, tmp_path):
    from webdataset import TarWriter

    videos = masked / "videos/train"
    files = {
        "front.mp4": (videos / "train0.mp4").read_bytes(),
        "front.mask.png": (videos / "train0.mask.png").read_bytes(),
        "rear.mp4": (videos / "train2.mp4").read_bytes(),
    }
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        with TarWriter(str(tmp_path / part / "a.tar"), encoder=False) as writer:
            writer.write({"__key__": part, **files})
    prepare(tmp_path, num_workers=1)
    config = partial(data_config, path=str(tmp_path), masks=True, crop_size=48, micro_batch_size=1)
    found = masks_of(batch[0] for batch in take(train_loader(config()), 8))
    assert set(found) == {0, 2}
    assert all((clip[3] == 0).any() for clip in found[0])
    assert all((clip[3] == 255).all() for clip in found[2])
