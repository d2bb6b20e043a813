"""What runs read: weights, loss networks, and the dataset, down to a decoded clip of each split."""

import dataclasses
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.data.clips import UndecodableError
from cosmos_hpc.data.dataset_index import is_metadataset, is_remote, metadataset_parts, split_shards, split_sizes
from cosmos_hpc.data.shard_check import changed_shard
from cosmos_hpc.doctor.case import Case
from cosmos_hpc.doctor.finding import Finding, failed, passed, warned
from cosmos_hpc.preflight import check_data, loss_networks, starting_weights

LOOKERS = 16
"""Shards that are looked at together, each at the other end of a network."""

CLIPS = 3
"""Videos of a split that are tried until one can be decoded."""


def weights(case: Case) -> Iterator[Finding]:
    """What training starts from lies on this file system, whole."""
    for run in case.distinct(lambda run: run.model):
        try:
            path = starting_weights(run.model)
        except ConfigError as error:
            yield failed("weights", str(error))
            return
        if path is None:
            yield passed("weights", "model.jit_ckpt_pth is not set: training starts from random weights")
        elif (damage := _damage_in(Path(path))) is not None:
            yield failed("weights", f"{damage}: fetch or export it again")
        else:
            yield passed("weights", path)


def networks(case: Case) -> Iterator[Finding]:
    """VGG16 and RAFT, where the loss looks through them."""
    for run in case.distinct(lambda run: run.loss):
        try:
            files = loss_networks(run).values()
        except ConfigError as error:
            yield failed("loss networks", str(error))
            return
        damaged = [damage for file in files if (damage := _damage_in(Path(file))) is not None]
        if damaged:
            yield failed("loss networks", f"{damaged[0]}: fetch it again")
        elif files:
            yield passed("loss networks", ", ".join(files))


def dataset(case: Case) -> Iterator[Finding]:
    """Index, splits, and samples for all ranks x workers, as `submit` refuses them."""
    for run in case.distinct(lambda run: (run.data, run.trainer.world_size)):
        try:
            check_data(run)
        except ConfigError as error:
            if case.first.after and case.jobs_before:
                yield warned("dataset", f"{error}; jobs that come before may still write it")
            else:
                yield failed("dataset", str(error))
            return
    remote = [run.data.path for run in case.distinct(lambda run: run.data.path) if is_remote(run.data.path)]
    yield from (passed("dataset", f"{path} is in an object store, and opened by the ranks alone") for path in remote)
    for path in _datasets(case):
        sizes = ", ".join(f"{count} {split}" for split, count in split_sizes(path).items())
        yield passed("dataset", f"{path}: {sizes}")


def shards(case: Case) -> Iterator[Finding]:
    """Every shard is there, as long as its index says, and no younger."""
    for path in _datasets(case):
        names = sorted({name for names in split_shards(path).values() for name in names})
        with ThreadPoolExecutor(LOOKERS) as pool:
            found = [wrong for wrong in pool.map(partial(changed_shard, path), names) if wrong]
        if found:
            yield failed("shards", f"{path}: {'; '.join(found[:3])}{' ...' if len(found) > 3 else ''} ({len(found)} of "
                         f"{len(names)}): `cosmos-hpc prepare {path}` again, or bring them back")  # fmt: skip
        elif names:
            yield passed("shards", f"{path}: {len(names)} as indexed, by size and time; `prepare --check` reads them")


def clips(case: Case) -> Iterator[Finding]:
    """A clip of every split, decoded as in training."""
    for run in case.distinct(lambda run: dataclasses.replace(run.data, num_workers=1, num_streams=None)):
        for path in _datasets(case):
            for split, names in split_shards(path).items():
                if names:
                    yield _clip(run.data, path, split, names)


def _clip(data: DataConfig, path: Path, split: str, names: list[str]) -> Finding:
    from cosmos_hpc.data.choosing import ClipKind  # torch: seconds of imports
    from cosmos_hpc.data.decoding import ClipDecoder

    is_of_images = str(path) == data.image_path
    shapes = [shape for shape in data.clip_shapes if split == "train" and (shape[0] == 1 or not is_of_images)]
    kinds = [ClipKind.of(data, *shape) for shape in shapes or [(data.num_frames, data.crop_size, data.crop_size)]]
    decoder = ClipDecoder(data.decode_timeout_s, data.decoder)
    reasons = []
    try:
        for name, raw in _first_videos(path, names):
            try:
                found = decoder.clips(raw, kinds, seed=None)
            except UndecodableError as error:
                reasons.append(f"{name}: {error}")
                continue
            return passed("clips", f"{path}, {split}: {name} gives {', '.join(str(list(c.shape)) for c in found)}")
    except (OSError, tarfile.TarError) as error:
        reasons.append(str(error))
    finally:
        decoder.close()
    told = "; ".join(reasons) or "its shards hold no video"
    frames = max(kind.num_frames for kind in kinds)
    return failed("clips", f"{path}, {split}: no clip of {frames} frames can be had ({told}): set data.num_frames "
                  "(data.shapes) lower, or pack other videos")  # fmt: skip


def _first_videos(path: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Videos of the first shard, each with its place."""
    from cosmos_hpc.data.sources import FILM  # brings PyAV

    left = CLIPS
    with tarfile.open(path / names[0], "r:") as shard:
        for member in shard:
            stream = shard.extractfile(member) if FILM.fullmatch(Path(member.name).name.partition(".")[2]) else None
            if stream is None:
                continue
            yield f"{names[0]}/{member.name}", stream.read()
            left -= 1
            if not left:
                return


def _datasets(case: Case) -> list[Path]:
    """Folders with an index, those inside blends too."""
    named = [path for run in case.distinct(lambda run: (run.data.path, run.data.general_path, run.data.image_path))
             for path in (run.data.path, run.data.general_path, run.data.image_path)
             if path and not is_remote(path)]  # fmt: skip
    found = []
    for path in dict.fromkeys(map(Path, named)):
        is_blend = is_metadataset(path)
        found += [part for split in ("train", "val") for part in metadataset_parts(path, split)] if is_blend else [path]
    return [path for path in dict.fromkeys(found) if split_shards(path)]


def _damage_in(path: Path) -> str | None:
    """What is wrong with the archives that hold weights; none where nothing is, or they are none."""
    files = [path] if path.is_file() else sorted(path.glob("*.jit")) + sorted(path.glob("*.pt"))
    for file in files:
        if file.suffix not in (".jit", ".pt", ".pth"):
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            if file.suffix == ".pth" and isinstance(error, zipfile.BadZipFile):  # the format before 2020
                continue
            return f"{file} is damaged ({error})"
        if damaged is not None:
            return f"{file} is damaged (CRC of {damaged})"
    return None
