"""What a validation measures: of the weights and of their average, each clip once."""

import pytest
import torch

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
    validation = Validation(batches(2, 1), TrainerConfig(precision="32"), groups)
    scores = validation.run(Brighter(0.02), lambda: seen.append(1), Brighter(0.002))
    assert scores.val_psnr == pytest.approx((20 + 40 + 40) / 3, abs=1e-3)  # 0.1 and 0.01 of the range
    assert scores.val_psnr_ema == pytest.approx((40 + 60 + 60) / 3, abs=1e-2)
    assert scores.val_ssim < scores.val_ssim_ema < 1
    assert scores.val_lpips is None
    assert len(seen) == 2
    alone = validation.run(Brighter(0.02), lambda: None)
    assert alone.written().keys() == {"val_psnr", "val_ssim"}
    assert alone[:2] == pytest.approx(scores[:2])


def test_vggs_distance_is_measured_where_the_loss_looks_through_it(groups):
    from cosmos_hpc.training.validation import Validation

    torch.manual_seed(0)
    eye = Eye(Vgg16(), 2)
    (clips,) = batches(1)
    values = clips.float() / 127.5 - 1
    scores = Validation([clips], TrainerConfig(precision="32"), groups, eye=eye).run(Brighter(0.01), lambda: None)
    assert scores.val_lpips == pytest.approx(eye.distances(values, values + 0.1).item(), rel=1e-4)


def test_use_of_codes_is_of_all_clips_and_not_of_the_last_batch(groups):
    from cosmos_hpc.training.validation import Validation

    network = starting_tokenizer(ModelConfig(model="DV8x16x16", channels=4), 0)
    encoded = iter(torch.tensor([[0, 0], [63999, 5]]).view(2, 1, 1, 1, 2))
    network.forward = lambda clips: Autoencoded(clips, network.quantizer.indices_to_codes(next(encoded)))
    scores = Validation(batches(1, 1), TrainerConfig(precision="32"), groups).run(network, lambda: None)
    assert scores.val_code_use == pytest.approx(3 / 64000)
    assert scores.val_perplexity == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4: an entropy of 1.5 bits


def test_a_validation_split_without_a_clip_is_refused(groups):
    from cosmos_hpc.training.validation import Validation

    with pytest.raises(ConfigError, match="no video of the split val gives a clip"):
        Validation([], TrainerConfig(), groups).run(Brighter(0.1), lambda: None)


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
