"""What a run tells: metrics.jsonl, the heartbeat, log lines, wandb. All ranks call, rank 0 writes."""

import json
import logging
import os
import time
from functools import partial
from typing import Any, NamedTuple, TextIO

from cosmos_hpc.config.run_folder import RunFolder, write_atomically
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.ranks import Rank

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""Least seconds between two heartbeats: a file system shared by thousands of runs feels each one."""


class StepMetrics(NamedTuple):
    """One line of metrics.jsonl."""

    step: int
    """Updates done, from 1."""

    loss: float
    """Weighted sum of the loss terms, mean over the global batch."""

    l1: float
    """Mean absolute difference of clip and reconstruction, in [-1, 1] units."""

    lr: float
    """Learning rate of this update."""

    grad_norm: float
    """Global gradient norm before clipping."""

    step_time_s: float
    """Wall seconds of the step on rank 0."""

    data_time_s: float
    """Of these, seconds spent waiting for clips."""

    clips_per_s: float
    """Clips of all ranks over wall seconds."""

    consumed_samples: int
    """Clips since step 0."""

    val_psnr: float | None = None
    """Mean PSNR of the validation clips in dB; on steps with a validation."""


class Telemetry:
    """The voice of one attempt of a run."""

    def __init__(self, folder: RunFolder, config: RunConfig, rank: Rank, attempt: int) -> None:
        self._folder = folder
        self._config = config
        self._attempt = attempt
        self._is_first = rank.is_first
        self._beat = 0.0
        self._file: TextIO | None = None
        self._wandb = _start_wandb(config, folder) if rank.is_first else None

    def resume_at(self, step: int) -> None:
        """Open metrics.jsonl for the steps after `step`; lines of later steps, which are trained again, are cut off."""
        if not self._is_first:
            return
        if self._folder.metrics.exists():
            lines = self._folder.metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(self._folder.metrics, "".join(kept) if step else "")
        self._file = self._folder.metrics.open("a")

    def phase(self, phase: str, step: int) -> None:
        """Say what the run is doing; reaches the heartbeat file at most every 5 s."""
        now = time.time()
        if self._is_first and now - self._beat >= HEARTBEAT_S:
            self._beat = now
            beat = {"time": now, "phase": phase, "step": step, "pid": os.getpid(), "attempt": self._attempt}
            write_atomically(self._folder.heartbeat, json.dumps(beat))

    def log_start(self, val_psnr: float) -> None:
        """Note how good the network is before step 1."""
        if self._is_first:
            logger.info("before step 1: validation PSNR %.2f dB", val_psnr)
            self._write({"step": 0, "val_psnr": val_psnr})

    def log(self, metrics: StepMetrics) -> None:
        """Note one step."""
        if not self._is_first:
            return
        self._write({name: value for name, value in metrics._asdict().items() if value is not None})
        is_last = metrics.step == self._config.trainer.max_steps
        if metrics.step % self._config.trainer.log_every_n_steps == 0 or is_last or metrics.val_psnr is not None:
            logger.info("%s", _step_line(metrics, self._config.trainer.max_steps))

    def close(self) -> None:
        """Flush what is left."""
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "resume_at comes first"
        self._file.write(json.dumps({**line, "attempt": self._attempt}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(line, step=line["step"])


def _step_line(metrics: StepMetrics, max_steps: int) -> str:
    wait = 100 * metrics.data_time_s / metrics.step_time_s
    validation = "" if metrics.val_psnr is None else f", validation PSNR {metrics.val_psnr:.2f} dB"
    left_min = (max_steps - metrics.step) * metrics.step_time_s / 60
    return (
        f"step {metrics.step}/{max_steps}: loss {metrics.loss:.4f}, grad norm {metrics.grad_norm:.3f}, "
        f"lr {metrics.lr:.2e}, {metrics.clips_per_s:.2f} clips/s, data wait {wait:.0f} %, "
        f"{left_min:.1f} min left{validation}"
    )


def _start_wandb(config: RunConfig, folder: RunFolder) -> Any:
    """A wandb run under the folder's name, or none where tracking is disabled. Without a network it stays offline."""
    mode, key = config.wandb.mode, os.environ.get(config.wandb.api_key_env)
    if mode == "disabled" or (mode == "auto" and not key):
        return None
    import wandb  # half a second and 60 MB: only where it is used

    if key:
        os.environ["WANDB_API_KEY"] = key
    name = folder.label.replace("/", "-")
    start = partial(wandb.init, project=config.wandb.project, entity=config.wandb.entity, id=name, dir=folder.path)
    if mode != "offline":
        try:
            return start(mode="online", resume="allow")
        except wandb.errors.CommError as error:
            logger.warning("wandb can't be reached (%s): metrics are kept offline in %s/wandb", error, folder.path)
    return start(mode="offline")
