"""Run folders with real files in them: settings, metrics, attempts, checkpoints of a narrow network, encoded video."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.loss_schema import LossConfig, PerceptualConfig
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import ModelConfig, OptimConfig, RunConfig, TrainerConfig
from cosmos_hpc.report.scores import Evaluation, EvaluationSet
from cosmos_hpc.tokenizer import starting_tokenizer

WriteRun = Callable[..., RunFolder]
"""The fixture `write_run`: settings, and of metrics and state what there is."""

FRAMES, HEIGHT, WIDTH = 12, 48, 64


def film(first_colour: int, num_frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """A gradient that drifts to the right."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return [
        np.stack([(across * 3 + 5 * t) % 256, down * 4 % 256, np.full_like(down, first_colour)], axis=-1).astype(
            np.uint8
        )
        for t in range(num_frames)
    ]


def run_config(data_path: Path | str, **changes: Any) -> RunConfig:
    """A run of the narrow network on clips of 9 frames and 32 x 32 pixels."""
    return RunConfig(
        name="trial",
        model=ModelConfig(model=changes.pop("model", "Cosmos-1.0-Tokenizer-CV8x8x8"), channels=8),
        data=DataConfig(
            path=str(data_path),
            num_frames=9,
            crop_size=changes.pop("crop_size", 32),
            micro_batch_size=2,
            global_batch_size=4,
        ),
        trainer=TrainerConfig(max_steps=40, precision="32", seed=changes.pop("seed", 3), limit_val_batches=8),
        optim=OptimConfig(**changes),
        loss=LossConfig(lpips=PerceptualConfig(weight=0.0)),
    )


def grey_state(config: RunConfig) -> dict[str, torch.Tensor]:
    """Weights whose last convolution gives 0 for every clip: each reconstruction is the grey half way, 0 in [-1, 1]."""
    tensors = starting_tokenizer(config.model, config.trainer.seed).state_dict()
    for name in ("decoder.conv_out.1.conv3d.weight", "decoder.conv_out.1.conv3d.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    return tensors


def save_checkpoint(folder: RunFolder, tensors: dict[str, torch.Tensor], step: int) -> Path:
    """Weights in the layout of a checkpoint."""
    path = folder.checkpoint(step)
    dcp.save({f"model.{name}": tensor for name, tensor in tensors.items()}, checkpoint_id=path, no_dist=True)
    return path


def step_lines(first: int, last: int, attempt: int, **extra: Any) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl as training writes them: loss 1/step, 2 clips/s on even steps and 4 on odd ones."""
    return [
        {
            "step": step,
            "loss": 1 / step,
            "l1": 1 / step,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "step_time_s": 1.0,
            "data_time_s": 0.1,
            "clips_per_s": 2.0 + 2 * (step % 2),
            "consumed_samples": 4 * step,
            "attempt": attempt,
            **extra,
        }
        for step in range(first, last + 1)
    ]


def attempt(number: int, started: float, ended: float | None, outcome: str | None, **more: Any) -> dict[str, Any]:
    """An entry of state.json's attempts."""
    return {
        "attempt": number,
        "started": started,
        "ended": ended,
        "outcome": outcome,
        "step": more.get("step"),
        "message": more.get("message"),
        "host": "node-1",
        "job_id": "4711",
    }


def evaluation_set(*evaluations: Evaluation, **changes: object) -> EvaluationSet:
    """Some weights on videos by number."""
    settings = {
        "data": "roads",
        "split": "val",
        "num_frames": 9,
        "num_windows": 1,
        "crop_size": 32,
        "videos": [f"video {index}" for index in range(len(evaluations[0].per_video["psnr"]))],
        "slices": {},
        "left_out": [],
        "evaluations": list(evaluations),
    }
    return EvaluationSet(**{**settings, **changes})
