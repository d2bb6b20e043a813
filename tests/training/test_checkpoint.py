"""What a name under checkpoints/ promises, in one process with real Megatron-Core and a real loader."""

import dataclasses
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import time
import weakref
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, read_run_config, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import load_tokenizer, starting_tokenizer
from cosmos_hpc.training import checkpoint as checkpoint_module
from cosmos_hpc.training import checkpoint_files
from cosmos_hpc.training.checkpoint import SaveError
from cosmos_hpc.training.checkpoint_files import DIGESTS, damage, digest


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


SMALL = ["model.channels=4", "data.num_frames=9", "data.crop_size=32", "data.num_workers=0", "checkpoint.keep=2"]


@pytest.fixture
def config(dataset):
    return resolve(load_experiment(None, [f"data.path={dataset}", *SMALL]), {})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "000-abc")


def build(folder: RunFolder, config, groups):
    from cosmos_hpc.data.loader import TrainLoader
    from cosmos_hpc.training.checkpoint import CheckpointStore
    from cosmos_hpc.training.ema import WeightAverage
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.optimizer import Optimizer

    module = starting_tokenizer(config.model, 0)
    ddp = groups.wrap(module, use_distributed_optimizer=config.optim.use_distributed_optimizer)
    loader = TrainLoader(config.data, seed=0, rank=0, world_size=1)
    average = WeightAverage(module, 0.9)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), average, loader)
    return state, CheckpointStore(folder, config, groups)


def take_a_step(state, groups) -> None:
    """Adam has moments from its first step on."""
    clips = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    state.optimizer.zero_grad()
    loss = (state.ddp(clips).reconstructions - clips).abs().mean()
    loss.backward()
    groups.finish_gradients(state.ddp)
    _, skipped = state.optimizer.step(loss.detach())
    state.optimizer.learn(bool(skipped))
    state.step += 1
    state.consumed_samples += 8
    state.average.update(state.step, skipped)


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def everything(state) -> dict[str, torch.Tensor]:
    """Weights, their average, and Adam's state."""
    (adam,) = (each.optimizer for each in state.optimizer.megatron.chained_optimizers)
    moments = {
        f"{index}.{name}": value for index, own in adam.state_dict()["state"].items() for name, value in own.items()
    }
    averages = {f"ema.{name}": value for name, value in state.average.module.state_dict().items()}
    return {name: value.clone() for name, value in (state.module.state_dict() | averages | moments).items()}


@pytest.mark.parametrize("has_transformer_engine", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_holds_the_state_as_it_was_when_the_save_began(
    folder, config, groups, distributed, has_transformer_engine, monkeypatch
):
    from megatron.core.optimizer import distrib_optimizer

    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", has_transformer_engine)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, use_distributed_optimizer=distributed))
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    before = everything(state)
    store.begin(state, 0, "abc")
    take_a_step(state, groups)  # while it is being written
    assert store.saved_step is None
    while store.is_writing:
        time.sleep(0.01)
    store.advance(is_writing=False)
    assert store.saved_step == 1

    other, store = build(folder, config, groups)
    layout = store.load_newest(other)
    assert (other.step, other.consumed_samples, layout["wandb_id"]) == (1, 8, "abc")
    after = everything(other)
    assert after.keys() == before.keys()
    assert all(value.equal(after[name]) for name, value in before.items())
    read = load_tokenizer(folder.checkpoint(1)).state_dict()  # by the tokenizer room alone, without Megatron-Core
    assert all(weight.equal(read[name]) for name, weight in other.module.state_dict().items())


def test_every_random_generator_goes_on_where_it_was(folder, config, groups):
    def draw() -> list[float]:
        on_device = torch.rand(2, device=groups.device)
        return [random.random(), *np.random.rand(2), *torch.rand(2).tolist(), *on_device.tolist()]

    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    store.save(state, 0, None)
    expected = draw()
    assert draw() != expected
    other, store = build(folder, config, groups)
    store.load_newest(other)
    assert draw() == expected


def test_a_checkpoint_tells_what_wrote_it_and_with_which_settings(folder, config, groups):
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    state.skipped_in_a_row = 2
    store.save(state, 77, "roads-000")
    other, store = build(folder, config, groups)
    layout = store.load_newest(other)
    assert layout["versions"].keys() == {"cosmos-hpc", "torch", "megatron-core", "megatron-energon"}
    assert layout["versions"]["torch"] == version("torch")
    (folder.path / "settings.yaml").write_text(layout["settings"])
    assert read_run_config(folder.path / "settings.yaml") == config
    assert (layout["wandb_id"], layout["metrics_bytes"], layout["step"]) == ("roads-000", 77, 1)
    assert (other.skipped_in_a_row, other.consumed_samples, other.optimizer.lr) == (2, 8, state.optimizer.lr)


def test_a_save_in_flight_is_finished_before_the_one_of_a_run_that_leaves(folder, config, groups):
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    store.begin(state, 0, None)
    take_a_step(state, groups)
    store.save(state, 0, None)
    assert names(folder) == ["latest", "step_00000001", "step_00000002"]
    assert damage(folder.checkpoint(1)) is damage(folder.checkpoint(2)) is None


def test_a_checkpoint_is_wanted_after_so_many_minutes_and_then_not_for_as_long(folder, config, groups):
    assert config.checkpoint.every_n_minutes == 10
    _, store = build(folder, config, groups)
    assert not store.wants_save
    often = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_n_minutes=0.02))
    state, store = build(folder, often, groups)
    while not store.wants_save:
        time.sleep(0.1)
    store.begin(state, 0, None)
    assert not store.wants_save
    store.finish(may_fail=False)


@pytest.mark.parametrize("when", ["table of contents", "rename", "pointer"])
def test_an_error_of_the_disk_after_the_writers_costs_no_more_than_that_checkpoint(
    folder, config, groups, caplog, monkeypatch, when
):
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    store.save(state, 0, None)
    take_a_step(state, groups)
    store.begin(state, 0, None)
    with monkeypatch.context() as disk:
        where, name = {
            "table of contents": (store._saver, "write_contents"),
            "rename": (checkpoint_files.Path, "rename"),
            "pointer": (checkpoint_files, "_point_at"),
        }[when]
        disk.setattr(where, name, fail_as_a_full_disk)
        store.finish(may_fail=True)
    assert "No space left on device" in caplog.text
    assert store.saved_step == (2 if when == "pointer" else 1)
    store.finish(may_fail=True)
    assert {"latest", "step_00000001"} <= set(names(folder))
    assert damage(folder.newest_checkpoint()) is None
    take_a_step(state, groups)
    store.save(state, 0, None)
    assert (folder.checkpoints / "latest").resolve() == folder.checkpoint(3)


def fail_as_a_full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system of its own")
def test_a_disk_that_fills_up_under_the_writers_says_so(tmp_path, config, groups, caplog, monkeypatch):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        folder = RunFolder(tmp_path)
        state, store = build(folder, config, groups)
        monkeypatch.setattr(checkpoint_module, "MARGIN_BYTES", -(2**30))  # it looks as if there were room
        store.begin(state, 0, None)
        store.finish(may_fail=True)
        assert "No space left on device" in caplog.text
        with pytest.raises(SaveError, match="No space left on device"):
            store.save(state, 0, None)
        assert names(folder) == []
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_checkpoints_are_whole_and_pruned(folder, config, groups):
    state, store = build(folder, config, groups)
    torn = folder.checkpoints / "step_00000009.partial"
    torn.mkdir(parents=True)
    assert store.load_newest(state) is None
    assert not torn.exists(), "what a kill left stays for ever"
    for _ in range(4):
        take_a_step(state, groups)
        store.save(state, 0, None)
    assert names(folder) == ["latest", "step_00000003", "step_00000004"]
    assert (folder.checkpoints / "latest").resolve() == folder.checkpoint(4)
    other, store = build(folder, config, groups)
    store.load_newest(other)  # of a save that reused the plan of those before
    read = everything(other)
    assert all(value.equal(read[name]) for name, value in everything(state).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "has checkpoint format 1, but this version reads 3: resume with the version that wrote it"),
        ({"use_distributed_optimizer": True}, "was written with optim.use_distributed_optimizer=True"),
    ],
)
def test_checkpoints_of_another_kind_are_refused_with_the_reason(folder, config, groups, change, words):
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    store.save(state, 0, None)
    rewrite_layout(folder.checkpoint(1), change)
    with pytest.raises(ConfigError, match=words):
        store.load_newest(state)
    assert folder.checkpoint(1).exists()


def rewrite_layout(checkpoint: Path, change: dict) -> None:
    """As another version or other settings would have written it, digest included."""
    layout, digests = checkpoint / "checkpoint.json", checkpoint / DIGESTS
    layout.write_text(json.dumps(json.loads(layout.read_text()) | change))
    digests.write_text(json.dumps(json.loads(digests.read_text()) | {layout.name: digest(layout)}))


def test_a_flipped_bit_is_not_taken_for_another_format(folder, config, groups):
    state, store = build(folder, config, groups)
    for _ in range(2):
        take_a_step(state, groups)
        store.save(state, 0, None)
    layout = folder.checkpoint_layout(folder.checkpoint(2))
    text = layout.read_text()
    assert '"format": 3' in text
    layout.write_text(text.replace('"format": 3', '"format": 2'))  # one bit
    assert store.load_newest(state)["step"] == 1
    rewrite_layout(folder.checkpoint(1), {"format": 1})
    (folder.checkpoint(1) / DIGESTS).unlink()  # as a version without digests would leave it
    with pytest.raises(ConfigError, match="has checkpoint format 1"):
        store.load_newest(state)


def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(folder, config, groups, caplog):
    state, store = build(folder, config, groups)
    for _ in range(2):
        take_a_step(state, groups)
        store.save(state, 0, None)
    newest = folder.checkpoint(2)
    whole = newest.with_name("copy")
    shutil.copytree(newest, whole)
    files = sorted(file.name for file in whole.iterdir())
    assert len(files) == 8
    for file in files:
        for spoil in (flip_a_bit, cut_in_half, Path.unlink):
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(whole, newest)
            spoil(newest / file)
            assert store.newest_good()[0] == folder.checkpoint(1), (file, spoil)
            assert f"{newest} is damaged" in caplog.text
            caplog.clear()
    assert len(list(folder.checkpoints.glob("step_00000002.bad*"))) == 24, "evidence was thrown away"
    assert store.load_newest(state)["step"] == 1


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_what_was_copied_to_the_host_is_kept_until_the_writer_is_done(tmp_path):
    """Pinned memory is shared with the forked writer: given to somebody else, it would be written as it is then."""
    from cosmos_hpc.training.background_write import BackgroundWrite

    class Staged(list):
        """What can be pointed to without being kept."""

    def extra() -> list[Path]:
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        return []

    request = SimpleNamespace(preload_fn=Staged, async_fn=None)
    write = BackgroundWrite(request, extra, tmp_path, 0)
    staged = weakref.ref(write._staged)
    gc.collect()
    assert write.is_running
    assert isinstance(staged(), Staged)
    (tmp_path / "go").touch()
    assert write.wait().error is None
    gc.collect()
    assert staged() is None


def test_a_writer_that_dies_costs_no_more_than_its_checkpoint(folder, config, groups, caplog):
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    store.save(state, 0, None)
    take_a_step(state, groups)
    store.begin(state, 0, None)
    os.kill(store._write._process.pid, signal.SIGKILL)
    store.finish(may_fail=True)
    assert "training goes on" in caplog.text
    assert names(folder) == ["latest", "step_00000001"]
    take_a_step(state, groups)
    store.save(state, 0, None)
    assert names(folder) == ["latest", "step_00000001", "step_00000003"]


def test_a_full_disk_costs_a_checkpoint_while_training_and_stops_a_run_that_leaves(
    folder, config, groups, caplog, monkeypatch
):
    state, store = build(folder, config, groups)
    take_a_step(state, groups)
    store.save(state, 0, None)
    take_a_step(state, groups)
    full = shutil.disk_usage(folder.path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    store.begin(state, 0, None)
    assert "No space left on device, 0 MiB are free and it takes" in caplog.text
    assert "training goes on" in caplog.text
    with pytest.raises(OSError, match="No space left on device"):
        store.save(state, 0, None)
    assert names(folder) == ["latest", "step_00000001"]


def test_a_roll_back_restores_weights_but_goes_on_with_other_clips(folder, config, groups):
    state, store = build(folder, config, groups)
    batches = iter(state.loader)
    next(batches)
    take_a_step(state, groups)
    store.save(state, 0, None)
    saved = everything(state)
    take_a_step(state, groups)
    next(batches)
    position = state.loader.state()
    assert store.load_newest(state, keeps_data_position=True)["step"] == 1
    assert all(value.equal(saved[name]) for name, value in everything(state).items())
    assert (state.step, state.consumed_samples) == (1, 16)
    assert repr(state.loader.state()) == repr(position)
