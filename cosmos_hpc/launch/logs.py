"""A rank's log, once or for as long as it grows."""

import time
from collections.abc import Iterator

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.run_folder import RunFolder
from cosmos_hpc.launch.status import run_status

POLL_S = 0.5


def read_log(folder: RunFolder, rank: int, attempt: int | None, *, follow: bool) -> Iterator[str]:
    """Pieces of the log's text.

    Args:
        folder: the run.
        rank: global index.
        attempt: from 0; none for the newest.
        follow: go on until the run is over.

    Raises:
        ConfigError: if there is no such log.
    """
    started = sorted(folder.path.glob("logs/*"))
    if not started:
        raise ConfigError(f"{folder.label} has no logs yet: see `cosmos-hpc status {folder.label}`")
    log = folder.rank_log(len(started) - 1 if attempt is None else attempt, rank)
    if not log.exists():
        there = sorted(str(path.relative_to(folder.path / "logs")) for path in folder.path.glob("logs/*/rank_*.log"))
        raise ConfigError(
            f"{folder.label} has no {log.relative_to(folder.path)}: there are {', '.join(there) or 'none'}"
        )
    with log.open(errors="replace") as file:
        while True:
            is_over = not follow or run_status(folder).is_over
            yield file.read()
            if is_over:
                return
            time.sleep(POLL_S)
