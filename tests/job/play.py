"""Supervisors in processes of their own, over doubles of the ranks that play what a test writes down."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from cosmos_hpc.config.cluster_schema import HangConfig
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.job import Supervisor

LIMIT_S = 60
SOON = HangConfig(first_limit_s=1.0, least_limit_s=0.5)
"""Limits of silence for a test that waits for one."""

Script = list[list[list[Any]]]
"""One list a rank, each of [verb, arguments...], as `double_ranks.py` plays them."""


class Play:
    """A supervisor at work in a process of its own."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.pid = os.fork()
        if self.pid == 0:
            try:
                Supervisor(folder.path)()
            except SystemExit as leave:
                os._exit(int(leave.code or 0))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(99)
            os._exit(0)

    def end(self) -> int:
        """Its exit code, once it has left."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the supervisor went on: {self.state}")

    @property
    def state(self) -> RunState:
        """As the file stands."""
        state = RunState.read(self.folder.state)
        assert state is not None
        return state

    @property
    def outcomes(self) -> list[str | None]:
        """Of all attempts."""
        return [attempt.outcome for attempt in self.state.attempts]


Start = Callable[..., Play]
