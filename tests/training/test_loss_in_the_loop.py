"""The loss over the micro batches of a step, and its weights over the steps of a run."""

from types import SimpleNamespace

import pytest
import torch

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Losses, starting_tokenizer
from cosmos_hpc.tokenizer.losses.vgg import Vgg16

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


class SomeClips:
    """Stands for the data room: clips of their own at each step, and a position among them."""

    def __init__(self) -> None:
        self._position = 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self._position)
            self._position += 1
            yield torch.randint(0, 256, (1, 3, 9, 16, 16), generator=generator, dtype=torch.uint8)

    def state(self) -> int:
        return self._position

    def restore(self, states: list[int]) -> None:
        (self._position,) = states


def test_a_resumed_run_repeats_every_loss_through_vgg_a_discriminator_and_a_posterior(groups, tmp_path):
    from cosmos_hpc.training.adversary import Adversary
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.ema import WeightAverage
    from cosmos_hpc.training.loop import TrainState, train_step
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.queued_steps import StepQueue

    torch.manual_seed(0)
    torch.save(Vgg16().state_dict(), tmp_path / "vgg.pth")
    settings = ["model.channels=4", "model.formulation=VAE", f"loss.lpips.weights={tmp_path / 'vgg.pth'}"]
    settings += ["loss.gram.weight=0.01", "loss.kl.weight=1e-6", "loss.adversarial.weight=0.1"]
    settings += ["loss.adversarial.channels=4", "data.global_batch_size=2", "data.crop_size=16", "data.num_frames=9"]
    config = resolve(load_experiment(None, [*settings, "trainer.precision=32"]), {})

    def train(folder: str, last: int) -> list:
        torch.manual_seed(1)
        module = starting_tokenizer(config.model, 0)
        ddp, average, adversary = groups.wrap(module), WeightAverage(module, 0.9), Adversary(config, groups)
        optimizer = Optimizer(ddp, config.optim, groups)
        state = TrainState(module, ddp, optimizer, average, SomeClips(), adversary)
        losses = Losses.build(config, groups.device, adversary.term)
        store = CheckpointStore(RunFolder(tmp_path / folder), config, groups)
        store.load_newest(state)  # last, as it brings the generators back
        run, queue, found = SimpleNamespace(config=config, groups=groups, losses=losses), StepQueue(), []
        clips = iter(state.loader)
        while state.step < last:
            queue.append(train_step(state, clips, run))
            for metrics in queue.arrived(everything=True):
                state.learn(metrics)
                terms = ("loss", "l1", "lpips", "gram", "kl", "adversarial", "adversarial_weight", "discriminator")
                found.append([getattr(metrics, name) for name in (*terms, "grad_norm", "lr")])
        store.save(state, 0, None)
        return found

    unbroken = train("unbroken", 4)
    assert train("broken", 2) + train("broken", 4) == unbroken
    assert len({tuple(step) for step in unbroken}) == 4
