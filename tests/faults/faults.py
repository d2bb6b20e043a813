"""Everything that may happen to a run, and how each is done to it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from forked_run import start_supervisor
from planned_death import POINTS

from cosmos_hpc.config.run_folder import RunFolder, read_json
from cosmos_hpc.config.run_state import Ending, RunState, Status
from cosmos_hpc.launch.local import children, is_alive

LIMIT_S = 300.0


class Victim:
    """A run on a small file system of its own, its supervisor, and what may be done to them."""

    def __init__(self, folder: RunFolder, disk: Path, generator: random.Random) -> None:
        """Start it.

        Args:
            folder: laid out by `submit`'s own function.
            disk: mount point that holds it.
            generator: chooses steps, ranks and files.
        """
        self.folder = folder
        self.disk = disk
        self.random = generator
        self.plan = disk.parent / "plan.json"
        self.num_submits = 0
        self.spoilt: list[str] = []
        self.submit()

    def submit(self) -> None:
        """Start a supervisor, as a person would who finds the run dead."""
        self.supervisor: BaseProcess = start_supervisor(self.folder.path, self.plan)
        self.num_submits += 1

    @property
    def step(self) -> int:
        """Of the last whole line of metrics.jsonl."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = self.folder.metrics.read_bytes().rpartition(b"\n")[0].splitlines()
            return int(json.loads(lines[-1])["step"])
        return 0

    @property
    def attempt(self) -> int:
        """Number of the newest attempt."""
        return self.folder.next_attempt() - 1

    @property
    def status(self) -> Status | None:
        """As the supervisor says."""
        state = RunState.read(self.folder.state)
        return None if state is None else state.status

    @property
    def said(self) -> str:
        """All that the supervisors said so far."""
        return self.plan.with_suffix(".log").read_text()

    def ending(self, attempt: int) -> Ending | None:
        """How an attempt ended, as the supervisor says."""
        state = RunState.read(self.folder.state)
        assert state is not None
        return next(record.outcome for record in state.attempts if record.attempt == attempt)

    def ranks(self) -> list[int]:
        """Processes of the ranks, by rank."""
        return [rank for launcher in children(self.supervisor.pid or 0) for rank in children(launcher)]

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Fail if it does not happen, with what the run says."""
        deadline = time.monotonic() + LIMIT_S
        while not happened():
            if time.monotonic() > deadline:
                logs = sorted(self.folder.path.glob("logs/*/*.log"))[-3:]
                tails = "\n".join(f"{log}:\n{log.read_text()[-1500:]}" for log in logs)
                raise AssertionError(f"never came: {what}; {self.status}\n{self.said[-1500:]}\n{tails}")
            time.sleep(0.01)

    def wait_for_steps(self, count: int) -> int:
        """Until so many more steps are done in a living attempt; that attempt's number."""
        attempt = self.attempt
        beat = read_json(self.folder.heartbeat)
        assert beat or not self.folder.heartbeat.exists()
        first = self.step

        def done() -> bool:
            return self.step >= first + count or self.status is Status.FINISHED

        self.wait_until(done, f"{count} more steps after {first}")
        return max(attempt, self.attempt)

    def wait_for_recovery(self, attempt: int) -> None:
        """Until a later attempt trains."""

        def trains() -> bool:
            if not self.supervisor.is_alive() and self.status is not Status.FINISHED:
                return False
            beat = _beat(self.folder)
            return beat.get("attempt", -1) > attempt and beat.get("phase") in ("train", "validate", "save", "leave")

        self.wait_until(trains, f"an attempt after {attempt} that trains")

    def kill_all(self) -> None:
        """Supervisor and ranks at once, as a node that loses power."""
        self.supervisor.kill()
        self.supervisor.join()


def _beat(folder: RunFolder) -> dict[str, object]:
    with contextlib.suppress(ValueError, OSError):
        return read_json(folder.heartbeat)
    return {}


def sigterm(victim: Victim) -> None:
    """Preemption, told again and again, before, during and after the save."""
    ranks = victim.ranks()
    os.kill(victim.supervisor.pid, signal.SIGTERM)
    while any(is_alive(rank) for rank in ranks):
        time.sleep(0.05)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)


def sigusr2(victim: Victim) -> None:
    """The time limit is near."""
    os.kill(victim.supervisor.pid, signal.SIGUSR2)


def run_out_of_grace(victim: Victim) -> None:
    """Preemption, and a kill before the save that it asked for is whole."""
    point = victim.random.choice(("write", "before rename"))
    victim.plan.write_text(json.dumps({"rank": 0, "at": point}))
    os.kill(victim.supervisor.pid, signal.SIGTERM)
    victim.wait_until(lambda: not victim.plan.exists(), f"death at {point}")


def kill_one_rank(victim: Victim) -> None:
    """One rank dies; the launcher ends the other with SIGTERM."""
    os.kill(victim.random.choice(victim.ranks()), signal.SIGKILL)


def kill_all_ranks(victim: Victim) -> None:
    """All ranks die at once."""
    for rank in victim.ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def kill_the_supervisor(victim: Victim) -> None:
    """The next `submit` heals it."""
    victim.kill_all()
    victim.submit()


def freeze_one_rank(victim: Victim) -> None:
    """A rank stops computing without dying: a hang."""
    os.kill(victim.random.choice(victim.ranks()), signal.SIGSTOP)


def kill_at_a_point(point: str) -> Callable[[Victim], None]:
    """A rank dies at a certain line."""

    def kill(victim: Victim) -> None:
        rank = 0 if "rename" in point or point == "pruning" else victim.random.randrange(2)
        victim.plan.write_text(json.dumps({"rank": rank, "at": point}))
        if point == "start-up":
            kill_one_rank(victim)  # a start is needed to die in it
        victim.wait_until(lambda: not victim.plan.exists(), f"death at {point}")

    kill.__name__ = f"kill_at_{point.replace(' ', '_').replace('-', '_')}"
    return kill


def fill_the_disk(victim: Victim) -> None:
    """To the last byte, and again where the run makes room, until the supervisor says so; then there is room again."""
    ballast, told = victim.disk / "ballast", victim.said.count("disk full")

    def is_noticed() -> bool:
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while victim.ranks():
                file.write(bytes(2**20))
        return victim.said.count("disk full") > told

    victim.wait_until(is_noticed, "an end by the full disk")
    ballast.unlink()


def spoil_the_newest_checkpoint(victim: Victim) -> None:
    """A bit flips in a file, or it is cut short, while nothing runs: each file's turn comes for both."""
    victim.wait_until(lambda: len(_checkpoints(victim)) > 1, "two checkpoints")
    victim.kill_all()
    newest = _checkpoints(victim)[-1]
    files = sorted(newest.iterdir())
    turn, is_cut = divmod(len(victim.spoilt), 2)
    file = files[turn % len(files)]
    content = bytearray(file.read_bytes())
    if is_cut:
        del content[len(content) // 2 :]
    else:
        content[victim.random.randrange(len(content))] ^= 1 << victim.random.randrange(8)
    file.write_bytes(content)
    victim.spoilt.append(f"{newest.name}/{file.name}")
    victim.submit()
    victim.wait_until(lambda: any(victim.folder.checkpoints.glob(f"{newest.name}.bad*")), "the damage is noticed")
    for aside in victim.folder.checkpoints.glob("*.bad*"):
        shutil.rmtree(aside)  # a person's work; the small disk has no room for all


def _checkpoints(victim: Victim) -> list[Path]:
    return sorted(victim.folder.checkpoints.glob("step_????????"))


def make_the_folder_read_only(victim: Victim) -> None:
    """No checkpoint can be written for a while; training goes on."""
    folder, log = victim.folder.checkpoints, victim.folder.rank_log(victim.attempt, 0)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        words = "Read-only file system"
        victim.wait_until(lambda: words in log.read_text() or victim.status is Status.FINISHED, "a save that fails")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def make_the_clock_jump(victim: Victim) -> None:
    """From the next start on, the ranks' wall clock is a day behind."""
    victim.plan.with_name("clock").write_text("-86400")
    kill_one_rank(victim)


@dataclass(frozen=True)
class Fault:
    """One kind of misfortune."""

    strike: Callable[[Victim], None]
    ending: Ending | None
    """How the supervisor has to class the end of the attempt, after which the next one follows; none: it goes on."""

    @property
    def name(self) -> str:
        """For the table."""
        return self.strike.__name__.replace("_", " ")


CLASSES = [
    [Fault(sigterm, Ending.PREEMPTED), Fault(run_out_of_grace, Ending.KILLED)],
    [Fault(sigusr2, Ending.TIME_LIMIT)],
    [Fault(kill_one_rank, Ending.KILLED), Fault(kill_all_ranks, Ending.KILLED)],
    [Fault(kill_the_supervisor, Ending.SUPERVISOR_KILLED)],
    [Fault(freeze_one_rank, Ending.HANG)],
    [Fault(kill_at_a_point(point), Ending.KILLED) for point in POINTS],
    [Fault(fill_the_disk, Ending.DISK_FULL)],
    [Fault(spoil_the_newest_checkpoint, Ending.SUPERVISOR_KILLED)],
]
"""Of each class one in the shortest run; a longer one goes through them again and again."""

ONCE = [Fault(make_the_folder_read_only, None), Fault(make_the_clock_jump, Ending.KILLED)]
"""Rare and slow: once each in a longer run."""


def choose(count: int, generator: random.Random) -> Iterator[Fault]:
    """So many faults, of all classes in turn, each class's kinds in turn, in a shuffled order."""
    chosen = [ONCE[index] for index in range(len(ONCE)) if count > len(CLASSES)]
    turns = [0] * len(CLASSES)
    while len(chosen) < count:
        index = (len(chosen)) % len(CLASSES)
        chosen.append(CLASSES[index][turns[index] % len(CLASSES[index])])
        turns[index] += 1
    generator.shuffle(chosen)
    yield from chosen


@contextlib.contextmanager
def small_disk(mount_point: Path, size_mib: int) -> Iterator[Path]:
    """A file system of a few MiB in memory; needs root."""
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", mount_point], check=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", mount_point], check=True)
