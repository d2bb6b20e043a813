"""A rank without torch: it starts at once, counts steps, saves and leaves as a real one does.

STAND_IN_STEP_S: seconds a step. STAND_IN_FAULT: `die`, `quota` or `refuse` of rank 1, `hang` of rank 0; at step 5 of
attempt 0.
"""

import argparse
import faulthandler
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

OUTCOMES = {signal.SIGTERM: "preempted", signal.SIGUSR2: "time_limit", 0: "requeued"}
SAVE_EVERY = 10


def main() -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGUSR2, lambda number, _: asked.append(number))
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-folder", type=Path)
    parser.add_argument("--attempt", type=int)
    arguments = parser.parse_args()
    rank = int(os.environ["SLURM_PROCID"])
    logs = arguments.run_folder / "logs" / f"{arguments.attempt:03d}"
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (logs / f"rank_{rank}.log").open("a", buffering=1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    fault = os.environ.get("STAND_IN_FAULT") if arguments.attempt == 0 else None
    fault = fault if rank == (0 if fault == "hang" else 1) else None
    step = count(arguments.run_folder, arguments.attempt, asked, fault, writes=rank == 0)
    leave_together(logs, rank)
    if rank == 0:
        outcome = OUTCOMES[asked[0]] if asked else "finished"
        write(logs / "outcome.json", {"outcome": outcome, "step": step, "message": None})
    print(f"left at step {step}")


def leave_together(logs: Path, rank: int) -> None:
    """Without one that died or hangs, none of them agrees on anything."""
    (logs / f"left_{rank}").touch()
    while len(list(logs.glob("left_*"))) < int(os.environ["SLURM_STEP_NUM_TASKS"]):
        time.sleep(0.05)


def count(folder: Path, attempt: int, asked: list[int], fault: str | None, *, writes: bool) -> int:
    """Steps from the newest checkpoint to the last one, or until asked to leave; saved at the end."""
    last = int(re.search(r"max_steps: (\d+)", (folder / "config.yaml").read_text())[1])
    step = first = max((int(path.name[-8:]) for path in folder.glob("checkpoints/step_????????")), default=0)
    started = time.time()
    step_s = float(os.environ.get("STAND_IN_STEP_S", "0.2"))
    while step < last and not asked:
        if (folder / "requeue_now").exists():
            asked.append(0)
        if fault is not None and step == 5:
            fail(fault)
        time.sleep(step_s)
        step += 1
        if not writes:
            continue
        with (folder / "metrics.jsonl").open("a") as file:
            line = {
                "time": time.time(),
                "step": step,
                "loss": 1 / step,
                "attempt": attempt,
                "step_time_s": step_s,
                "data_time_s": 0.0,
            }
            file.write(json.dumps(line) + "\n")
        beat = {"time": time.time(), "attempt": attempt, "phase": "train", "step": step, "beats": step}
        beat |= {"seconds": {"train": time.time() - started}, "resumed_step": first}
        write(folder / "heartbeat.json", beat)
        if step % SAVE_EVERY == 0 or (folder / "checkpoint_now").exists():
            save(folder, step)
    if writes:
        save(folder, step)
    return step


def fail(fault: str) -> None:
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
        while True:
            time.sleep(1)
    if fault == "refuse":
        print("error: data.path is /none, which is not there: pack it first")
        os._exit(2)
    raise OSError(122, "Disk quota exceeded", "checkpoint")


def save(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    write(checkpoint / "checkpoint.json", {"step": step, "world_size": int(os.environ["SLURM_STEP_NUM_TASKS"])})
    (folder / "checkpoint_now").unlink(missing_ok=True)


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(json.dumps(content))
    path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    main()
