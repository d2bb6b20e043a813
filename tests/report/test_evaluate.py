import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from report_parts import WriteRun, film, grey_state, run_config, save_checkpoint
from torch import nn
from typer.testing import CliRunner

from cosmos_hpc.cli import app
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder
from cosmos_hpc.data.loader import ValidationLoader, to_unit_range
from cosmos_hpc.data.video_file import probe, write_mp4
from cosmos_hpc.report.evaluate import Instruments, Source, Task, evaluate, run_source, start_source, through
from cosmos_hpc.report.evaluation_clips import clip_of
from cosmos_hpc.report.scores import read_evaluation
from cosmos_hpc.report.strips import write_worst
from cosmos_hpc.tokenizer import psnr, starting_tokenizer
from cosmos_hpc.tokenizer.frechet import FeatureNetwork
from cosmos_hpc.tokenizer.losses.vgg import LAYER_WEIGHTS, Vgg16

CHANNEL = 3


def task(dataset: Path, **changes: object) -> Task:
    return Task(**{"data": dataset, "num_frames": 9, "crop_size": 32, **changes})  # type: ignore[arg-type]


def changed_weights(config, **tensors: torch.Tensor) -> Source:
    """The starting weights with some tensors replaced; double underscores stand for dots."""

    def load():
        network = starting_tokenizer(config.model, config.trainer.seed)
        network.load_state_dict({name.replace("__", "."): tensor for name, tensor in tensors.items()}, strict=False)
        return network

    return Source("changed", load)


def start(config) -> Source:
    return Source("start", partial(starting_tokenizer, config.model, config.trainer.seed), is_start=True)


def psnr_of_grey(dataset: Path) -> list[float]:
    """By hand, for each clip: what a reconstruction of 127.5 everywhere is worth. The mean over frames, peak 255."""
    clips = [
        clip.numpy() for batch in ValidationLoader(run_config(dataset).data, rank=0, world_size=1) for clip in batch
    ]
    frames = [[np.mean((clip[:, t].astype(float) - 127.5) ** 2) for t in range(clip.shape[1])] for clip in clips]
    return [sum(10 * math.log10(255**2 / mse) for mse in clip) / len(clip) for clip in frames]


def test_grey_reconstructions_are_worth_what_hand_arithmetic_says_on_the_clips_of_validation(
    dataset: Path, write_run: WriteRun
) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    save_checkpoint(folder, grey_state(config), step=40)
    told: list[tuple[int, int]] = []
    found = evaluate([run_source(folder)], task(dataset), on_video=lambda *counts: told.append(counts))
    expected = psnr_of_grey(dataset)
    [row] = found.evaluations
    assert (row.weights, row.run, row.step) == (folder.label, folder.path.name, 40)
    assert (len(found.videos), told[-1]) == (4, (4, 4))
    assert row.per_video["psnr"] == pytest.approx(expected, abs=1e-4)
    lowest, second = sorted(expected)[:2]
    assert row.score("psnr").worst5 == pytest.approx(lowest + 0.15 * (second - lowest), abs=1e-4)  # 5 % of 3 gaps
    assert row.latents is None  # nothing to compare with


def test_decoder_alone_leaves_every_latent_as_it_was(dataset: Path, write_run: WriteRun) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    save_checkpoint(folder, grey_state(config), step=40)
    found = evaluate([start_source(folder), run_source(folder)], task(dataset))
    before, after = found.evaluations
    assert before.is_start
    assert after.latents is not None
    assert after.latents.is_unchanged
    assert (after.latents.largest_shift, set(after.latents.std_ratio)) == (0.0, {1.0})
    assert after.per_video["old_encoder"] == after.per_video["psnr"]
    assert after.per_video["old_decoder"] == before.per_video["psnr"]
    gain = found.gain(after, "psnr")
    assert gain is not None
    expected = np.mean(psnr_of_grey(dataset)) - np.mean(before.per_video["psnr"])
    assert gain.mean == pytest.approx(expected, abs=1e-4)


def test_moved_latents_are_measured_channel_by_channel_and_decoded_crosswise(dataset: Path) -> None:
    config = run_config(dataset)
    old = starting_tokenizer(config.model, config.trainer.seed)
    moved = old.quant_conv.conv3d.bias.clone()
    moved[CHANNEL] += 0.5
    # the decoder takes the move back, so that its own reconstructions are the old ones
    back = old.post_quant_conv.conv3d.bias - 0.5 * old.post_quant_conv.conv3d.weight[:, CHANNEL, 0, 0, 0]
    new = changed_weights(config, quant_conv__conv3d__bias=moved, post_quant_conv__conv3d__bias=back)
    before, after = evaluate([start(config), new], task(dataset)).evaluations
    assert after.per_video["psnr"] == pytest.approx(before.per_video["psnr"], abs=1e-3)
    with torch.no_grad():
        clips = [to_unit_range(batch) for batch in ValidationLoader(config.data, rank=0, world_size=1)]
        latents = torch.cat([old.encode(batch) for batch in clips])
        crossed = [
            value
            for batch in clips
            for value in psnr(
                batch,
                old.decode(
                    old.encode(batch) + 0.5 * nn.functional.one_hot(torch.tensor(CHANNEL), 16).view(1, 16, 1, 1, 1)
                ),
            ).tolist()
        ]
    assert after.latents is not None
    assert not after.latents.is_unchanged
    shift = 0.5 / latents.double()[:, CHANNEL].std(correction=0).item()
    assert after.latents.mean_shift[CHANNEL] == pytest.approx(shift, rel=1e-4)
    assert max(map(abs, after.latents.mean_shift[:CHANNEL] + after.latents.mean_shift[CHANNEL + 1 :])) < 1e-6
    assert after.latents.std_ratio == pytest.approx([1.0] * 16, rel=1e-4)
    assert after.per_video["old_decoder"] == pytest.approx(crossed, abs=1e-3)
    assert after.per_video["old_encoder"] != pytest.approx(after.per_video["psnr"], abs=1e-3)


def test_changed_indices_and_use_of_codes_are_counted(dataset: Path) -> None:
    config = run_config(dataset, model="Cosmos-1.0-Tokenizer-DV8x16x16")
    old = starting_tokenizer(config.model, config.trainer.seed)
    same_code = {
        "quant_conv__conv3d__weight": torch.zeros_like(old.quant_conv.conv3d.weight),
        "quant_conv__conv3d__bias": torch.zeros_like(old.quant_conv.conv3d.bias),
    }
    before, after = evaluate([start(config), changed_weights(config, **same_code)], task(dataset)).evaluations
    with torch.no_grad():
        clips = [to_unit_range(batch) for batch in ValidationLoader(config.data, rank=0, world_size=1)]
        indices = torch.cat([old.encode_indices(batch) for batch in clips])
        flat = changed_weights(config, **same_code).load()
        [constant] = flat.encode_indices(clips[0]).unique().tolist()
    changed = (indices != constant).double().flatten(1).mean(1)
    assert after.per_video["changed"] == pytest.approx(changed.tolist())
    assert after.over_all["perplexity"] == pytest.approx(1.0)
    assert after.over_all["code_use"] == pytest.approx(1 / 64000)
    assert before.over_all["code_use"] == pytest.approx(len(indices.unique()) / 64000)


def test_windows_are_coded_each_by_itself(drives: Path) -> None:
    config = run_config("gone")
    network = starting_tokenizer(config.model, config.trainer.seed).eval()
    clips = torch.rand(1, 3, 18, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = torch.cat([network(half).reconstructions for half in (clips[:, :, :9], clips[:, :, 9:])], dim=2)
    torch.testing.assert_close(through(network, clips, 2).reconstructions, expected)
    [row] = evaluate([start(config)], task(drives, num_windows=2, max_videos=1)).evaluations
    assert row.per_video["border"][0] > 0
    [row] = evaluate([start(config)], task(drives, num_windows=1, max_videos=1)).evaluations
    assert "border" not in row.per_video


def test_frechet_distance_is_there_where_a_network_is_given(dataset: Path, tmp_path: Path) -> None:
    class MeanColour(nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return clips.mean(dim=(2, 3, 4))

    config = run_config(dataset)
    torch.jit.trace(MeanColour(), torch.zeros(1, 3, 9, 32, 32)).save(str(tmp_path / "colour.pt"))
    eye = FeatureNetwork(tmp_path / "colour.pt", torch.device("cpu"))
    with_it = evaluate([start(config)], task(dataset), Instruments(features=eye))
    assert with_it.evaluations[0].over_all["frechet"] > 0
    assert "frechet" not in evaluate([start(config)], task(dataset)).evaluations[0].over_all


def test_clips_that_the_network_can_not_take_are_refused(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="clips have 7 frames, but CV8x8x8 takes 1 "):
        evaluate([start(run_config(dataset))], task(dataset, num_frames=7))


def test_clips_longer_than_every_video_are_refused_with_the_mend(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"gives a clip of 25 frames .*has 17 frames.*set a smaller --num-frames"):
        evaluate([start(run_config(dataset))], task(dataset, num_frames=25))


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loose videos with what is said of them beside: two cameras, boxes, masks, one that is broken."""
    root = tmp_path_factory.mktemp("drives")
    for index, camera in enumerate(("front", "left", "front")):
        write_mp4(root / f"drive_{index}.mp4", film(80 * index, num_frames=18), fps=24)
        facts = {"camera": camera, "sky": {"night": index == 2}}
        if index == 0:
            facts["boxes"] = [[20, 10, 30, 20], {"frame": 5, "box": [40, 30, 64, 48]}]
        (root / f"drive_{index}.json").write_text(json.dumps(facts))
    mask = np.zeros((48, 64), np.uint8)
    mask[:, :32] = 255
    from PIL import Image

    Image.fromarray(mask).save(root / "drive_1.mask.png")
    (root / "drive_3.mp4").write_bytes(b"no video")
    return root


def test_boxes_and_masks_are_cut_as_the_pictures_are(drives: Path) -> None:
    videos = task(drives).videos()
    boxed, masked, bare = (clip_of(video, task(drives).shape) for video in videos[:3])
    # frames 4 to 12 of 18, rows 8 to 40 of 48, columns 16 to 48 of 64
    assert boxed.inside is not None
    expected = torch.zeros(1, 9, 32, 32, dtype=torch.bool)
    expected[:, :, 2:12, 4:14] = True
    expected[:, 1, 22:, 24:] = True
    assert boxed.inside.equal(expected)
    assert masked.inside is not None
    assert masked.inside[..., :16].all()
    assert not masked.inside[..., 16:].any()
    assert bare.inside is None


def test_scores_inside_are_of_what_the_boxes_hold(drives: Path) -> None:
    config = run_config("gone")
    grey = changed_weights(config, **{name.replace(".", "__"): tensor for name, tensor in grey_state(config).items()})
    found = evaluate([start(config), grey], task(drives, fields=("camera", "sky.night")))
    clip = clip_of(task(drives).videos()[1], task(drives).shape)
    left = clip.frames[:, :, :, :16].double() / 255 - 0.5
    by_hand = (-10 * torch.log10(left.square().mean(dim=(0, 2, 3)))).mean().item()
    assert found.evaluations[1].per_video["psnr_inside"][1] == pytest.approx(by_hand, abs=1e-3)
    assert math.isnan(found.evaluations[1].per_video["psnr_inside"][2])
    assert found.slices == {"camera": ["front", "left", "front"], "sky.night": ["false", "false", "true"]}
    assert [name for name, _ in found.left_out] == ["drive_3"]


def test_worst_clips_are_drawn_beside_their_errors(drives: Path, tmp_path: Path) -> None:
    config = run_config("gone")
    grey = changed_weights(config, **{name.replace(".", "__"): tensor for name, tensor in grey_state(config).items()})
    sources, what = [start(config), grey], task(drives)
    found = evaluate(sources, what)
    [worst] = write_worst(found, sources, what, 1, tmp_path)
    lowest = found.evaluations[1].worst(1)[0]
    assert worst.name == found.videos[lowest]
    sheet = np.round(imread(worst.strip)[..., :3] * 255)
    rows = sheet.reshape(5, -1, sheet.shape[1], 3)[:, 16:]  # original, start, its error, grey, its error
    assert np.all(rows[3] == 128)  # 127.5, rounded to even
    error = np.minimum(255, 4 * np.abs(rows[0] - 128))
    assert np.array_equal(rows[4], error)
    assert probe(worst.video)[:4] == (9, 9, 32, 3 * 32)


def test_pictures_smaller_than_the_clip_are_enlarged_and_whole_frames_are_taken_whole(drives: Path) -> None:
    video = task(drives).videos()[0]
    assert clip_of(video, task(drives, crop_size=96).shape).frames.shape == (3, 9, 96, 96)
    assert clip_of(video, task(drives, crop_size=None).shape).frames.shape == (3, 9, 48, 64)


def run_cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_command_compares_a_run_with_its_start_where_the_report_will_look(
    dataset: Path, drives: Path, experiment: ExperimentFolder, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    save_checkpoint(folder, grey_state(config), step=40)
    write_run(run_config(dataset, seed=7))  # never started
    monkeypatch.setenv("COSMOS_HPC_RUNS", str(experiment.path.parent))
    printed = run_cli("trial", "--worst", "1")
    assert "PSNR, dB" in printed
    assert "latents of trial/000" in printed
    [found] = [read_evaluation(path) for path in experiment.evaluations.glob("*/evaluation.json")]
    assert (found.data, found.num_frames, found.crop_size) == (str(dataset), 9, 32)  # as the run was trained
    assert [row.weights for row in found.evaluations] == [f"start of {folder.label}", folder.label]
    told = json.loads(run_cli(str(folder.path), "--no-start", "--data", str(drives), "--by", "camera", "--json"))
    assert [row["weights"] for row in told["evaluations"]] == [folder.label]
    assert set(told["evaluations"][0]["slices"]["camera"]) == {"front", "left"}
    assert told["left_out"][0][0] == "drive_3"
    assert len(told["pictures"]) == 3
    assert len(list(experiment.evaluations.iterdir())) == 2


def test_command_looks_through_the_vgg16_of_a_file(
    dataset: Path, experiment: ExperimentFolder, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(dataset)
    save_checkpoint(write_run(config), grey_state(config), step=40)
    monkeypatch.setenv("COSMOS_HPC_RUNS", str(experiment.path.parent))
    torch.manual_seed(0)
    network = Vgg16()  # in torchvision's layout; its weights are not the trained ones
    torch.save(network.state_dict(), tmp_path / "vgg16.pt")
    told = json.loads(run_cli("trial", "--no-start", "--vgg16", str(tmp_path / "vgg16.pt"), "--worst", "0", "--json"))
    distances = []
    with torch.no_grad():
        for batch in ValidationLoader(config.data, rank=0, world_size=1):
            for clip in to_unit_range(batch):
                pairs = zip(network(clip.movedim(1, 0)), network(torch.zeros_like(clip).movedim(1, 0)), strict=True)
                distances.append(sum(w * (a - b).abs().mean() for w, (a, b) in zip(LAYER_WEIGHTS, pairs, strict=True)))
    assert told["evaluations"][0]["scores"]["lpips"]["mean"] == pytest.approx(float(np.mean(distances)), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trial/001"], "trial/001 has no checkpoint yet"),
        (["trial", "--data", "nowhere"], "--data is nowhere, which is not there"),
        (["trial", "--probe", "detect"], "--probe is detect, but takes module:function"),
        (["trial", "--vgg16", "no/such"], "no/such is not in the Hugging Face cache"),
        (["trial", "--windows", "0"], "--windows is 0, but must be at least 1"),
        (["trial", "--split", "night"], "holds no video in its split night; it has train, val"),
    ],
)
def test_command_refuses_what_it_can_not_do(
    arguments: list[str],
    words: str,
    dataset: Path,
    experiment: ExperimentFolder,
    write_run: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(dataset)
    save_checkpoint(write_run(config), grey_state(config), step=40)
    write_run(run_config(dataset, seed=7))
    monkeypatch.setenv("COSMOS_HPC_RUNS", str(experiment.path.parent))
    with pytest.raises(ConfigError, match=words):
        run_cli(*arguments)
