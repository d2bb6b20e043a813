"""How many clips a forward takes where the settings leave it to a measurement."""

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import start_ranks

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.ranks import Rank


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


def settings(*overrides: str, total: int = 8, ranks: int = 1) -> RunConfig:
    size = ["model.channels=4", "trainer.precision=32", "data.num_frames=9", "data.crop_size=16"]
    batch = ["data.micro_batch_size=auto", f"data.global_batch_size={total}", f"trainer.devices={ranks}"]
    return resolve(load_experiment(None, [*size, *batch, "loss.lpips.weight=0", *overrides]), {})


def measured(seconds_of: dict[int, float | None], config: RunConfig, groups, monkeypatch) -> RunConfig:
    """With a bench on which steps of these sizes take so long."""
    from cosmos_hpc.training import micro_batch

    monkeypatch.setattr(micro_batch._Bench, "measure", lambda _, size: seconds_of[size])
    return micro_batch.with_micro_batch(config, groups)


@pytest.mark.parametrize(
    ("seconds_of", "best"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}, 8),
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: None}, 4),
        ({1: 1.0, 2: 1.2, 4: 4.0}, 2),
        ({1: 1.0, 2: 1.2, 4: 2.38, 8: 4.7}, 2),
    ],
    ids=["the faster the more", "the last one does not fit", "slower again", "a little faster is noise"],
)
def test_the_fastest_that_fits_is_taken(groups, monkeypatch, seconds_of, best):
    config = settings()
    found = measured(seconds_of, config, groups, monkeypatch)
    assert found.data.micro_batch_size == best
    assert found == settings(f"data.micro_batch_size={best}"), "nothing else changes"


def test_a_number_is_kept_and_nothing_measured(groups, monkeypatch):
    assert measured({}, settings("data.micro_batch_size=4"), groups, monkeypatch).data.micro_batch == 4


def test_not_even_one_clip_fits(groups, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError, match="not even one clip"):
        measured({1: None}, settings(), groups, monkeypatch)


@pytest.mark.parametrize(
    "terms", [[], ["loss.adversarial.weight=0.1", "loss.adversarial.channels=4"]], ids=["L1", "a discriminator"]
)
def test_real_steps_are_measured_and_leave_no_trace(groups, terms):
    from cosmos_hpc.training.micro_batch import with_micro_batch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = settings(*terms, total=4)
    assert with_micro_batch(config, groups).data.micro_batch_size in (1, 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_found_by_trying(groups, monkeypatch):
    from cosmos_hpc.training import micro_batch

    real = micro_batch.run_trial

    def full_at_four(module, losses, clips, *others):
        """A double of a GPU that holds three clips."""
        if len(clips) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(module, losses, clips, *others)

    monkeypatch.setattr(micro_batch, "run_trial", full_at_four)
    bench = micro_batch._Bench(settings(), groups)
    assert bench.measure(2) > 0
    assert bench.measure(4) is None


def choose_on_rank(rank: Rank, out: Path) -> None:
    """The second rank is slower, and holds less."""
    from cosmos_hpc.training import micro_batch
    from cosmos_hpc.training.parallel import Groups

    groups = Groups.start(rank)
    seconds = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0} if rank.is_first else {1: 1.0, 2: 1.9, 4: 3.0, 8: None}
    micro_batch._Bench.measure = lambda _, size: seconds[size]
    found = micro_batch.with_micro_batch(settings(total=16, ranks=2), groups)
    (out / f"{rank.rank}.json").write_text(json.dumps(found.data.micro_batch_size))
    groups.stop()


def test_all_ranks_take_what_the_slowest_and_smallest_can(tmp_path):
    start_ranks(choose_on_rank, 2, tmp_path)
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == ["4", "4"]
