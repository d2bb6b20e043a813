"""The verbs that plan and send; `cli` puts them into the command."""

import shlex
import sys
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_hpc.cli_options import JobFile, Json, Overrides, print_json

if TYPE_CHECKING:
    from cosmos_hpc.config.run_folder import RunFolder
    from cosmos_hpc.launch.submit import Submission

SHOWN = 10
"""Runs that are named one by one."""


class Retry(StrEnum):
    """Runs that are sent although they are over."""

    FAILED = "failed"


RetryOption = Annotated[Retry | None, typer.Option("--retry", help="failed: send failed runs again.")]


def plan(
    job: JobFile,
    overrides: Overrides = None,
    script: Annotated[bool, typer.Option("--script", help="Print what sbatch would be given.")] = False,
    retry: RetryOption = None,
    as_json: Json = False,
) -> None:
    """Show the runs of an experiment file, what they will take, and what `submit` would do. Sends nothing."""
    from cosmos_hpc import api
    from cosmos_hpc.tables import plan_rows, print_batches, print_plan

    planned = api.plan(job, overrides or [], retries_failed=retry is not None)
    if script:
        print_batches(planned.batches())
        return
    forecasts, warnings = planned.forecasts(), planned.warnings()
    if as_json:
        rows = plan_rows(planned.runs, planned.placed, forecasts)
        print_json([{**row, "warnings": lines} for row, lines in zip(rows, warnings, strict=True)])
        return
    print_plan(planned.runs, planned.placed, forecasts)
    for warning in dict.fromkeys(line for lines in warnings for line in lines):
        print(f"warning: {warning}", file=sys.stderr)
    _tell_of_left([folder.label for folder in planned.left])


def submit(
    job: JobFile,
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay and show progress; Ctrl-C stops the runs, saved.")] = False,
    retry: RetryOption = None,
    prune: Annotated[bool, typer.Option("--prune", help="Cancel runs that the file does not make any more.")] = False,
    no_doctor: Annotated[bool, typer.Option("--no-doctor", help="Leave out the quick part of `doctor`.")] = False,
    as_json: Json = False,
) -> None:
    """Send what is missing of an experiment: finished, failed and running runs are left alone, broken ones go on.

    What `after` names in the file has to be finished first: jobs wait for it in the queue, runs of this machine are
    refused until it is.
    """
    from cosmos_hpc import api

    sent = api.submit(
        job,
        overrides or [],
        retries_failed=retry is not None,
        prunes=prune,
        examines=not no_doctor,
        on_warning=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    if as_json:
        print_json({
            "sent": sent.jobs,
            "skipped": [run.folder.label for run in sent.placed if not run.is_sent],
            "pruned": {folder.label: what for folder, what in sent.pruned.items()},
        })  # fmt: skip
    else:
        _tell(sent)
    if wait:
        _wait([run.folder for run in sent.placed], shlex.join(["cosmos-hpc", "submit", str(job), *(overrides or [])]))


def _tell(sent: "Submission") -> None:
    """What was done with how many runs, and what the user may want to know of the others."""
    for label, job in list(sent.jobs.items())[:SHOWN]:
        print(f"{label}: job {job}")
    if len(sent.jobs) > SHOWN:
        print(f"... and {len(sent.jobs) - SHOWN} more")
    skipped = Counter(run.action.removeprefix("skip: ") for run in sent.placed if not run.is_sent)
    others = "".join(f", {count} {action}" for action, count in skipped.items())
    name = sent.experiment.name
    print(f"sent {len(sent.jobs)} of {len(sent.placed)} runs{others}; see: cosmos-hpc status {name}")
    if skipped["failed"]:
        print(f"why they failed: cosmos-hpc status {name}; once that is mended, send them with --retry failed")
    for folder, what in sent.pruned.items():
        print(f"{folder.label} left the sweep: {what}")
    if not sent.pruned:
        _tell_of_left([folder.label for folder in sent.left])


def _tell_of_left(labels: list[str]) -> None:
    if labels:
        shown = ", ".join(labels[:SHOWN]) + (" ..." if len(labels) > SHOWN else "")
        print(f"{len(labels)} runs are no part of this sweep (any more): {shown}; submit --prune cancels what lives")


def _wait(folders: "list[RunFolder]", again: str) -> None:
    from cosmos_hpc.launch.follow import follow
    from cosmos_hpc.launch.status import run_statuses
    from cosmos_hpc.tables import print_status

    failed = follow(folders, again)
    print_status(run_statuses(folders))
    if failed:
        raise typer.Exit(1)
