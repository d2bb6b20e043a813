"""A step of the loop as a whole: its loss over micro batches, its tensors, and that nothing in it waits."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def build(groups, micro_batch_size: int, first: int = 0, precision: str = "32"):
    """State, what the loop works with, and the clips of a step, which are the same however they are cut."""
    from cosmos_hpc.training.ema import WeightAverage
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.optimizer import Optimizer

    sizes = ["data.global_batch_size=4", f"data.micro_batch_size={micro_batch_size}", f"trainer.precision={precision}"]
    config = resolve(load_experiment(None, ["model.channels=4", *WEIGHTS, *WINDOWS, *sizes]), {})
    module = starting_tokenizer(config.model, 0)
    ddp = groups.wrap(module)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), WeightAverage(module, 0.9), None, step=first)
    run = SimpleNamespace(config=config, groups=groups, losses=Losses(config.loss))
    clips = torch.randint(0, 256, (4, 3, 17, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return state, run, clips.split(micro_batch_size)


def steps(groups, micro_batch_size: int, first: int, last: int):
    """Metrics of the steps after `first`, and the weights."""
    from cosmos_hpc.training.loop import train_step
    from cosmos_hpc.training.queued_steps import StepQueue

    state, run, batches = build(groups, micro_batch_size, first)
    queue, metrics = StepQueue(), []
    for _ in range(first, last):
        queue.append(train_step(state, iter(batches), run))
        metrics += queue.arrived(everything=True)
        state.optimizer.learn(False)
    return metrics, state.module.state_dict()


class NoWordToTheHost(TorchDispatchMode):
    """On a CPU nothing waits; a value that goes to the host stands for what would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read on the host"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_waiting(device: torch.device):
    if device.type == "cpu":
        with NoWordToTheHost():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_step_waits_for_the_device(groups):
    from cosmos_hpc.training.loop import train_step

    with pytest.raises((AssertionError, RuntimeError)), without_waiting(groups.device):
        torch.ones(1, device=groups.device).item()
    state, run, batches = build(groups, 2, precision="bf16")
    batches = [batch.to(groups.device) for batch in batches]
    state.optimizer.learn(False)
    for number in range(4):
        with without_waiting(groups.device) if number else contextlib.nullcontext():
            queued = train_step(state, iter(batches), run)
        state.optimizer.learn(False)
        assert queued.numbers.read()[-1] == 0.0


def test_weights_gradients_and_moments_stay_contiguous_float32(groups):
    from cosmos_hpc.training.loop import train_step

    state, run, batches = build(groups, 2, precision="bf16")
    train_step(state, iter(batches), run)
    (adam,) = (each.optimizer for each in state.optimizer.megatron.chained_optimizers)
    tensors = [*state.module.parameters(), *(weight.main_grad for weight in state.module.parameters())]
    tensors += [own[name] for own in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors += list(state.average.module.parameters())
    assert len(tensors) == 5 * len(list(state.module.parameters()))
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_a_network_with_running_statistics_is_refused(groups):
    with pytest.raises(AssertionError):
        groups.wrap(torch.nn.Sequential(torch.nn.Conv3d(3, 4, 1), torch.nn.BatchNorm3d(4)))


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


def test_a_mask_beside_the_clips_says_what_the_loss_looks_at(groups):
    from cosmos_hpc.data.loader import to_unit_range
    from cosmos_hpc.tokenizer.losses.pixels import mean_absolute_difference
    from cosmos_hpc.training.loop import train_step

    def step(mask):
        state, run, (clips,) = build(groups, 4)
        with torch.no_grad():
            reconstructions = state.module(to_unit_range(clips)).reconstructions
        batch = clips if mask is None else torch.cat([clips, mask], 1)
        _, l1, grad_norm, _ = train_step(state, iter([batch]), run).numbers.read()
        return l1, grad_norm, to_unit_range(clips), reconstructions

    whole = torch.full((4, 1, 17, 16, 16), 255, dtype=torch.uint8)
    left = whole.clone()
    left[..., 8:] = 0
    everything, everywhere, nothing = step(None), step(whole), step(torch.zeros_like(whole))
    assert everywhere[:2] == pytest.approx(everything[:2], rel=1e-5)
    assert nothing[:2] == (0.0, 0.0)
    l1, grad_norm, clips, reconstructions = step(left)
    inside = mean_absolute_difference(clips[..., :8], reconstructions[..., :8])
    assert l1 == pytest.approx(inside.item(), rel=1e-4)
    assert grad_norm > 0
    assert l1 != pytest.approx(everything[0], rel=1e-4)


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
