"""A rank without torch: it starts at once, counts steps, saves and leaves as a real one does.

STAND_IN_STEP_S: seconds a step. STAND_IN_FAULT: `deaf`, a rank that does not hear signals.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    asked: list[int] = []
    if os.environ.get("STAND_IN_FAULT") == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    else:
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
    step = count(arguments.run_folder, asked, writes=rank == 0)
    if rank == 0:
        outcome = {signal.SIGTERM: "preempted", signal.SIGUSR2: "time_limit"}[asked[0]] if asked else "finished"
        write(logs / "outcome.json", {"outcome": outcome, "step": step, "message": None})
    print(f"left at step {step}")


def count(folder: Path, asked: list[int], *, writes: bool) -> int:
    """Steps from the newest checkpoint to the last one, or until asked to leave; saved at the end."""
    last = int(re.search(r"max_steps: (\d+)", (folder / "config.yaml").read_text())[1])
    step = max((int(path.name[-8:]) for path in folder.glob("checkpoints/step_????????")), default=0)
    started = time.time()
    while step < last and not asked:
        time.sleep(float(os.environ.get("STAND_IN_STEP_S", "0.2")))
        step += 1
        if writes:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            beat = {"time": time.time(), "pid": os.getpid(), "phase": "train", "step": step, "beats": step}
            write(folder / "heartbeat.json", beat | {"seconds": {"train": time.time() - started}})
    if writes:
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        write(checkpoint / "checkpoint.json", {"step": step, "world_size": int(os.environ["SLURM_NTASKS"])})
    return step


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(json.dumps(content))
    path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    main()
