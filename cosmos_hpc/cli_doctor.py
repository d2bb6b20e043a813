"""The verb that looks before anything is sent; `cli` puts it into the command."""

from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_hpc.cli_options import JobFile, Json, Overrides, print_json

if TYPE_CHECKING:
    from cosmos_hpc.doctor import Finding
    from cosmos_hpc.doctor.case import Case


def doctor(
    job: JobFile,
    overrides: Overrides = None,
    on_cluster: Annotated[
        bool,
        typer.Option(
            "--on-cluster", help="Then send a probe job of two nodes, for two minutes, with the job's options."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Find in a minute what would fail later: settings, cluster, folders, image, weights, data, memory. Sends nothing.

    Exit codes: 0 nothing failed, 1 something did, 2 there is no such file.
    """
    from cosmos_hpc.doctor import examine
    from cosmos_hpc.launch.follow import progress_bar
    from cosmos_hpc.tables import print_findings

    with progress_bar() as progress:
        task = progress.add_task("doctor", total=None)
        found, case = examine(
            job,
            overrides or [],
            lambda title, done, total: progress.update(task, completed=done, total=total, description=title),
        )
    if on_cluster:
        tried = _from_cluster(found, case)
        found = [finding for finding in found if finding.check not in {one.check for one in tried}] + tried
    if as_json:
        print_json([finding._asdict() for finding in found])
    else:
        print_findings(found)
    if any(finding.has_failed for finding in found):
        raise typer.Exit(1)


def _from_cluster(found: "list[Finding]", case: "Case | None") -> "list[Finding]":
    """What a probe job finds, unless what was found already would keep it from running."""
    from rich.console import Console

    from cosmos_hpc.doctor.finding import failed
    from cosmos_hpc.doctor.probe import probe

    if case is None or any(finding.has_failed for finding in found):
        return [failed("probe job", "not sent: mend the above first")]
    if not case.is_on_slurm:
        return [failed("probe job", "runs of this machine need none: name a profile with cluster=slurm/NAME.yaml")]
    console = Console(stderr=True)
    with console.status("probe job") as line:
        try:
            return probe(case, line.update)
        except KeyboardInterrupt:
            console.print("the probe job is cancelled")
            raise
