"""Small real videos and a dataset made of them."""

from pathlib import Path

import pytest
from small_videos import NUM_TRAIN, NUM_VAL, pictures

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.data.loader import TrainLoader
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import write_mp4


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Folders train and val with ten and five videos, numbered throughout."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(NUM_TRAIN + NUM_VAL):
        part = "train" if number < NUM_TRAIN else "val"
        write_mp4(root / part / f"{number:02d}.mp4", pictures(number), fps=25, crf=10)
    return root


@pytest.fixture(scope="session")
def dataset(videos, tmp_path_factory) -> Path:
    """The same, packed three to a shard and indexed."""
    root = tmp_path_factory.mktemp("dataset")
    for part in ("train", "val"):
        pack([videos / part], root / part, max_clips_per_shard=3)
    prepare(root, num_workers=1)
    return root


@pytest.fixture
def data_config(dataset):
    """Settings that fit the dataset, open to changes."""

    def make(**changes) -> DataConfig:
        settings = {
            "path": str(dataset),
            "num_frames": 9,
            "crop_size": 32,
            "micro_batch_size": 2,
            "num_workers": 0,
            "shuffle_buffer_size": 4,
            "clips_per_decode": 1,
            "clip_start": "any",
        }
        return DataConfig(**settings | changes)

    return make


@pytest.fixture
def train_loader():
    """Makes loaders and ends their workers."""
    made = []

    def make(config, *, seed=7, rank=0, world_size=1) -> TrainLoader:
        made.append(TrainLoader(config, seed=seed, rank=rank, world_size=world_size))
        return made[-1]

    yield make
    for loader in made:
        loader.close()
