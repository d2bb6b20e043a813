"""A training step of this kit beside the recipe as published, in alternation on the same clips, on one GPU.

    python benchmarks/gpu_train_step.py                         # CV and DV, B = 1 and 4
    python benchmarks/gpu_train_step.py --kinds CV --batches 1 --profile
    python benchmarks/gpu_train_step.py --losses 300            # compiled against eager, over so many steps
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_train_step.py --no-recipe   # B is each GPU's: weak scaling

The recipe: the network as its specification reads (tests/tokenizer/reference_network.py), weights, loss networks and
AdamW in bfloat16, eager. This kit: `train_step` of the loop itself, with float32 weights under bfloat16 autocast,
clipping, averaged weights, and the numbers that are logged. Both lessen L1 + 0.1 x the difference of VGG16's features;
VGG16's weights are random, which changes no speed. Prints milliseconds (medians), clips/s, the ratio, TFLOP/s, the
share of the matrix rate measured in the same call, and peak memory.
"""

import argparse
import contextlib
import gc
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tokenizer"))

from reference_network import ReferenceTokenizer

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.ranks import current_rank
from cosmos_hpc.tokenizer import Losses, starting_tokenizer, tokenizer_in_training
from cosmos_hpc.tokenizer.architecture import Architecture
from cosmos_hpc.tokenizer.losses.perceptual import Eye
from cosmos_hpc.tokenizer.losses.vgg import LAYER_WEIGHTS, Vgg16
from cosmos_hpc.training.compilation import Subject, compile_in_regions
from cosmos_hpc.training.ema import WeightAverage
from cosmos_hpc.training.loop import TrainState, train_step
from cosmos_hpc.training.optimizer import Optimizer
from cosmos_hpc.training.parallel import Groups
from cosmos_hpc.training.queued_steps import QueuedStep

MODELS = {"CV": "Cosmos-1.0-Tokenizer-CV8x8x8", "DV": "Cosmos-1.0-Tokenizer-DV8x16x16"}
TFLOP = {"CV": 5.57 + 3.97, "DV": 4.18 + 3.97}
"""Of one clip of 33 frames of 256 x 256, forward and backward of the network, and both passes through VGG16."""

WARMED = 100
"""Steps before losses are compared: at first they fall too fast."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["CV", "DV"], choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--num-frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of each way in a round")
    parser.add_argument("--no-recipe", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also where the time of this kit's step goes")
    parser.add_argument("--eager", action="store_true", help="this kit's step uncompiled")
    parser.add_argument("--losses", type=int, metavar="STEPS", help="instead: the loss of compiled and of eager steps")
    parser.add_argument("settings", nargs="*", help="of the kit's run, such as optim.clip_grad=0")
    arguments = parser.parse_args()
    groups = Groups.start(current_rank())
    with contextlib.nullcontext() if groups.rank.is_first else contextlib.redirect_stdout(io.StringIO()):
        measure(groups, arguments)
    groups.stop()


def measure(groups: Groups, arguments: argparse.Namespace) -> None:
    rate = float("nan")
    if groups.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        rate = matrix_rate(groups.device)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16 matrices {rate / 1e12:.0f} TFLOP/s")
    pairs = itertools.product(arguments.kinds, arguments.batches)
    if arguments.losses is not None:
        for kind, batch in pairs:
            compare_losses(kind, batch, groups, arguments)
        return
    print("| step | ms | clips/s | ratio | TFLOP/s | of the matrix rate | peak allocated, reserved GB | warm-up s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, batch in pairs:
        compare(kind, batch, groups, rate, arguments)


def compare(kind: str, batch: int, groups: Groups, rate: float, arguments: argparse.Namespace) -> None:
    ways: dict[str, Callable[[], object]] = {}
    memory: dict[str, tuple[float, float]] = {}
    warm_up: dict[str, float] = {}
    shape = (batch, 3, arguments.num_frames, arguments.size, arguments.size)
    clips = [torch.randint(256, shape, dtype=torch.uint8) for _ in range(4)]
    if groups.device.type == "cuda":
        clips = [each.pin_memory() for each in clips]
    makers = {"recipe": recipe_step, "kit": kit_step}
    if arguments.no_recipe:
        del makers["recipe"]
    for name, make in makers.items():
        forget(groups)
        started = time.perf_counter()
        ways[name] = make(kind, batch, clips, groups, arguments)
        for _ in range(4):
            ways[name]()
        wait(groups)
        warm_up[name] = time.perf_counter() - started
        memory[name] = peak(groups)
        if name == "recipe":  # what follows is to show its own memory
            del ways[name]
    if not arguments.no_recipe:
        ways = {"recipe": recipe_step(kind, batch, clips, groups, arguments), **ways}
        for _ in range(2):
            ways["recipe"]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, step in ways.items():
            step()
            wait(groups)
            started = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            wait(groups)
            times[name].append((time.perf_counter() - started) / arguments.steps)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, seconds in medians.items():
        ratio = medians["recipe"] / seconds if "recipe" in medians else float("nan")
        full = TFLOP[kind] * (arguments.num_frames / 33) * (arguments.size / 256) ** 2
        flops, clips_per_s = full * batch / seconds, batch * groups.rank.world_size / seconds
        print(
            f"| {kind}, B={batch}, {name} | {1000 * seconds:.1f} | {clips_per_s:.1f} | {ratio:.2f} | {flops:.0f} "
            f"| {flops * 1e12 / rate:.0%} | {memory[name][0]:.1f}, {memory[name][1]:.1f} | {warm_up[name]:.0f} |",
            flush=True,
        )
    if arguments.profile:
        profile(ways["kit"])
    ways.clear()
    torch._dynamo.reset()


def compare_losses(kind: str, batch: int, groups: Groups, arguments: argparse.Namespace) -> None:
    """Means over 20 steps: compiled, eager, and eager again on clips that differ by less than their rounding.

    All start from the same weights, which some steps have warmed, and see the same clips in the same order.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(32 * batch, 3, 3, 6, 6, generator=generator)
    shape = (arguments.num_frames, arguments.size, arguments.size)
    clips = list((255 * F.interpolate(coarse, shape, mode="trilinear")).to(torch.uint8).split(batch))
    moved = [each.clone() for each in clips]
    for each in moved:  # one value of 256 in one pixel: the smallest difference there is
        each[:, :, 0, 0, 0] ^= 1
    losses: dict[str, Tensor] = {}
    for name, own, is_eager in (("eager", clips, True), ("eager, moved", moved, True), ("compiled", clips, False)):
        forget(groups)
        step = kit_step(kind, batch, own, groups, argparse.Namespace(**{**vars(arguments), "eager": is_eager}))
        numbers = [float(step().numbers.read()[0]) for _ in range(WARMED + arguments.losses)]
        losses[name] = torch.tensor(numbers[WARMED:]).split(20)
        torch._dynamo.reset()
    print(f"{kind}, B={batch}: steps after {WARMED}, means of the loss, and how far from eager")
    print("| steps | eager | eager, moved | compiled |")
    print("| --- | --- | --- | --- |")
    for index, parts in enumerate(zip(*losses.values(), strict=True)):
        eager, other, compiled = (float(part.mean()) for part in parts)
        told = f"{other:.5f} ({other / eager - 1:+.2%}) | {compiled:.5f} ({compiled / eager - 1:+.2%})"
        print(f"| {20 * index + 1} to {20 * index + len(parts[0])} | {eager:.5f} | {told} |", flush=True)


def recipe_step(
    kind: str, batch: int, clips: list[Tensor], groups: Groups, arguments: argparse.Namespace
) -> Callable[[], object]:
    del batch
    device, dtype = groups.device, torch.bfloat16 if groups.device.type == "cuda" else torch.float32
    architecture = Architecture.of(run_config(kind, 1, arguments).model)
    torch.manual_seed(0)
    network = ReferenceTokenizer(architecture).to(device, dtype)
    network.load_state_dict(starting_tokenizer(run_config(kind, 1, arguments).model, 0).state_dict(), strict=False)
    eye = PlainVgg().to(device, dtype)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.5, 0.999), weight_decay=0.01)
    source = itertools.cycle(clips)

    def step() -> Tensor:
        batch = (next(source).to(device, non_blocking=True).float() / 127.5 - 1).to(dtype)
        optimizer.zero_grad()
        reconstructions = network.decode(network.encode(batch))
        loss = (reconstructions - batch).abs().mean() + 0.1 * eye(batch, reconstructions)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


class PlainVgg(nn.Module):
    """The perceptual term as the recipe has it: all frames at once."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Vgg16()

    def forward(self, clips: Tensor, reconstructions: Tensor) -> Tensor:
        pairs = zip(
            *(self.network(each.transpose(1, 2).flatten(0, 1)) for each in (clips, reconstructions)), strict=True
        )
        return sum(w * F.l1_loss(a, b) for w, (a, b) in zip(LAYER_WEIGHTS, pairs, strict=True))


def run_config(kind: str, batch: int, arguments: argparse.Namespace) -> RunConfig:
    settings = [
        f"model.model={MODELS[kind]}",
        f"model.channels={arguments.channels}",
        f"data.num_frames={arguments.num_frames}",
        f"data.crop_size={arguments.size}",
        f"data.micro_batch_size={batch}",
        f"data.global_batch_size={batch * current_rank().world_size}",
        f"trainer.devices={current_rank().world_size}",
        *arguments.settings,
    ]
    return resolve(load_experiment(None, settings), {})


def kit_step(
    kind: str, batch: int, clips: list[Tensor], groups: Groups, arguments: argparse.Namespace
) -> Callable[[], QueuedStep]:
    config = run_config(kind, batch, arguments)
    torch.manual_seed(0)
    module = tokenizer_in_training(config)
    ddp = groups.wrap(module, use_distributed_optimizer=config.optim.use_distributed_optimizer)
    dtype = torch.bfloat16 if groups.device.type == "cuda" else torch.float32
    eye = Eye(Vgg16().to(groups.device, dtype), config.loss.lpips.chunk_frames)
    losses = Losses(config.loss, eye=eye)
    average = WeightAverage(module, 0.999)
    if not arguments.eager:
        on_gpu = groups.device.type == "cuda"
        torch.backends.cudnn.benchmark = on_gpu
        compile_in_regions(Subject(module, losses, average), with_graphs=on_gpu)
    state = TrainState(module, ddp, Optimizer(ddp, config.optim, groups), average, iter(()))
    run = SimpleNamespace(config=config, groups=groups, losses=losses)
    source = itertools.cycle(clips)

    def batches() -> Iterator[Tensor]:
        yield from source

    feed = batches()
    queued: list[QueuedStep] = []

    def step() -> QueuedStep:
        queued.append(train_step(state, feed, run))  # the numbers are read one step late, as the loop does
        if len(queued) > 1:
            state.optimizer.learn(bool(queued.pop(0).numbers.read()[-1]))
        return queued[-1]

    return step


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[4:])


def forget(groups: Groups) -> None:
    gc.collect()
    if groups.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(groups: Groups) -> tuple[float, float]:
    if groups.device.type != "cuda":
        return float("nan"), float("nan")
    return torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9


def wait(groups: Groups) -> None:
    if groups.device.type == "cuda":
        torch.cuda.synchronize()


def profile(step: Callable[[], object], num_steps: int = 3) -> None:
    """GPU milliseconds of a step by sort of kernel, and the longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    events = [
        e
        for e in seen.key_averages()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.key.startswith("Optimizer.")
    ]
    sorts: dict[str, float] = {}
    for event in events:
        name = event.key.lower()
        sort = next((sort for sort, marks in SORTS.items() if any(mark in name for mark in marks)), "other")
        sorts[sort] = sorts.get(sort, 0.0) + event.self_device_time_total / 1000 / num_steps
    print("  GPU ms a step:", {name: round(ms, 1) for name, ms in sorts.items()}, "sum", round(sum(sorts.values()), 1))
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:45]:
        ms = event.self_device_time_total / 1000 / num_steps
        print(f"    {ms:7.2f} ms  x{event.count / num_steps:5.1f}  {event.key[:150]}")


SORTS = {
    "convolutions and products": ("gemm", "conv", "cutlass", "xmma", "cudnn", "nvjet", "wgrad", "dgrad"),
    "compiled pointwise and reductions": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
    "optimizer": ("fusedadam", "fusedoptimizer", "multi_tensor"),
}

if __name__ == "__main__":
    main()
