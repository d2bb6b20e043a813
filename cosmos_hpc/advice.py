"""What `plan` warns of: settings that work, and that their user should know of."""

import json
from collections.abc import Iterator

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.container import missing_image

MOST = 0.03
"""Share of the time that validation should take at most."""


def advice(run: RunConfig, folder: RunFolder) -> list[str]:
    """One sentence for each thing to know of a run, with its mend.

    Args:
        run: settings.
        folder: where an earlier start may have left its times; need not be there.
    """
    return [*_on_latents(run), *_on_container(run), *_on_validation(run, folder)]


def _on_latents(run: RunConfig) -> Iterator[str]:
    if run.model.may_train_encoder:
        what = "latents" if run.model.kind == "CV" else "indices"
        yield (
            f"model.trainable is {run.model.trainable}: the encoder moves, and with it the {what} on which released "
            f"Cosmos world models and everything cached depend; model.trainable=decoder keeps them"
        )


def _on_container(run: RunConfig) -> Iterator[str]:
    image, mode = run.container.image, run.container.mode
    if (image is not None or mode != "none") and run.cluster.executor == "local":
        setting = f"container.image is {image}" if mode == "none" else f"container.mode is {mode}"
        yield f"{setting}, but cluster.executor is local: the ranks run on this machine, without the container"
    elif run.container.mode != "none" and (missing := missing_image(run.container)) is not None:
        yield missing


def _on_validation(run: RunConfig, folder: RunFolder) -> Iterator[str]:
    interval = run.trainer.val_check_interval
    if interval is None:
        return  # the minutes stretch by themselves
    measured = _measured_ratio(folder)
    ratio = _estimated_ratio(run) if measured is None else measured
    share = ratio / (ratio + interval)
    if share > MOST:
        fitting = round(ratio / MOST)
        yield (
            f"validation every {interval} steps (trainer.val_check_interval) takes about {share:.0%} of the time"
            f"{'' if measured is None else ', as measured in this run'}: set {fitting} or more, or leave it out for "
            f"one every {run.trainer.val_every_n_minutes:g} minutes"
        )


def _estimated_ratio(run: RunConfig) -> float:
    """Steps that a validation takes as long as, from counts of clips alone.

    A forward takes a third of a step without VGG16, and half of one where both look through it.
    """
    data, trainer = run.data, run.trainer
    forward = 1 / 2 if run.loss.looks_through_vgg(trainer.max_steps) else 1 / 3
    networks = 2 if run.optim.ema_decay else 1
    datasets = 1 if data.general_path is None else 2
    clips = trainer.limit_val_batches * data.micro_batch * datasets * networks
    return forward * clips / (data.global_batch_size / trainer.world_size)


def _measured_ratio(folder: RunFolder) -> float | None:
    """The same as this run's newest validation and the median step before it took."""
    try:
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()[-500:]]
    except (OSError, ValueError):
        return None
    took = [line["validation_time_s"] for line in lines if "validation_time_s" in line]
    steps = sorted(line["step_time_s"] for line in lines if "step_time_s" in line)
    return took[-1] / steps[len(steps) // 2] if took and steps else None
