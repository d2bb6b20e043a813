"""How the loader's processes live and die: deaf to signals meant for the rank, ended by the rank alone."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Processes forked in this block start with the rank's signals blocked.

    Ctrl-C and SLURM signal the whole group of processes. A worker that died of it, or ran the handler of the rank,
    would take away the batches of the step after which the rank saves.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerStart:
    """First thing that a worker runs."""

    def __init__(self, then: Callable[[int], None]) -> None:
        """Made in the rank.

        Args:
            then: Energon's own start of a worker.
        """
        self.rank_pid = os.getpid()
        self.then = then

    def __call__(self, worker: int) -> None:
        """Ignore what is meant for the rank; end with the rank, or when it says so."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.rank_pid:  # it died before the line above
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._obey, daemon=True).start()
        self.then(worker)

    def _obey(self) -> None:
        """Leave on a SIGTERM of the rank, in whatever a decoder hangs; anybody else's has no effect."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.rank_pid:
            pass
        os._exit(0)
