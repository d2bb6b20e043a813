"""A prepared dataset, and run folders laid where a test wants them."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_parts import WriteRun, film

from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, run_hash
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import write_mp4


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training and four validation videos, packed and indexed."""
    root = tmp_path_factory.mktemp("dataset")
    for split, colours in (("train", (0, 40, 80)), ("val", (120, 160, 200, 240))):
        videos = root / "videos" / split
        videos.mkdir(parents=True)
        for colour in colours:
            write_mp4(videos / f"{colour:03d}.mp4", film(colour), fps=10)
        pack([videos], root / "shards" / split)
    prepare(root / "shards", num_workers=1)
    return root / "shards"


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
            folder.state.write_text(json.dumps(state))
        return folder

    return write
