"""The verbs of `cosmos-hpc image`: containers' images on the shared file system."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_hpc.cli_options import Json, print_json
from cosmos_hpc.config.errors import ConfigError

if TYPE_CHECKING:
    from cosmos_hpc.launch.image_import import WantedImage

image = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Images of containers, once, on the shared file system."
)


@dataclass(frozen=True)
class ImportTask:
    """An import as a job of its own; called again after a preemption, it goes on with the layers that it has."""

    wanted: "WantedImage"

    def __call__(self) -> None:
        """Import, with a line in the log for each thing that enroot does."""
        from cosmos_hpc.launch.image_import import bring

        told: list[str] = []

        def tell(step: str, done: int) -> None:
            if told[-1:] != [step]:
                told.append(step)
                print(f"{step} ({done / 2**30:.1f} of {self.wanted.remote.size / 2**30:.1f} GiB)", flush=True)

        print(bring(self.wanted, tell), flush=True)


@image.command("import")
def import_image(
    source: Annotated[
        str, typer.Argument(help="Such as nvcr.io/nvidia/nemo:25.02, or a profile such as enroot/nemo.yaml.")
    ],
    cluster: Annotated[
        str | None, typer.Option(help="Import in a job of this profile, such as slurm/cpu.yaml, instead of here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring an image from a registry, with enroot's own credentials; what is there already stays."""
    from cosmos_hpc.launch.image_import import bring, find
    from cosmos_hpc.launch.images import images_folder

    name, digest = _named(source)
    wanted = find(name, images_folder(), digest)
    job = None
    if wanted.is_there:
        file = wanted.file
    elif cluster is not None:
        from cosmos_hpc.launch.tasks import send_tasks

        file = wanted.file
        (job,) = send_tasks("image-import", [ImportTask(wanted)], images_folder() / "import_logs", cluster)
    else:
        from cosmos_hpc.launch.follow import progress_bar

        with progress_bar() as progress:
            task = progress.add_task("import", total=wanted.remote.size >> 20)

            def show(step: str, done: int) -> None:
                progress.update(task, description=f"{step}, MiB", completed=done >> 20)

            file = bring(wanted, show)
    if as_json:
        print_json({"file": str(file), "digest": wanted.remote.digest, "job": job})
    elif job is not None:
        print(f"sent as job {job}, which writes {file}; its log is in {images_folder() / 'import_logs'}")
    else:
        print(f"{file}\n{wanted.remote.digest}; in an experiment file: container: {{image: {wanted.name}}}")


@image.command("list")
def list_images(as_json: Json = False) -> None:
    """Show the images that are there, oldest first, and what they hold."""
    from cosmos_hpc.launch.images import PACKAGES, images_folder, imported

    found = imported()
    if as_json:
        print_json([{"file": str(file), **asdict(manifest)} for file, manifest in found])
        return
    for file in sorted(images_folder().glob(".*.partial")):
        print(f"being imported: {file.name.removeprefix('.').removesuffix('.partial')}, {_mib(file)} MiB written")
    if not found:
        print(f"no images in {images_folder()} (COSMOS_HPC_IMAGES); see: cosmos-hpc image import")
        return
    from cosmos_hpc.tables import print_table

    rows = [
        [
            manifest.name,
            (manifest.digest or "-").removeprefix("sha256:")[:12],
            f"{manifest.size / 2**30:.1f} GiB",
            manifest.imported[:10],
            ", ".join(f"{name} {manifest.packages[name]}" for name in PACKAGES if name in manifest.packages) or "-",
        ]
        for _, manifest in found
    ]
    print_table(["image", "digest", "size", "imported", "inside"], rows)


@image.command()
def describe(
    file: Annotated[Path, typer.Argument(help="Squashfs file that was not made by `image import`.")],
    as_json: Json = False,
) -> None:
    """Write beside a squashfs file what is inside, as `import` does, for `list` and `doctor`."""
    from cosmos_hpc.launch.image_import import describe as describe_file
    from cosmos_hpc.launch.images import PACKAGES

    manifest = describe_file(file)
    if as_json:
        print_json(asdict(manifest))
        return
    print(f"{file}: " + ", ".join(f"{name} {manifest.packages.get(name, 'is missing')}" for name in PACKAGES))


@image.command()
def remove(
    name: Annotated[str, typer.Argument(help="Image, beginning of a digest, or file.")],
) -> None:
    """Remove an image, unless a run that waits or runs needs it."""
    from cosmos_hpc.launch.images import manifest_file

    file = _one_image(name)
    users = _living_users(file)
    if users:
        raise ConfigError(f"{file} is used by {', '.join(users)}: cancel these first, or wait for their end")
    file.unlink()
    manifest_file(file).unlink(missing_ok=True)
    print(f"removed {file}")


def _mib(file: Path) -> int:
    return (file.stat().st_size if file.exists() else 0) >> 20


def _named(source: str) -> tuple[str, str | None]:
    """Name and pinned digest, also out of a profile."""
    if not source.endswith((".yaml", ".yml")):
        return source, None
    from cosmos_hpc.config.load import load_experiment, resolve
    from cosmos_hpc.launch.images import SUFFIXES

    container = resolve(load_experiment(None, [f"container={source}", "cluster=local"]), {}).container
    if container.image is None or container.image.endswith(SUFFIXES):
        raise ConfigError(
            f"{source}: container.image is {container.image}, but only a registry's image can be imported"
        )
    return container.image, container.digest


def _one_image(name: str) -> Path:
    from cosmos_hpc.launch.images import ImageName, imported

    if Path(name).is_file():
        return Path(name).resolve()
    found = [
        file
        for file, manifest in imported()
        if name in (file.name, manifest.name, manifest.digest)
        or (len(name) >= 6 and (manifest.digest or "").removeprefix("sha256:").startswith(name))
        or (":" in name and manifest.name == str(ImageName.of(name)))
    ]
    if len(found) != 1:
        fit = "names no image" if not found else f"names {len(found)} images, {', '.join(file.name for file in found)}"
        raise ConfigError(f"{name} {fit}: choose a digest of `cosmos-hpc image list`")
    return found[0]


def _living_users(file: Path) -> list[str]:
    """Runs that are not over and whose settings name the file."""
    from cosmos_hpc import api
    from cosmos_hpc.launch.status import run_statuses

    users = [run for run in api.runs() if f" {file}\n" in run.config.read_text()]
    return [status.run for status in run_statuses(users) if not status.is_over]
