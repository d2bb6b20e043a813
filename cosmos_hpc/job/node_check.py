"""What one node shows of itself before the ranks start on it. Run on the node as a script of its own, without packages.

node_check.py HOST PORT TOKEN CHECKS    CHECKS is JSON: gpus, folder, room_bytes, index, nodes
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SMI = "nvidia-smi"
ERROR_COUNTS = ("ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")
"""What a GPU that must not be trusted tells of itself; cards without ECC say [N/A]."""

SCRATCH_BYTES = 2**26
"""Room that loaders and NCCL need in /tmp and /dev/shm."""

VALUES = 4096
"""Numbers in the all-reduce."""


def gpu_problems(wanted: int) -> "list[str] | None":
    """What is wrong with the GPUs that the job was given here; none where this node has no tool to tell."""
    if not wanted:
        return []
    if shutil.which(SMI) is None:
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    code, told = _smi(ERROR_COUNTS, given)
    if code and "not a valid field" in told:  # an older driver
        code, told = _smi((), given)
    if code:
        return [f"{SMI} says: {' '.join(told.split())[:200]}"]
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.strip()]
    found = [
        f"GPU {index} has {name} = {value}"
        for index, _, *counts in rows
        for name, value in zip(ERROR_COUNTS, counts, strict=False)
        if (value.isdecimal() and int(value) > 0) or value == "Yes"
    ]
    if len(rows) < wanted:
        found.append(f"{len(rows)} GPUs are there, {wanted} are needed")
    return found


def folder_problems(folder: str, room_bytes: int) -> "list[str]":
    """What is wrong with the run folder as seen from here."""
    probe = Path(folder) / f".{socket.gethostname()}.{os.getpid()}.probe"
    try:
        probe.write_bytes(bytes(4096))
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [f"{folder} can't be written from here: {error.strerror}"]
    return [f"{folder} has no room for a checkpoint"] if free < room_bytes else []


def scratch_problems() -> "list[str]":
    """What is wrong with this node's own scratch."""
    found = []
    for scratch in (os.environ.get("TMPDIR", "/tmp"), "/dev/shm"):
        try:
            free = shutil.disk_usage(scratch).free
        except OSError as error:
            found.append(f"{scratch} can't be used: {error.strerror}")
            continue
        if free < SCRATCH_BYTES:
            found.append(f"{scratch} has {free >> 20} MiB left")
    return found


def share(index: int) -> "list[int]":
    """What a node gives to the all-reduce; over n nodes, the j-th sum is n (n + 1) / 2 x (j + 1)."""
    return [(index + 1) * (j + 1) for j in range(VALUES)]


def main() -> None:
    """Report to the supervisor's gate, in the order in which it asks."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the time limit's warning is for the ranks
    host, port, token, text = sys.argv[1:]
    checks = json.loads(text)
    index = int(os.environ["SLURM_PROCID"])
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rw") as stream:

        def tell(**content: object) -> None:
            stream.write(json.dumps({"token": token, **content}) + "\n")
            stream.flush()

        tell(host=os.environ["SLURMD_NODENAME"])
        for _ in range(3):
            stream.readline()
            tell(time=time.time())
        gpus, scratch = gpu_problems(checks["gpus"]), scratch_problems()
        folder = folder_problems(checks["folder"], checks["room_bytes"])
        tell(gpus=gpus, folder=folder, scratch=scratch, share=share(index))
        nodes = checks["nodes"]
        total = json.loads(stream.readline())
        tell(is_sum_right=total == [nodes * (nodes + 1) // 2 * (j + 1) for j in range(VALUES)])


def _smi(fields: "tuple[str, ...]", given: str) -> "tuple[int, str]":
    query = [SMI, f"--query-gpu={','.join(('index', 'uuid', *fields))}", "--format=csv,noheader"]
    query += [f"--id={given}"] if given else []
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        return 1, "nothing for 8 s"
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


if __name__ == "__main__":
    main()
