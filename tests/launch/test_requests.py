"""What a person asks of a run by a file in its folder."""

from pathlib import Path

import pytest

from cosmos_hpc.config.load import to_yaml
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, RunState, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.requests import checkpoint_now, requeue, wait_for_save


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "trial" / "000-0123abcd")
    run.path.mkdir(parents=True)
    run.config.write_text(to_yaml(RunConfig()))
    return run


def write_state(folder: RunFolder, status: Status) -> None:
    record = AttemptRecord(attempt=0, started=1.0, host="here", job_id="7")
    RunState(status, 1, [record]).write(folder.state)


def test_a_living_run_is_asked_and_one_that_is_over_is_not(folder: RunFolder) -> None:
    write_state(folder, Status.RUNNING)
    with locked(folder.supervisor_lock):
        assert checkpoint_now(folder) == "asked to save after its next step"
        assert requeue(folder) == "asked to save and to start again"
    assert folder.save_request.exists()
    assert folder.requeue_request.exists()
    for request in (folder.save_request, folder.requeue_request):
        request.unlink()
    write_state(folder, Status.FINISHED)
    assert (checkpoint_now(folder), requeue(folder)) == ("not running", "not running")
    assert not folder.save_request.exists()
    assert not folder.requeue_request.exists()


def test_who_waits_learns_where_the_checkpoint_lies_or_that_none_came(folder: RunFolder) -> None:
    write_state(folder, Status.RUNNING)
    with locked(folder.supervisor_lock):
        assert wait_for_save(folder, before=0).startswith("nothing newer than step 0 was saved")
        folder.checkpoint(12).mkdir(parents=True)
        assert wait_for_save(folder, before=0) == f"saved in {folder.checkpoint(12)}"
    write_state(folder, Status.FAILED)
    folder.save_request.touch()
    assert wait_for_save(folder, before=12) == "failed before it could save"
