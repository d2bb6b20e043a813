"""What a folder holds already, so that a killed call goes on and another one does nothing."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self

from cosmos_hpc.config.errors import ConfigError

LEDGER = "tokenized.jsonl"


class Outcome(NamedTuple):
    """What came of one video."""

    name: str
    size: int
    num_frames: int
    reason: str | None
    """Why it was left out."""


@dataclass(frozen=True)
class Settings:
    """What all samples of a folder have in common."""

    to: str
    dtype: str
    max_frames: int | None
    tile_size: int | None
    tile_overlap: int | None
    """None where frames are taken whole."""

    tokenizer: str
    weights_sha256: str


class Ledger:
    """`tokenized.jsonl` in the folder that is written: the settings on its first line, then a line a finished file.

    A file counts as finished when its line is there and it has the size that the line says. One call at a time.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        """Open the folder's ledger, or begin one.

        Raises:
            ConfigError: if another call writes here, or the folder was made with other settings or by something else.
        """
        self.out = out
        self.files: set[str] = set()
        self.outcomes: dict[str, Outcome] = {}
        path = out / LEDGER
        if not path.exists() and any(out.rglob("*.tar")):
            raise ConfigError(f"{out} holds shards of something else: choose another folder for --out")
        out.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._lock()
            lines = self._whole_lines()
            if lines:
                self._check(json.loads(lines[0]), settings)
            else:
                self._append(asdict(settings))
            self._read(json.loads(line) for line in lines[1:])
        except BaseException as error:
            self._file.close()
            if isinstance(error, ValueError):
                raise ConfigError(f"{path} is damaged ({error}): choose another folder for --out") from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, file: str | None, num_bytes: int, outcomes: Sequence[Outcome]) -> None:
        """Note a file that has its final name, and the videos that it was made of; none where all were left out."""
        self._append({"file": file, "bytes": num_bytes, "videos": outcomes})
        self.outcomes.update((outcome.name, outcome) for outcome in outcomes)
        if file is not None:
            self.files.add(file)

    def free_names(self) -> Iterator[str]:
        """Names of numbered shards that no finished one has."""
        return (name for number in count() if (name := f"shard-{number:06d}.tar") not in self.files)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another `cosmos-hpc tokenize` writes into {self.out}: wait for it, or choose another folder for --out"
            ) from None
        except OSError:
            pass  # a file system without locks; two calls at once then do work twice

    def _whole_lines(self) -> list[bytes]:
        """All lines but the rest of one that was being written when the call died, which is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        return whole.splitlines()

    def _check(self, there: dict[str, object], settings: Settings) -> None:
        facts = {"weights_sha256": "weights", "tokenizer": "tokenizer"}  # the others are options of the command
        others = [
            f"{facts.get(name) or '--' + name.replace('_', '-')} {str(there.get(name))[:12]}, not {str(value)[:12]}"
            for name, value in asdict(settings).items()
            if there.get(name) != value
        ]
        if others:
            raise ConfigError(f"{self.out} was made with {', '.join(others)}: choose another folder for --out")

    def _read(self, records: Iterable[dict]) -> None:
        latest: dict[str | int, dict] = {}
        for number, record in enumerate(records):
            latest.pop(record["file"], None)  # redone: it takes its place at the end
            latest[record["file"] or number] = record
        for record in latest.values():
            if record["file"] is None or _size(self.out / record["file"]) == record["bytes"]:
                self.files.update([record["file"]] if record["file"] else [])
                self.outcomes.update((fields[0], Outcome(*fields)) for fields in record["videos"])

    def _append(self, line: object) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
