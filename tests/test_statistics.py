"""mean_std.pt comes along with an export: as it was where the encoder is as it was, else measured on videos."""

import logging
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from cosmos_hpc.cli import app
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve, to_yaml
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.video_file import read_frames, write_mp4
from cosmos_hpc.tokenize import measure, statistics_for
from cosmos_hpc.tokenizer import LatentStatistics, read_latent_statistics, starting_tokenizer
from cosmos_hpc.tokenizer.latent_statistics import write_latent_statistics

MODEL = ModelConfig(model="CV8x8x8", channels=4)


@pytest.fixture(autouse=True)
def _logged(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("cosmos_hpc"), "propagate", True)
    caplog.set_level(logging.INFO, "cosmos_hpc")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Of 121, 17 and 5 frames of one colour each, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    draw = np.random.default_rng(0)
    for num_frames in (121, 17, 5):
        frames = draw.integers(256, size=(num_frames, 1, 1, 3)).astype(np.uint8).repeat(20, 1).repeat(42, 2)
        write_mp4(folder / f"{num_frames}.mp4", frames, fps=25)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def run_folder(path: Path, network, **settings: str) -> Path:
    """A run with one checkpoint."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    path.mkdir()
    config = resolve(load_experiment(None, ["model.model=CV8x8x8", "model.channels=4", *overrides]), {})
    (path / "config.yaml").write_text(to_yaml(config))
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {f"ema.{name}": tensor * 2 for name, tensor in network.state_dict().items() if name.endswith("bias")}
    state |= {f"ema.{name}": tensor for name, tensor in network.state_dict().items() if name.endswith("weight")}
    dcp.save(state, checkpoint_id=path / "checkpoints" / "step_00000003", no_dist=True)
    return path


def same(one: LatentStatistics, other: LatentStatistics) -> bool:
    return all(map(torch.equal, one, other))


@torch.no_grad()
def test_all_positions_are_measured_on_the_videos_that_are_long_enough(videos):
    network, seen = starting_tokenizer(MODEL, 0), []
    found = measure(network, videos, crop_size=32, on_video=lambda *counts: seen.append(counts))
    assert seen == [(1, 64)]
    frames = np.stack(list(read_frames(videos / "121.mp4")))[:, 2:18, 5:37]  # multiples of 8, from the middle
    latents = network.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0].flatten(2)
    assert found.mean.allclose(latents.mean(2), atol=1e-5)
    assert found.std.allclose(latents.std(2, correction=0), atol=1e-4)
    shorter = measure(network, videos, num_frames=17)
    assert shorter.mean[:, 2].equal(shorter.mean[:, 15])
    assert not shorter.mean[:, 1].equal(shorter.mean[:, 2])


def test_a_packed_dataset_is_measured_like_its_videos(videos, tmp_path):
    pack([videos], tmp_path / "shards" / "train", max_clips_per_shard=1)
    network = starting_tokenizer(MODEL, 0)
    packed, plain = (measure(network, folder, num_frames=17) for folder in (tmp_path / "shards", videos))
    assert packed.mean.allclose(plain.mean, atol=1e-6)
    assert packed.std.allclose(plain.std, atol=1e-6)


def test_videos_that_are_too_short_say_how_to_go_on(videos, tmp_path):
    shutil.copy(videos / "17.mp4", tmp_path)
    network = starting_tokenizer(MODEL, 0)
    mend = r"name longer videos by --statistics DATASET, or measure fewer frames by --statistics-frames 17"
    with pytest.raises(ConfigError, match=rf"has 121 frames to measure \(at most 17\): {mend}"):
        measure(network, tmp_path)


def test_a_run_is_measured_on_its_own_data_unless_its_encoder_is_as_it_was(videos, tmp_path, caplog):
    network = starting_tokenizer(MODEL, 0)
    start = tmp_path / "start"
    start.mkdir()
    torch.save(network.state_dict(), start / "model.pt")
    own = LatentStatistics(torch.zeros(16, 16), torch.ones(16, 16))
    write_latent_statistics(own, start / "mean_std.pt")
    settings = {"model__jit_ckpt_pth": str(start), "data__path": str(videos), "data__crop_size": "32"}
    assert same(statistics_for(start, network), own)
    run = run_folder(tmp_path / "run", network, **settings)
    assert same(statistics_for(run, network), own)
    with torch.no_grad():
        network.encoder.conv_in[0].conv3d.bias += 1
    expected = measure(network, videos, crop_size=32)
    assert same(statistics_for(run, network), expected)
    assert same(statistics_for(run / "checkpoints" / "step_00000003", network), expected)
    assert same(statistics_for(run, network, start / "mean_std.pt"), own)
    shutil.rmtree(start)  # nothing to compare with
    assert same(statistics_for(run, network), expected)

    gone = run_folder(tmp_path / "gone", network, data__path=str(tmp_path / "nowhere"))
    assert statistics_for(gone, network) is None
    assert "no mean_std.pt: data.path of" in caplog.text
    assert "name one by --statistics" in caplog.text
    with pytest.raises(ConfigError, match=r"DV8x16x16 has no mean_std\.pt: leave --statistics out"):
        statistics_for(gone, starting_tokenizer(ModelConfig(model="DV8x16x16", channels=4), 0), videos)


def test_command_exports_the_averages_of_a_run_with_their_statistics(videos, tmp_path):
    network = starting_tokenizer(MODEL, 0)
    run = run_folder(tmp_path / "run", network, data__path=str(videos))
    arguments = ["export", str(run), "--to", "pt", "--ema", "--statistics-frames", "17"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    out = run / "exports" / "pt-ema"
    assert done.stdout.splitlines() == [f"{out}/mean_std.pt", f"{out}/model.pt"]
    tensors = torch.load(out / "model.pt", weights_only=True)["model"]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter *= 2 if name.endswith("bias") else 1
            assert tensors[f"network.{name}"].equal(parameter), name
    assert same(read_latent_statistics(out / "mean_std.pt"), measure(network, videos, num_frames=17))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--statistics", "x.pt", "--no-statistics"], "--statistics and --no-statistics exclude each other"),
        (["--ema"], r"model.pt holds no averaged weights \(EMA\): leave --ema out"),
        (["--to", "diffusers"], "needs its AutoencoderKLCosmos"),
        (["--statistics-frames", "20"], r"--statistics-frames is 20, but takes 1 \+ 8k up to 121"),
        (["--statistics", "nowhere"], "nowhere is not there: name video files, folders of them"),
    ],
)
def test_command_refuses_what_can_not_be_exported_before_it_writes(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    torch.save(starting_tokenizer(MODEL, 0).state_dict(), tmp_path / "model.pt")
    done = CliRunner().invoke(app, ["export", "model.pt", "--out", "out", *options])
    assert isinstance(done.exception, ConfigError), done.output
    assert re.search(message, str(done.exception)), done.exception
    assert not (tmp_path / "out").exists()
