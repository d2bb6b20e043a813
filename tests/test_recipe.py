"""Defaults that the recipe promises, where the guide's are kept and where they are at fault."""

import pytest

from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.schema import RunConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss.l1.weight", 1.0),
        ("loss.lpips.weight", 0.1),
        ("loss.gram.weight", 0.0),  # the guide builds what it needs, and never gets to its first step
        ("loss.flow.weight", 0.0),  # likewise
        ("loss.consistency.weight", 0.0),
        ("loss.kl.weight", 0.0),
        ("loss.fsq_entropy.weight", 0.0),
        ("loss.adversarial.weight", 0.0),
        ("optim.lr", 1e-4),
        ("optim.betas", (0.5, 0.999)),
        ("optim.eps", 1e-8),
        ("optim.weight_decay", 0.01),
        ("optim.warmup_steps", 200),  # the guide: none
        ("optim.clip_grad", 1.0),  # the guide: none
        ("optim.ema_decay", 0.999),  # the guide: none
        ("optim.lr_schedule", "constant"),
        ("model.trainable", "all"),
        ("model.formulation", "AE"),
        ("data.num_frames", 33),
        ("data.crop_size", 256),
        ("data.micro_batch_size", 1),
        ("data.global_batch_size", 8),
        ("data.general_path", None),
        ("trainer.precision", "bf16"),  # of the computation; weights, moments and averages are float32
        ("trainer.val_every_n_minutes", 5.0),  # the guide: 100 steps
        ("trainer.val_check_interval", None),
        ("trainer.max_epochs", None),
        ("trainer.max_skipped_steps", 3),
        ("trainer.max_rollbacks", 2),
        ("checkpoint.every_n_minutes", 10.0),
        ("checkpoint.keep", 3),
        ("checkpoint.best_by", "val_psnr"),  # the guide: the highest step number
        ("wandb.mode", "auto"),
        ("wandb.log_media", False),
    ],
)
def test_default(setting, value):
    found = RunConfig()
    for part in setting.split("."):
        found = getattr(found, part)
    assert found == value


def test_the_guides_own_fields_are_taken_by_their_names():
    line = ["trainer.max_epochs=10", "trainer.val_check_interval=100", "trainer.limit_val_batches=1"]
    line += ["trainer.log_every_n_steps=1", "data.num_workers=8", "optim.betas=[0.5, 0.999]"]
    run = resolve(load_experiment(None, line), {})
    assert (run.trainer.max_epochs, run.trainer.val_check_interval, run.trainer.limit_val_batches) == (10, 100, 1)
