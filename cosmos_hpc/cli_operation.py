"""The commands for runs that were sent: how they stand, what they print, what may be asked of them, why they ended."""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_hpc.cli_options import Json, print_json

if TYPE_CHECKING:
    from cosmos_hpc.config.run_folder import RunFolder

WATCH_S = 5.0
"""Between two looks; the controller serves everybody."""

RunName = Annotated[str, typer.Argument(help="Experiment, EXPERIMENT/RUN (a beginning is enough), or a run's folder.")]


def status(
    experiment: Annotated[str | None, typer.Argument(help="Experiment or run; all experiments if left out.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it anew until all runs are over, or Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how runs stand: SLURM's state, step, loss, speed, goodput, attempts and their causes, nodes, time left."""
    from cosmos_hpc.launch.status import run_statuses
    from cosmos_hpc.tables import print_status

    while True:
        rows = run_statuses(_runs(experiment))
        if watch and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # from the top of an empty screen
        if as_json:
            print_json([dataclasses.asdict(row) for row in rows])
        else:
            print_status(rows)
        sys.stdout.flush()
        if not watch or all(row.is_over for row in rows):
            return
        time.sleep(WATCH_S)


def cancel(run: RunName) -> None:
    """Stop the runs of an experiment; they save first, and `submit` goes on from there."""
    from cosmos_hpc.launch.status import cancel_all

    for folder, said in cancel_all(_runs(run)).items():
        print(f"{folder.label}: {said}")


def requeue(run: RunName) -> None:
    """Have runs save and start again: through the queue on SLURM, at once on a local machine."""
    from cosmos_hpc.launch.requests import requeue as requeue_run

    for folder in _runs(run):
        print(f"{folder.label}: {requeue_run(folder)}")


def checkpoint_now(
    run: RunName,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the checkpoints are there.")] = False,
) -> None:
    """Have runs save after their next step, and go on."""
    from cosmos_hpc.launch.requests import checkpoint_now as ask
    from cosmos_hpc.launch.requests import wait_for_save

    folders = _runs(run)
    before = {folder: folder.newest_step() for folder in folders}
    for folder in folders:
        print(f"{folder.label}: {ask(folder)}", flush=True)
    for folder in folders if wait else []:
        print(f"{folder.label}: {wait_for_save(folder, before[folder])}", flush=True)


def logs(
    run: RunName,
    rank: Annotated[int, typer.Option(help="Rank whose log is shown.")] = 0,
    attempt: Annotated[int | None, typer.Option(help="Attempt, from 0; the newest if left out.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing until the run is over, or Ctrl-C.")
    ] = False,
) -> None:
    """Print a rank's log."""
    from cosmos_hpc.launch.logs import read_log

    for text in read_log(_one_run(run), rank, attempt, follow=follow):
        print(text, end="", flush=True)


def explain(run: RunName, as_json: Json = False) -> None:
    """Tell why each attempt of a run ended, what was done about it and what it cost, or why it is pending."""
    from cosmos_hpc.launch.explain import explain as explain_run
    from cosmos_hpc.launch.explain import page

    found = explain_run(_one_run(run))
    print_json(dataclasses.asdict(found)) if as_json else print(page(found))


def _one_run(name: str) -> "RunFolder":
    from cosmos_hpc.api import one_run

    return one_run(name)


def _runs(name: str | None) -> "list[RunFolder]":
    from cosmos_hpc.api import runs

    return runs(name)
