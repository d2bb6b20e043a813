"""Run folders whose ranks are doubles."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from play import Play, Script, Start

import cosmos_hpc.job.attempt as attempt_module
import cosmos_hpc.job.hang as hang_module
from cosmos_hpc.config.cluster_schema import ClusterConfig, RestartConfig
from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.schema import RunConfig, TrainerConfig
from cosmos_hpc.launch.step import start_step


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of the run whose ranks are doubles."""
    run = RunFolder(tmp_path / "runs" / "doubles" / "000-0123abcd")
    run.path.mkdir(parents=True)
    run.experiment.max_parallel.write_text("1")
    return run


@pytest.fixture
def start(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a supervisor over doubles.

    Takes one script for each attempt, changes of the cluster's settings, and what starts the first attempt in place of
    the double; a second call goes on in the same folder.
    """
    monkeypatch.setattr(attempt_module, "LISTEN_S", 0.05)
    monkeypatch.setattr(hang_module, "QUIET_S", 0.3)
    monkeypatch.setattr(hang_module, "STACKS_S", 3.0)
    monkeypatch.delenv("SUBMITIT_LOCAL_JOB_ID", raising=False)

    def begin(*scripts: Script, first_launcher: Callable[..., Any] | None = None, **cluster: Any) -> Play:
        restarts = RestartConfig(**{"backoff_s": 0.05, **cluster.pop("restarts", {})})
        config = RunConfig(
            data=DataConfig(global_batch_size=len(scripts[0])),
            trainer=TrainerConfig(devices=len(scripts[0])),
            cluster=ClusterConfig(restarts=restarts, **{"health_check_s": 0.0, **cluster}),
        )
        folder.config.write_text(to_yaml(config))
        double = Path(__file__).with_name("double_ranks.py")

        def start_doubles(command: list[str], environment: dict[str, str], output: Any) -> Any:
            if first_launcher is not None and command[-1] == "0":
                return first_launcher(command, environment, output)
            run_folder = command[command.index("--run-folder") + 1]
            played = [sys.executable, "-S", str(double), run_folder, command[-1], json.dumps(scripts)]
            return start_step(played, environment, output)

        monkeypatch.setattr(attempt_module, "start_step", start_doubles)
        return Play(folder)

    return begin
