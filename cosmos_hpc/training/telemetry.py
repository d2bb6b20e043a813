"""What a run tells: metrics.jsonl, the heartbeat, log lines, a bar, tracking. All ranks call, rank 0 writes."""

import contextlib
import json
import logging
import math
from typing import Any, NamedTuple, TextIO

from cosmos_hpc.config.run_folder import RunFolder, write_atomically
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.ranks import Rank
from cosmos_hpc.training.heartbeat import Heartbeat
from cosmos_hpc.training.live_bar import LiveBar
from cosmos_hpc.training.tracking import Tracker, start_tracking

logger = logging.getLogger(__name__)


class ValidationScores(NamedTuple):
    """How good the reconstructions of unseen clips are, by the names in metrics.jsonl; means over clips."""

    val_psnr: float
    """Peak signal-to-noise ratio in dB."""

    val_ssim: float | None = None
    """Structural similarity."""

    val_lpips: float | None = None
    """Difference of VGG16's features; where the loss has them."""

    val_code_use: float | None = None
    """DV: share of the codebook that occurs in the validation clips."""

    val_perplexity: float | None = None
    """DV: number of codes that, used evenly, would carry as much."""

    val_psnr_ema: float | None = None
    """PSNR of the averaged weights, where there is an average."""

    val_ssim_ema: float | None = None
    """Structural similarity of the averaged weights."""

    val_lpips_ema: float | None = None
    """Difference of VGG16's features of the averaged weights."""

    general_psnr: float | None = None
    """Like those of val, of the clips of data.general_path, where that is set: what is forgotten shows here."""

    general_ssim: float | None = None
    """Structural similarity."""

    general_lpips: float | None = None
    """Difference of VGG16's features."""

    general_psnr_ema: float | None = None
    """Of the averaged weights."""

    general_ssim_ema: float | None = None
    """Of the averaged weights."""

    general_lpips_ema: float | None = None
    """Of the averaged weights."""

    val_clips: float | None = None
    """Clips of val: fewer where a run goes on with fewer ranks or a smaller micro batch, and then others as well."""

    def written(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def told(self) -> str:
        """PSNR, as log lines say it."""
        average = "" if self.val_psnr_ema is None else f", of the average {self.val_psnr_ema:.2f} dB"
        general = "" if self.general_psnr is None else f", on general video {self.general_psnr:.2f} dB"
        return f"validation PSNR {self.val_psnr:.2f} dB{average}{general}"


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

    lpips: float | None = None
    """Difference of VGG16's features; like the terms below not weighted, and in steps where its weight is above 0."""

    gram: float | None = None
    """Difference of their Gram matrices."""

    flow: float | None = None
    """Difference of optical flow in pixels."""

    consistency: float | None = None
    """Difference of overlapping windows."""

    kl: float | None = None
    """Divergence of the latents in nats."""

    fsq_entropy: float | None = None
    """How unevenly the quantizer's levels are used."""

    adversarial: float | None = None
    """Minus the discriminator's verdict on the reconstructions."""

    adversarial_weight: float | None = None
    """What that was multiplied with: the weight, or with `adaptive` its product with the gradients' ratio."""

    discriminator: float | None = None
    """The discriminator's own loss, from 0 (always right) over 1 (knows nothing)."""

    skipped: bool = False
    """Whether the update was left out, as loss or gradient was not finite; written where it is true."""

    validation: ValidationScores | None = None
    """On steps with a validation; each score stands in the line by its own name."""

    memory_gib: float | None = None
    """Most memory that rank 0 held so far: of the GPU where there is one, else of its process."""

    validation_time_s: float | None = None
    """Seconds that the validation after this step took."""


class Telemetry:
    """The voice of one attempt of a run."""

    def __init__(self, folder: RunFolder, config: RunConfig, rank: Rank, attempt: int) -> None:
        self._folder = folder
        self._config = config
        self._attempt = attempt
        self._is_first = rank.is_first
        self._file: TextIO | None = None
        self._heartbeat = Heartbeat(folder, attempt) if rank.is_first else None
        self._tracker: Tracker | None = None
        self._bar: LiveBar | None = None
        self._pictures: Any = None

    @property
    def wandb_id(self) -> str | None:
        """The run's name at wandb, where it is tracked there."""
        return None if self._tracker is None else self._tracker.id

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl up to the last step that was logged; 0 on other ranks."""
        return 0 if self._file is None else self._folder.metrics.stat().st_size

    def resume_at(self, step: int, metrics_bytes: int) -> None:
        """Open metrics.jsonl for the steps after `step`, and tracking with it.

        What lies behind `metrics_bytes` is trained again: it goes to the attempt's logs.
        """
        if self._heartbeat is None:
            return
        is_start = self._file is None
        self._heartbeat.resume_at(step)
        self._cut(metrics_bytes)
        self._file = self._folder.metrics.open("a", encoding="utf-8")
        if is_start:
            self._tracker = start_tracking(self._config, self._folder)
            self._bar = LiveBar.on_terminal(self._folder.label, self._config.trainer.max_steps)

    def roll_back_to(self, step: int, metrics_bytes: int) -> None:
        """Go on behind an earlier step, in the same attempt."""
        if self._file is not None:
            self._file.close()
        self.resume_at(step, metrics_bytes)

    def phase(self, phase: str, step: int) -> None:
        """Say what the run is doing."""
        if self._heartbeat is not None:
            self._heartbeat.enter(phase, step)

    def tick(self) -> None:
        """A sign of life within a phase."""
        if self._heartbeat is not None:
            self._heartbeat.tick()

    def note_step_times(self, seconds: list[float], saved_step: int | None) -> None:
        """What each rank's last step took without waiting for the others, and the newest published checkpoint."""
        if self._heartbeat is not None:
            self._heartbeat.note_step_times(seconds, saved_step)

    def note_compilation(self, told: str) -> None:
        """How this start computes; goes into provenance.json too, beside the start's other circumstances."""
        if self._heartbeat is None:
            return
        self._heartbeat.note_compilation(told)
        *before, start = json.loads(self._folder.provenance.read_text())
        with contextlib.suppress(OSError):  # a full disk is not to end a run here
            write_atomically(self._folder.provenance, json.dumps([*before, {**start, "compilation": told}], indent=1))

    def facts(self, saved_step: int | None) -> dict[str, Any]:
        """Where this attempt began, what it saved, and where its time went, on rank 0."""
        return {} if self._heartbeat is None else self._heartbeat.facts(saved_step)

    def show(self, pictures: Any) -> None:
        """Have pictures go along with the next line, where `wandb.log_media` lets them.

        Args:
            pictures: uint8 [H, W, 3] on the CPU, or none.
        """
        self._pictures = pictures if self._config.wandb.log_media else None

    def log_start(self, scores: ValidationScores) -> None:
        """Note how good the network is before step 1."""
        if self._is_first:
            logger.info("before step 1: %s", scores.told())
            self._write({"step": 0, **scores.written()})

    def log(self, metrics: StepMetrics) -> None:
        """Note one step."""
        if self._heartbeat is None:
            return
        self._heartbeat.note_wait(metrics.data_time_s)
        scores = {} if metrics.validation is None else metrics.validation.written()
        line = {**metrics._replace(validation=None)._asdict(), **scores}
        known = {name: value for name, value in line.items() if value is not None and value is not False}
        self._write({name: value for name, value in known.items() if math.isfinite(value)})  # JSON knows no NaN
        if self._bar is not None:
            self._bar.show(metrics)
        if metrics.skipped:
            logger.warning("step %d: loss or gradient is not finite, the update is left out", metrics.step)
        is_last = metrics.step == self._config.trainer.max_steps
        if metrics.step % self._config.trainer.log_every_n_steps == 0 or is_last or metrics.validation is not None:
            logger.info("%s", _step_line(metrics, self._config.trainer.max_steps))

    def close(self) -> None:
        """Flush what is left."""
        if self._heartbeat:
            self._heartbeat.close()
        if self._file:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()

    def _cut(self, length: int) -> None:
        """Keep the first bytes of metrics.jsonl, and the rest as this attempt's find."""
        written = self._folder.metrics.read_bytes() if self._folder.metrics.exists() else b""
        if len(written) > length:
            cut = self._folder.cut_metrics(self._attempt)
            cut.parent.mkdir(parents=True, exist_ok=True)
            with cut.open("ab") as file:
                file.write(written[length:])
        write_atomically(self._folder.metrics, written[:length].decode())

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "resume_at comes first"
        self._file.write(json.dumps({**line, "attempt": self._attempt}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(line, self._pictures)
            self._pictures = None


def _step_line(metrics: StepMetrics, max_steps: int) -> str:
    wait = 100 * metrics.data_time_s / metrics.step_time_s
    validation = "" if metrics.validation is None else f", {metrics.validation.told()}"
    left_min = (max_steps - metrics.step) * metrics.step_time_s / 60
    return (
        f"step {metrics.step}/{max_steps}: loss {metrics.loss:.4f}, grad norm {metrics.grad_norm:.3f}, "
        f"lr {metrics.lr:.2e}, {metrics.clips_per_s:.2f} clips/s, data wait {wait:.0f} %, "
        f"{metrics.memory_gib or 0:.1f} GiB, {left_min:.1f} min left{validation}"
    )
