"""The videos of a split, and what lies beside them."""

import json
from pathlib import Path

import pytest
from webdataset import TarWriter

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.sources import of_split


@pytest.fixture
def with_siblings(videos: Path, tmp_path: Path) -> Path:
    """A prepared dataset whose samples have a JSON beside their mp4."""
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        with TarWriter(str(tmp_path / "set" / split / "shard-000000.tar")) as shard:
            for video in sorted((videos / split).iterdir()):
                facts = {"number": int(video.stem)}
                shard.write({"__key__": video.stem, "mp4": video.read_bytes(), "json": facts, "mask.png": b"mask"})
    prepare(tmp_path / "set", num_workers=1)
    return tmp_path / "set"


def test_videos_of_a_split_come_with_what_lies_beside_them(with_siblings: Path, videos: Path) -> None:
    found = of_split(with_siblings, "val")
    assert [video.key for video in found] == [path.stem for path in sorted((videos / "val").iterdir())]
    assert [json.loads(video.siblings["json"].read())["number"] for video in found] == [
        int(video.key) for video in found
    ]
    assert found[0].siblings["mask.png"].read() == b"mask"


def test_loose_videos_have_siblings_by_their_name_and_masks_are_no_videos(videos: Path, tmp_path: Path) -> None:
    raw = next((videos / "val").iterdir()).read_bytes()
    for name in ("drive.mp4", "drive.mask.mp4", "drive[1].mp4", "drive-2.mp4"):
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "drive.json").write_text("{}")
    (tmp_path / "drive[1].json").write_text("[]")
    found = {video.path.name: video.siblings for video in of_split(tmp_path, "val")}
    assert {name: sorted(siblings) for name, siblings in found.items()} == {
        "drive.mp4": ["json", "mask.mp4"],
        "drive[1].mp4": ["json"],
        "drive-2.mp4": [],
    }
    assert found["drive[1].mp4"]["json"].read() == b"[]"


def test_cameras_of_a_sample_are_videos_of_their_own(videos: Path, tmp_path: Path) -> None:
    raw = next((videos / "val").iterdir()).read_bytes()
    with TarWriter(str(tmp_path / "shard.tar")) as shard:
        shard.write({"__key__": "drive", "front.mp4": raw, "rear.mkv": raw, "mask.mp4": raw, "json": {"night": True}})
    found = of_split(tmp_path, "val")
    assert [(video.name, video.camera) for video in found] == [
        ("shard/drive-front", "front"),
        ("shard/drive-rear", "rear"),
    ]
    assert sorted(found[0].siblings) == ["json", "mask.mp4"]


def test_a_cameras_mask_is_no_video_and_a_key_of_a_camera_has_no_dot(videos: Path, tmp_path: Path) -> None:
    raw = next((videos / "val").iterdir()).read_bytes()
    files = {"cam.front.mp4": raw, "cam.rear.mp4": raw, "cam.front.mask.mp4": raw, "cam.rear.mask.png": b"", "json": {}}
    with TarWriter(str(tmp_path / "shard.tar"), encoder=False) as shard:
        shard.write({"__key__": "drive", **files, "json": b"{}"})
    found = of_split(tmp_path, "val")
    assert [(video.key, video.camera) for video in found] == [
        ("drive-cam-front", "cam.front"),
        ("drive-cam-rear", "cam.rear"),
    ]
    assert "mask.mp4" in found[0].siblings
    assert "mask.png" not in found[0].siblings
    assert "mask.png" in found[1].siblings


def test_a_blend_gives_the_videos_of_all_its_datasets(dataset: Path, with_siblings: Path, tmp_path: Path) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"
        f"  val: {{blend: [{{weight: 1, path: {dataset}}}, {{weight: 2, path: set}}]}}\n"
    )
    assert len(of_split(blend, "val")) == len(of_split(dataset, "val")) + len(of_split(with_siblings, "val")) == 10


def test_a_split_that_is_not_there_is_refused_with_those_that_are(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"no video in its split test; it has train, val"):
        of_split(dataset, "test")


def test_packed_videos_bring_what_lies_beside_them_as_far_as_it_still_fits(videos: Path, tmp_path: Path) -> None:
    drives = tmp_path / "drives"
    drives.mkdir()
    raw = next((videos / "val").iterdir()).read_bytes()
    for name in ("drive.mp4", "drive.mask.mp4"):
        (drives / name).write_bytes(raw)
    (drives / "drive.json").write_text('{"night": true, "boxes": [[0, 0, 8, 8]]}')
    pack([drives], tmp_path / "whole")
    [video] = of_split(tmp_path / "whole", "val")
    assert json.loads(video.siblings["json"].read()) == {"night": True, "boxes": [[0, 0, 8, 8]]}
    assert video.siblings["mask.mp4"].read() == raw
    pack([drives], tmp_path / "small", height=32)
    [video] = of_split(tmp_path / "small", "val")
    assert {ending: json.loads(part.read()) for ending, part in video.siblings.items()} == {"json": {"night": True}}
