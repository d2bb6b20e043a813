"""What a submission would do with runs in every state, and what it refuses, on a machine without SLURM."""

import json
from pathlib import Path

import pytest

from cosmos_hpc import api
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder, runs_folder
from cosmos_hpc.config.run_state import RunState, Status
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.placement import lay_out
from cosmos_hpc.launch.snapshot import snapshot_folder, take_snapshot
from cosmos_hpc.launch.step import step_environment


@pytest.fixture
def laid_out(quick_job: Path) -> RunFolder:
    """The run of the quick job, as a submission leaves it that was never started."""
    (placed,) = api.plan(quick_job).placed
    lay_out(placed.config, placed.folder, {"code": "first"})
    return placed.folder


def action(job: Path, **options: bool) -> str:
    (placed,) = api.plan(job, **options).placed
    return placed.action


@pytest.mark.parametrize(
    ("status", "planned", "retried"),
    [
        (Status.FINISHED, "skip: finished", "skip: finished"),
        (Status.FAILED, "skip: failed", "start"),
        (Status.CANCELLED, "start", "start"),
        (Status.RUNNING, "start", "start"),  # by a supervisor that is dead
    ],
)
def test_failed_runs_are_sent_again_only_if_that_is_asked(quick_job, laid_out, status, planned, retried):
    RunState(status).write(laid_out.state)
    assert (action(quick_job), action(quick_job, retries_failed=True)) == (planned, retried)
    laid_out.checkpoint(10).mkdir(parents=True)
    assert action(quick_job, retries_failed=True) == retried.replace("start", "resume")


def test_a_mark_without_a_job_counts_only_while_the_submission_lives(quick_job, laid_out):
    laid_out.pending_mark.touch()
    with locked(laid_out.experiment.submit_lock):
        assert action(quick_job) == "skip: pending"
        with pytest.raises(ConfigError, match="quick is being submitted at this moment"):
            api.submit(quick_job)
    assert action(quick_job) == "start"
    assert not laid_out.pending_mark.exists()


def test_runs_that_the_file_does_not_make_any_more_are_told(quick_job, laid_out):
    assert [folder.label for folder in api.plan(quick_job, ["trainer.seed=1"]).left] == [laid_out.label]
    assert api.plan(quick_job).left == []


def test_a_run_of_this_machine_does_not_start_before_what_it_comes_after(quick_job, laid_out):
    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigError) as refused:
            api.submit(quick_job, ["name=second", *overrides])
        return str(refused.value)

    assert "quick/000" in refusal("after=quick")
    assert "is unsupervised: mend it and `cosmos-hpc submit` it again" in refusal("after=quick")
    laid_out.pending_mark.write_text("1")  # a process that lives
    assert refusal("after=[quick]") == (
        "after: quick is not finished, and runs of this machine don't wait for others: submit again when "
        "`cosmos-hpc status quick --watch` has ended"
    )
    RunState(Status.FAILED).write(laid_out.state)
    laid_out.pending_mark.unlink()
    assert "is failed" in refusal("after=quick")
    RunState(Status.FINISHED).write(laid_out.state)
    assert "/none" in refusal("after=quick", "data.path=/none"), "only the dataset is left to refuse"
    assert not list(runs_folder().glob("second/*"))


def test_a_folder_that_can_not_be_written_is_told_before_anything_is_sent(quick_job):
    runs_folder().write_text("in the way")
    with pytest.raises(OSError, match="runs"):
        api.submit(quick_job)


def test_equal_code_is_kept_once_and_whole(tmp_path):
    experiment = ExperimentFolder(tmp_path / "quick")
    planned = snapshot_folder(experiment)
    assert not planned.exists()
    assert take_snapshot(experiment) == take_snapshot(experiment) == planned
    assert [folder.name for folder in experiment.code.iterdir()] == [planned.name]
    for name in ("cosmos_hpc/job/__main__.py", "jobs/quickstart.yaml", "slurm/h100.yaml", "enroot/nemo.yaml"):
        assert (planned / name).read_bytes() == (Path(__file__).parents[2] / name).read_bytes()
    assert not list(planned.rglob("__pycache__"))


def test_ranks_see_the_profiles_python_path_in_front_of_the_snapshot(quick_job, monkeypatch):
    (run,) = api.plan(quick_job, ["cluster={executor: slurm, environment: {PYTHONPATH: /mine}}"]).runs
    monkeypatch.setenv("PYTHONPATH", "/runs/quick/code/0123abcd:/users")
    assert step_environment(run.config, "node1", 1)["PYTHONPATH"] == "/mine:/runs/quick/code/0123abcd:/users"
    monkeypatch.delenv("PYTHONPATH")
    assert step_environment(run.config, "node1", 1)["PYTHONPATH"] == "/mine"


def test_provenance_of_each_start_is_kept(quick_job, laid_out):
    (placed,) = api.plan(quick_job).placed
    lay_out(placed.config, laid_out, {"code": "later"})
    assert json.loads(laid_out.provenance.read_text()) == [{"code": "first"}, {"code": "later"}]
