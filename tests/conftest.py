"""Real parts that many tests share: short films, a dataset indexed by Energon, quick settings for a run."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, each with several processes
# A shell that starts the tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["WANDB_MODE"] = "disabled"  # seconds at each start; tests of tracking set another


def write_film(path: Path, *, num_frames: int = 17, height: int = 48, width: int = 64, seed: int = 0) -> None:
    """A short mp4 of a drifting gradient with a bright square: something that a network can learn."""
    from cosmos_hpc.data.video_file import write_mp4

    generator = np.random.default_rng(seed)
    tint, speed = generator.integers(40, 200, 3), generator.integers(1, 4)
    rows, columns = np.mgrid[0:height, 0:width]
    frames = []
    for t in range(num_frames):
        ramp = (rows + columns + speed * t) % 64
        frame = (tint * 0.6 + ramp[..., None]).astype(np.uint8)
        frame[8:16, (8 + speed * t) % (width - 8) :][:, :8] = 255
        frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames, fps=24)


@pytest.fixture(autouse=True)
def own_runs_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a test go into its working folder, and no SLURM answers, whatever the caller's environment says."""
    monkeypatch.delenv("COSMOS_HPC_RUNS", raising=False)
    monkeypatch.setenv("SLURM_CONF", os.devnull)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four validation films of 17 frames, packed and indexed."""
    from cosmos_hpc.data.pack import pack
    from cosmos_hpc.data.prepare import prepare

    root = tmp_path_factory.mktemp("dataset")
    for split, count in (("train", 8), ("val", 4)):
        for index in range(count):
            write_film(root / "videos" / split / f"{split}_{index}.mp4", seed=index + 100 * (split == "val"))
        pack([root / "videos" / split], root / "shards" / split, max_clips_per_shard=2)
    prepare(root / "shards")
    return root / "shards"


@pytest.fixture
def quick_job(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment file of one small run on two ranks, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    job = tmp_path / "quick.yaml"
    job.write_text(
        f"""\
name: quick
model: {{channels: 4}}
data: {{path: {dataset}, num_frames: 9, crop_size: 32, micro_batch_size: 2, global_batch_size: 4, num_workers: 1}}
trainer: {{max_steps: 24, devices: 2, precision: 32, val_check_interval: 12}}
optim: {{lr: 1e-3, warmup_steps: 4}}
loss: {{lpips: {{weight: 0}}}}
checkpoint: {{every_n_steps: 10}}
cluster: local
"""
    )
    return job
