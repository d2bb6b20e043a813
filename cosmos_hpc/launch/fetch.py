"""Released weights and loss networks, once, on the login node, into the cache that compute nodes read offline."""

import errno
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import tqdm

from cosmos_hpc.config.errors import ConfigError

VGG16 = "timm/vgg16.tv_in1k"
"""VGG16 trained on ImageNet, for the perceptual loss. For RAFT-large, of the flow loss, no such repository is known."""

WEIGHTS = (("autoencoder.jit",), ("encoder.jit", "decoder.jit"), ("model.safetensors",), ("model.pt",))
"""Files that together hold a network; one of these rows is needed."""

WANTED = (*(name for row in WEIGHTS for name in row), "config.json", "mean_std.pt")
"""Files that are fetched; whatever else a repository holds is left there."""

PUBLISHED_MD5 = {
    "nvidia/Cosmos-Tokenize1-CV8x8x8-720p": {
        "autoencoder.jit": "7f658580d5cf617ee1a1da85b1f51f0d",
        "encoder.jit": "f5834d03645c379bc0f8ad14b9bc0299",
        "decoder.jit": "ff21a63ed817ffdbe4b6841111ec79a8",
        "mean_std.pt": "f07680ad7eefae57d698778e2a0c7c96",
    },
    "nvidia/Cosmos-Tokenize1-DV8x16x16-720p": {
        "autoencoder.jit": "606b8585b637f06057725cbb67036ae6",
        "encoder.jit": "95186b0410346a3f0cf250b76daec452",
        "decoder.jit": "f0c8a9d992614a43e7ce24ebfc901e26",
    },
}
"""Sums that NVIDIA gives for its files, by repository."""

LOGIN = "`hf auth login` or HF_TOKEN"


class FetchedWeights(NamedTuple):
    """What lies in the cache after a fetch."""

    folder: Path
    """Snapshot of the repository; `read_weights` takes it."""

    commit: str
    """The revision's commit, to name in a paper or to pin."""

    files: tuple[Path, ...]
    """The fetched files in that folder."""

    loss_network_files: tuple[Path, ...] = ()
    """The fetched files of the networks that losses look through, if asked for."""


class RepositoryFile(NamedTuple):
    """A file on Hugging Face, written as REPOSITORY:FILE; where no file is named, the weights by their usual name."""

    repository: str
    file: str | None

    @classmethod
    def of(cls, name: str) -> Self:
        """Read the name.

        Raises:
            ConfigError: if it can't be one.
        """
        repository, colon, file = name.partition(":")
        if colon and (not file or file.startswith("/") or ".." in file.split("/") or re.search(r"[*?\[]", file)):
            raise ConfigError(f"{name!r} names no file: name one such as ORGANISATION/REPOSITORY:raft_large.pth")
        return cls(repository_id(repository), file or None)


def fetch(
    name: str,
    *,
    revision: str | None = None,
    loss_networks: bool = False,
    vgg16: str | None = None,
    raft: str | None = None,
) -> FetchedWeights:
    """Download what is missing of a repository and compare sizes and checksums of all of it.

    A broken connection is taken up again where it broke; finished files are kept if the fetch ends early. A bar is
    shown where standard error is a terminal.

    Args:
        name: `ORGANISATION/REPOSITORY` on Hugging Face, or one of NVIDIA's by its last part.
        revision: branch, tag or commit; none: `main`.
        loss_networks: also fetch `VGG16`.
        vgg16: take VGG16 from here instead: `REPOSITORY` or `REPOSITORY:FILE`.
        raft: also fetch RAFT-large from here, written the same way.

    Raises:
        ConfigError: with what failed and the mend; no token is ever part of it.
    """
    others = [VGG16 if vgg16 is None and loss_networks else vgg16, raft]
    networks = [RepositoryFile.of(other) for other in others if other is not None]
    weights = _fetch_repository(RepositoryFile(repository_id(name), None), revision)
    fetched = [_fetch_repository(network, None) for network in networks]
    return weights._replace(loss_network_files=tuple(file for network in fetched for file in network.files))


def cached(name: str, revision: str | None = None) -> Path:
    """The folder that `fetch` filled, without any use of the network.

    Its files are links to `../../blobs`: a container needs the repository's whole folder, two levels up.

    Raises:
        ConfigError: if the weights are not in the cache, or not all of them.
    """
    repository = repository_id(name)
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(WANTED), local_files_only=True)
    except LocalEntryNotFoundError:
        folder = None
    if folder is None or not _holds_weights(Path(folder)):
        chosen = f" --revision {revision}" if revision else ""
        raise ConfigError(
            f"{repository}{f' at {revision}' if revision else ''} is not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}: run `cosmos-hpc fetch {name}{chosen}` on the login node first, "
            "with the same HF_HOME"
        )
    return Path(folder)


def cached_network(name: str) -> Path:
    """The file of a loss network that `fetch` brought, without any use of the network.

    Args:
        name: as `fetch` was given it, such as `VGG16`: `REPOSITORY` or `REPOSITORY:FILE`.

    Raises:
        ConfigError: if it is not in the cache.
    """
    repository, file = RepositoryFile.of(name)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_wanted(file), local_files_only=True))
        return next(folder / wanted for wanted in _wanted(file) if (folder / wanted).exists())
    except (LocalEntryNotFoundError, StopIteration):
        raise ConfigError(
            f"{name} is not in the Hugging Face cache {constants.HF_HUB_CACHE}: run `cosmos-hpc fetch` with "
            "--loss-networks (or --vgg16, --raft) on the login node first, with the same HF_HOME"
        ) from None


def repository_id(name: str) -> str:
    """`ORGANISATION/REPOSITORY` of a name; one without an organisation is NVIDIA's.

    Raises:
        ConfigError: if the name can't be a repository's.
    """
    if re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII) is None or re.search(r"--|\.\.|\.git$|[.-]$", name):
        raise ConfigError(
            f"{name!r} is no repository on Hugging Face: name one such as Cosmos-1.0-Tokenizer-CV8x8x8 "
            "or ORGANISATION/REPOSITORY"
        )
    return name if "/" in name else f"nvidia/{name}"


class _TerminalBar(tqdm):
    """The client's bar, on a terminal only: its own counts files wherever standard error leads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": options.get("disable") or not sys.stderr.isatty()})


def _wanted(file: str | None) -> list[str]:
    """Names of the files that are fetched."""
    return list(WANTED) if file is None else [file]


def _fetch_repository(wanted: RepositoryFile, revision: str | None) -> FetchedWeights:
    repository, names = wanted.repository, _wanted(wanted.file)
    with _one_line_errors(repository, revision), _quiet():
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=names, tqdm_class=_TerminalBar))
        described = HfApi().model_info(repository, revision=folder.name, files_metadata=True)
    released = {file.rfilename: file for file in described.siblings or ()}
    if wanted.file is not None and not (folder / wanted.file).exists():
        raise ConfigError(
            f"{_page(repository)} holds no {wanted.file}: choose a file from {_page(repository)}/tree/main"
        )
    if wanted.file is None and not _holds_weights(folder):  # the client counts patterns without a match as a success
        raise ConfigError(
            f"{_page(repository)} at commit {folder.name} holds none of "
            f"{', '.join(' with '.join(row) for row in WEIGHTS)}: name the repository of a Cosmos tokenizer, "
            "or a loss network's file as REPOSITORY:FILE"
        )
    files = tuple(folder / name for name in names if (folder / name).exists())
    for file in files:
        _refuse_damaged(file, released[file.relative_to(folder).as_posix()])
        _refuse_unpublished(file, repository)
    return FetchedWeights(folder, folder.name, files)


def _holds_weights(folder: Path) -> bool:
    return any(all((folder / name).exists() for name in row) for row in WEIGHTS)


def _refuse_damaged(file: Path, released: RepoSibling) -> None:
    """Compare with what the repository says of the file; the client compares sizes only, and only while it loads."""
    size = file.stat().st_size
    if released.size is not None and size != released.size:  # mirrors may leave it out
        _remove(file)
        raise ConfigError(f"{file} had {size} bytes in place of {released.size} and was removed: fetch it again")
    if released.lfs is not None and _digest(file, "sha256") != released.lfs.sha256:
        _remove(file)
        raise ConfigError(f"{file} was damaged (its SHA-256 is not the repository's) and was removed: fetch it again")


def _refuse_unpublished(file: Path, repository: str) -> None:
    published = PUBLISHED_MD5.get(repository, {}).get(file.name)
    if published is not None and (found := _digest(file, "md5")) != published:
        _remove(file)
        raise ConfigError(
            f"{file} had the MD5 sum {found}, but NVIDIA published {published}, and was removed: fetch it again, "
            f"or name the published commit with --revision, see {_page(repository)}/commits/main"
        )


def _digest(file: Path, algorithm: str) -> str:
    with file.open("rb") as stream:
        # MD5 guards against accidents here, which machines in FIPS mode need to be told
        return hashlib.file_digest(stream, partial(hashlib.new, algorithm, usedforsecurity=False)).hexdigest()


def _remove(file: Path) -> None:
    """Take a file out of the cache, so that no job reads it and the next fetch loads it anew."""
    file.resolve().unlink()
    file.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's warnings to itself: it resumes by its own, and what ends a fetch is told in one line."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        hub_logging.set_verbosity(level)


@contextmanager
def _one_line_errors(repository: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, RuntimeError, UnicodeError) as error:  # hf_xet raises RuntimeError, even on a full disk
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise ConfigError(_explained(cause, repository, revision)) from error


def _explained(error: BaseException, repository: str, revision: str | None) -> str:
    """What happened, where, and the mend; a GatedRepoError is a RepositoryNotFoundError, and both are OSErrors."""
    page = _page(repository)
    match error:
        case GatedRepoError() if get_token() is None:
            return f"{repository} is gated: accept its licence at {page}, then log in with {LOGIN}"
        case GatedRepoError():
            return (
                f"{repository} is gated and your token has no access: accept its licence at {page} "
                f"as the token's owner, or give another token with {LOGIN}"
            )
        case RepositoryNotFoundError():
            return f"{page} does not exist, or is private: check the name, or log in as a member with {LOGIN}"
        case RevisionNotFoundError():
            return f"{repository} has no revision {revision}: choose a branch, tag or commit from {page}/commits/main"
        case HfHubHTTPError(response=response) if response.status_code == 401:
            return (
                f"{constants.ENDPOINT} wants a valid token (401): give one with {LOGIN}; "
                "a public repository opens without any"
            )
        case HfHubHTTPError(response=response) if response.status_code == 403:
            return f"{page} is forbidden to your token (403): give one that may read it with {LOGIN}"
        case HfHubHTTPError(response=response):
            return f"{page} can't be fetched now: the server answered {response.status_code}: run it again later"
        case OfflineModeIsEnabled():
            return f"{page} can't be fetched while HF_HUB_OFFLINE is set: unset it on the login node"
        case UnicodeError():
            return f"the Hugging Face token holds a character that no request can carry: give it again with {LOGIN}"
        case _ if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return (
                f"{constants.HF_HUB_CACHE} is full, so {repository} can't be fetched: "
                "free some space, or set HF_HOME to a folder with room"
            )
        case PermissionError() | FileExistsError() | NotADirectoryError() | OSError(errno=errno.EROFS):
            return f"{constants.HF_HUB_CACHE} can't be written ({_reason(error)}): set HF_HOME to a folder of yours"
        case HTTPError():
            return (
                f"{constants.ENDPOINT} can't be reached ({_reason(error)}): run this where there is internet access, "
                "behind a proxy with HTTPS_PROXY set; finished files are kept"
            )
        case _:
            return f"{page} can't be fetched ({_reason(error)}): run it again; finished files are kept"


def _reason(error: BaseException) -> str:
    """The error's first line, unless it quotes a request's headers."""
    text = next(iter(str(error).splitlines()), "")
    return type(error).__name__ if not text or "Bearer" in text else text


def _page(repository: str) -> str:
    return f"{constants.ENDPOINT}/{repository}"
