"""When silence counts as a hang, by a clock that the test moves; what a stack dump tells."""

import faulthandler
import tempfile
from pathlib import Path

import pytest

from cosmos_hpc.config.cluster_schema import HangConfig
from cosmos_hpc.config.load import load_experiment, resolve
from cosmos_hpc.config.rank_reports import Heartbeat
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import AttemptRecord, RunState
from cosmos_hpc.job.attempt import Attempt
from cosmos_hpc.job.hang import Vigil, innermost_frame

LIMITS = HangConfig(first_limit_s=1000.0, least_limit_s=60.0, factor=5.0)


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def hear(vigil: Vigil, clock: Clock, phase: str, beats: int, after_s: float) -> None:
    clock.now += after_s
    vigil.hear(Heartbeat(attempt=0, phase=phase, beats=beats))


def test_each_phase_has_a_generous_limit_until_it_was_left_and_then_a_learned_one() -> None:
    clock = Clock()
    vigil = Vigil(LIMITS, {}, clock=clock)
    hear(vigil, clock, "start", 1, 30.0)
    hear(vigil, clock, "start", 2, 20.0)
    assert vigil.limit_s == 1000.0, "the start may still be in for a longer silence"
    hear(vigil, clock, "train", 3, 10.0)
    hear(vigil, clock, "train", 4, 1.0)
    assert vigil.limit_s == 1000.0
    hear(vigil, clock, "start", 5, 1.0)  # a roll-back
    assert vigil.limit_s == 5 * 30.0
    hear(vigil, clock, "train", 6, 1.0)
    assert vigil.limit_s == 60.0, "never below the floor"
    hear(vigil, clock, "train", 7, 40.0)
    assert vigil.limit_s == 200.0


def test_a_time_in_which_the_supervisor_stood_still_itself_is_no_silence_of_the_ranks() -> None:
    clock = Clock()
    vigil = Vigil(LIMITS, {"train": 2.0}, clock=clock)
    hear(vigil, clock, "train", 1, after_s=1)
    clock.now += 1e6
    assert vigil.is_hung
    vigil.forgive(1e6)
    assert not vigil.is_hung
    clock.now += vigil.limit_s + 1
    assert vigil.is_hung


def test_each_hang_doubles_the_limits_for_the_next_attempt() -> None:
    for num_hangs, first_s, learned_s in ((0, 1000.0, 100.0), (1, 2000.0, 200.0), (2, 4000.0, 400.0)):
        clock = Clock()
        vigil = Vigil(LIMITS, {"train": 20.0}, num_hangs=num_hangs, clock=clock)
        assert vigil.limit_s == first_s
        hear(vigil, clock, "train", 1, 1.0)
        assert vigil.limit_s == learned_s


def test_a_heartbeat_whose_beats_do_not_grow_is_no_sign_of_life() -> None:
    clock = Clock()
    vigil = Vigil(LIMITS, {"train": 2.0}, clock=clock)
    hear(vigil, clock, "train", 7, 1.0)
    for _ in range(6):
        hear(vigil, clock, "train", 7, 10.0)
        assert not vigil.is_hung
    hear(vigil, clock, "train", 7, 0.5)
    assert vigil.is_hung
    assert vigil.describe(["rank 0 in f (x.py:1)"]) == "no sign of life for 60 s in phase train (rank 0 in f (x.py:1))"
    hear(vigil, clock, "train", 8, 0.0)
    assert not vigil.is_hung


def test_what_one_attempt_learned_the_next_one_knows() -> None:
    clock, learned = Clock(), {}
    first = Vigil(LIMITS, learned, clock=clock)
    hear(first, clock, "first_step", 1, 20.0)
    hear(first, clock, "train", 2, 100.0)
    clock.now += 5000.0
    assert first.is_hung
    assert learned == {"start": 20.0, "first_step": 100.0}
    second = Vigil(LIMITS, learned, clock=clock)
    hear(second, clock, "first_step", 1, 10.0)
    assert second.limit_s == 500.0


def test_the_main_threads_innermost_frame_is_read_from_a_real_dump() -> None:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    frame = innermost_frame("some line of the log\n" + text + "another line\n")
    assert frame.startswith(
        f"in test_the_main_threads_innermost_frame_is_read_from_a_real_dump ({Path(__file__).name}:"
    )


@pytest.mark.parametrize("text", ["", "Killed\n", "Current thread 0x00007f (most recent call first):\n"])
def test_a_rank_that_prints_no_stack_is_said_to_be_stuck(text: str) -> None:
    assert innermost_frame(text) == "did not answer: stopped, or stuck in the kernel"


@pytest.mark.parametrize(("mode", "limit_s"), [("none", 300.0), ("enroot", 1800.0), ("pyxis", 1800.0)])
def test_a_start_in_a_container_is_given_the_time_that_unpacking_takes(
    tmp_path: Path, mode: str, limit_s: float
) -> None:
    """What a node that had the image unpacked has taught tells nothing of the next node."""
    run = resolve(load_experiment(None, [f"container.mode={mode}", "container.image=/shared/a.sqsh"]), {})
    record = AttemptRecord(attempt=0, started=0.0, host="c1", job_id="1")
    state = RunState(attempts=[record], longest_silence_s={"start": 10.0, "train": 1.0})
    attempt = Attempt(RunFolder(tmp_path / "roads" / "000-1"), run, state, lambda: None)
    assert attempt._vigil.limit_s == limit_s
    assert state.longest_silence_s["train"] == 1.0
