"""What a name under checkpoints/ promises, in one process with real Megatron-Core and a real loader."""

import json

import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import load_tokenizer, starting_tokenizer


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


def build(folder: RunFolder, config, groups):
    from cosmos_hpc.data.loader import TrainLoader
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.optimizer import Optimizer

    module = starting_tokenizer(config.model, 0)
    ddp = groups.wrap(module)
    loader = TrainLoader(config.data, seed=0, rank=0, world_size=1)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups.device), loader)
    return state, CheckpointStore(folder, config, groups)


def take_a_step(state, groups) -> None:
    """Adam has moments from its first step on."""
    clips = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    state.ddp.zero_grad_buffer()
    (state.ddp(clips).reconstructions - clips).abs().mean().backward()
    groups.finish_gradients(state.ddp)
    state.optimizer.step()


def test_checkpoints_are_whole_pruned_and_refused_by_other_ranks_and_formats(tmp_path, dataset, groups):
    small = ["model.channels=4", "data.num_frames=9", "data.crop_size=32", "data.num_workers=0", "checkpoint.keep=2"]
    config = resolve(load_experiment(None, [f"data.path={dataset}", *small]), {})
    folder = RunFolder(tmp_path / "000-abc")
    state, store = build(folder, config, groups)
    torn = folder.checkpoints / "step_00000009.partial"
    torn.mkdir(parents=True)
    assert not store.load_newest(state)
    assert not torn.exists(), "what a kill left stays for ever"

    for step in (1, 2, 3):
        take_a_step(state, groups)
        state.step, state.consumed_samples = step, 8 * step
        store.save(state)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_00000002", "step_00000003"]

    other, store = build(folder, config, groups)
    assert store.load_newest(other)
    assert (other.step, other.consumed_samples) == (3, 24)
    read = load_tokenizer(folder.checkpoint(3)).state_dict()  # by the tokenizer room alone, without Megatron-Core
    assert all(weight.equal(read[name]) for name, weight in state.module.state_dict().items())

    layout = folder.checkpoint_layout(folder.checkpoint(3))
    for change, words in (({"world_size": 4}, "written by 4 ranks"), ({"format": 99}, "format 99")):
        layout.write_text(json.dumps({"format": 1, "step": 3, "consumed_samples": 24, "world_size": 1} | change))
        state, store = build(folder, config, groups)
        with pytest.raises(ConfigError, match=words):
            store.load_newest(state)
