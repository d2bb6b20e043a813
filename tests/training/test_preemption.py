import os
import signal

import pytest

from cosmos_hpc.training.preemption import Outcome, StopRequest


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def alone(value: int) -> int:
    """The largest over a group of one."""
    return value


def test_without_a_signal_training_goes_on(stop):
    assert stop.agreed(alone) is None


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (signal.SIGTERM, Outcome.PREEMPTED),
        (signal.SIGUSR2, Outcome.TIME_LIMIT),
        (signal.SIGINT, Outcome.INTERRUPTED),
    ],
)
def test_a_signal_only_sets_a_flag_that_is_read_at_a_step_boundary(stop, number, outcome):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert stop.agreed(alone) is outcome


def test_ranks_that_heard_nothing_leave_with_those_that_did(stop):
    assert stop.agreed(lambda own: max(own, 3)) is Outcome.PREEMPTED


def test_a_forked_worker_does_not_take_the_signal_for_the_rank(stop):
    read, write = os.pipe()
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(write, b"1" if stop.agreed(alone) is None else b"0")
        os._exit(0)
    os.wait()
    assert os.read(read, 1) == b"1"
    assert stop.agreed(alone) is None
