"""How the controller and its partitions are set, in scontrol's own words, asked once by whoever needs it."""

import re
import subprocess

from cosmos_hpc.config.errors import ConfigError


def cluster_settings() -> dict[str, str]:
    """`scontrol show config` by name, such as MaxArraySize, KillWait, PreemptType.

    Raises:
        ConfigError: if the controller does not answer.
    """
    return dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", _told("config"), re.MULTILINE))


def partition_settings(name: str) -> dict[str, str]:
    """`scontrol show partition` by name, such as State, PreemptMode, GraceTime.

    Raises:
        ConfigError: if the controller does not answer, or has no such partition.
    """
    return dict(re.findall(r"(\w+)=(\S*)", _told("partition", name, "--oneliner")))


def whole_seconds(text: str | None) -> int:
    """Of `30 sec`, `00:00:30` or `120`; 0 where nothing is said."""
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    number = re.match(r"\d+", text or "")
    return int(number[0]) if number else 0


def _told(*what: str) -> str:
    try:
        return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise ConfigError("scontrol does not answer: run this on a node of the cluster, see `scontrol ping`") from None
