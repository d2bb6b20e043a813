"""Training compiled: it computes what eager computes, and goes on in eager where it would not."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_ranks import start_ranks
from torch import nn

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.ranks import Rank
from cosmos_hpc.tokenizer import Autoencoded, Losses, starting_tokenizer
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.vgg import Vgg16

CV = "Cosmos-1.0-Tokenizer-CV8x8x8"
TRACED = "aot_eager"
"""A backend for which forward and backward are traced as for the real one, and run by torch's own kernels."""

RECORDED = "eager"
"""A backend for which the forward is recorded and run as it is, which is quicker."""


class Small(nn.Module):
    """Stands where it does not matter which network is compiled: a tokenizer's parts, which compile at once."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv3d(3, 4, 1), nn.Conv3d(4, 3, 1)

    def forward(self, clips: torch.Tensor) -> Autoencoded:
        latents = self.encoder(clips)
        return Autoencoded(self.decoder(latents.tanh()), latents)


def fails(graph, inputs):
    """A compiler that has a bug."""
    raise ValueError("no such instruction")


def errs(graph, inputs):
    """A compiler whose code is wrong."""
    return lambda *given: [2 * each if each.is_floating_point() else each for each in graph(*given)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def groups():
    from cosmos_hpc.training.parallel import Groups

    started = Groups.start(Rank(0, 0, 1))
    yield started
    started.stop()


def build(groups, mode: str, model: str | None = None, settings=()):
    """What is compiled, with settings that ask for it, and the state of a step."""
    from cosmos_hpc.training.compilation import Subject
    from cosmos_hpc.training.ema import WeightAverage
    from cosmos_hpc.training.loop import TrainState
    from cosmos_hpc.training.optimizer import Optimizer

    sizes = ["data.num_frames=9", "data.crop_size=32", "data.global_batch_size=1", "data.micro_batch_size=1"]
    narrow = [f"model.model={model or CV}", "model.channels=4", "trainer.precision=32"]
    terms = ["loss.lpips.weight=0", f"trainer.compile={mode}", *settings]
    config = resolve(load_experiment(None, [*narrow, *sizes, *terms]), {})
    torch.manual_seed(0)
    module = starting_tokenizer(config.model, 0) if model else Small()
    ddp = groups.wrap(module)
    average = WeightAverage(module, 0.9)
    losses = Losses(config.loss, eye=Eye(Vgg16(), 4) if config.loss.lpips.weight else None)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), average, None)
    return Subject(module, losses, average), config, state


def two_steps(groups, subject, config, state) -> list[torch.Tensor]:
    """Numbers of two steps, and the average after them."""
    from cosmos_hpc.training.loop import train_step

    run = SimpleNamespace(config=config, groups=groups, losses=subject.losses)
    shape = (1, 3, config.data.num_frames, config.data.crop_size, config.data.crop_size)
    clips = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    numbers = [torch.tensor(train_step(state, iter([clips]), run).numbers.read()) for _ in range(2)]
    return [*numbers, *state.average.module.state_dict().values()]


def test_compiled_steps_are_those_of_eager(groups, tmp_path):
    from cosmos_hpc.training.compilation import compile_and_compare

    perceptual = ["loss.lpips.weight=0.1", "loss.lpips.weights=given"]
    subject, config, state = build(groups, "required", CV, perceptual)
    names = list(subject.module.state_dict())
    found = compile_and_compare(subject, config, groups, RunFolder(tmp_path), 0, backend=TRACED)
    assert found.is_on
    assert found.told.startswith("compiled in")
    assert list(subject.module.state_dict()) == names, "checkpoints and exports know them"
    compiled = two_steps(groups, subject, config, state)
    for own, eager in zip(compiled, two_steps(groups, *build(groups, "off", CV, perceptual)), strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-6)


def test_a_validation_compiles_nothing(groups, tmp_path):
    from cosmos_hpc.training.compilation import compile_and_compare

    graphs = []

    def counts(graph, inputs):
        graphs.append(graph)
        return graph

    subject, config, _ = build(groups, "required")
    found = compile_and_compare(subject, config, groups, RunFolder(tmp_path), 0, backend=counts)
    before = len(graphs)
    with found.paused(), torch.no_grad():
        subject.module(torch.zeros(2, 3, 17, 16, 16))
    assert len(graphs) == before > 0


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (fails, "compiling failed with .*: .*no such instruction"),
        (errs, "compiled differs from eager by .* where rounding explains"),
    ],
)
def test_a_compiler_that_fails_or_errs_is_left_alone(groups, tmp_path, backend, reason):
    from cosmos_hpc.training.compilation import compile_and_compare

    subject, config, state = build(groups, "auto")
    found = compile_and_compare(subject, config, groups, RunFolder(tmp_path), 0, backend=backend)
    assert not found.is_on
    assert re.match(f"eager: rank 0: {reason}", found.told)
    eager = two_steps(groups, *build(groups, "off"))
    for own, other in zip(two_steps(groups, subject, config, state), eager, strict=True):
        assert torch.equal(own, other)


def test_every_shape_is_compiled_before_the_first_step(groups, tmp_path):
    from cosmos_hpc.training.compilation import compile_and_compare

    seen = []

    def notes(graph, inputs):
        seen.append(next(tuple(each.shape) for each in inputs if each.dim() == 5))
        return graph

    subject, config, _ = build(groups, "auto", settings=["data.shapes={9x32x32: 1, 17x16x24: 1, 1x48x48: 2}"])
    assert compile_and_compare(subject, config, groups, RunFolder(tmp_path), 0, backend=notes).is_on
    assert {shape[2:] for shape in seen} >= {(9, 32, 32), (17, 16, 24), (1, 48, 48)}


@pytest.mark.parametrize(("mode", "told"), [("off", "eager: trainer.compile is off"), ("auto", "eager: there is no")])
def test_on_a_cpu_nothing_is_compiled_unless_it_is_required(groups, tmp_path, mode, told):
    from cosmos_hpc.training.compilation import compile_training

    subject, config, _ = build(groups, mode)
    assert compile_training(subject, config, groups, RunFolder(tmp_path), 0).told.startswith(told)


def test_required_ends_where_compiling_fails(groups, tmp_path, monkeypatch):
    from cosmos_hpc.training import compilation

    broken = partial(compilation.compile_and_compare, backend=fails)
    monkeypatch.setattr(compilation, "compile_and_compare", broken)
    subject, config, _ = build(groups, "required")
    with pytest.raises(ConfigError, match=r"required, but eager: rank 0: compiling failed .*: set it to auto"):
        compilation.compile_training(subject, config, groups, RunFolder(tmp_path), 0)


def one_rank_fails(rank: Rank, folder: Path) -> None:
    """Rank 1 of two can't compile."""
    from cosmos_hpc.training.compilation import compile_and_compare
    from cosmos_hpc.training.parallel import Groups

    torch.set_num_threads(1)
    groups = Groups.start(rank)
    subject, config, _ = build(groups, "auto")
    backend = RECORDED if rank.is_first else fails
    found = compile_and_compare(subject, config, groups, RunFolder(folder), 0, backend=backend)
    (folder / f"{rank.rank}").write_text(found.told)
    groups.stop()


def test_all_ranks_go_on_in_eager_where_one_must(tmp_path):
    start_ranks(one_rank_fails, 2, tmp_path)
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first == second
    assert first.startswith("eager: rank 1: compiling failed")


def test_what_was_compiled_is_kept_for_later_starts_with_the_same_code(groups, tmp_path, monkeypatch):
    """The compiler's own export and import of its results are doubles: the real ones need a C compiler."""
    from cosmos_hpc.training.compilation import compile_and_compare

    loaded: list[bytes] = []
    exports = iter([b"first", b"second", b"third", b"fourth"])
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (next(exports), None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: not loaded.append(content))

    def start(precision: str) -> list[bytes]:
        loaded.clear()
        subject, config, _ = build(groups, "auto", settings=[f"trainer.precision={precision}"])
        compile_and_compare(subject, config, groups, RunFolder(tmp_path), 0, backend=RECORDED)
        return list(loaded)

    assert start("32") == []
    assert start("32") == [b"first"]
    assert start("bf16") == [], "other settings are other code"
    assert start("bf16") == [b"second"]
    assert len(list(RunFolder(tmp_path).compiled.iterdir())) == 1, "what no start needs any more is gone"
    for refusal, next_one in ((refuse, b"third"), (lambda content: None, b"fourth")):
        monkeypatch.setattr(torch.compiler, "load_cache_artifacts", refusal)
        start("bf16")
        (left,) = RunFolder(tmp_path).compiled.iterdir()
        assert left.read_bytes() == next_one, "what can't be read gives way to what this start compiled"


def refuse(content: bytes) -> None:
    raise RuntimeError("not what was saved")


@pytest.mark.parametrize(
    ("trainable", "modes"),
    [
        ("all", {"encoder": "reduce-overhead", "decoder": "reduce-overhead"}),
        ("decoder", {"encoder": "reduce-overhead", "decoder": "reduce-overhead"}),
        ("[decoder.*, quant_conv.*]", {"encoder": None, "decoder": "reduce-overhead"}),
    ],
)
def test_no_graph_overwrites_what_a_layer_behind_a_frozen_encoder_keeps(monkeypatch, trainable, modes):
    from cosmos_hpc.tokenizer import tokenizer_in_training
    from cosmos_hpc.training.compilation import Subject, compile_in_regions

    small = ["model.channels=4", f"model.trainable={trainable}", "loss.lpips.weight=0"]
    config = resolve(load_experiment(None, small), {})
    module, found = tokenizer_in_training(config), {}
    names = {each: name for name, each in module.named_modules()}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: found.update({names[self]: how["mode"]}))
    compile_in_regions(Subject(module, Losses(config.loss), None))
    assert found == modes
