"""Narrow networks learn from the quickstart's films: the product's own command, and the losses that it gave before."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.data.loader import ValidationLoader, to_unit_range
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.quickstart import cut_films
from cosmos_hpc.tokenizer import psnr, starting_tokenizer

STORED = Path(__file__).with_name("reference_losses.json")
"""Losses of these runs by film, kind and step, with torch 2.13 on x86-64. `python tests/training/test_learning.py
[FILM]` writes it."""

FILMS = {"bikes": None, "bigbuckbunny": 96}
"""`data.resize`: a crop out of the middle of bigbuckbunny at its full height is hardly more than one colour."""

CHANNELS = 8
SETTINGS = [
    f"model.channels={CHANNELS}",
    "data.num_frames=9",
    "data.crop_size=64",
    "data.micro_batch_size=2",
    "data.global_batch_size=2",
    "data.num_workers=0",
    "data.shuffle_buffer_size=20",
    "data.clips_per_decode=1",
    "data.clip_start=any",
    "trainer.precision=32",
    "trainer.val_check_interval=50",
    "optim.lr=2e-3",
    "optim.betas=[0.9, 0.99]",
    "optim.warmup_steps=20",
    "optim.lr_schedule=cosine",
    "loss.lpips.weight=0",  # as no VGG16 comes with the tests
]
STEPS = {"CV8x8x8": 300, "DV8x16x16": 350}
GAIN_DB = 2.0
FEW = 15
"""Steps of the quick comparison."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, Path]:
    return datasets(tmp_path_factory.mktemp("films"))


def datasets(root: Path) -> dict[str, Path]:
    """The quickstart's videos of each film; the held-out ones are from its end."""
    cut_films(root / "videos")
    for film in FILMS:
        for split in ("train", "val"):
            videos = sorted((root / "videos" / split).glob(f"{film}_*.mp4"))
            pack(videos, root / film / split, max_clips_per_shard=4)
        prepare(root / film)
    return {film: root / film for film in FILMS}


def start_near_the_identity(kind: str, out: Path) -> Path:
    """Weights with which so few steps are enough: no branch adds anything yet, and no bias hides the signal.

    With torch's own, a network this deep first learns the clip's mean colour and stays there for hundreds of steps.
    """
    network = starting_tokenizer(ModelConfig(model=kind, channels=CHANNELS), 0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if name.endswith(".bias") or name.endswith(("conv2.1.conv3d.weight", "proj_out.conv3d.weight")):
            torch.nn.init.zeros_(weight)
        elif name.endswith("conv3d.weight"):
            torch.nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)
    torch.nn.init.normal_(network.decoder.conv_out[1].conv3d.weight, std=0.01, generator=generator)
    torch.save(network.state_dict(), out / f"{kind}.pt")
    return out / f"{kind}.pt"


def train(kind: str, film: str, data: Path, out: Path, steps: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    weights = start_near_the_identity(kind, out)
    settings = [f"name={kind}", f"model.model={kind}", f"model.jit_ckpt_pth={weights}", f"data.path={data}"]
    settings += [f"optim.decay_steps={STEPS[kind]}"]  # also where it is stopped earlier
    settings += [f"data.resize={FILMS[film]}"] if FILMS[film] else []
    command = [sys.executable, "-m", "cosmos_hpc.train", *settings, *SETTINGS, f"trainer.max_steps={steps}"]
    environment = {**os.environ, "COSMOS_HPC_RUNS": str(out), "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (metrics,) = out.glob(f"{kind}/*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def mean_colour_psnr(film: str, data: Path) -> float:
    """PSNR of a clip's mean colour in the place of the clip, mean over the validation clips."""
    config = DataConfig(path=str(data), num_frames=9, crop_size=64, resize=FILMS[film])
    clips = [to_unit_range(batch) for batch in ValidationLoader(config, rank=0, world_size=1)]
    return float(torch.cat([psnr(clip, clip.mean((2, 3, 4), keepdim=True).expand_as(clip)) for clip in clips]).mean())


@pytest.mark.parametrize("kind", STEPS)
def test_the_first_losses_are_those_of_before(shards, tmp_path, kind):
    losses = [line["loss"] for line in train(kind, "bikes", shards["bikes"], tmp_path, FEW)[1:]]
    assert losses == pytest.approx(json.loads(STORED.read_text())["bikes"][kind][:FEW], rel=1e-2)


@pytest.mark.training
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("film", FILMS)
def test_averaged_weights_beat_the_mean_colour_of_clips_never_seen(shards, tmp_path, film, kind):
    lines = train(kind, film, shards[film], tmp_path, STEPS[kind])
    losses = torch.tensor([line["loss"] for line in lines[1:]])
    stored = torch.tensor(json.loads(STORED.read_text())[film][kind])
    assert losses[:FEW].tolist() == pytest.approx(stored[:FEW].tolist(), rel=1e-2)
    for part in range(0, STEPS[kind], 50):  # rounding grows from step to step; means over 50 of them stay
        assert losses[part : part + 50].mean() == pytest.approx(stored[part : part + 50].mean(), rel=0.1)
    assert lines[-1]["val_psnr_ema"] >= mean_colour_psnr(film, shards[film]) + GAIN_DB


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = json.loads(STORED.read_text())
        for film, data in datasets(Path(scratch)).items():
            if film not in (sys.argv[1:] or FILMS):
                continue
            print(f"{film}: mean colour {mean_colour_psnr(film, data):.2f} dB", flush=True)
            for kind in STEPS:
                (out := Path(scratch) / "runs" / film).mkdir(parents=True, exist_ok=True)
                written = train(kind, film, data, out, STEPS[kind])
                print(f"{film}, {kind}: {[line for line in written if 'val_psnr_ema' in line]}", flush=True)
                found.setdefault(film, {})[kind] = [round(line["loss"], 5) for line in written[1:]]
                STORED.write_text(json.dumps(found))
