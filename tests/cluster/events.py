"""What an event costs a run, measured on the tests' cluster; rows of docs/slurm-events.md."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from runs import RUN_LIMIT_S, metrics, steps_of_attempt, story
from slurm_cluster import SlurmCluster, wait_until

from cosmos_hpc.config.run_folder import RunFolder

HEADER = """\
| event | ranks | cluster | steps lost | seconds to the next step | losses bit-equal |
| --- | --- | --- | ---: | ---: | --- |"""


@dataclass
class Event:
    """One row of the table."""

    name: str
    """What happened."""

    ranks: str
    """`trainer`, or `stand-in`, which counts steps without torch."""

    flavor: str
    """Cluster."""

    folder: RunFolder
    """The run that it happened to."""

    attempt: int
    """That it ended."""

    seconds: float = 0.0
    """Until the next step was done."""

    losses_equal: bool | None = None
    """Whether the run's losses equal an unbroken run's, bit for bit; none for stand-ins, which have none."""

    @property
    def lost_steps(self) -> int:
        """Done, and done again by the next attempt."""
        cut = self.folder.cut_metrics(self.attempt + 1)
        if cut.exists():
            return len([line for line in cut.read_text().splitlines() if '"loss"' in line])
        return len(
            set(steps_of_attempt(self.folder, self.attempt)) & set(steps_of_attempt(self.folder, self.attempt + 1))
        )


class Events:
    """All rows of a session."""

    def __init__(self) -> None:
        self.rows: list[Event] = []

    @contextlib.contextmanager
    def event(self, cluster: SlurmCluster, folder: RunFolder, name: str, *, ranks: str = "trainer") -> Iterator[None]:
        """Let something happen in the block to a run that trains; then wait for the step after it."""
        attempt = folder.next_attempt() - 1
        row = Event(name, ranks, str(cluster.flavor), folder, attempt)
        began = time.monotonic()
        yield
        wait_until(
            lambda: any(steps_of_attempt(folder, later) for later in range(attempt + 1, folder.next_attempt())),
            f"a step after {name}", RUN_LIMIT_S, lambda: story(cluster, folder),
        )  # fmt: skip
        row.seconds = time.monotonic() - began
        self.rows.append(row)

    def note(self, cluster: SlurmCluster, folder: RunFolder, name: str, attempt: int = 0) -> None:
        """Take down what ended an attempt of stand-ins, whose lines in metrics.jsonl tell the time."""
        times = [[line["time"] for line in metrics(folder) if line["attempt"] == one] for one in (attempt, attempt + 1)]
        self.rows.append(Event(name, "stand-in", str(cluster.flavor), folder, attempt, times[1][0] - times[0][-1]))

    def judge(self, folder: RunFolder, losses_equal: bool) -> None:
        """Say of all events of a run whether its losses came out the same."""
        for row in self.rows:
            if row.folder == folder:
                row.losses_equal = losses_equal

    def lines(self) -> list[str]:
        """Rows of the table, below `HEADER`."""
        words = {True: "yes", False: "**no**", None: "-"}
        rows = [
            (row.name, row.ranks, row.flavor, row.lost_steps, f"{row.seconds:.0f}", words[row.losses_equal])
            for row in self.rows
        ]
        return [f"| {' | '.join(map(str, row))} |" for row in rows]
