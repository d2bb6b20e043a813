import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from report_parts import WriteRun, grey_state, run_config, save_checkpoint

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.loader import ValidationLoader
from cosmos_hpc.report.evaluate import evaluate


def psnr_of_grey(dataset: Path) -> list[float]:
    """By hand, for each clip: what a reconstruction of 127.5 everywhere is worth. The mean over frames, peak 255."""
    clips = [
        clip.numpy() for batch in ValidationLoader(run_config(dataset).data, rank=0, world_size=1) for clip in batch
    ]
    frames = [[np.mean((clip[:, t].astype(float) - 127.5) ** 2) for t in range(clip.shape[1])] for clip in clips]
    return [sum(10 * math.log10(255**2 / mse) for mse in clip) / len(clip) for clip in frames]


def test_grey_reconstructions_are_worth_what_hand_arithmetic_says(dataset: Path, write_run: WriteRun) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    save_checkpoint(folder, grey_state(config), step=40)
    batches: list[None] = []
    [row] = evaluate([folder.path], config.data, on_batch=lambda: batches.append(None))
    expected = psnr_of_grey(dataset)
    assert (row.source, row.num_clips, len(batches)) == (folder.path, 4, 2)
    assert row.psnr_per_clip == pytest.approx(expected, abs=1e-4)
    assert row.psnr_mean == pytest.approx(sum(expected) / 4, abs=1e-4)
    lowest, second = sorted(expected)[:2]
    assert row.psnr_p5 == pytest.approx(lowest + 0.15 * (second - lowest), abs=1e-4)  # 5 % of 3 gaps


def test_each_source_has_a_row_in_the_order_given(dataset: Path, write_run: WriteRun) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    grey = save_checkpoint(folder, grey_state(config), step=20)
    other = grey_state(config)
    other["decoder.conv_out.1.conv3d.bias"] += 100.0  # far outside [-1, 1] in some bands
    bad = save_checkpoint(folder, other, step=40)
    rows = evaluate([bad, grey], config.data)
    assert [row.source for row in rows] == [bad, grey]
    assert rows[0].psnr_mean < rows[1].psnr_mean


def test_clips_that_the_network_can_not_take_are_refused(dataset: Path, write_run: WriteRun) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    save_checkpoint(folder, grey_state(config), step=40)
    with pytest.raises(ConfigError, match="clips have 7 frames, but CV8x8x8 takes 1 "):
        evaluate([folder.path], dataclasses.replace(config.data, num_frames=7))


def test_clips_longer_than_every_video_are_refused_with_the_mend(dataset: Path, write_run: WriteRun) -> None:
    config = run_config(dataset)
    folder = write_run(config)
    save_checkpoint(folder, grey_state(config), step=40)
    with pytest.raises(ConfigError, match=r"no video of its split val has 25 frames.*set a smaller data.num_frames"):
        evaluate([folder.path], dataclasses.replace(config.data, num_frames=25))
