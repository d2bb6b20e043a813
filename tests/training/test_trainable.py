"""A network of which only a part is trained."""

import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Losses, starting_tokenizer
from cosmos_hpc.tokenizer.trainable import freeze_all_but


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


def trained(groups, tmp_path, trainable: str, kind: str) -> set[str]:
    """Names of the tensors that two steps, a checkpoint, a fresh start from it and one more step have moved."""
    from cosmos_hpc.config.run_folder import RunFolder
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.ema import WeightAverage
    from cosmos_hpc.training.loop import Run, TrainState, train_step
    from cosmos_hpc.training.optimizer import Optimizer
    from cosmos_hpc.training.queued_steps import StepQueue

    settings = [f"model.model={kind}", "model.channels=4", f"model.trainable={trainable}", "loss.lpips.weight=0"]
    settings += ["data.num_frames=9", "data.crop_size=32", "data.global_batch_size=1", "trainer.precision=32"]
    config = resolve(load_experiment(None, settings), {})

    class NoLoader:
        def state(self) -> None:
            return None

        def restore(self, _: object) -> None:
            return None

    def build():
        module = starting_tokenizer(config.model, 0)
        freeze_all_but(module, config.model.trainable_patterns)
        ddp = groups.wrap(module)
        average = WeightAverage(module, 0.9)
        state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), average, NoLoader())
        store = CheckpointStore(RunFolder(tmp_path), config, groups)
        store.load_newest(state)
        run = Run(config, groups, store, Losses(config.loss), *[None] * 5)  # type: ignore[arg-type]  # unused
        return state, run, store

    def step(state, run) -> None:
        queue = StepQueue()
        queue.append(train_step(state, iter([torch.randint(0, 256, (1, 3, 9, 32, 32), dtype=torch.uint8)]), run))
        for metrics in queue.arrived(everything=True):
            state.learn(metrics)

    state, run, store = build()
    before = {name: value.clone() for name, value in state.module.state_dict().items()}
    for _ in range(2):
        step(state, run)
    store.save(state, 0, None)
    state, run, _ = build()
    step(state, run)
    moved, followed = (
        {name for name, value in module.state_dict().items() if not value.equal(before[name]) and not is_idle(name)}
        for module in (state.module, state.average.module)
    )
    assert moved == followed
    return moved


def is_idle(name: str) -> bool:
    """Whether a weight has no gradient, so that rounding alone decides whether it moves.

    A key's bias adds the same to all logits, of which softmax takes no notice.
    """
    return name.endswith(".k.conv3d.bias")


@pytest.mark.parametrize("kind", ["CV8x8x8", "DV8x16x16"])
@pytest.mark.parametrize(
    ("trainable", "heads"),
    [("decoder", ("decoder.", "post_quant_conv.")), ("encoder", ("encoder.", "quant_conv."))],
)
def test_only_the_named_half_moves_and_its_average_follows_also_after_a_resume(
    groups, tmp_path, trainable, heads, kind
):
    moved = trained(groups, tmp_path, trainable, kind)
    parameters = {name for name, _ in starting_tokenizer(ModelConfig(model=kind, channels=4), 0).named_parameters()}
    named = {name for name in parameters if name.startswith(heads)}
    assert moved <= named
    still = {name for name in named - moved if not is_idle(name)}
    assert all("attn_1.1" in name for name in still)  # queries and keys, where there is a single cell to look at


def test_patterns_choose_by_name(groups, tmp_path):
    moved = trained(groups, tmp_path, "[decoder.conv_out.*, '*.norm_out.*']", "CV8x8x8")
    assert {name.split(".conv3d")[0].rsplit(".", 1)[0].split(".")[0] for name in moved} == {"decoder", "encoder"}
    assert all("conv_out" in name or "norm_out" in name for name in moved)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"pattern 'decoder\.upp\.\*', which no parameter matches"):
        freeze_all_but(starting_tokenizer(ModelConfig(channels=4), 0), ["decoder.*", "decoder.upp.*"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.trainable=decodr"], "set all, decoder, encoder, or a list of patterns"),
        (["model.trainable=[]"], "set all, decoder, encoder, or a list of patterns"),
        (["model.trainable=decoder", "loss.kl.weight=1e-6", "model.formulation=VAE"], "leaves the encoder as it is"),
    ],
)
def test_what_can_not_be_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        resolve(load_experiment(None, overrides), {})
