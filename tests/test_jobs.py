"""Every example in jobs/ can be planned as it is."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
JOBS = sorted(ROOT.glob("jobs/*.yaml"))
NODES = {"cv8x8x8_four_nodes": 32, "cv8x8x8_one_gpu": 1, "quickstart": 2}
"""Ranks, where they are not 8."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what `fetch` brings, by its names alone: to plan reads no weights."""
    root = tmp_path_factory.mktemp("hub")
    for repository, files in {
        "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8": ("autoencoder.jit", "encoder.jit", "decoder.jit"),
        "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16": ("autoencoder.jit", "encoder.jit", "decoder.jit"),
        "timm/vgg16.tv_in1k": ("model.safetensors",),
    }.items():
        folder = root / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        for file in files:
            (folder / "snapshots" / ("0" * 40) / file).write_bytes(b"")
    return root


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_example_can_be_planned_as_it_is(job: Path, hub: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_hpc.cli", "plan", str(job), "--json"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    written = yaml.safe_load(job.read_text())
    sizes = [len(values) for values in written.get("sweep", {}).get("grid", {}).values()]
    assert len(runs) == math.prod(sizes)
    assert {run["ranks"] for run in runs} == {NODES.get(job.stem, 8)}
    assert {run["cluster"] for run in runs} == {"local" if written["cluster"] == "local" else "slurm"}
    assert {run["run"].partition("/")[0] for run in runs} == {written["name"]} == {job.stem}


def test_there_is_an_example_for_each_thing_that_teams_start_from() -> None:
    assert {job.stem for job in JOBS} >= {
        "cv8x8x8_guide",
        "dv8x16x16_guide",
        "cv8x8x8_decoder",
        "cv8x8x8_adversarial",
        "cv8x8x8_720p",
        "cv8x8x8_long_clips",
        "cv8x8x8_sweep",
        "cv8x8x8_one_gpu",
        "cv8x8x8_one_node",
        "cv8x8x8_four_nodes",
    }


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_example_opens_with_the_command_that_runs_it(job: Path) -> None:
    first = job.read_text().splitlines()[0]
    assert first.startswith(f"# cosmos-hpc submit jobs/{job.name}") or job.stem == "quickstart"
