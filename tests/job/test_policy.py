"""What follows an attempt: budgets and back-off, worked out by hand."""

import pytest

from cosmos_hpc.config.cluster_schema import RestartConfig
from cosmos_hpc.config.run_state import AttemptRecord, Ending
from cosmos_hpc.job.policy import BAD_NODE, MENDS, Action, what_follows

HEALTHY = [ending for ending in Ending if ending.is_fault and ending not in (Ending.USER_ERROR, Ending.NON_FINITE)]


def record(ending: Ending, step: int = 0, saved_step: int = 0, job_id: str = "7") -> AttemptRecord:
    return AttemptRecord(
        0, 0.0, "node1", job_id, 1.0, ending, step, "what and where", "its line", saved_step=saved_step
    )


def faults(ending: Ending, count: int) -> list[AttemptRecord]:
    return [record(ending, step=step) for step in range(count)]


@pytest.mark.parametrize("ending", HEALTHY)
def test_each_fault_has_a_budget_of_its_own_and_a_mend(ending: Ending) -> None:
    budget = getattr(RestartConfig(), ending)
    others = [record(other, step=100) for other in HEALTHY if other is not ending]
    within = what_follows(others + faults(ending, budget), RestartConfig(), is_slurm=False)
    assert within.action is Action.RESTART
    beyond = what_follows(others + faults(ending, budget + 1), RestartConfig(), is_slurm=False)
    assert beyond.action is Action.STOP
    assert f"cluster.restarts.{ending}" in beyond.diagnosis
    assert beyond.diagnosis.endswith(MENDS[ending])


@pytest.mark.parametrize("ending", [Ending.USER_ERROR, Ending.NON_FINITE])
def test_what_would_come_again_stops_at_once(ending: Ending) -> None:
    assert what_follows([record(ending)], RestartConfig(), is_slurm=True).action is Action.STOP


def test_the_back_off_doubles_with_each_fault_up_to_its_ceiling_and_starts_anew_after_progress() -> None:
    restarts = RestartConfig(killed=99, backoff_s=5.0)
    delays = [what_follows(faults(Ending.KILLED, count), restarts, is_slurm=False).delay_s for count in range(1, 10)]
    assert delays == [5, 10, 20, 40, 80, 160, 320, 320, 320]
    moved_on = [*faults(Ending.KILLED, 4), record(Ending.KILLED, step=9, saved_step=8)]
    assert what_follows(moved_on, restarts, is_slurm=False).delay_s == 5


@pytest.mark.parametrize("ending", HEALTHY)
def test_only_a_bad_node_gives_the_allocation_back(ending: Ending) -> None:
    expected = Action.REQUEUE if ending in BAD_NODE else Action.RESTART
    assert what_follows([record(ending)], RestartConfig(), is_slurm=True).action is expected
    assert what_follows([record(ending)], RestartConfig(), is_slurm=False).action is Action.RESTART


@pytest.mark.parametrize("ending", [Ending.PREEMPTED, Ending.TIME_LIMIT])
def test_an_agreed_end_goes_back_to_the_queue_or_on_at_once(ending: Ending) -> None:
    assert what_follows([record(ending)], RestartConfig(), is_slurm=True).action is Action.REQUEUE
    here = what_follows([record(ending)], RestartConfig(), is_slurm=False)
    assert (here.action, here.delay_s) == (Action.RESTART, 0.0)


def test_a_run_that_a_person_sends_again_has_its_budget_back() -> None:
    spent = [record(Ending.KILLED, step=step, job_id="7") for step in range(4)]
    assert what_follows(spent, RestartConfig(), is_slurm=False).action is Action.STOP
    again = [*spent, record(Ending.KILLED, step=9, job_id="8")]
    assert what_follows(again, RestartConfig(), is_slurm=False).action is Action.RESTART
