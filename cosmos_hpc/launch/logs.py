"""A rank's log, once or for as long as it grows."""

import time
from collections.abc import Iterator
from pathlib import Path

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.launch.status import run_status

POLL_S = 0.5


def read_log(folder: RunFolder, rank: int, attempt: int | None, *, follow: bool) -> Iterator[str]:
    """Pieces of the log's text.

    Args:
        folder: the run.
        rank: global index.
        attempt: from 0; none for the newest, and with `follow` for those that come after it as well.
        follow: go on until the run is over, and wait for a log that is not there yet.

    Raises:
        ConfigError: if there is no such log.
    """
    number = max(0, folder.next_attempt() - 1) if attempt is None else attempt
    place = 0
    while True:
        is_over = not follow or run_status(folder).is_over
        is_last = attempt is not None or number >= folder.next_attempt() - 1
        log = folder.rank_log(number, rank)
        if log.exists():
            text, place = _read_from(log, place)
            yield text
        elif is_over:
            raise ConfigError(_what_there_is(folder, log))
        if not is_last:
            number, place = number + 1, 0
        elif is_over:
            return
        else:
            time.sleep(POLL_S)


def _read_from(log: Path, place: int) -> tuple[str, int]:
    with log.open("rb") as file:
        file.seek(place)
        text = file.read()
    return text.decode(errors="replace"), place + len(text)


def _what_there_is(folder: RunFolder, log: Path) -> str:
    there = sorted(str(path.relative_to(folder.path / "logs")) for path in folder.path.glob("logs/*/rank_*.log"))
    if not there:
        return f"{folder.label} has no logs yet: see `cosmos-hpc status {folder.label}`"
    return f"{folder.label} has no {log.relative_to(folder.path)}: there are {', '.join(there)}"
