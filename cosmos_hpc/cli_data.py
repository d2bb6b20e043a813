"""The verbs that make a dataset: `pack` and `prepare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cosmos_hpc.cli_options import Json, print_json
from cosmos_hpc.config.errors import ConfigError


def pack(
    sources: Annotated[
        list[Path], typer.Argument(help="Videos, folders of them, patterns in quotes, or .csv and .txt lists.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tar shards.")],
    shard_size_mib: Annotated[float, typer.Option(help="Size at which a shard is full, in MiB.")] = 256,
    max_clips_per_shard: Annotated[int | None, typer.Option(help="Videos at which a shard is full.")] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Shards written at the same time: one per core, or per task.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Leave out broken, short, static and copied videos.")] = True,
    min_frames: Annotated[int, typer.Option(help="Videos with fewer frames are left out.")] = 9,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Regular expression whose find in a path says what stays on one side of the split; "
            "its folder if left out and all videos lie in folders; `none`: no groups."
        ),
    ] = None,
    split_s: Annotated[
        float | None, typer.Option(help="Cut longer videos, at key frames, into parts of at least so many seconds.")
    ] = None,
    split_scenes: Annotated[
        bool,
        typer.Option(
            "--split-scenes", help="Cut videos where another scene begins, up to whose first key frame is left out."
        ),
    ] = False,
    gop: Annotated[
        int | None, typer.Option(help="Encode anew (H.264), with a key frame every so many frames: cheap to decode.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Encode anew, the shorter side brought down to so many pixels.")
    ] = None,
    crf: Annotated[int, typer.Option(help="Quality of what is encoded anew: 0 is lossless, 51 is worst.")] = 18,
    array: Annotated[
        int | None, typer.Option(help="Send that many tasks to the cluster instead of packing here.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Profile for --array, such as slurm/cpu.yaml; SLURM, if left out and there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack videos into WebDataset tar shards; the same call again goes on where it was killed."""
    import os

    from cosmos_hpc.data.pack import PackSettings, plan_pack
    from cosmos_hpc.data.pack import pack as pack_videos

    settings = PackSettings(
        shard_size_mib=shard_size_mib,
        max_clips_per_shard=max_clips_per_shard,
        probe=probe,
        min_frames=min_frames,
        group_by=group_by,
        split_s=split_s,
        split_scenes=split_scenes,
        gop=gop,
        height=height,
        crf=crf,
    )
    if array is not None:
        from cosmos_hpc.data.pack import PLAN_FOLDER, PackTask
        from cosmos_hpc.launch.tasks import send_tasks

        num_shards = len(plan_pack(sources, out, settings).shards)
        count = min(array, num_shards)
        tasks = [PackTask(out.resolve(), index, count, num_workers or 1) for index in range(count)]
        jobs = send_tasks(f"pack-{out.name}", tasks, out / PLAN_FOLDER / "submitit", cluster)
        print(json.dumps(jobs) if as_json else f"sent {len(jobs)} tasks for {num_shards} shards: {' '.join(jobs)}")
        return
    from cosmos_hpc.data.video_names import find_videos
    from cosmos_hpc.launch.follow import progress_bar

    with progress_bar() as progress:
        task = progress.add_task("pack", total=len(find_videos(sources)))
        summary = pack_videos(
            sources,
            out,
            settings,
            num_workers=num_workers or os.cpu_count() or 1,
            on_video=lambda _: progress.advance(task),
        )
    if as_json:
        print_json(summary._asdict())
        return
    for video, reason in summary.refused:
        print(f"left out {video}: {reason}")
    print(f"packed {summary.videos} videos ({summary.bytes / 2**20:.1f} MiB) into {summary.shards} shards in {out}")
    print(f"next: cosmos-hpc prepare {out}")


def prepare(
    root: Annotated[Path, typer.Argument(help="Folder of tar shards; train/, val/ in it, if there, are the split.")],
    split: Annotated[str, typer.Option(help="Shares of shards for train, val and test.")] = "99,1,0",
    shuffle_tars: Annotated[
        bool, typer.Option("--shuffle-tars", help="Deal shards out shuffled, not by name.")
    ] = False,
    num_workers: Annotated[int, typer.Option(help="Shards read at the same time.")] = 4,
    streams: Annotated[int, typer.Option(help="Ranks x workers to come: fewer training videos are refused.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare all shards with the index, byte by byte.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Index shards for Energon, without a question; a killed call goes on."""
    from cosmos_hpc.data.prepare import check as check_dataset
    from cosmos_hpc.data.prepare import prepare as prepare_dataset
    from cosmos_hpc.launch.follow import progress_bar

    shares = _shares(split)
    with progress_bar() as progress:
        task = progress.add_task("check" if check else "prepare", total=None)

        def on_shard(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if check:
            counts = check_dataset(root, num_workers=num_workers, on_shard=on_shard)
        else:
            counts = prepare_dataset(
                root,
                split=shares,
                shuffle_tars=shuffle_tars,
                num_workers=num_workers,
                num_streams=streams,
                on_shard=on_shard,
            )
    if as_json:
        print_json(counts)
    else:
        done = "checked" if check else "prepared"
        print(f"{done} {root}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(share) for share in text.split(","))
    except ValueError:
        raise ConfigError(f"--split is {text!r}, but takes three numbers: such as 99,1,0") from None
    return train, val, test
