"""Where seconds went, worked out by hand."""

import pytest

from cosmos_hpc.config.run_state import AttemptRecord, Ending, Goodput
from cosmos_hpc.job.goodput import account, settle_lost_steps


def record(first: int, last: int, trained_s: float, **more: object) -> AttemptRecord:
    return AttemptRecord(
        attempt=0,
        started=0.0,
        host="node1",
        job_id="7",
        resumed_step=first,
        step=last,
        goodput=Goodput(allocated_s=trained_s, productive_s=trained_s),
        **{"ended": 1.0, "outcome": Ending.KILLED, "saved_step": last, **more},
    )


def lost(attempts: list[AttemptRecord]) -> list[float]:
    settle_lost_steps(attempts)
    return [attempt.goodput.lost_s for attempt in attempts]


def test_seconds_that_rank_0_does_not_tell_are_start_up_before_and_silence_after() -> None:
    told = {"start": 20.0, "train": 60.0, "data": 5.0, "validate": 3.0, "save": 2.0}
    spent = account(told, run_s=130.0, silence_s=25.0, before=Goodput(backoff_s=10.0, queue_s=500.0))
    assert spent == Goodput(
        allocated_s=140.0,
        productive_s=60.0,
        startup_s=35.0,  # 20 told, 15 for the imports before the first heartbeat
        data_s=5.0,
        validation_s=3.0,
        checkpoint_s=2.0,
        backoff_s=10.0,
        silence_s=25.0,
        queue_s=500.0,
    )
    assert spent.share == pytest.approx(60 / 140)


def test_steps_after_the_newest_checkpoint_are_lost_with_a_fault() -> None:
    attempts = [record(100, 140, 80.0, saved_step=130)]
    assert lost(attempts) == [20.0]  # 10 of 40 steps
    assert attempts[0].goodput.productive_s == 60.0


def test_a_living_attempt_has_lost_nothing_yet() -> None:
    assert lost([record(0, 10, 5.0, ended=None, outcome=None, saved_step=None)]) == [0.0]


def test_a_damaged_checkpoint_costs_the_steps_of_more_than_one_attempt() -> None:
    attempts = [record(0, 40, 40.0), record(40, 60, 20.0)]
    assert lost(attempts) == [0.0, 0.0]
    attempts.append(record(30, 70, 40.0))  # the checkpoints of 40 and 60 were bad
    assert lost(attempts) == [10.0, 20.0, 0.0]
    assert lost(attempts) == [10.0, 20.0, 0.0], "settling twice changes nothing"
