"""Run as a program in a fresh process: loads exported files and compares them with what the network computed.

    python -m cosmos_hpc.tokenizer.export_check FORM FILES CASES TOLERANCE

prints the largest difference, relative to the largest value; ends with a message and status 1 if it is too large.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """An input and what the network makes of it."""

    clip: Tensor
    latents: Tensor
    """CV: latents; DV: indices."""

    reconstruction: Tensor


class Pair(NamedTuple):
    """Something computed twice."""

    what: str
    from_file: Tensor
    from_network: Tensor


def pairs_of_jit(files: Path) -> Callable[[Case], list[Pair]]:
    """What the three TorchScript files compute."""
    encoder, decoder, autoencoder = (
        torch.jit.load(files / f"{name}.jit") for name in ("encoder", "decoder", "autoencoder")
    )
    return lambda case: [
        Pair("encoder.jit", encoder(case.clip)[0], case.latents),
        Pair("decoder.jit", decoder(case.latents), case.reconstruction),
        Pair("autoencoder.jit", autoencoder(case.clip)[0], case.reconstruction),
    ]


def pairs_of_weights(file: Path, dtype: torch.dtype) -> Callable[[Case], list[Pair]]:
    """What a network with the weights of one file computes."""
    from cosmos_hpc.tokenizer.discrete import DiscreteTokenizer
    from cosmos_hpc.tokenizer.weights import load_tokenizer

    network = load_tokenizer(file).to(dtype)

    def pairs(case: Case) -> list[Pair]:
        if isinstance(network, DiscreteTokenizer):
            latents, reconstruction = network.encode_indices(case.clip), network.decode_indices(case.latents)
        else:
            latents, reconstruction = network.encode(case.clip), network.decode(case.latents)
        return [
            Pair(f"{file.name}, encoded", latents, case.latents),
            Pair(f"{file.name}, decoded", reconstruction, case.reconstruction),
        ]

    return pairs


def pairs_of_diffusers(folder: Path) -> Callable[[Case], list[Pair]]:
    """What diffusers makes of the folder, in float32."""
    from cosmos_hpc.tokenizer.diffusers_folder import diffusers_class

    model = diffusers_class().from_pretrained(folder, torch_dtype=torch.float32).eval()
    return lambda case: [
        Pair("diffusers, encoded", model.encode(case.clip).latent_dist.mode(), case.latents),
        Pair("diffusers, decoded", model.decode(case.latents).sample, case.reconstruction),
    ]


def relative_difference(pair: Pair) -> float:
    """Largest difference over largest value; for indices the share that differs."""
    if pair.from_file.shape != pair.from_network.shape or pair.from_file.dtype != pair.from_network.dtype:
        return float("inf")
    if not pair.from_network.is_floating_point():
        return (pair.from_file != pair.from_network).float().mean().item()
    difference = (pair.from_file.float() - pair.from_network.float()).abs().max()
    return (difference / pair.from_network.float().abs().max()).item()


@torch.no_grad()
def main() -> None:
    """Compare, print, and end with status 1 on a difference."""
    form, files, tolerance = sys.argv[1], Path(sys.argv[2]), float(sys.argv[4])
    cases = [Case(*case) for case in torch.load(sys.argv[3], weights_only=True)]
    if form == "jit":
        pairs = pairs_of_jit(files)
    elif form == "diffusers":
        pairs = pairs_of_diffusers(files)
    else:
        pairs = pairs_of_weights(files / f"model.{form}", cases[0].clip.dtype)
    largest = 0.0
    with torch.jit.optimized_execution(False):  # else TorchScript studies the first runs of each graph for seconds
        for case in cases:
            for pair in pairs(case):
                difference = relative_difference(pair)
                largest = max(largest, difference)
                if not difference <= tolerance:
                    sys.exit(f"{pair.what} differs by {difference:.1e} of the largest value on {list(case.clip.shape)}")
    print(largest)


if __name__ == "__main__":
    main()
