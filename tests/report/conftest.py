"""Run folders laid where a test wants them."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_parts import WriteRun

from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, run_hash
from cosmos_hpc.config.schema import RunConfig


@pytest.fixture
def experiment(tmp_path: Path) -> ExperimentFolder:
    """An experiment without runs."""
    return ExperimentFolder(tmp_path / "runs" / "trial")


@pytest.fixture
def write_run(experiment: ExperimentFolder) -> WriteRun:
    """Lay a run folder of the experiment: its settings, and of metrics and state what is given."""

    def write(
        config: RunConfig, metrics: list[dict[str, Any]] | None = None, state: dict[str, Any] | None = None
    ) -> RunFolder:
        folder = RunFolder(experiment.path / f"{len(experiment.runs()):03d}-{run_hash(config)}")
        folder.path.mkdir(parents=True)
        folder.config.write_text(to_yaml(config))
        if metrics is not None:
            folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        if state is not None:
            folder.state.write_text(json.dumps({"pid": None, **state}))
        return folder

    return write
