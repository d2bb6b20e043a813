"""Settings as written to typed objects, through OmegaConf; many variants of the same settings at little cost."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.config.schema import RunConfig


def typed(schema: type, settings: Mapping[str, Any], source: str) -> Any:
    """An object of the schema.

    Args:
        schema: dataclass, nested by groups.
        settings: nested as in YAML.
        source: where they come from, for messages.

    Raises:
        ConfigError: for a value of the wrong type, or one that the schema refuses.
    """
    return Variants(schema, settings, source).make({}, source)


class Variants:
    """Settings of which some take other values in each variant; OmegaConf, which is slow, reads each value once."""

    def __init__(self, schema: type, settings: Mapping[str, Any], source: str) -> None:
        self._schema = schema
        with _one_line(schema, settings, source):
            self._typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(settings)))
            self._plain = typing.cast(dict[str, Any], OmegaConf.to_container(self._typed))
        self._read: dict[tuple[str, str], Any] = {}

    def make(self, choices: Mapping[str, Any], source: str) -> Any:
        """The object that the settings become with these choices.

        Args:
            choices: dotted setting to value as written.
            source: for messages.

        Raises:
            ConfigError: for a value of the wrong type, or one that the schema refuses.
        """
        chosen = {key: self._value(key, value, source) for key, value in choices.items()}
        try:
            return _build(self._schema, self._plain, chosen)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def _value(self, key: str, value: Any, source: str) -> Any:
        """A value as the type of its setting."""
        known = (key, repr(value))
        if known not in self._read:
            group, _, name = key.rpartition(".")
            holder = typing.cast(DictConfig, OmegaConf.select(self._typed, group) if group else self._typed)
            OmegaConf.set_readonly(holder, False)
            with _one_line(self._schema, _nested(key, value), source):
                OmegaConf.update(holder, name, value, merge=False)
                self._read[known] = OmegaConf.to_container(holder)[name]  # type: ignore[call-overload, index]
        return self._read[known]


def known_settings(schema: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Dotted name and field of every setting, in the order of the schema."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield from known_settings(typing.cast(type, item.type), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def first_line(error: Exception) -> str:
    """What a library's error says before it explains at length."""
    return str(error).strip().splitlines()[0]


def _build(schema: type, settings: Mapping[str, Any], chosen: Mapping[str, Any], prefix: str = "") -> Any:
    values = {}
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        if dataclasses.is_dataclass(item.type):
            values[item.name] = _build(typing.cast(type, item.type), settings[item.name], chosen, f"{key}.")
        else:
            values[item.name] = chosen[key] if key in chosen else settings[item.name]
    return schema(**values)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


@contextlib.contextmanager
def _one_line(schema: type, settings: Mapping[str, Any], source: str) -> Iterator[None]:
    """OmegaConf's refusals as ours, with the key and what it takes."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _tuple_of_wrong_length(settings, schema) or "a setting"
        takes = next((item.type for name, item in known_settings(schema) if key.split("[")[0] == name), None)
        expected = f": it takes {getattr(takes, '__name__', takes)}" if takes is not None else ""
        reason = first_line(error)
        if reason.endswith("is not Optional"):
            reason = "there is no value: write NAME: VALUE, with a space between"
        raise ConfigError(f"{source}: {key}: {reason}{expected}") from None


def _tuple_of_wrong_length(settings: Mapping[str, Any], schema: type) -> str | None:
    """The setting of which OmegaConf says only that a length does not match."""
    for name, item in known_settings(schema):
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        parts: Sequence[Any] = typing.get_args(item.type)
        is_pair = typing.get_origin(item.type) is tuple and Ellipsis not in parts
        if is_pair and isinstance(value, list) and len(value) != len(parts):
            return name
    return None
