"""The real loop over clips of which some make the network's output NaN."""

import json
from collections.abc import Iterator

import pytest
import torch

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Losses, starting_tokenizer
from cosmos_hpc.training.compilation import Compilation
from cosmos_hpc.training.preemption import Outcome, StopRequest
from cosmos_hpc.training.recovery import NonFiniteError
from cosmos_hpc.training.telemetry import ValidationScores

POISON = 255
"""A clip that is white all over stands for one that the network can't bear."""


class ListedClips:
    """Stands for the data room: clips from a list of shades, and a position in it."""

    def __init__(self, shades: list[int]) -> None:
        self._shades = shades
        self._position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            shade = self._shades[self._position]
            self._position += 1
            yield torch.full((1, 3, 9, 16, 16), shade, dtype=torch.uint8)

    def state(self) -> int:
        return self._position

    def restore(self, states: list[int]) -> None:
        (self._position,) = states


class NoValidation:
    """Stands for the validation, which is not at issue."""

    is_wanted = False
    pictures = None

    def is_due(self, step: int) -> bool:
        return False

    def run(self, *_: object) -> ValidationScores:
        return ValidationScores(0.0)


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


@pytest.fixture
def train_on(tmp_path, groups):
    """Trains on clips of the given shades until step 8; the state and the run's folder."""
    from cosmos_hpc.training.agreement import Agreement
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.loop import Run, TrainState, train
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.recovery import NonFiniteGuard
    from cosmos_hpc.training.telemetry import Telemetry

    def do(shades: list[int], *overrides: str) -> tuple[TrainState, RunFolder, Outcome]:
        small = ["model.channels=4", "data.global_batch_size=1", "trainer.max_steps=8", "trainer.precision=32"]
        small += ["loss.lpips.weight=0", "checkpoint.every_n_steps=2"]
        config = resolve(load_experiment(None, [*small, *overrides]), {})
        folder = RunFolder(tmp_path / "000-abc")
        module = starting_tokenizer(config.model, 0)
        module.register_forward_pre_hook(lambda _, clips: (clips[0] * float("nan"),) if clips[0].min() > 0.99 else None)
        ddp = groups.wrap(module)
        optimizer = Optimizer(ddp, config.optim, groups)
        state = TrainState(module, ddp, optimizer, None, ListedClips(shades))
        telemetry = Telemetry(folder, config, groups.rank, 0)
        telemetry.resume_at(0, 0)
        checkpoints, guard = CheckpointStore(folder, config, groups), NonFiniteGuard(config.trainer)
        agreement = Agreement(groups, StopRequest())
        run = Run(
            config,
            groups,
            checkpoints,
            Losses(config.loss),
            NoValidation(),
            telemetry,
            agreement,
            guard,
            Compilation("eager"),
        )
        outcome = train(state, run)
        telemetry.close()
        return state, folder, outcome

    return do


def lines(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_an_update_that_is_not_finite_is_left_out_and_training_goes_on(train_on):
    state, folder, outcome = train_on([100, 120, POISON, 140, 150, 160, 170, 180])
    assert outcome is Outcome.FINISHED
    assert [line["step"] for line in lines(folder)] == list(range(9))
    assert [line["step"] for line in lines(folder) if line.get("skipped")] == [3]
    assert all(weight.isfinite().all() for weight in state.module.parameters())


def test_too_many_in_a_row_roll_back_and_go_past_the_clips_that_did_it(train_on, caplog):
    good, bad = [100, 120, 140, 150], [POISON] * 4
    state, folder, outcome = train_on([*good, *bad, *range(40, 60)], "trainer.max_skipped_steps=2")
    assert outcome is Outcome.FINISHED
    assert "rolled back" in caplog.text
    assert [line["step"] for line in lines(folder)] == list(range(9))
    assert not any(line.get("skipped") for line in lines(folder) if line["step"] <= 4)
    cut = [json.loads(line) for line in folder.cut_metrics(0).read_text().splitlines()]
    assert [line["step"] for line in cut if line["skipped"]] == [5, 6, 7], "the lines that were cut are lost"
    assert state.consumed_samples > state.step
    assert all(weight.isfinite().all() for weight in state.module.parameters())


def test_a_run_that_stays_not_finite_stops_with_a_diagnosis(train_on):
    with pytest.raises(NonFiniteError, match=r"also after 1 roll-backs: lower optim.lr"):
        train_on([100, 120, *[POISON] * 40], "trainer.max_skipped_steps=1", "trainer.max_rollbacks=1")


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(train_on):
    with pytest.raises(NonFiniteError, match="before the first checkpoint"):
        train_on([POISON] * 40)
