"""What the schema says of a field beside its type, and how it refuses a value."""

from dataclasses import field
from typing import Any

from cosmos_hpc.config.errors import ConfigError


def neutral(default: Any) -> Any:
    """A field that changes how a run is executed but not what comes out of it."""
    return field(default=default, metadata={"identity": False})


def expands(default: Any, **metadata: bool) -> Any:
    """A path or name in which `$NAME`, `${NAME}` of the environment and `~` are expanded.

    With `is_path=True`, a relative path is kept whole, as jobs start elsewhere; with `may_be_repository=True` only if
    it exists, since the value may name a repository on Hugging Face.
    """
    return field(default=default, metadata={"expands": True, **metadata})


def require(holds: bool, message: str) -> None:
    """Refuse a value that can't work.

    Raises:
        ConfigError: with the message, if `holds` is false.
    """
    if not holds:
        raise ConfigError(message)
