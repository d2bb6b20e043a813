"""A CV network as the folder that diffusers' `AutoencoderKLCosmos.from_pretrained` loads."""

import importlib
import re
from pathlib import Path
from typing import Any

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.tokenizer.architecture import NUM_LEVELS, Architecture
from cosmos_hpc.tokenizer.continuous import ContinuousTokenizer
from cosmos_hpc.tokenizer.latent_statistics import LatentStatistics
from cosmos_hpc.tokenizer.taps import parameters_for_own_taps

RENAMINGS = (
    (r"\.conv3d\b", ""),
    (r"\b(conv_in|conv_out|conv1|conv2)\.0\b", r"\1.conv_s"),
    (r"\b(conv_in|conv_out|conv1|conv2)\.1\b", r"\1.conv_t"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bmid\.attn_1\.0\b", "mid_block.attentions.0"),
    (r"\bmid\.attn_1\.1\b", "mid_block.temp_attentions.0"),
    (r"\b([qkv])\.(weight|bias)$", r"to_\1.\2"),
    (r"\bproj_out\b", "to_out.0"),
    (r"\bdown\.(\d)", r"down_blocks.\1"),
    (r"\bup\.(\d)", lambda level: f"up_blocks.{NUM_LEVELS - 1 - int(level[1])}"),  # there in the order of execution
    (r"\bblock\.(\d)", r"resnets.\1"),
    (r"\b(down|up)sample\b", r"\1samplers.0"),
)
"""Released names to those of diffusers: pattern and replacement, applied one after another."""


def diffusers_name(name: str) -> str:
    """What diffusers calls a parameter."""
    for pattern, replacement in RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_class() -> Any:
    """`diffusers.AutoencoderKLCosmos`.

    Raises:
        ConfigError: if diffusers is not installed whole, or too old.
    """
    try:
        return importlib.import_module("diffusers").AutoencoderKLCosmos  # an optional extra
    except (ImportError, AttributeError, RuntimeError) as error:  # the last if a package that it needs is missing
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"exporting to diffusers needs its AutoencoderKLCosmos ({reason}): "
            "run `pip install 'cosmos-hpc[diffusers]'`"
        ) from error


def write_diffusers(network: ContinuousTokenizer, statistics: LatentStatistics | None, folder: Path) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors.

    Args:
        network: in the dtype to write.
        statistics: of its latents, which pipelines normalise by; without them the folder says that there are none.
        folder: to write to.

    Raises:
        ConfigError: without diffusers, or if it has no such network.
    """
    architecture = network.architecture
    model = diffusers_class()(**diffusers_config(architecture, statistics))
    tensors = {diffusers_name(name): tensor for name, tensor in parameters_for_own_taps(network).items()}
    try:
        model.to(network.post_quant_conv.conv3d.weight.dtype).load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"diffusers' AutoencoderKLCosmos is another network than this {architecture.name} ({reason}): "
            "export to jit, pt or safetensors"
        ) from error
    model.save_pretrained(folder)


def diffusers_config(architecture: Architecture, statistics: LatentStatistics | None) -> dict[str, Any]:
    """The arguments of `AutoencoderKLCosmos` for a network."""
    widths = architecture.widths
    return {
        "encoder_block_out_channels": (architecture.channels, *widths),
        "decode_block_out_channels": (*widths, widths[-1]),
        "patch_size": architecture.patch_size,
        "spatial_compression_ratio": architecture.spatial_compression,
        "temporal_compression_ratio": architecture.temporal_compression,
        "latents_mean": None if statistics is None else statistics.mean.flatten().tolist(),
        "latents_std": None if statistics is None else statistics.std.flatten().tolist(),
    }
