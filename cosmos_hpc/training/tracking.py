"""Weights & Biases: one run there for a run here, whatever requeues it, and each step once."""

import json
import logging
import os
from typing import Any

from cosmos_hpc.config.run_folder import RunFolder, write_atomically
from cosmos_hpc.config.schema import RunConfig, identity

logger = logging.getLogger(__name__)


class Tracker:
    """What is told to Weights & Biases.

    A step that is trained again after a resume or a roll-back was told already and is left out; one that a kill kept
    from being told is made up for from metrics.jsonl, which holds every step once.
    """

    def __init__(self, run: Any) -> None:
        """Tell this run of wandb.

        Args:
            run: as `wandb.init` gives it, which knows how far it has got.
        """
        self._run = run
        self._told = run.step - 1

    @property
    def id(self) -> str:
        """The run's name there."""
        return str(self._run.id)

    def make_up(self, folder: RunFolder) -> None:
        """Tell what metrics.jsonl holds and was not told yet."""
        for line in folder.metrics.read_text().splitlines():
            self.log(json.loads(line))

    def log(self, line: dict[str, Any], pictures: Any = None) -> None:
        """Tell one line of metrics.jsonl.

        Args:
            line: has a `step`.
            pictures: uint8 [H, W, 3], if they may leave the machine.
        """
        if line["step"] <= self._told:
            return
        self._told = line["step"]
        if pictures is not None:
            import wandb

            line = {**line, "reconstruction": wandb.Image(pictures, caption="clip, reconstruction")}
        self._run.log(line, step=line["step"])

    def finish(self) -> None:
        """Wait until all is sent, or on disk: SLURM kills what outlives a rank, wandb's own process as well."""
        import wandb

        self._run.finish()
        wandb.teardown()


def start_tracking(config: RunConfig, folder: RunFolder) -> Tracker | None:
    """A run at Weights & Biases, or in the run's folder for `wandb sync` where there is no key or no network.

    Args:
        config: settings, which go along.
        folder: of the run, with a metrics.jsonl that ends where training goes on.

    Returns:
        None where tracking is disabled.
    """
    mode, key = config.wandb.mode, os.environ.get(config.wandb.api_key_env)
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    if mode == "disabled":
        return None
    import wandb  # seconds and 60 MB: only where it is used

    if key:
        os.environ["WANDB_API_KEY"] = key
    settings: dict[str, Any] = {
        "id": _run_id(folder),
        "name": folder.label,
        "group": folder.experiment.name,
        "project": _project(config),
        "entity": config.wandb.entity,
        "dir": folder.path,
        "config": identity(config),
        "resume": "allow",
        "settings": wandb.Settings(console="off", disable_code=True, disable_git=True),  # numbers, and nothing else
    }
    tracker = None
    if mode == "online":
        try:
            tracker = Tracker(wandb.init(mode="online", **settings))
        except wandb.errors.Error as error:
            logger.warning("wandb can't be reached (%s): metrics are kept offline in %s/wandb", error, folder.path)
            wandb.teardown()  # which else still holds the run's name
    if tracker is None:
        _set_aside_offline_runs(folder)
        settings.pop("resume")
        tracker = Tracker(wandb.init(mode="offline", **settings))
    tracker.make_up(folder)
    return tracker


def _project(config: RunConfig) -> str:
    """The setting, else what the guide's variable or wandb's own says."""
    named = (os.environ.get(name) for name in ("WANDB_PROJECT_NAME", "WANDB_PROJECT"))
    return config.wandb.project or next((name for name in named if name), "cosmos-hpc")


def _run_id(folder: RunFolder) -> str:
    """The run's name at Weights & Biases, which the first start chooses for good.

    WANDB_RUN_ID is taken where the experiment has one run; the runs of a sweep add their number to it.
    """
    if folder.wandb_id.exists():
        return folder.wandb_id.read_text()
    given = os.environ.get("WANDB_RUN_ID")
    name = given or folder.label.replace("/", "-")
    if given and len(folder.experiment.runs()) > 1:
        name = f"{given}-{folder.path.name.partition('-')[0]}"
    folder.wandb_id.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.wandb_id, name)
    return name


def _set_aside_offline_runs(folder: RunFolder) -> None:
    """Each offline run holds all steps from the first one on, so that `wandb sync wandb/offline-run-*` doubles none."""
    for earlier in folder.wandb_id.parent.glob("offline-run-*"):
        earlier.rename(earlier.with_name(f"replaced-{earlier.name}"))
