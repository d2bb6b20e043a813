"""`cosmos-hpc`: one function per verb, which reads its arguments, calls one function and prints.

Heavy modules are imported inside the verbs that need them: a login node answers at once.
"""

import errno
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cosmos_hpc import __version__
from cosmos_hpc.cli_data import pack, prepare
from cosmos_hpc.cli_doctor import doctor
from cosmos_hpc.cli_evidence import evaluate, report
from cosmos_hpc.cli_image import image
from cosmos_hpc.cli_operation import cancel, checkpoint_now, explain, logs, requeue, status
from cosmos_hpc.cli_options import Json, print_json
from cosmos_hpc.cli_submission import plan, submit
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.names import weights_named as _weights

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich would take a third of the time that --help may take
    help="Post-train NVIDIA Cosmos video tokenizers on your own video, on your own SLURM cluster.",
)

TileSize = Annotated[
    int | None, typer.Option(help="Cut larger frames into tiles of this many pixels a side; whole if left out.")
]
TileOverlap = Annotated[int | None, typer.Option(help="Pixels over which neighbouring tiles are blended: 64.")]


class ExportFormat(StrEnum):
    """Files that `export` writes."""

    JIT = "jit"
    PT = "pt"
    SAFETENSORS = "safetensors"
    DIFFUSERS = "diffusers"


class TokenFormat(StrEnum):
    """Files that `tokenize` writes."""

    SHARDS = "shards"
    SAFETENSORS = "safetensors"


class ExportDtype(StrEnum):
    """Type of the exported weights; the released ones are bf16."""

    BF16 = "bf16"
    FP32 = "fp32"


UNWRITABLE = (errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2."""
    try:
        app()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        mend = "free some space, or choose another folder"
        print(f"error: {error.filename or 'a file'} can't be written ({error.strerror}): {mend}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Post-train NVIDIA Cosmos video tokenizers on your own video, on your own SLURM cluster."""
    if show:
        print(f"cosmos-hpc {__version__}")
        raise typer.Exit


app.command()(pack)
app.command()(prepare)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Cosmos-1.0-Tokenizer-CV8x8x8, or ORGANISATION/REPOSITORY.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; main if left out.")] = None,
    loss_networks: Annotated[bool, typer.Option(help="Also VGG16, for the perceptual loss.")] = False,
    vgg16: Annotated[
        str | None, typer.Option(help="VGG16 from here: REPOSITORY[:FILE]; timm/vgg16.tv_in1k if left out.")
    ] = None,
    raft: Annotated[
        str | None,
        typer.Option(
            help="Also RAFT-large, for the flow loss: REPOSITORY[:FILE] with torchvision's state dict; no default."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring released weights from Hugging Face, once, into the cache that jobs read offline."""
    from cosmos_hpc.launch.fetch import fetch as fetch_weights

    fetched = fetch_weights(name, revision=revision, loss_networks=loss_networks, vgg16=vgg16, raft=raft)
    if as_json:
        print_json(fetched._asdict())
        return
    for file in (*fetched.files, *fetched.loss_network_files):
        print(file)
    print(f"commit {fetched.commit}; in an experiment file: model: {{jit_ckpt_pth: {name}}}")


app.add_typer(image, name="image")
app.command()(doctor)
app.command()(plan)
app.command()(submit)


for verb in (status, cancel, requeue, checkpoint_now, logs, explain):
    app.command()(verb)


app.command()(evaluate)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Run (EXPERIMENT/RUN), checkpoint or folder of weights.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; exports/FORMAT in the run if left out.")] = None,
    to: Annotated[
        ExportFormat,
        typer.Option(
            help="jit: encoder.jit, decoder.jit, autoencoder.jit; pt: model.pt; safetensors; diffusers: a folder."
        ),
    ] = ExportFormat.JIT,
    dtype: Annotated[ExportDtype, typer.Option(help="Type of the weights.")] = ExportDtype.FP32,
    ema: Annotated[
        bool, typer.Option("--ema", help="The moving averages that the run kept of its weights; into FORMAT-ema.")
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="CV: a mean_std.pt, or a dataset to measure it on; if left out, the dataset of the run, "
            "or the mean_std.pt beside the weights."
        ),
    ] = None,
    statistics_frames: Annotated[int | None, typer.Option(help="Frames of each video to measure: 121.")] = None,
    no_statistics: Annotated[bool, typer.Option("--no-statistics", help="Export no mean_std.pt.")] = False,
) -> None:
    """Write weights in the form of the released Cosmos tokenizers, verified before they get their name."""
    import torch

    from cosmos_hpc.config.run_folder import RunFolder
    from cosmos_hpc.ranks import set_up_logging
    from cosmos_hpc.tokenize import statistics_for
    from cosmos_hpc.tokenizer import check_form, load_tokenizer
    from cosmos_hpc.tokenizer import export as export_weights

    set_up_logging()  # tells the difference that the check found
    weights = _weights(source)
    if out is None and not RunFolder(weights).config.exists():
        raise ConfigError(f"{source} is no run: say where to write with --out FOLDER")
    if no_statistics and statistics is not None:
        raise ConfigError("--statistics and --no-statistics exclude each other: leave one out")
    network = load_tokenizer(weights, ema=ema)
    check_form(network, to)
    measured = None
    if not no_statistics:
        with _progress() as progress:
            task = progress.add_task("measure mean_std.pt", total=None, visible=False)

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, visible=True)

            measured = statistics_for(weights, network, statistics, num_frames=statistics_frames, on_video=show)
    torch_dtype = torch.bfloat16 if dtype is ExportDtype.BF16 else torch.float32
    target = out or RunFolder(weights).exports / (f"{to}-ema" if ema else to)
    for file in export_weights(network, target, to, torch_dtype, measured):
        print(file)


@app.command()
def reconstruct(
    sources: Annotated[list[Path], typer.Argument(help="Videos of any length and size, or folders of them.")],
    weights: Annotated[str, typer.Option(help="Run (EXPERIMENT/RUN), checkpoint, export or folder of weights.")],
    out: Annotated[Path, typer.Option(help="Folder for the side-by-side mp4s.")] = Path("reconstructions"),
    max_frames: Annotated[int | None, typer.Option(help="Frames of each video; all if left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write anew what is there already.")] = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
) -> None:
    """Write original and reconstruction side by side."""
    from cosmos_hpc.report.reconstruct import reconstruct_all

    with _progress() as progress:
        task = progress.add_task("reconstruct", total=None)
        summary = reconstruct_all(
            sources,
            _weights(weights),
            out,
            max_frames=max_frames,
            overwrite=overwrite,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            on_frames=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for target in summary.written:
        print(target)
    for _, reason in summary.refused:
        print(f"left out: {reason}")
    if summary.kept:
        print(f"{len(summary.kept)} were in {out} already; --overwrite writes them anew")


@app.command()
def tokenize(
    sources: Annotated[list[Path], typer.Argument(help="Videos, folders of them, or one folder of packed shards.")],
    weights: Annotated[str, typer.Option(help="Run (EXPERIMENT/RUN), checkpoint, export or folder of weights.")],
    out: Annotated[Path, typer.Option(help="Folder to write; what an earlier call finished there is kept.")],
    to: Annotated[
        TokenFormat, typer.Option(help="shards: KEY.latents.npy or KEY.indices.npy with KEY.json; safetensors.")
    ] = TokenFormat.SHARDS,
    shard_size_mib: Annotated[
        float | None, typer.Option(help="Size at which a shard is full, for video files: 256 MiB if left out.")
    ] = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames of each video; all if left out.")] = None,
    dtype: Annotated[ExportDtype, typer.Option(help="Type in which the network computes.")] = ExportDtype.BF16,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    as_json: Json = False,
) -> None:
    """Encode videos to latents or indices, for training that other models do on them."""
    from cosmos_hpc.tokenize import Progress
    from cosmos_hpc.tokenize import tokenize as tokenize_videos

    with _progress() as progress:
        task = progress.add_task("tokenize", total=None)

        def show(at: Progress) -> None:
            what = f"tokenize, {at.num_frames} frames"
            progress.update(task, completed=at.num_done, total=at.num_videos, description=what)

        summary = tokenize_videos(
            sources,
            _weights(weights),
            out,
            to=to,
            dtype=dtype,
            shard_size_mib=shard_size_mib,
            max_frames=max_frames,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            on_progress=show,
        )
    if as_json:
        print_json(summary._asdict())
        return
    for source, reason in summary.skipped:
        print(f"left out {source}: {reason}")
    if summary.videos == 0:
        print(f"nothing to do: {out} holds what can be had of these videos")
        return
    written = f"{summary.videos} videos ({summary.frames} frames) into {summary.files} files"
    print(f"tokenized {written} ({summary.bytes / 2**20:.1f} MiB) in {out}; {summary.kept} were dealt with before")


app.command()(report)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the clips, the dataset, the runs and the report.")] = Path(
        "quickstart"
    ),
) -> None:
    """Go the whole way once on this machine, small, on real clips: about four minutes on two cores."""
    from cosmos_hpc.quickstart import run_quickstart

    run_quickstart(out)


def _progress() -> Any:
    from cosmos_hpc.launch.follow import progress_bar

    return progress_bar()


if __name__ == "__main__":
    main()
