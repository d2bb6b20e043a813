"""Which parameters training moves."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from cosmos_hpc.config.errors import ConfigError


def freeze_all_but(module: nn.Module, patterns: Sequence[str]) -> None:
    """Leave a gradient to the parameters whose names match, and to no other.

    Args:
        module: network.
        patterns: as of a shell, such as `decoder.up.*`; of the whole name, and `*` matches dots as well.

    Raises:
        ConfigError: if a pattern matches nothing.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"model.trainable has the pattern {pattern!r}, which no parameter matches: "
                f"their names are like {names[0]}, {names[-1]}"
            )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
