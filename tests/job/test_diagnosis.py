"""How ends are classed, from folders as ranks, torchrun and srun leave them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.config.run_state import Ending
from cosmos_hpc.job import ends
from cosmos_hpc.job.ends import Diagnosis, diagnose, kind_of

GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4"

TORCHRUN = """\
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-02_03:04:05
  host      : node7
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 4711)
  error_file: <N/A>
"""


def left(folder: Path, code: int = 1, launcher: str = "", **files: Any) -> Diagnosis:
    """The diagnosis of a folder with these files: `rank_0` a log's text, `failure_0` a failure, `outcome`."""
    run = RunFolder(folder)
    run.attempt_logs(0).mkdir(parents=True)
    run.launcher_log(0).write_text(launcher)
    for name, content in files.items():
        if name == "outcome":
            run.outcome(0).write_text(json.dumps(content))
        elif name.startswith("failure"):
            rank = int(name[-1])
            run.failure(0, rank).write_text(json.dumps({"rank": rank, "host": f"node{rank}", **content}))
        else:
            run.rank_log(0, int(name[-1])).write_text(content)
    return diagnose(run, 0, code)


def failure(kind: str, message: str, time: float, step: int | None = 4) -> dict[str, Any]:
    return {"type": kind, "message": message, "time": time, "step": step}


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        ("ConfigError: data.path is /gone", Ending.USER_ERROR),
        ("error: data.path is /gone", Ending.USER_ERROR),
        ("NonFiniteError: the loss is nan at step 12", Ending.NON_FINITE),
        ("OSError: [Errno 28] No space left on device: 'x'", Ending.DISK_FULL),
        ("OSError: [Errno 122] Disk quota exceeded: 'x'", Ending.DISK_FULL),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", Ending.OUT_OF_MEMORY),
        ("RuntimeError: CUDA error: out of memory", Ending.OUT_OF_MEMORY),
        ("RuntimeError: DataLoader worker (pid 31) is killed by signal: Bus error.", Ending.OUT_OF_MEMORY),
        ("MemoryError: ", Ending.OUT_OF_MEMORY),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", Ending.GPU_ERROR),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", Ending.GPU_ERROR),
        ("RuntimeError: CUDA error: device-side assert triggered", Ending.CODE_FAULT),
        (GLOO, Ending.LOST_RANKS),
        ("torch.distributed.DistBackendError: NCCL error: unhandled cuda error, NCCL version 2.2", Ending.LOST_RANKS),
        ("torch.distributed.DistNetworkError: The server socket has failed to listen", Ending.LOST_RANKS),
        ("ValueError: 3 is no frame", Ending.CODE_FAULT),
    ],
)
def test_an_errors_line_tells_its_class(error: str, ending: Ending) -> None:
    assert kind_of(error) is ending


def test_the_outcome_file_counts_before_anything_else(tmp_path: Path) -> None:
    found = left(tmp_path, -9, outcome={"outcome": "time_limit", "step": 7}, failure_1=failure("ValueError", "x", 1.0))
    assert (found.ending, found.step) == (Ending.TIME_LIMIT, 7)


def test_an_outcome_of_the_older_form_says_nothing(tmp_path: Path) -> None:
    found = left(tmp_path, outcome={"outcome": "failed", "step": None, "message": "x"}, rank_0="error: no such clip\n")
    assert (found.ending, found.error) == (Ending.USER_ERROR, "error: no such clip")


def test_the_earliest_failure_that_is_not_the_loss_of_the_others_is_the_cause(tmp_path: Path) -> None:
    kind, _, message = GLOO.partition(": ")
    failures = {
        "failure_0": failure(kind, message, 1.0),
        "failure_1": failure("ValueError", "late", 3.0),
        "failure_2": failure("MemoryError", "", 2.0, step=5),
    }
    found = left(tmp_path, **failures)
    assert (found.ending, found.rank, found.host, found.step) == (Ending.OUT_OF_MEMORY, 2, "node2", 5)
    assert found.log == RunFolder(tmp_path).rank_log(0, 2)


def test_a_failure_file_that_was_torn_is_passed_over(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").attempt_logs(0).parent.mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    run.attempt_logs(0).mkdir()
    run.failure(0, 0).write_text('{"rank": 0, "ty')
    assert diagnose(run, 0, 1) == Diagnosis(Ending.CODE_FAULT, "ended with exit code 1", log=run.launcher_log(0))


@pytest.mark.parametrize("others", [{}, {"rank_0": f"Traceback\n{GLOO}\n"}, {"rank_0": "old\nerror: of yesterday\n"}])
def test_torchrun_names_the_rank_that_was_killed(tmp_path: Path, others: dict[str, str]) -> None:
    found = left(tmp_path, 1, TORCHRUN.format(code=-9), **others)
    assert (found.ending, found.rank, found.host) == (Ending.KILLED, 1, "node7")
    assert found.error == "ended by SIGKILL"


def test_srun_names_the_rank_that_was_killed_first(tmp_path: Path) -> None:
    words = (
        "srun: error: node3: task 5: Killed\nsrun: Terminating StepId=7.0\nsrun: error: node1: tasks 0-3: Terminated"
    )
    found = left(tmp_path, 137, words, rank_0=GLOO)
    assert (found.ending, found.rank, found.host) == (Ending.KILLED, 5, "node3")


def test_a_launcher_that_was_killed_itself_is_a_kill(tmp_path: Path) -> None:
    assert left(tmp_path / "signal", -9).ending is Ending.KILLED
    assert left(tmp_path / "status", 137).ending is Ending.KILLED


def test_slurms_own_words_explain_a_kill(tmp_path: Path) -> None:
    oom = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
    killed = "srun: error: node3: task 5: Out Of Memory\n"
    assert left(tmp_path / "oom", 137, oom + killed).ending is Ending.OUT_OF_MEMORY
    lost = "srun: error: Node failure on node2\nsrun: error: node1: tasks 0-3: Killed\n"
    found = left(tmp_path / "node", 137, lost, rank_0=GLOO)
    assert (found.ending, found.error) == (Ending.NODE_FAILURE, "srun: error: Node failure on node2")


def test_a_container_that_does_not_start_is_told_in_its_own_words(tmp_path: Path) -> None:
    died = "srun: error: node3: task 5: Exited with exit code 1\n"
    full = "error: no container on node3: /raid has 12 MiB left, too little to unpack a.sqsh: set container.scratch"
    found = left(tmp_path / "full", 1, f"node2: unpacking /shared/a.sqsh in /raid\n{full}\n{died}", rank_0=GLOO)
    assert (found.ending, found.error, found.host) == (Ending.NODE_FAILURE, full, "node3")
    mount = "enroot-mount: failed to mount: /gone at /raid/x/gone: No such file or directory"
    found = left(tmp_path / "mount", 1, f"{mount}\n{died}")
    assert (found.ending, found.error) == (Ending.CODE_FAULT, mount)
    pyxis = "slurmstepd: error: pyxis: couldn't start container"
    found = left(tmp_path / "pyxis", 1, f"pyxis: importing docker image: x\n{pyxis}\n{died}")
    assert (found.ending, found.error) == (Ending.CODE_FAULT, pyxis)


def test_without_failure_files_the_logs_tell_first_of_all_that_of_the_rank_which_died(tmp_path: Path) -> None:
    logs = {"rank_0": "RuntimeError: of rank 0\n", "rank_1": f"{GLOO}\nValueError: 3 is no frame\nbye\n"}
    found = left(tmp_path, 1, TORCHRUN.format(code=1), **logs)
    assert (found.ending, found.error, found.rank) == (Ending.CODE_FAULT, "ValueError: 3 is no frame", 1)


def test_ranks_that_all_lost_each_other_are_classed_so_even_if_the_watchdog_aborts(tmp_path: Path) -> None:
    nccl = "torch.distributed.DistBackendError: NCCL error: remote process exited\n"
    assert left(tmp_path, 1, TORCHRUN.format(code=-6), rank_0=nccl, rank_1=nccl).ending is Ending.LOST_RANKS


def test_a_crash_without_a_word_is_told_by_its_signal(tmp_path: Path) -> None:
    found = left(tmp_path, 139, "srun: error: node3: task 5: Segmentation fault (core dumped)\n")
    assert (found.ending, found.error) == (Ending.CODE_FAULT, "ended by SIGSEGV")


def test_exit_code_2_is_the_users_error(tmp_path: Path) -> None:
    assert left(tmp_path, 2).ending is Ending.USER_ERROR


def test_an_end_without_a_word_on_a_full_disk_is_the_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "is_full", lambda _: True)
    assert left(tmp_path / "lost", 1, rank_1=GLOO).ending is Ending.DISK_FULL
    assert left(tmp_path / "silent", 1).ending is Ending.DISK_FULL
    assert left(tmp_path / "told", 1, rank_0="ValueError: 3 is no frame\n").ending is Ending.CODE_FAULT
    assert left(tmp_path / "killed", -9).ending is Ending.KILLED
