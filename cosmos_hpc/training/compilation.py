"""Network and losses compiled, the proof that this changes nothing, and a file that spares later starts the time."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cosmos_hpc import tokenizer
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder, write_atomically
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.tokenizer.losses import Losses
from cosmos_hpc.training.ema import WeightAverage
from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.trial import Trial, free_memory, run_trial, soft_clips

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Shapes of one function. Beyond torch's own limit of 8 it goes on uncompiled, with no more than a line in the log."""

MOST = 8.0
"""Compiled may differ from eager by so many times what eager differs by when its input moves within its rounding."""

FLOOR = 2e-3
"""Relative difference that is always allowed: what TensorFloat-32 makes of float32."""

ROUNDING = {"bf16": 2.0**-9, "32": 2.0**-24}
"""Half of the last place that the precision keeps."""


@dataclass(frozen=True)
class Compilation:
    """How a start computes."""

    told: str
    """For provenance.json and `status`: `compiled`, or `eager`, with figures or the reason."""

    is_on: bool = False
    """Whether it is compiled."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Compute uncompiled, so that no shape of a validation is compiled."""
        if not self.is_on:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


class _Difference(NamedTuple):
    """Relative to the norm of the first of two results."""

    reconstructions: float
    gradient: float

    def is_within(self, spread: "_Difference") -> bool:
        """Whether neither is more than eager's own spread explains; false for NaN."""
        return all(own <= MOST * other + FLOOR for own, other in zip(self, spread, strict=True))

    def __str__(self) -> str:
        return f"{self.reconstructions:.2%} in reconstructions and {self.gradient:.2%} in gradients"


class Subject(NamedTuple):
    """What is compiled."""

    module: nn.Module
    losses: Losses
    average: WeightAverage | None


def compile_in_regions(subject: Subject, *, backend: str = "inductor", with_graphs: bool = True) -> None:
    """Compile in place, and so with the same names of weights; nothing is compiled before it is first called.

    Encoder and decoder are regions of their own, because the reduction of a region's gradients starts when its whole
    backward has ended. A frozen encoder is replayed by a CUDA graph only if nothing that is trained looks at what it
    leaves, which the decoder's replay overwrites.

    Args:
        subject: network, losses and average.
        backend: of torch.compile.
        with_graphs: whether CUDA graphs replay what was compiled of the network.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    trained = {name.partition(".")[0] for name, weight in subject.module.named_parameters() if weight.requires_grad}
    for region in ("encoder", "decoder"):
        replays = with_graphs and (region in trained or region == "decoder" or "quant_conv" not in trained)
        mode = "reduce-overhead" if replays else None
        subject.module.get_submodule(region).compile(mode=mode, dynamic=False, backend=backend)
    subject.losses.compile(backend)
    if subject.average is not None:
        subject.average.compile(backend)


def compile_training(subject: Subject, config: RunConfig, groups: Groups, folder: RunFolder, step: int) -> Compilation:
    """Compile if `trainer.compile` asks for it; `auto` does so on a GPU. Collective.

    Args:
        subject: network, losses and average; the test is made with their weights as they are now.
        config: settings.
        groups: the ranks.
        folder: of the run.
        step: updates done.

    Raises:
        ConfigError: with `required`, where compiling fails or its code differs from eager.
    """
    wanted = config.trainer.compile
    if wanted == "off":
        return Compilation("eager: trainer.compile is off")
    if wanted == "auto" and groups.device.type != "cuda":
        return Compilation("eager: there is no GPU")
    compilation = compile_and_compare(subject, config, groups, folder, step)
    if wanted == "required" and not compilation.is_on:
        raise ConfigError(f"trainer.compile is required, but {compilation.told}: set it to auto to train all the same")
    return compilation


def compile_and_compare(
    subject: Subject, config: RunConfig, groups: Groups, folder: RunFolder, step: int, *, backend: str = "inductor"
) -> Compilation:
    """Compile, warm every shape, and compare with eager. Collective.

    Each rank of the first node compiles for its GPU, whose number is part of the code, and leaves the result in the run
    folder; other nodes, and later starts, load it. All compute alike in the end: where one rank can't compile or
    differs, all go on in eager.

    Takes what `compile_training` takes, and the backend of torch.compile.
    """
    started, on_gpu = time.perf_counter(), groups.device.type == "cuda"
    test, store = _Test(subject, config, groups, step), _Artifacts(folder, groups.device, config)
    spread = test.spread()
    torch.backends.cudnn.benchmark = on_gpu  # before graphs are recorded
    compile_in_regions(subject, backend=backend, with_graphs=on_gpu)
    if not groups.rank.is_on_first_node:
        groups.barrier()  # until the first node has left what the others load
    store.load()
    own = test.compare(spread)
    if groups.rank.is_on_first_node:
        store.save()
        groups.barrier()
    findings = groups.gather(own)
    faults = [f"rank {rank}: {finding.fault}" for rank, finding in enumerate(findings) if finding.fault]
    if faults:
        subject.losses.interpret()
        torch.compiler.set_stance("force_eager")
        torch._dynamo.reset()  # the graphs, and their memory
        torch.backends.cudnn.benchmark = False
        test.forget()
        logger.warning("training goes on uncompiled, and slower: %s", "; ".join(faults))
        return Compilation(f"eager: {faults[0]}")
    test.forget()
    seconds = time.perf_counter() - started
    told = f"compiled in {seconds:.0f} s; differs from eager by {findings[0].difference}"
    logger.info("%s", told)
    return Compilation(told, is_on=True)


class _Finding(NamedTuple):
    """What comparing came to on one rank."""

    difference: _Difference | None
    fault: str
    """Why not to go on compiled; empty where nothing speaks against it."""


class _Test:
    """The same clips and weights through eager and compiled code; no gradient of the run is touched."""

    def __init__(self, subject: Subject, config: RunConfig, groups: Groups, step: int) -> None:
        self._subject = subject
        self._precision = config.trainer.precision
        self._groups = groups
        # Terms and windows may come with the steps: what the run begins with, and what it ends with.
        steps = sorted({step, max(step, config.trainer.max_steps - 1)})
        batches = [soft_clips(shape, config.data.micro_batch, groups.device) for shape in config.data.clip_shapes]
        self._cases = [(clips, step) for clips in batches for step in steps]
        self._expected: list[Trial] = []

    def spread(self) -> list[_Difference]:
        """What eager differs by when the input moves within its rounding, by case."""
        found = []
        for clips, step in self._cases:
            noise = torch.rand(clips.shape, generator=torch.Generator().manual_seed(1)).to(clips)
            moved = clips * (1 + ROUNDING[self._precision] * (2 * noise - 1))
            self._expected.append(self._run(clips, step))
            found.append(_difference(self._expected[-1], self._run(moved, step)))
        free_memory(self._groups.device)  # for graphs are recorded in memory of their own
        return found

    def compare(self, spread: list[_Difference]) -> _Finding:
        """What the code as it is now differs by; three times each, since graphs are recorded on the way."""
        differences: list[_Difference] = []
        try:
            for (clips, step), expected in zip(self._cases, self._expected, strict=True):
                for _ in range(3):
                    found = self._run(clips, step)
                differences.append(_difference(expected, found))
            if self._subject.average is not None:
                self._subject.average.update(0, torch.ones((), device=self._groups.device))  # left out: moves nothing
        except Exception as error:  # whatever a compiler may raise
            logger.warning("compiling failed", exc_info=True)
            message = " ".join(str(error).split())[:200]
            return _Finding(None, f"compiling failed with {type(error).__name__}: {message}")
        pairs = zip(differences, spread, strict=True)
        bad = next(((own, other) for own, other in pairs if not own.is_within(other)), None)
        if bad is None:
            return _Finding(differences[0], "")
        return _Finding(bad[0], f"compiled differs from eager by {bad[0]}, where rounding explains {bad[1]}")

    def forget(self) -> None:
        """Free what it took."""
        self._expected.clear()
        free_memory(self._groups.device)

    def _run(self, clips: Tensor, step: int) -> Trial:
        return run_trial(self._subject.module, self._subject.losses, clips, step, self._groups, self._precision)


class _Artifacts:
    """The compiler's results in the run folder, named by all that they depend on."""

    def __init__(self, folder: RunFolder, device: torch.device, config: RunConfig) -> None:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else os.uname().machine
        data = config.data
        facts: list[Any] = [gpu, torch.__version__, config.model.model, config.model.channels, config.trainer.precision]
        facts += [list(data.clip_shapes), data.micro_batch]
        digest = hashlib.sha256(repr(facts).encode())
        for file in sorted(Path(tokenizer.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
        self._device = device.index or 0
        self._file = folder.compiled / f"{digest.hexdigest()[:16]}-{self._device}.bin"

    def load(self) -> None:
        """Take over what another process has compiled, if it is there; a file that can't be read costs time only."""
        if not self._file.exists():
            return
        reason = "torch can't read it"
        try:
            if torch.compiler.load_cache_artifacts(self._file.read_bytes()) is not None:
                return
        except Exception as error:  # a torn file fails in as many ways as it has bytes
            reason = str(error)
        logger.warning("%s can't be used, so this start compiles anew: %s", self._file, reason)
        with contextlib.suppress(OSError):
            self._file.unlink()

    def save(self) -> None:
        """Leave it for the others, in place of what other code left; a full disk costs time only."""
        found = None if self._file.exists() else torch.compiler.save_cache_artifacts()
        if found is None:
            return
        try:
            for old in self._file.parent.glob(f"*-{self._device}.bin"):
                old.unlink()
            write_atomically(self._file, found[0])
        except OSError as error:
            logger.warning("what was compiled can't be kept, so the next start compiles anew: %s", error)


def _difference(expected: Trial, found: Trial) -> _Difference:
    """In the 2-norm."""
    return _Difference(
        _relative([expected.reconstructions], [found.reconstructions]), _relative(expected.gradient, found.gradient)
    )


def _relative(expected: list[Tensor], found: list[Tensor]) -> float:
    squares = [
        torch.stack([(other.double() - own.double()).square().sum(), own.double().square().sum()])
        for own, other in zip(expected, found, strict=True)
    ]
    off, size = torch.stack(squares).sum(0).sqrt().tolist()
    return float(off / max(size, 1e-30))
