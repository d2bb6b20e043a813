import json
import os
import signal
from pathlib import Path

import pytest
from forked_ranks import start_ranks

from cosmos_hpc.ranks import Rank
from cosmos_hpc.training import preemption
from cosmos_hpc.training.preemption import OUTCOMES, Outcome, StopRequest


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_signal_training_goes_on(stop):
    assert OUTCOMES[stop.code] is None


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (signal.SIGTERM, Outcome.PREEMPTED),
        (signal.SIGUSR2, Outcome.TIME_LIMIT),
        (signal.SIGINT, Outcome.INTERRUPTED),
    ],
)
def test_a_signal_only_sets_a_flag(stop, number, outcome):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert OUTCOMES[stop.code] is outcome


def test_the_stronger_of_two_signals_counts_whichever_comes_last(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert OUTCOMES[stop.code] is Outcome.PREEMPTED


def test_a_forked_worker_does_not_take_the_signal_for_the_rank(stop):
    read, write = os.pipe()
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(write, b"1" if OUTCOMES[stop.code] is None else b"0")
        os._exit(0)
    os.wait()
    assert os.read(read, 1) == b"1"
    assert OUTCOMES[stop.code] is None


def test_a_file_asks_to_start_again_and_any_signal_is_stronger(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "LOOK_S", 0.0)
    stop.look_for(tmp_path / "requeue_now")
    assert OUTCOMES[stop.code] is None
    (tmp_path / "requeue_now").touch()
    assert OUTCOMES[stop.code] is Outcome.REQUEUED
    os.kill(os.getpid(), signal.SIGUSR2)
    assert OUTCOMES[stop.code] is Outcome.TIME_LIMIT


def exchange_on_rank(rank: Rank, out: Path) -> None:
    from cosmos_hpc.training.agreement import Agreement
    from cosmos_hpc.training.parallel import Groups

    index, groups, stop = rank.rank, Groups.start(rank), StopRequest()
    stop.install()
    agreement, heard = Agreement(groups, stop), []
    for step in range(3):
        agreement.start(
            wants_save=step == 1 and index == 0,
            wants_validation=step == 2 and index == 0,
            is_writing=step == 2 and index == 1,
            busy_s=index + step,
        )
        if step == 0 and index == 1:
            os.kill(os.getpid(), signal.SIGUSR2)  # during a step: too late for its own agreement
        heard.append(tuple(agreement.read()))
    (out / f"{index}.json").write_text(json.dumps(heard))
    groups.stop()


def test_ranks_leave_together_one_step_after_one_of_them_was_told(tmp_path):
    start_ranks(exchange_on_rank, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    assert first == second
    assert first == [
        [None, False, False, False, [0, 1]],
        ["time_limit", True, False, False, [1, 2]],
        ["time_limit", False, True, True, [2, 3]],
    ]
