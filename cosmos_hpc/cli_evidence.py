"""The commands that tell what training has brought: `evaluate` and `report`."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_hpc.cli_options import Json, print_json
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.names import runs_named, weights_or_runs_named

if TYPE_CHECKING:  # brings torch
    from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder
    from cosmos_hpc.config.schema import RunConfig
    from cosmos_hpc.report.evaluate import Instruments, Source, Task


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Experiments, runs (EXPERIMENT/RUN), checkpoints, exports or folders of weights. The others are "
            "compared with the first; before a run that comes first go the weights that it started from."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Prepared dataset, folder of shards or of videos; the first run's if left out.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a prepared dataset.")] = "val",
    num_frames: Annotated[
        int | None, typer.Option(help="Frames per clip, 1 + 8k; as the first run was trained, else 33.")
    ] = None,
    windows: Annotated[
        int, typer.Option(help="Clips in a row, each coded by itself: above 1 for the error across their borders.")
    ] = 1,
    crop_size: Annotated[
        int | None,
        typer.Option(help="Height and width in pixels, 0: whole frames; as the first run was trained, else 256."),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Fields of the videos' JSON to tell apart: camera,weather,night.")
    ] = None,
    vgg16: Annotated[
        str | None, typer.Option(help="VGG16 for its distance: a file or a fetched REPOSITORY; used where it is there.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="TorchScript network, clips [B, 3, T, H, W] in [-1, 1] to [B, D], for a Frechet distance."),
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="Your detector, module:function of uint8 frames [T, H, W, 3], on both.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Also the moving averages that runs kept.")] = False,
    no_start: Annotated[bool, typer.Option("--no-start", help="Leave the starting weights out.")] = False,
    worst: Annotated[int, typer.Option(help="Worst clips to draw: a strip with error maps, and an mp4.")] = 3,
    max_videos: Annotated[int | None, typer.Option(help="Videos, spread over all; all if left out.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables and pictures; in the experiment's report/ if left out, else evaluation/."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare weights on unseen videos: means with intervals, slices, what became of the latents, the worst clips."""
    from cosmos_hpc.launch.follow import progress_bar
    from cosmos_hpc.report.evaluate import Task
    from cosmos_hpc.report.evaluate import evaluate as evaluate_weights
    from cosmos_hpc.report.scores import summary, write_evaluation
    from cosmos_hpc.report.strips import write_worst
    from cosmos_hpc.tables import print_evaluation

    _check_positive(**{"--windows": windows, "--num-frames": num_frames, "--max-videos": max_videos})
    chosen, runs = _chosen(sources, ema=ema, no_start=no_start)
    trained = _config_of(runs)
    size = crop_size if crop_size is not None or trained is None else trained.data.crop_size
    task = Task(
        data=_data(data, trained),
        split=split,
        num_frames=num_frames or (33 if trained is None else trained.data.num_frames),
        num_windows=windows,
        crop_size=256 if size is None else size or None,
        fields=tuple(field.strip() for field in by.split(",")) if by else (),
        max_videos=max_videos,
    )
    instruments = _instruments(vgg16, features, probe, trained)
    with progress_bar() as progress:
        bar = progress.add_task("evaluate", total=None)
        found = evaluate_weights(
            chosen, task, instruments, on_video=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    folder = out or _folder(runs, task)
    write_evaluation(found, folder)
    pictures = write_worst(found, chosen, task, worst, folder)
    if as_json:
        drawn = [{"video": each.name, "strip": str(each.strip), "mp4": str(each.video)} for each in pictures]
        print_json({**summary(found), "folder": str(folder), "pictures": drawn})
        return
    print_evaluation(found)
    if instruments.eye is None:
        print("no VGG distance: `cosmos-hpc fetch NAME --loss-networks` brings VGG16, or name its file by --vgg16")
    for each in pictures:
        print(f"{each.strip}\n{each.video}")
    print(f"tables in {folder}")


def report(
    experiment: Annotated[str, typer.Argument(help="Experiment.")],
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="No frames of videos on the page.")] = False,
) -> None:
    """Write an experiment's report: one HTML file, with what `evaluate` has found of its runs."""
    from cosmos_hpc.report.page import write_report

    print(write_report(runs_named(experiment)[0].experiment, num_pictures=0 if no_pictures else 3))


def evaluation_folder(experiment: "ExperimentFolder", task: "Task") -> Path:
    """Where the page of an experiment looks for it; the same videos and clips take the place of an earlier one."""
    described = f"{task.data.resolve()} {task.split} {task.shape} {task.num_windows} {task.max_videos} {task.fields}"
    return experiment.evaluations / f"{task.data.name}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def _chosen(names: list[str], *, ema: bool, no_start: bool) -> "tuple[list[Source], list[RunFolder]]":
    """The weights in order, and the runs among them."""
    from cosmos_hpc.config.run_folder import RunFolder
    from cosmos_hpc.report.evaluate import run_source, start_source, weights_source

    chosen: list[Source] = []
    runs: list[RunFolder] = []
    for name in names:
        found = weights_or_runs_named(name)
        if isinstance(found, Path):
            found = _runs_at(found) or found
        if isinstance(found, Path):
            chosen.append(weights_source(found, name))
            continue
        trained = [run for run in found if run.newest_checkpoint() is not None]
        if not trained:
            raise ConfigError(f"{name} has no checkpoint yet: wait for one, or name other weights")
        if not chosen and not no_start:
            chosen.append(start_source(trained[0]))
        for run in trained:
            chosen += [run_source(run), *([run_source(run, ema=True)] if ema else [])]
        runs += trained
    return chosen, runs


def _runs_at(path: Path) -> "list[RunFolder]":
    """The run or the runs of an experiment that lie at a path; none for weights of another kind."""
    from cosmos_hpc.config.run_folder import ExperimentFolder, RunFolder

    resolved = path.resolve()
    return [RunFolder(resolved)] if RunFolder(resolved).config.exists() else ExperimentFolder(resolved).runs()


def _config_of(runs: "list[RunFolder]") -> "RunConfig | None":
    from cosmos_hpc.config.load import read_run_config

    return read_run_config(runs[0].config) if runs else None


def _data(data: Path | None, trained: "RunConfig | None") -> Path:
    if data is None and (trained is None or trained.data.path is None):
        raise ConfigError("no run is named, whose dataset could be taken: name one by --data")
    found = data or Path(trained.data.path)  # type: ignore[union-attr, arg-type]  # checked above
    if not found.exists():
        raise ConfigError(f"--data is {found}, which is not there: name a dataset or a folder of videos")
    return found


def _instruments(
    vgg16: str | None, features: Path | None, probe: str | None, trained: "RunConfig | None"
) -> "Instruments":
    from cosmos_hpc.report.evaluate import Instruments, compute_device, read_eye
    from cosmos_hpc.report.probe import Probe
    from cosmos_hpc.tokenizer.frechet import FeatureNetwork

    eye = _vgg16(vgg16, trained)
    return Instruments(
        eye=None if eye is None else read_eye(eye),
        features=None if features is None else FeatureNetwork(features, compute_device()),
        probe=None if probe is None else Probe(probe),
    )


def _vgg16(name: str | None, trained: "RunConfig | None") -> Path | None:
    """The file: the one named, else the one that the run's loss looked through or that `fetch` brought, if any."""
    from cosmos_hpc.launch.fetch import VGG16, cached_network

    wanted = name or (VGG16 if trained is None else trained.loss.lpips.weights)
    if Path(wanted).is_file():
        return Path(wanted)
    try:
        return cached_network(wanted)
    except ConfigError:
        if name is not None:
            raise
        return None


def _folder(runs: "list[RunFolder]", task: "Task") -> Path:
    experiments = {run.experiment for run in runs}
    return evaluation_folder(experiments.pop(), task) if len(experiments) == 1 else Path("evaluation")


def _check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, but must be at least 1")
