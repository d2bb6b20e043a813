"""Time encode and decode against a plain transcription of the specification, with the same weights.

    python benchmarks/tokenizer_plumbing.py                      # a narrow network on the CPU
    python benchmarks/tokenizer_plumbing.py --device cuda        # the released width, bfloat16 autocast, eager
    python benchmarks/tokenizer_plumbing.py --device cuda --compile

Prints milliseconds a call (the smallest of the repetitions, the two networks taking turns) and the ratio; a ratio
above 1 says how much faster the kit's network is. On the CPU it is the time of one thread, so other work on the
machine counts little. With --train a call is forward and backward of encode and decode.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tokenizer"))

from reference_network import ReferenceTokenizer

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import build_tokenizer


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def step(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], clips: Tensor) -> None:
    (decode(encode(clips)) - clips).abs().mean().backward()


def compare(name: str, ours: Callable[[], object], plain: Callable[[], object], args: argparse.Namespace) -> None:
    """Alternate between the two, so that other work on the machine meets both."""
    device = torch.device(args.device)
    for _ in range(args.warm_up):
        ours(), plain()
    times = [(seconds(plain, device), seconds(ours, device)) for _ in range(args.repetitions)]
    plain_ms, our_ms = (1000 * min(column) for column in zip(*times, strict=True))
    print(f"| {name} | {plain_ms:.1f} | {our_ms:.1f} | {plain_ms / our_ms:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels", type=int, help="base width; 16 on the CPU, else 128 as released")
    parser.add_argument("--shape", help="B,T,H,W; 1,9,128,128 on the CPU, else 1,33,256,256")
    parser.add_argument("--compile", action="store_true", help="compile both networks")
    parser.add_argument("--train", action="store_true", help="time forward and backward instead")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    channels = args.channels or (16 if on_cpu else 128)
    b, t, h, w = map(int, (args.shape or ("1,9,128,128" if on_cpu else "1,33,256,256")).split(","))
    what = f"{b}x3x{t}x{h}x{w}, width {channels}, {args.device}, {'float32' if on_cpu else 'bfloat16 autocast'}"
    print(f"{what}, {'compiled' if args.compile else 'eager'}, torch {torch.__version__}\n")
    print("| call | specification, ms | cosmos-hpc, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for kind in ("CV8x8x8", "DV8x16x16"):
        torch.manual_seed(0)
        network = build_tokenizer(ModelConfig(model=kind, channels=channels))
        plain = ReferenceTokenizer(network.architecture)
        plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("quantizer.")})
        pair = [module.to(args.device) for module in (network, plain)]
        clips = (torch.rand(b, 3, t, h, w) * 2 - 1).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=not on_cpu), torch.set_grad_enabled(args.train):
            encoders, decoders = [m.encode for m in pair], [m.decode for m in pair]
            if args.compile:
                encoders, decoders = [list(map(torch.compile, calls)) for calls in (encoders, decoders)]
            latents = encoders[0](clips).detach()
            if args.train:
                steps = [partial(step, e, d, clips) for e, d in zip(encoders, decoders, strict=True)]
                compare(f"{kind} forward and backward", *steps, args)
            else:
                compare(f"{kind} encode", *(partial(e, clips) for e in encoders), args)
                compare(f"{kind} decode", *(partial(d, latents) for d in decoders), args)


if __name__ == "__main__":
    main()
