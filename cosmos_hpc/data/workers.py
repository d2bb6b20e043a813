"""How the loader's processes live and die: deaf to signals meant for the rank, ended by the rank alone."""

import ctypes
import gc
import os
import signal
import threading
from multiprocessing.context import ForkContext, ForkProcess

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGE_BYTES = 128 * 1024

SIGNALS_TO_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C and SLURM send them to the whole group of processes."""


def give_memory_back() -> None:
    """Let frames go back to the system when they are freed: 220 MiB flat, not 270 to 350 in holes."""
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(threshold, LARGE_BYTES)


class WorkerProcess(ForkProcess):
    """A forked process that only its rank can end.

    Ctrl-C and SLURM signal the whole group of processes. A worker that died of it, or ran the handler that it
    inherits, would take away the clips of the step after which the rank saves.
    """

    def start(self) -> None:
        """Fork with the signals blocked, so that none hits the worker before `run`, and with the heap frozen.

        Energon's start of a worker looks at each object that the collector knows, and collects: 0.4 CPU seconds over
        the rank's heap, which would be copied as well.
        """
        self.rank_pid = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_TO_THE_RANK)
        gc.freeze()
        try:
            super().start()
        finally:
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """In the worker: end with the rank, ignore what is meant for it, then work."""
        gc.disable()  # Energon collects every tenth batch; at the end, the rank's heap is unfrozen and must stay whole
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.rank_pid:  # it died before the line above
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        give_memory_back()
        threading.Thread(target=self._obey, daemon=True).start()
        super().run()

    def _obey(self) -> None:
        """Leave on the rank's SIGTERM, whatever a decoder hangs in; anybody else's has no effect."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.rank_pid:
            pass
        os._exit(0)


class WorkerContext(ForkContext):
    """What torch starts a loader's processes through."""

    Process = WorkerProcess
