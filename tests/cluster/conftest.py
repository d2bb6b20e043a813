"""The fixture `slurm_cluster`: a real SLURM for the whole session, with an empty queue before each test."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from events import HEADER, Events
from slurm_cluster import Flavor, SlurmCluster, running, what_is_missing

REQUIRED = "COSMOS_HPC_REQUIRES_CLUSTER"
"""Set where a cluster that can't be started is a failure rather than a reason to skip."""


TABLE = pytest.StashKey[list[str]]()
"""Rows of the table of events."""


@pytest.fixture(scope="session")
def cluster_of() -> Iterator[Callable[[Flavor], SlurmCluster]]:
    """The cluster of a flavor, which is started when it is first asked for and lives until the session's end."""
    living: dict[Flavor, SlurmCluster] = {}
    with ExitStack() as stack:

        def started(flavor: Flavor) -> SlurmCluster:
            if flavor not in living:
                living[flavor] = stack.enter_context(running(flavor))
            return living[flavor]

        yield started


@pytest.fixture(scope="session")
def events(request: pytest.FixtureRequest) -> Iterator[Events]:
    """Rows of the table of events, which is printed at the end of the session."""
    rows = Events()
    yield rows
    config = request.config
    if hasattr(config, "workeroutput"):  # one of the processes among which pytest-xdist shares the tests
        config.workeroutput["events"] = rows.lines()
    else:
        config.stash[TABLE] = rows.lines()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the rows of a worker of pytest-xdist that is through."""
    lines = node.config.stash.setdefault(TABLE, [])
    lines += getattr(node, "workeroutput", {}).get("events", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    if config.stash.get(TABLE, []):
        terminalreporter.write_line("\n".join(["", HEADER, *config.stash[TABLE]]))


@pytest.fixture
def slurm_cluster(
    request: pytest.FixtureRequest, cluster_of: Callable[[Flavor], SlurmCluster], monkeypatch: pytest.MonkeyPatch
) -> SlurmCluster:
    """A calm cluster that the test's SLURM commands go to; of another flavor by indirect parametrization."""
    flavor = getattr(request, "param", Flavor())
    reason = what_is_missing(flavor)
    if reason is not None and REQUIRED in os.environ:
        pytest.fail(f"{REQUIRED} is set, but {reason}")
    if reason is not None:
        pytest.skip(reason)
    cluster = cluster_of(flavor)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    cluster.calm()
    return cluster
