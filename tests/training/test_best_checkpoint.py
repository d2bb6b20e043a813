"""The best checkpoint by a validation score stays, however many follow."""

import json
import math

import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.training.checkpoint_files import BestBy, point_and_prune, publish


def save(folder, step: int, best_by: BestBy, **scores: float) -> None:
    unfinished = folder / f"step_{step:08d}.partial"
    unfinished.mkdir(parents=True)
    (unfinished / "checkpoint.json").write_text(json.dumps({"step": step, "scores": scores}))
    publish(unfinished, folder / f"step_{step:08d}")
    point_and_prune(folder / f"step_{step:08d}", 2, best_by)


def kept(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_????????"))


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("val_psnr", [20.0, 22.0, 21.0, 21.5, 19.0], 2), ("val_lpips_ema", [0.5, 0.2, 0.4, 0.3, 0.6], 2)],
)
def test_the_best_stays_beside_the_last_ones_until_a_better_one_comes(tmp_path, metric, values, best):
    best_by = BestBy(metric)
    for step, value in enumerate(values, start=1):
        save(tmp_path, step, best_by, **{metric: value})
    assert kept(tmp_path) == [best, 4, 5]
    assert (tmp_path / "best").resolve() == tmp_path / f"step_{best:08d}"
    assert (tmp_path / "latest").resolve() == tmp_path / "step_00000005"
    save(tmp_path, 6, best_by, **{metric: 0.1 if "lpips" in metric else 30.0})
    assert kept(tmp_path) == [5, 6]
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000006"


def test_scores_on_other_clips_are_not_compared(tmp_path):
    best_by = BestBy("val_psnr")
    for step, (clips, value) in enumerate([(64, 30.0), (64, 29.0), (32, 25.0), (32, 26.0), (32, 24.0)], start=1):
        save(tmp_path, step, best_by, val_psnr=value, val_clips=clips)
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000004"
    save(tmp_path, 6, best_by, val_psnr=23.0)  # its score is not known to be of as many
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000006"


def test_checkpoints_without_that_score_are_never_best(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, BestBy("val_ssim"), val_psnr=20.0 - step)
    assert kept(tmp_path) == [3, 4]
    assert not (tmp_path / "best").exists()
    assert BestBy("val_psnr").best(tmp_path) == (tmp_path / "step_00000003", 17.0, None)
    assert BestBy(None).best(tmp_path) is None
    assert math.isclose(BestBy("val_lpips").worth({"val_lpips": 0.25}), -0.25)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint.best_by=psnr"], "set val_psnr, val_ssim"),
        (["checkpoint.best_by=val_psnr_ema", "optim.ema_decay=0"], "no average to validate"),
        (["checkpoint.best_by=val_lpips", "loss.lpips.weight=0"], "without VGG16 there is no such score"),
    ],
)
def test_a_score_that_will_not_be_there_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        resolve(load_experiment(None, overrides), {})
