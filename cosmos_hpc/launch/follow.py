"""Waiting for runs with a bar for each; Ctrl-C asks them to save and stop."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.launch.status import RunStatus, cancel, run_status, run_statuses

POLL_S = 0.5

QUEUE_POLL_S = 5.0
"""The controller serves everybody."""


def progress_bar() -> Progress:
    """The bar of every long command; silent where standard error is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def follow(
    folders: Sequence[RunFolder], again: str, on_status: Callable[[RunFolder, RunStatus], None] = lambda *_: None
) -> list[RunStatus]:
    """Wait until all runs are over.

    Args:
        folders: the runs.
        again: command that goes on after a stop, for the message.
        on_status: called with each run's status at each look.

    Returns:
        The runs that did not finish.
    """
    try:
        return [status for status in _watch(folders, on_status) if status.status != "finished"]
    except KeyboardInterrupt:
        print("stopping: the runs save first", flush=True)
        for folder in folders:
            if not run_status(folder).is_over:
                cancel(folder)
        for status in _watch(folders, on_status):
            print(f"{status.run}: {status.status}, {_saved(folders, status)}")
        print(f"go on with: {again}", flush=True)
        raise


def _numbers(status: RunStatus) -> str:
    """What the bar says of the last step."""
    told = [
        "" if status.loss is None else f"loss {status.loss:.4f}",
        "" if status.clips_per_s is None else f"{status.clips_per_s:.2f} clips/s",
        "" if status.data_wait is None else f"data wait {status.data_wait:.0%}",
        "" if status.memory_gib is None else f"{status.memory_gib:.1f} GiB",
    ]
    return "".join(f", {each}" for each in told if each)


def _saved(folders: Sequence[RunFolder], status: RunStatus) -> str:
    newest = next(folder.newest_checkpoint() for folder in folders if folder.label == status.run)
    return "nothing was to be saved yet" if newest is None else f"saved in {newest}"


def _watch(folders: Sequence[RunFolder], on_status: Callable[[RunFolder, RunStatus], None]) -> list[RunStatus]:
    with progress_bar() as progress:
        tasks = [progress.add_task(folder.label, total=None) for folder in folders]
        while True:
            found = run_statuses(folders)
            for folder, task, status in zip(folders, tasks, found, strict=True):
                what = f"{folder.label} {status.status}{_numbers(status)}"
                progress.update(task, completed=status.step, total=status.max_steps, description=what)
                on_status(folder, status)
            if all(status.is_over for status in found):
                return found
            time.sleep(QUEUE_POLL_S if any(status.job for status in found) else POLL_S)
