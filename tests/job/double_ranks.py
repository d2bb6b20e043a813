"""A double of the step: plays launcher and ranks as a test wrote them down. Run by `python -S`, imports little.

    double_ranks.py RUN_FOLDER ATTEMPT SCRIPT

SCRIPT is JSON: for each attempt (the last one for all further), for each rank, a list of [verb, arguments...].
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, attempt, script = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
logs = f"{folder}/logs/{attempt:03d}"
beats = 0
asked = False


def write(path: str, **content: object) -> None:
    written = Path(f"{path}.{os.getpid()}")
    written.write_text(json.dumps(content))
    written.replace(path)


def on_term(*_: object) -> None:
    global asked
    asked = True


def act(rank: int, verb: str, *values: object) -> None:
    global beats
    if verb == "beat":  # phase, step, more
        beats += 1
        phase, step, *more = values
        content = {"phase": phase, "step": step, "beats": beats, "attempt": attempt, "time": time.time()}
        write(f"{folder}/heartbeat.json", **content, **(more[0] if more else {}))
    elif verb == "end":  # outcome, step, more
        outcome, step, *more = values
        write(f"{logs}/outcome.json", outcome=outcome, step=step, message=None, **(more[0] if more else {}))
    elif verb == "fail":  # type, message, step
        kind, message, step = values
        content = {"rank": rank, "host": f"node{rank}", "type": kind, "message": message, "step": step}
        write(f"{logs}/failure_rank_{rank}.json", **content, time=time.time())
        print(f"{kind}: {message}", flush=True)
        os._exit(2 if kind == "ConfigError" else 1)
    elif verb == "save":  # step
        Path(f"{folder}/checkpoints/step_{values[0]:08d}").mkdir(parents=True, exist_ok=True)
    elif verb == "say":
        print(*values, flush=True)
    elif verb == "sleep":
        time.sleep(values[0])
    elif verb == "until_asked":
        while not asked:
            time.sleep(0.01)
    elif verb == "die":  # signal
        os.kill(os.getpid(), values[0])
    elif verb == "stacks":
        import faulthandler

        faulthandler.register(signal.SIGUSR1, all_threads=True)
    else:
        os._exit(values[0])  # "exit"


def run_rank(rank: int) -> None:
    signal.signal(signal.SIGTERM, on_term)
    log = os.open(f"{logs}/rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for verb, *values in script[min(attempt, len(script) - 1)][rank]:
        act(rank, verb, *values)
    os._exit(0)


def launch(num_ranks: int) -> int:
    """As srun --kill-on-bad-exit: the first that fails takes the others with it."""
    pids = {}
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            run_rank(rank)
        pids[pid] = rank
    highest = 0
    while pids:
        pid, status = os.wait()
        rank, code = pids.pop(pid), os.waitstatus_to_exitcode(status)
        if code and not highest:
            how = "Killed" if code == -9 else f"Exited with exit code {code}"
            print(f"srun: error: node{rank}: task {rank}: {how}", file=sys.stderr, flush=True)
            for other in pids:
                os.kill(other, signal.SIGTERM)
            time.sleep(0.3)
            for other in pids:
                os.kill(other, signal.SIGKILL)
        highest = max(highest, code if code >= 0 else 128 - code)
    return highest


sys.exit(launch(len(script[0])))
