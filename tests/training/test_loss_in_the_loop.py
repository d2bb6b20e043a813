"""The loss over the micro batches of a step, and its weights over the steps of a run."""

from types import SimpleNamespace

import pytest
import torch

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Losses, starting_tokenizer

WEIGHTS = ["loss.lpips.weight=0", "loss.consistency.boundaries=[2]", "loss.consistency.values=[0.5]"]
WINDOWS = ["loss.consistency.num_frames=9", "loss.consistency.step=8", "data.num_frames=17", "data.crop_size=16"]


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


def steps(groups, micro_batch_size: int, first: int, last: int):
    """Metrics of the steps after `first`, and the weights; the clips are the same however they are cut."""
    from cosmos_hpc.training.loop import TrainState, train_step
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.queued_steps import StepQueue

    sizes = ["data.global_batch_size=4", f"data.micro_batch_size={micro_batch_size}", "trainer.precision=32"]
    config = resolve(load_experiment(None, ["model.channels=4", *WEIGHTS, *WINDOWS, *sizes]), {})
    module = starting_tokenizer(config.model, 0)
    ddp = groups.wrap(module)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), None, None, step=first)
    run = SimpleNamespace(config=config, groups=groups, losses=Losses(config.loss))
    clips = torch.randint(0, 256, (4, 3, 17, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    queue, metrics = StepQueue(), []
    for _ in range(first, last):
        queue.append(train_step(state, iter(clips.split(micro_batch_size)), run))
        metrics += queue.arrived(everything=True)
        state.optimizer.learn(False)
    return metrics, module.state_dict()


def test_a_weight_changes_at_its_step_of_the_run_however_steps_are_cut_or_resumed(groups):
    metrics, _ = steps(groups, 1, 0, 4)
    assert [step.consistency is None for step in metrics] == [True, True, False, False]
    assert [step.loss == pytest.approx(step.l1) for step in metrics] == [True, True, False, False]
    assert metrics[2].loss == pytest.approx(metrics[2].l1 + 0.5 * metrics[2].consistency)
    (resumed,), _ = steps(groups, 2, 2, 3)
    assert resumed.consistency is not None


def test_micro_batches_give_the_step_of_the_whole_batch(groups):
    whole, expected = steps(groups, 4, 2, 3)
    cut, weights = steps(groups, 1, 2, 3)
    assert cut[0].loss == pytest.approx(whole[0].loss, rel=1e-5)
    assert cut[0].consistency == pytest.approx(whole[0].consistency, rel=1e-5)
    assert cut[0].grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)
