"""What a validation measures: of the weights and of their average, each clip once."""

import time
from pathlib import Path

import pytest
import torch
from forked_ranks import start_ranks

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import CheckpointConfig, ModelConfig, RunConfig, TrainerConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import starting_tokenizer
from cosmos_hpc.tokenizer.continuous import Autoencoded
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.vgg import Vgg16


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


class Brighter(torch.nn.Module):
    """Reconstructs clips a little too bright; the first clip that it ever sees ten times as much."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self._by = by
        self._factors = iter([10.0])

    def forward(self, clips: torch.Tensor) -> Autoencoded:
        by = torch.full((len(clips), 1, 1, 1, 1), self._by)
        by[0] *= next(self._factors, 1.0)
        return Autoencoded(clips + by, clips)


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 140, (size, 3, 2, 16, 16), generator=generator, dtype=torch.uint8) for size in sizes]


def test_each_clip_counts_once_in_uneven_batches_for_the_weights_and_their_average(groups):
    from cosmos_hpc.training.validation import Validation

    seen = []
    validation = Validation({"val": batches(2, 1)}, TrainerConfig(precision="32"), groups)
    scores = validation.run(Brighter(0.02), lambda: seen.append(1), Brighter(0.002))
    assert scores.val_psnr == pytest.approx((20 + 40 + 40) / 3, abs=1e-3)  # 0.1 and 0.01 of the range
    assert scores.val_psnr_ema == pytest.approx((40 + 60 + 60) / 3, abs=1e-2)
    assert scores.val_ssim < scores.val_ssim_ema < 1
    assert scores.val_lpips is None
    assert len(seen) == 2
    alone = validation.run(Brighter(0.02), lambda: None)
    assert alone.written().keys() == {"val_psnr", "val_ssim", "val_clips"}
    assert alone[:2] == pytest.approx(scores[:2])


def test_vggs_distance_is_measured_where_the_loss_looks_through_it(groups):
    from cosmos_hpc.training.validation import Validation

    torch.manual_seed(0)
    eye = Eye(Vgg16(), 2)
    (clips,) = batches(1)
    values = clips.float() / 127.5 - 1
    scores = Validation({"val": [clips]}, TrainerConfig(precision="32"), groups, eye=eye).run(
        Brighter(0.01), lambda: None
    )
    assert scores.val_lpips == pytest.approx(eye.distances(values, values + 0.1).item(), rel=1e-4)


def test_use_of_codes_is_of_all_clips_and_not_of_the_last_batch(groups):
    from cosmos_hpc.training.validation import Validation

    network = starting_tokenizer(ModelConfig(model="DV8x16x16", channels=4), 0)
    encoded = iter(torch.tensor([[0, 0], [63999, 5]]).view(2, 1, 1, 1, 2))
    network.forward = lambda clips: Autoencoded(clips, network.quantizer.indices_to_codes(next(encoded)))
    scores = Validation({"val": batches(1, 1)}, TrainerConfig(precision="32"), groups).run(network, lambda: None)
    assert scores.val_code_use == pytest.approx(3 / 64000)
    assert scores.val_perplexity == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: an entropy of 1.5 bits


def test_a_validation_split_without_a_clip_is_refused(groups):
    from cosmos_hpc.training.validation import Validation

    with pytest.raises(ConfigError, match="no video of the split val gives a clip"):
        Validation({"val": []}, TrainerConfig(), groups).run(Brighter(0.1), lambda: None)


def test_only_a_validation_better_than_all_before_asks_for_a_checkpoint(groups, tmp_path):
    from cosmos_hpc.config.run_folder import RunFolder
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.telemetry import ValidationScores

    store = CheckpointStore(RunFolder(tmp_path), RunConfig(checkpoint=CheckpointConfig(best_by="val_ssim")), groups)
    found = []
    for step, ssim in ((2, 0.5), (4, 0.4), (6, 0.5), (8, float("nan")), (10, 0.6)):
        store.note(step, ValidationScores(20.0, val_ssim=ssim))
        found.append(store.is_best(step))
        assert not store.is_best(step + 1)
    assert found == [True, False, False, False, True]
    store.note(12, ValidationScores(20.0, val_ssim=0.3, val_clips=8))
    assert store.is_best(12), "on other clips"


def test_a_second_dataset_is_scored_by_itself(groups):
    from cosmos_hpc.training.validation import Validation

    class Steady(torch.nn.Module):
        """Reconstructs dark clips exactly to 20 dB, bright ones to 40 dB."""

        def forward(self, clips: torch.Tensor) -> Autoencoded:
            by = 0.02 if clips.mean() > 0 else 0.2
            return Autoencoded(clips - by, clips)

    dark, bright = (torch.full((1, 3, 2, 16, 16), shade, dtype=torch.uint8) for shade in (100, 200))
    validation = Validation({"val": [dark, dark], "general": [bright]}, TrainerConfig(precision="32"), groups)
    scores = validation.run(Steady(), lambda: None, Steady())
    assert (scores.val_psnr, scores.general_psnr) == pytest.approx((20, 40), abs=1e-3)
    assert scores.val_clips == 2
    assert scores.written().keys() - {"val_clips"} == {
        f"{split}_{name}{kind}" for split in ("val", "general") for name in ("psnr", "ssim") for kind in ("", "_ema")
    }


@pytest.mark.parametrize(("took_s", "is_wanted_after"), [(0.0, 120), (9.0, 300)])
def test_validations_come_by_the_clock_but_never_take_more_than_three_percent(
    groups, monkeypatch, took_s, is_wanted_after
):
    from cosmos_hpc.training.validation import Validation

    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    validation = Validation({"val": batches(1)}, TrainerConfig(precision="32", val_every_n_minutes=2), groups)

    def advance(by: float) -> None:
        nonlocal now
        now += by

    validation.run(Brighter(0.1), lambda: advance(took_s))
    advance(is_wanted_after - 10)
    assert not validation.is_wanted
    advance(10)
    assert validation.is_wanted
    assert not validation.is_due(100)


def test_the_guides_step_field_takes_the_place_of_the_clock(groups, monkeypatch):
    from cosmos_hpc.training.validation import Validation

    trainer = TrainerConfig(val_check_interval=7, max_steps=16)
    validation = Validation({"val": batches(1)}, trainer, groups)
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    assert not validation.is_wanted
    assert [step for step in range(1, 17) if validation.is_due(step)] == [7, 14, 16]
    assert (TrainerConfig().val_every_n_minutes, TrainerConfig().val_check_interval) == (5.0, None)


def validate_on_rank(rank: Rank, dataset: Path, out: Path) -> None:
    from cosmos_hpc.data.loader import ValidationLoader
    from cosmos_hpc.training.parallel import Groups
    from cosmos_hpc.training.validation import Validation

    groups = Groups.start(rank)
    data = DataConfig(path=str(dataset), num_frames=9, crop_size=32, micro_batch_size=3)
    loader = ValidationLoader(data, rank=rank.rank, world_size=rank.world_size)
    network = starting_tokenizer(ModelConfig(channels=4), 0)
    scores = Validation({"val": loader}, TrainerConfig(precision="32"), groups).run(network, lambda: None)
    torch.save([sum(len(batch) for batch in loader), scores.written()], out / f"{rank.world_size}_{rank.rank}.pt")
    groups.stop()


def test_ranks_with_uneven_shares_and_batches_measure_what_one_rank_does(tmp_path, dataset):
    for world_size in (1, 3):  # four clips in batches of up to three: 3 + 1 on one rank, two ranks have one clip
        start_ranks(validate_on_rank, world_size, dataset, tmp_path)
    (alone,) = (torch.load(tmp_path / "1_0.pt"),)
    shares = [torch.load(tmp_path / f"3_{index}.pt") for index in range(3)]
    assert (alone[0], sorted(count for count, _ in shares)) == (4, [1, 1, 2])
    for _, scores in shares:
        assert scores == pytest.approx(alone[1], rel=1e-5)
