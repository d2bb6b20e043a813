"""What is checked of a run's inputs before anything starts; light enough for a login node."""

from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.dataset_index import check_dataset


def check_inputs(run: RunConfig) -> None:
    """Refuse a run whose data or weights are not there.

    Raises:
        ConfigError: with the setting, what it points to, and the mend.
    """
    check_dataset(run.data.path)
    weights = run.model.jit_ckpt_pth
    if weights is not None and not Path(weights).exists():
        raise ConfigError(f"model.jit_ckpt_pth is {weights}, which does not exist: name a folder with autoencoder.jit")
