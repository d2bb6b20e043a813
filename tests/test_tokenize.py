"""Videos become latents on disk that webdataset reads by itself and that decode to what the tokenizer reconstructs."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors import safe_open
from typer.testing import CliRunner

from cosmos_hpc.cli import app, main
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.video_file import read_frames, write_mp4
from cosmos_hpc.tokenize import Progress, encode_frames, tokenize
from cosmos_hpc.tokenizer import EncodedVideo, Tokenizer, starting_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory):
    """A file with the weights of a network of width 4, by the kind and the seed."""

    def write(name: str, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("weights")
        torch.save(starting_tokenizer(ModelConfig(model=name, channels=4), seed).state_dict(), folder / "model.pt")
        return folder

    return write


@pytest.fixture(scope="module")
def cv(weights_of) -> Path:
    return weights_of("CV8x8x8")


def film(path: Path, num_frames: int = 9, height: int = 24, width: int = 32, seed: int = 0, fps: float = 24) -> Path:
    """Coloured waves that travel."""
    draw = np.random.default_rng(seed).uniform
    y, x = np.mgrid[0:height, 0:width]
    t = np.arange(num_frames)[:, None, None]
    waves = [np.sin(draw(0.1, 0.4) * x + draw(0.1, 0.4) * y + draw(-0.3, 0.3) * t) for _ in range(3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8), fps)
    return path


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def samples_in(shard: Path) -> list[dict]:
    return list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def encoded(values: np.ndarray | torch.Tensor, facts: dict) -> EncodedVideo:
    return EncodedVideo(torch.as_tensor(values), facts["num_frames"], facts["height"], facts["width"])


@pytest.mark.parametrize(("name", "dtype"), [("CV8x8x8", "fp32"), ("CV8x8x8", "bf16"), ("DV8x16x16", "fp32")])
def test_sample_read_by_webdataset_decodes_to_what_the_tokenizer_reconstructs(tmp_path, weights_of, name, dtype):
    weights = weights_of(name)
    videos = [
        film(tmp_path / "videos" / "long.mp4", 90, 18, 34, fps=12.5),  # two windows, neither length nor size fits
        film(tmp_path / "videos" / "one.mp4", 1, 34, 22, seed=1),
    ]
    pack([tmp_path / "videos"], tmp_path / "shards" / "train", probe=False)  # which leaves a single frame out
    tokenize([tmp_path / "shards"], weights, tmp_path / "out", dtype=dtype)
    samples = samples_in(tmp_path / "out" / "train" / "shard-000000.tar")
    assert [sample["__key__"] for sample in samples] == ["long", "one"]
    tokenizer = Tokenizer.from_weights(weights, dtype=DTYPES[dtype])
    for sample, video in zip(samples, videos, strict=True):
        values = sample["latents.npy"] if name == "CV8x8x8" else sample["indices.npy"]
        assert values.dtype == {"CV8x8x8fp32": "float32", "CV8x8x8bf16": "float16"}.get(name + dtype, "int32")
        frames = frames_of(video)
        np.testing.assert_array_equal(tokenizer.decode(encoded(values, sample["json"])), tokenizer.reconstruct(frames))
    facts = samples[0]["json"]
    padded = {"CV8x8x8": (24, 40), "DV8x16x16": (32, 48)}[name]
    assert (facts["padded_num_frames"], facts["padded_height"], facts["padded_width"]) == (97, *padded)
    assert (facts["fps"], facts["tokenizer"], facts["dtype"]) == (12.5, name, dtype)
    assert facts["source"] == str(tmp_path / "shards" / "train" / "shard-000000.tar" / "long.mp4")


@pytest.mark.parametrize(("name", "dtype"), [("CV8x8x8", "bf16"), ("DV8x16x16", "fp32")])
def test_safetensors_hold_the_networks_own_type_and_all_facts(tmp_path, weights_of, name, dtype):
    weights = weights_of(name)
    video = film(tmp_path / "videos" / "town" / "night.mp4", 11, 26, 18)
    tokenize([tmp_path / "videos"], weights, tmp_path / "out", to="safetensors", dtype=dtype)
    with safe_open(tmp_path / "out" / "town-night.safetensors", "pt") as file:
        (field,) = file.keys()
        values, facts = file.get_tensor(field), json.loads(file.metadata()["json"])
    assert (field, values.dtype) == (("latents", torch.bfloat16) if name == "CV8x8x8" else ("indices", torch.int32))
    tokenizer = Tokenizer.from_weights(weights, dtype=DTYPES[dtype])
    np.testing.assert_array_equal(tokenizer.decode(encoded(values, facts)), tokenizer.reconstruct(frames_of(video)))


@pytest.mark.parametrize("num_frames", [1, 16, 17, 18, 25, 26, 33, 60])
def test_windows_one_after_the_other_give_the_latents_of_the_whole(num_frames):
    tokenizer = Tokenizer(
        starting_tokenizer(ModelConfig(model="CV8x8x8", channels=4), 0), window_frames=17, overlap_frames=8
    )
    video = np.random.default_rng(0).integers(256, size=(num_frames, 9, 8, 3), dtype=np.uint8)
    counts: list[int] = []
    piecewise, whole = encode_frames(iter(video), tokenizer, counts.append), tokenizer.encode(video)
    assert piecewise.latents.equal(whole.latents)
    assert piecewise[1:] == whole[1:] == (num_frames, 9, 8)
    assert sum(counts) == num_frames


def test_shards_keep_names_and_subfolders_and_a_second_call_does_nothing(tmp_path, cv, dataset):
    seen: list[Progress] = []
    first = tokenize([dataset], cv, tmp_path / "out", max_frames=5, on_progress=seen.append)
    assert (first.videos, first.frames, first.files, first.kept, first.skipped) == (12, 60, 6, 0, [])
    names = {str(shard.relative_to(dataset)) for shard in dataset.rglob("*.tar")}
    written = files_in(tmp_path / "out")
    assert set(written) == names | {"tokenized.jsonl"}
    assert first.bytes == sum(len(content) for name, content in written.items() if name in names)
    assert seen[-1] == Progress(12, 12, 60)
    assert tokenize([dataset], cv, tmp_path / "out", max_frames=5)[:5] == (0, 0, 0, 0, 12)
    assert files_in(tmp_path / "out") == written


def test_video_files_fill_shards_up_to_their_size(tmp_path, cv):
    for index in range(5):
        film(tmp_path / "videos" / f"{index}.mp4", seed=index)
    # 16 x 2 x 3 x 4 values in float32 and their facts take over 1.5 KiB and under 2.5 KiB, so two fit into 5 KiB
    tokenize([tmp_path / "videos"], cv, tmp_path / "out", dtype="fp32", shard_size_mib=5 / 1024)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [[sample["__key__"] for sample in samples_in(shard)] for shard in shards] == [["0", "1"], ["2", "3"], ["4"]]


@pytest.mark.parametrize("to", ["shards", "safetensors"])
def test_undecodable_videos_are_named_with_the_reason_and_the_rest_is_done(tmp_path, cv, to):
    whole = film(tmp_path / "videos" / "b.mp4", 30).read_bytes()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video at all")
    (tmp_path / "videos" / "c.mp4").write_bytes(whole[:600])
    (tmp_path / "videos" / "d.mp4").write_bytes(b"")
    begin = whole.index(b"mdat") + 4
    (tmp_path / "videos" / "e.mp4").write_bytes(whole[:begin] + b"\xff" * 2000 + whole[begin + 2000 :])
    summary = tokenize([tmp_path / "videos"], cv, tmp_path / "out", to=to)
    assert (summary.videos, summary.files) == (1, 1)
    assert [Path(video).name for video, _ in summary.skipped] == ["a.mp4", "c.mp4", "d.mp4", "e.mp4"]
    assert all(reason.startswith("it can't be opened as a video") for _, reason in summary.skipped[:3])
    assert summary.skipped[3][1].startswith("it is damaged: ")
    again = tokenize([tmp_path / "videos"], cv, tmp_path / "out", to=to)
    assert (again.videos, again.kept, again.skipped) == (0, 5, summary.skipped)
    (tmp_path / "videos" / "a.mp4").write_bytes(whole)  # mended
    third = tokenize([tmp_path / "videos"], cv, tmp_path / "out", to=to)
    assert (third.videos, third.frames, third.kept, len(third.skipped)) == (1, 30, 4, 3)
    written = tmp_path / "out" / {"shards": "shard-000001.tar", "safetensors": "a.safetensors"}[to]
    assert written.stat().st_size == third.bytes


def test_broken_video_inside_a_shard_is_named(tmp_path, cv):
    shard = tmp_path / "shards" / "mixed.tar"
    shard.parent.mkdir()
    good, long_key = film(tmp_path / "good.mp4"), "g" * 96
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with tarfile.open(shard, "w") as archive:
        archive.add(good, f"{long_key}.mp4")  # a field's longer name no longer fits into plain tar headers
        archive.add(tmp_path / "bad.mp4", "bad.mp4")
    summary = tokenize([shard], cv, tmp_path / "out")
    assert (summary.videos, [video for video, _ in summary.skipped]) == (1, [f"{shard}/bad.mp4"])
    assert summary.skipped[0][1].startswith("it can't be opened as a video")
    assert [sample["__key__"] for sample in samples_in(tmp_path / "out" / "mixed.tar")] == [long_key]


def test_nothing_that_can_be_tokenized_is_an_error(tmp_path, cv):
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(ConfigError, match=r"none of 1 videos can be tokenized, .*a.mp4 for one: it can't be opened"):
        tokenize([tmp_path / "a.mp4"], cv, tmp_path / "out")


@pytest.mark.parametrize("kind", ["shards", "files"])
def test_killed_call_goes_on_and_ends_with_the_same_bytes(tmp_path, cv, kind):
    for index in range(6):
        film(tmp_path / "videos" / f"{index}.mp4", 65, 32, 64, seed=index)
    source = tmp_path / "videos"
    if kind == "shards":
        source = tmp_path / "shards"
        pack([tmp_path / "videos"], source, max_clips_per_shard=2)
    out = tmp_path / "out"
    size = 25 / 1024 if kind == "files" else None  # two videos of 16 x 9 x 4 x 8 float16 and their facts
    arguments = [str(source), "--weights", str(cv), "--out", str(out)]
    arguments += ["--shard-size-mib", str(size)] if size else []
    process = subprocess.Popen([sys.executable, "-m", "cosmos_hpc.cli", "tokenize", *arguments])
    ledger = out / "tokenized.jsonl"
    deadline = time.monotonic() + 60
    while not (ledger.exists() and len(ledger.read_bytes().splitlines()) > 1):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = files_in(out)
    summary = tokenize([source], cv, out, shard_size_mib=size)
    assert 0 < summary.kept < 6
    assert summary.videos == 6 - summary.kept
    whole = tmp_path / "whole"
    tokenize([source], cv, whole, shard_size_mib=size)
    assert files_in(out) == files_in(whole)
    assert files_in(out).items() >= {name: data for name, data in finished.items() if name.endswith(".tar")}.items()


def test_torn_shard_and_torn_ledger_are_made_whole(tmp_path, cv, dataset):
    out = tmp_path / "out"
    tokenize([dataset], cv, out)
    whole = files_in(out)
    ledger, torn = out / "tokenized.jsonl", out / "val" / "shard-000001.tar"
    os.truncate(torn, torn.stat().st_size // 2)
    os.truncate(ledger, ledger.stat().st_size - 7)  # the line of the last file, val/shard-000001.tar
    summary = tokenize([dataset], cv, out)
    assert (summary.videos, summary.files, summary.kept) == (2, 1, 10)
    assert files_in(out) == whole
    os.truncate(out / "train" / "shard-000000.tar", 100)
    assert tokenize([dataset], cv, out).files == 1
    assert {name: data for name, data in files_in(out).items() if name != "tokenized.jsonl"} == {
        name: data for name, data in whole.items() if name != "tokenized.jsonl"
    }


def test_new_videos_go_into_new_shards_and_a_changed_one_is_refused(tmp_path, cv):
    videos, out = tmp_path / "videos", tmp_path / "out"
    film(videos / "b.mp4")
    tokenize([videos], cv, out)
    film(videos / "a.mp4", seed=1)
    assert tokenize([videos], cv, out)[:3] == (1, 9, 1)
    assert [sample["__key__"] for sample in samples_in(out / "shard-000001.tar")] == ["a"]
    film(videos / "b.mp4", 17, seed=2)
    with pytest.raises(ConfigError, match=r"holds b from a file of \d+ bytes, but .*b.mp4 has \d+: choose another"):
        tokenize([videos], cv, out)


def test_other_weights_or_settings_into_the_same_folder_are_refused(tmp_path, cv, weights_of):
    video, out = film(tmp_path / "videos" / "a.mp4"), tmp_path / "out"
    tokenize([video], cv, out)
    before = files_in(out)
    with pytest.raises(ConfigError, match=r"out was made with --dtype bf16, not fp32: choose another folder for --out"):
        tokenize([video], cv, out, dtype="fp32")
    with pytest.raises(ConfigError, match=r"out was made with weights [0-9a-f]{12}, not [0-9a-f]{12}: choose another"):
        tokenize([video], weights_of("CV8x8x8", seed=1), out)
    with pytest.raises(ConfigError, match=r"made with --to shards, not safetensors, --max-frames None, not 3: choose"):
        tokenize([video], cv, out, to="safetensors", max_frames=3)
    with pytest.raises(ConfigError, match="made with --tile-size None, not 128, --tile-overlap None, not 64: choose"):
        tokenize([video], cv, out, tile_size=128)
    assert files_in(out) == before


@pytest.mark.parametrize(
    ("sources", "out", "options", "message"),
    [
        (["none"], "out", {}, "none is not there"),
        (["empty"], "out", {}, "no videos in"),
        (["films"], "films/out", {}, "out lies in .*films, which is read: choose another folder for --out"),
        (["films"], "shards", {}, "shards holds shards of something else: choose another folder for --out"),
        (["films", "shards"], "out", {}, "is a shard among other sources: name one folder of shards, or only videos"),
        (["torn"], "out", {}, r"a\.tar can't be read as a tar \(.*\): pack it again"),
        (["shards"], "out", {"shard_size_mib": 1}, "--shard-size-mib is for video files into shards"),
        (["films"], "out", {"shard_size_mib": 0}, "--shard-size-mib is 0, in which nothing fits"),
        (["films"], "out", {"max_frames": 0}, "--max-frames is 0, which leaves nothing of a video: set 1 or more"),
        (["films"], "out", {"tile_overlap": 8}, "tiles can't overlap by 8 pixels without a tile size: give one"),
        (["films"], "out", {"tile_size": 64}, "tiles of 64 pixels can't overlap by 64: let them overlap by at least 8"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, cv, monkeypatch, sources, out, options, message):
    monkeypatch.chdir(tmp_path)
    film(Path("films/a.mp4"))
    Path("empty").mkdir()
    pack([Path("films")], Path("shards"))
    Path("torn").mkdir()
    Path("torn/a.tar").write_bytes(Path("shards/shard-000000.tar").read_bytes()[:1000])
    with pytest.raises(ConfigError, match=message) as refusal:
        tokenize([Path(source) for source in sources], cv, Path(out), **options)
    assert "\n" not in str(refusal.value)
    assert not Path("out").exists()


def test_large_frames_are_tokenized_in_tiles_when_asked(tmp_path, cv):
    video, out = film(tmp_path / "videos" / "a.mp4", 9, 40, 64), tmp_path / "out"
    tokenize([video], cv, out, dtype="fp32", tile_size=32, tile_overlap=8)
    (sample,) = samples_in(out / "shard-000000.tar")
    tiled = Tokenizer.from_weights(cv, tile_size=32, tile_overlap=8).encode(frames_of(video)).latents
    assert torch.from_numpy(sample["latents.npy"]).equal(tiled)
    assert not tiled.allclose(Tokenizer.from_weights(cv).encode(frames_of(video)).latents)
    assert tokenize([video], cv, out, dtype="fp32", tile_size=32, tile_overlap=8).kept == 1
    with pytest.raises(ConfigError, match="was made with --tile-overlap 8, not 16: choose another folder"):
        tokenize([video], cv, out, dtype="fp32", tile_size=32, tile_overlap=16)


def test_two_calls_at_once_do_not_mix(tmp_path, cv):
    video, out = film(tmp_path / "a.mp4"), tmp_path / "out"

    def second_call(_: Progress) -> None:
        with pytest.raises(ConfigError, match=r"another `cosmos-hpc tokenize` writes into .*out: wait for it"):
            tokenize([video], cv, out)

    assert tokenize([video], cv, out, on_progress=second_call).videos == 1


def test_command_prints_what_was_done_and_what_was_left_out(tmp_path, cv):
    film(tmp_path / "videos" / "a.mp4")
    (tmp_path / "videos" / "b.mp4").write_bytes(b"no video")
    arguments = ["tokenize", str(tmp_path / "videos"), "--weights", str(cv), "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert f"left out {tmp_path}/videos/b.mp4: it can't be opened as a video" in first.stdout
    assert "tokenized 1 videos (9 frames) into 1 files" in first.stdout
    assert "nothing to do: " in CliRunner().invoke(app, arguments).stdout
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (told["videos"], told["kept"], len(told["skipped"])) == (0, 2, 1)


@pytest.mark.parametrize("verb", ["tokenize", "reconstruct", "export"])
def test_place_that_can_not_be_written_is_one_line(tmp_path, cv, verb, monkeypatch, capsys):
    video = film(tmp_path / "videos" / "a.mp4")
    (tmp_path / "file").touch()
    sources = [str(cv)] if verb == "export" else [str(video), "--weights", str(cv)]
    monkeypatch.setattr(sys, "argv", ["cosmos-hpc", verb, *sources, "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "can't be written (Not a directory): free" in line
    ]
    assert len(lines) == 1
