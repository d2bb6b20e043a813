"""What the supervisor makes of each end of the ranks; they are doubles, and once the launcher is torch's own."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from play import SOON, Play, Script, Start

import cosmos_hpc.job.hang as hang_module
import cosmos_hpc.job.supervisor as supervisor_module
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import Ending, Status
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.job import allocation
from cosmos_hpc.launch.local import locked
from cosmos_hpc.launch.step import start_step

DONE = [[["save", 9], ["end", "finished", 9]], []]
"""The first rank writes how it ended, the second just leaves."""

GLOO = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:43321"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_fault_of_one_rank_restarts_the_step_and_is_told_with_that_ranks_words(start: Start) -> None:
    broken = [[["sleep", 0.2], ["fail", "RuntimeError", GLOO, 4]], [["fail", "ValueError", "no such frame", 4]]]
    play = start(broken, DONE)
    assert play.end() == 0
    assert play.outcomes == ["code_fault", "finished"]
    record = play.state.attempts[0]
    assert record.message == (
        "code fault on rank 1 of node1 at step 4: ValueError: no such frame (see logs/000/rank_1.log)"
    )


def test_the_same_fault_twice_at_the_same_step_stops_with_a_diagnosis(start: Start) -> None:
    broken = [[["sleep", 5]], [["fail", "ValueError", "no such frame", 4]]]
    play = start(broken, restarts={"code_fault": 9})
    assert play.end() == 1
    assert (play.state.status, play.outcomes) == (Status.FAILED, ["code_fault"] * 2)
    message = play.state.attempts[-1].message
    assert message.startswith("code fault on rank 1 of node1 at step 4: ValueError: no such frame (see logs/001/rank_1")
    assert message.endswith(
        "the same came twice at this step: read the log and mend the code or the data, then submit again"
    )


def test_a_refused_setting_stops_at_once(start: Start) -> None:
    play = start([[["fail", "ConfigError", "data.path is /gone: mount it", None]]])
    assert play.end() == 1
    assert play.outcomes == ["user_error"]
    assert "data.path is /gone: mount it" in play.state.attempts[0].message


def test_a_run_that_moves_on_has_its_budget_back_and_one_that_does_not_stops(start: Start) -> None:
    lost = [[["save", 1], ["fail", "RuntimeError", GLOO, 1]]]
    moved = [[["save", 2], ["fail", "RuntimeError", GLOO, 2]]]
    play = start(lost, lost, moved, restarts={"lost_ranks": 2})
    assert play.end() == 1
    assert play.outcomes == ["lost_ranks"] * 5
    assert [record.saved_step for record in play.state.attempts] == [1, 1, 2, 2, 2]
    assert "number 3 without a new checkpoint (cluster.restarts.lost_ranks)" in play.state.attempts[-1].message


def test_preemptions_and_time_limits_never_use_up_a_budget(start: Start) -> None:
    ends = [[[["end", outcome, 3]]] for outcome in ("preempted", "time_limit") * 4]
    none = dict.fromkeys(("code_fault", "killed", "lost_ranks"), 0)
    play = start(*ends, DONE[:1], restarts=none)
    assert play.end() == 0
    assert play.outcomes == ["preempted", "time_limit"] * 4 + ["finished"]


def test_a_rank_killed_after_it_wrote_the_outcome_was_preempted_all_the_same(start: Start) -> None:
    slow_exit = [[["until_asked"], ["end", "preempted", 5], ["die", signal.SIGKILL]], [["until_asked"]]]
    play = start(slow_exit, DONE)
    wait_for(play.folder.rank_log(0, 0)), wait_for(play.folder.rank_log(0, 1))
    os.kill(play.pid, signal.SIGTERM)
    assert play.end() == 0
    assert play.outcomes == ["preempted", "finished"]
    assert play.state.attempts[0].message is None


def test_a_rank_that_dies_while_the_others_see_only_sigterm_is_a_fault(start: Start) -> None:
    killed = [[["until_asked"], ["exit", 0]], [["sleep", 0.1], ["die", signal.SIGKILL]]]
    play = start(killed, DONE)
    assert play.end() == 0
    assert play.outcomes == ["killed", "finished"]
    assert play.state.attempts[0].message == "killed on rank 1 of node1: ended by SIGKILL (see logs/000/rank_1.log)"


def test_the_real_launchers_words_tell_which_rank_was_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends SIGTERM to the others, which here leave with exit code 0 as if they had been preempted."""
    rank = (
        "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); "
        "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(60)"
    )

    def torchrun(command: list[str], *rest: Any) -> Any:
        launcher = command[: command.index("cosmos_hpc.train") - 1]
        return start_step([*launcher, "--no-python", sys.executable, "-S", "-c", rank], *rest)

    play = start(DONE, first_launcher=torchrun)
    assert play.end() == 0
    assert play.outcomes == ["killed", "finished"]
    assert play.state.attempts[0].message.startswith("killed on rank 1 of ")


def test_a_hang_is_ended_with_the_frames_of_all_ranks_and_tried_again(start: Start) -> None:
    stuck = [
        [["stacks"], ["beat", "start", 0], ["beat", "train", 3], ["sleep", 60]],
        [["stacks"], ["die", signal.SIGSTOP]],
    ]
    play = start(stuck, DONE, hang=SOON)
    assert play.end() == 0
    assert play.outcomes == ["hang", "finished"]
    message = play.state.attempts[0].message
    assert message.startswith("hang at step 3: no sign of life for ")
    assert "in phase train (rank 0 in act (double_ranks.py:" in message
    assert "rank 1 did not answer" in message
    assert "most recent call first" in play.folder.rank_log(0, 0).read_text()


def test_ranks_that_never_say_anything_hang_in_the_start(start: Start) -> None:
    play = start([[["sleep", 60]]], restarts={"hang": 0}, hang=SOON)
    assert play.end() == 1
    assert play.outcomes == ["hang"]
    assert "in phase start" in play.state.attempts[0].message
    assert "raise cluster.hang.first_limit_s" in play.state.attempts[0].message


def test_a_hang_is_seen_in_every_phase_and_tried_again(start: Start) -> None:
    phases = ["start", "first_step", "train", "validate", "save", "leave"]
    numbered = enumerate(phases, 1)
    stuck = [[[["save", step], ["beat", "start", 0], ["beat", phase, 3], ["sleep", 60]]] for step, phase in numbered]
    play = start(*stuck, DONE[:1], hang=SOON, restarts={"hang": len(phases)})
    assert play.end() == 0
    assert play.outcomes == ["hang"] * len(phases) + ["finished"]
    for phase, record in zip(phases, play.state.attempts, strict=False):
        assert f"in phase {phase} " in record.message


def test_patience_that_hangs_have_cost_is_forgotten_with_a_new_checkpoint(start: Start) -> None:
    def stuck(step: int) -> Script:
        return [[["stacks"], ["beat", "start", 0], ["save", step], ["beat", "train", step], ["sleep", 60]]]

    play = start(stuck(1), stuck(1), stuck(2), stuck(3), DONE[:1], hang=SOON, restarts={"hang": 4})
    assert play.end() == 0
    assert play.outcomes == ["hang"] * 4 + ["finished"]
    waited = [float(re.search(r"for (\d+) s in phase train", record.message)[1]) for record in play.state.attempts[:4]]
    assert waited[0] < waited[1] < waited[2] > waited[3]  # 1, 2, 4 and 2 s; the third left a new checkpoint


PY_SPY = """#!/bin/sh
echo "native stacks: $*"
exec sleep 60
"""


def test_py_spy_adds_native_stacks_where_it_is_installed_and_may_hang_itself(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "py-spy"
    tool.write_text(PY_SPY)
    tool.chmod(0o755)
    monkeypatch.setattr(hang_module, "PY_SPY_S", 0.5)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    play = start([[["stacks"], ["beat", "train", 3], ["sleep", 60]]], DONE[:1], hang=SOON)
    assert play.end() == 0
    assert play.outcomes == ["hang", "finished"]
    assert "native stacks: dump --nonblocking --pid " in play.folder.launcher_log(0).read_text()


def test_a_full_disk_is_waited_for(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    monkeypatch.setattr(supervisor_module, "has_room", lambda _: room.exists())
    play = start([[["fail", "OSError", "[Errno 28] No space left on device", 4]]], DONE[:1])
    wait_for(play.folder.failure(0, 0))
    time.sleep(0.3)
    assert play.outcomes[0] in (None, "disk_full")
    assert len(play.outcomes) == 1, "it went on without room"
    room.touch()
    assert play.end() == 0
    assert play.outcomes == ["disk_full", "finished"]


def test_a_disk_that_stays_full_stops_the_run_with_the_mend(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "has_room", lambda _: False)
    full = [[["fail", "OSError", "[Errno 122] Disk quota exceeded", 4]]]
    play = start(full, restarts={"disk_wait_s": 0.2})
    assert play.end() == 1
    assert "no room for a checkpoint in 0 s: make room or have the quota raised" in play.state.attempts[0].message


def test_a_cancel_during_the_back_off_is_heard(start: Start) -> None:
    play = start([[["exit", 1]]], restarts={"backoff_s": 60.0})
    deadline = time.monotonic() + 30
    while not (play.folder.state.exists() and play.outcomes == ["code_fault"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert play.state.status == Status.WAITING
    play.folder.cancel_mark.touch()
    assert play.end() == 0
    assert play.state.status == Status.CANCELLED


def test_goodput_of_a_run_with_a_fault_adds_up(start: Start) -> None:
    told = {"resumed_step": 0, "saved_step": 2, "seconds": {"start": 0.1, "train": 0.4}}
    first = [["save", 2], ["beat", "train", 8, told], ["sleep", 0.6], ["die", signal.SIGKILL]]
    second = {"resumed_step": 2, "saved_step": 10, "seconds": {"start": 0.1, "train": 0.2, "save": 0.05}}
    play = start([first], [[["sleep", 0.4], ["save", 10], ["end", "finished", 10, second]]])
    assert play.end() == 0
    before, after = (record.goodput for record in play.state.attempts)
    assert before.lost_s == pytest.approx(0.3)  # steps 3 to 8 of 8 in 0.4 s
    assert before.productive_s == pytest.approx(0.1)
    assert (after.productive_s, after.checkpoint_s, after.lost_s) == (0.2, 0.05, 0.0)
    assert after.backoff_s >= 0.05
    for spent in (before, after):
        parts = spent.productive_s + spent.startup_s + spent.data_s + spent.validation_s + spent.checkpoint_s
        assert spent.allocated_s == pytest.approx(parts + spent.lost_s + spent.backoff_s + spent.silence_s)
    assert play.state.goodput.share == pytest.approx(0.3 / (before.allocated_s + after.allocated_s))


def test_runs_of_an_experiment_share_the_places_that_max_parallel_gives(start: Start, folder: RunFolder) -> None:
    other = RunFolder(folder.path.with_name("001-4567cdef"))
    other.path.mkdir()
    first = start([[["sleep", 1.0], ["end", "finished", 9]]])
    other.config.write_text(folder.config.read_text())
    second = Play(other)
    assert (first.end(), second.end()) == (0, 0)
    spans = sorted((record.started, record.ended) for play in (first, second) for record in play.state.attempts)
    assert len(spans) == 2
    assert spans[0][1] <= spans[1][0]


def test_the_wait_for_nodes_is_told_apart_from_what_was_allocated(start: Start, folder: RunFolder) -> None:
    folder.pending_mark.write_text("7")
    os.utime(folder.pending_mark, (time.time() - 500, time.time() - 500))  # sent so long ago
    play = start([[["end", "preempted", 3]]], DONE[:1])
    assert play.end() == 0
    first, second = (record.goodput for record in play.state.attempts)
    assert 500 <= first.queue_s < 560
    assert second.queue_s == 0, "on the same nodes nothing waits in a queue"
    assert first.allocated_s < 60
    state = play.state  # requeued, and back after so long
    state.status, state.attempts[-1].outcome = Status.WAITING, Ending.PREEMPTED
    state.attempts[-1].ended -= 300
    state.write(folder.state)
    again = Play(folder)
    assert again.end() == 0
    assert 300 <= again.state.attempts[-1].goodput.queue_s < 360
    assert again.state.goodput.queue_s > 800


BIN = """#!/bin/sh
echo "$(basename "$0") $*" >> {said}
{answer}
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the supervisor asks of SLURM, where there is none: each call as a line; a requeue ends the job."""
    said, tools = tmp_path / "said", tmp_path / "bin"
    tools.mkdir()
    node = "echo JobState=RUNNING Restarts=0 NodeList=node0 EndTime=Unknown"
    answers = {"scontrol": f'case "$*" in requeue*) kill -KILL $PPID;; show\\ job*) {node};; *) echo node0;; esac'}
    answers["squeue"] = "echo '70_3.batch|batch'; echo '70_3.0|true'; echo '70_3.1|cosmos-ranks'; echo '70_3.2|bash'"
    answers["sinfo"] = "echo node0; echo node1"
    answers["scancel"] = f'case "$1" in *KILL) kill -KILL $(cat {tmp_path}/launcher);; esac'
    for name, answer in answers.items():
        (tools / name).write_text(BIN.format(said=said, answer=answer))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name, value in {"ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "3", "JOB_ID": "73"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return said


@pytest.mark.parametrize(
    ("first", "ending"),
    [
        ([["end", "preempted", 3]], "preempted"),
        ([["end", "time_limit", 3]], "time_limit"),
        ([["fail", "RuntimeError", "CUDA error: uncorrectable ECC error encountered", 3]], "gpu_error"),
    ],
)
def test_on_slurm_preemption_time_limit_and_a_bad_node_go_back_to_the_queue(
    start: Start, slurm: Path, first: list[Any], ending: str
) -> None:
    play = start([first], executor="slurm")
    assert play.end() == -signal.SIGKILL
    asked = slurm.read_text().splitlines()
    assert [line for line in asked if "show" not in line and "sinfo" not in line] == [
        "scontrol requeue Incomplete 70_3"
    ]
    assert (play.state.status, play.outcomes) == (Status.WAITING, [ending])


def test_on_slurm_a_fault_that_leaves_the_nodes_healthy_restarts_in_the_same_allocation(
    start: Start, slurm: Path
) -> None:
    play = start([[["fail", "RuntimeError", GLOO, 4]]], DONE[:1], executor="slurm")
    assert play.end() == 0
    assert play.outcomes == ["lost_ranks", "finished"]
    assert all("scontrol show" in line for line in slurm.read_text().splitlines())


def test_on_slurm_a_hung_step_is_asked_for_stacks_and_killed_by_its_own_id(
    start: Start, slurm: Path, tmp_path: Path
) -> None:
    def noted(*arguments: Any) -> Any:
        step = start_step([sys.executable, "-S", "-c", "import time; time.sleep(60)"], *arguments[1:])
        (tmp_path / "launcher").write_text(str(step.pid))
        return step

    play = start(DONE[:1], first_launcher=noted, executor="slurm", hang=SOON)
    assert play.end() == 0
    assert play.outcomes == ["hang", "finished"]
    calls = [line for line in slurm.read_text().splitlines() if line.startswith("scancel")]
    assert calls == ["scancel --signal=USR1 70_3.1", "scancel --signal=KILL 70_3.1"]


def test_on_slurm_a_job_that_was_given_to_another_node_goes_on_although_its_earlier_start_holds_the_lock(
    start: Start, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = start([[["sleep", 60]]], DONE[:1], executor="slurm")
    wait_for(play.folder.rank_log(0, 0))
    os.kill(play.pid, signal.SIGKILL)
    assert play.end() == -signal.SIGKILL
    monkeypatch.setattr(supervisor_module, "EARLIER_SELF_S", 0.2)
    with locked(play.folder.supervisor_lock):  # as that of a process that SLURM has lost may be
        again = Play(play.folder)
        assert again.end() == 0
        assert again.outcomes[-1] == "finished"
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
        other = Play(play.folder)
        assert other.end() == 0
    assert len(other.outcomes) == len(again.outcomes), "another job leaves a run with a supervisor alone"


def test_on_slurm_a_supervisor_whose_job_runs_again_elsewhere_starts_nothing(start: Start, slurm: Path) -> None:
    scontrol = slurm.with_name("bin") / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("Restarts=0", "Restarts=1"))
    play = start(DONE[:1], executor="slurm")
    assert play.end() == 0
    assert not list(play.folder.path.glob("logs/*/rank_*"))


def test_on_slurm_a_bad_node_is_kept_away_from_although_the_controller_is_busy_at_first(
    start: Start, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation.time, "sleep", lambda _: None)
    monkeypatch.setattr(allocation, "requeue_own_job", lambda job: True)
    orders: list[list[str]] = []

    def busy_at_first(job: str, nodes: list[str]) -> None:
        orders.append(nodes)
        if len(orders) == 1:
            raise ConfigError("scontrol failed: busy")

    monkeypatch.setattr(allocation, "keep_away", busy_at_first)
    given = allocation.Allocation(RunFolder(tmp_path), RunConfig()).give_back(["gpu7"])
    assert (given, orders) == (allocation.JobEnd.REQUEUED_BY_US, [["gpu7"], ["gpu7"]])


def test_on_slurm_a_supervisor_that_is_killed_again_and_again_stops(start: Start, slurm: Path) -> None:
    for attempt in range(2):
        play = start([[["sleep", 60]]], executor="slurm", restarts={"supervisor_killed": 1})
        wait_for(play.folder.rank_log(attempt, 0))
        os.kill(play.pid, signal.SIGKILL)
        assert play.end() == -signal.SIGKILL
    assert Play(play.folder).end() == 1
    assert play.state.status == Status.FAILED
    assert "number 2 without a new checkpoint" in play.state.attempts[-1].message


def test_on_slurm_a_supervisor_that_died_in_a_preemption_uses_up_no_budget(start: Start, slurm: Path) -> None:
    sacct = slurm.with_name("bin") / "sacct"
    sacct.write_text("#!/bin/sh\necho 'PREEMPTED|0:9|2026-01-01T10:00:00|2026-01-01T10:30:01|node0'\n")
    sacct.chmod(0o755)
    none = {"supervisor_killed": 0}
    play = start([[["sleep", 60]]], DONE[:1], executor="slurm", restarts=none)
    wait_for(play.folder.rank_log(0, 0))
    os.kill(play.pid, signal.SIGKILL)
    assert play.end() == -signal.SIGKILL
    again = Play(play.folder)
    assert again.end() == 0
    assert again.outcomes == ["preempted", "finished"]
    assert again.state.attempts[0].followed == "went back to the queue"
