"""The commands for runs that were sent, as a shell sees them: what is drawn anew, exit codes, Ctrl-C."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos_hpc import api
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, Ending, RunState, Status
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.placement import lay_out

LIMIT_S = 60
CLEAR = "\x1b[H\x1b[2J"


@pytest.fixture
def running(quick_job: Path) -> Iterator[RunFolder]:
    """The quick job's run while a supervisor of it seems to live."""
    (placed,) = api.plan(quick_job).placed
    lay_out(placed.config, placed.folder, {"code": "first"})
    RunState(Status.RUNNING, attempts=[AttemptRecord(0, 1.0, "node1", "")]).write(placed.folder.state)
    with locked(placed.folder.supervisor_lock):
        yield placed.folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cosmos_hpc.cli", *arguments]


class Terminal:
    """A command whose output is one."""

    def __init__(self, *arguments: str) -> None:
        self._screen, side = pty.openpty()
        wide = {**os.environ, "COLUMNS": "160"}
        self.process = subprocess.Popen(command(*arguments), stdout=side, stderr=side, env=wide)
        os.close(side)
        self.seen = ""

    def read_until(self, words: str) -> None:
        """Wait for words that it has not shown before."""
        start, deadline = len(self.seen), time.monotonic() + LIMIT_S
        while words not in self.seen[start:]:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._screen], [], [], 1.0)[0]:
                self.seen += os.read(self._screen, 4096).decode()

    def end(self) -> int:
        code = self.process.wait(LIMIT_S)
        os.close(self._screen)
        return code


def test_a_watched_status_is_drawn_anew_until_the_run_is_over(running):
    terminal = Terminal("status", "quick", "--watch")
    terminal.read_until("running")
    RunState(Status.FINISHED).write(running.state)
    terminal.read_until("finished")
    assert terminal.end() == 0
    assert [("running" in screen, "finished" in screen) for screen in terminal.seen.split(CLEAR)[1:]] in (
        [(True, False), (False, True)],
        [(True, False), (True, False), (False, True)],
    )


def test_ctrl_c_ends_a_watched_status_and_a_followed_log_with_130_and_the_run_goes_on(running):
    watching = Terminal("status", "quick", "--watch")
    watching.read_until("running")
    log = running.rank_log(0, 0)
    log.parent.mkdir(parents=True)
    log.write_text("resumed at step 0\n")
    following = Terminal("logs", "quick", "--follow")
    following.read_until("resumed at step 0")
    for terminal in (watching, following):
        terminal.process.send_signal(signal.SIGINT)
        assert (terminal.end(), "Traceback" in terminal.seen) == (130, False)
    assert not running.cancel_mark.exists()


def test_what_no_terminal_shows_has_no_codes_of_one(running):
    RunState(Status.FINISHED).write(running.state)
    done = subprocess.run(command("status", "quick", "--watch"), capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout


def test_waiting_for_a_run_that_does_not_finish_ends_with_1(running, quick_job):
    record = AttemptRecord(
        0, 1.0, "node1", "", ended=2.0, outcome=Ending.CODE_FAULT, message="code fault: no such layer"
    )
    RunState(Status.FAILED, attempts=[record]).write(running.state)
    running.supervisor_lock.unlink()
    done = subprocess.run(command("submit", str(quick_job), "--wait"), capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "code fault: no such layer" in done.stdout
    assert "--retry failed" in done.stdout


def test_python_has_the_same_verbs(running):
    log = running.rank_log(0, 0)
    log.parent.mkdir(parents=True)
    log.write_text("resumed at step 0\n")
    assert [row.status for row in api.status("quick")] == ["running"]
    assert "".join(api.logs("quick")) == "resumed at step 0\n"
    assert api.checkpoint_now("quick") == {running.label: "asked to save after its next step"}
    assert api.requeue("quick") == {running.label: "asked to save and to start again"}
    assert [story.record.host for story in api.explain("quick").attempts] == ["node1"]
    assert list(api.cancel("quick")) == [running.label]
    assert (running.save_request.exists(), running.requeue_request.exists(), running.cancel_mark.exists()) == (
        True,
    ) * 3
    for name in api.__all__:
        assert getattr(api, name).__doc__, name
