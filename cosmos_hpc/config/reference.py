"""The table of settings in the README, read from the schema: `python -m cosmos_hpc.config.reference README.md`."""

import ast
import dataclasses
import inspect
import itertools
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from cosmos_hpc.config.schema import RunConfig
from cosmos_hpc.config.sweep_schema import SweepConfig

BEGIN, END = "<!-- settings: made by `make docs` -->", "<!-- end of settings -->"


def settings_table() -> str:
    """A Markdown table: dotted name, default, meaning; settings marked `*` don't name the run."""
    settings = [*_rows(RunConfig, "", is_neutral=False), *_rows(SweepConfig, "sweep.", is_neutral=True)]
    rows = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in settings]
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows])


def update(readme: Path) -> None:
    """Replace the table between the marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{settings_table()}\n{END}{after}")


def _rows(schema: type, prefix: str, *, is_neutral: bool) -> Iterator[tuple[str, str, str]]:
    meanings = _meanings(schema)
    for item in dataclasses.fields(schema):
        neutral = is_neutral or not item.metadata.get("identity", True)
        if dataclasses.is_dataclass(item.type):
            yield from _rows(typing.cast(type, item.type), f"{prefix}{item.name}.", is_neutral=neutral)
        else:
            star = " *" if neutral and not prefix.startswith("sweep") else ""
            yield prefix + item.name, f"{_default(item)}{star}", meanings[item.name]


def _default(item: "dataclasses.Field[typing.Any]") -> str:
    made = item.default_factory
    value = item.default if made is dataclasses.MISSING else made()
    return "" if value is None or value in ((), {}, []) else f"`{list(value) if isinstance(value, tuple) else value}`"


def _meanings(schema: type) -> dict[str, str]:
    """Field to the string below it, in the class or in those that it builds on."""
    parent = typing.cast(type, schema.__base__)
    inherited = {} if parent is object else _meanings(parent)
    (definition,) = ast.parse(inspect.getsource(schema)).body
    body = typing.cast(ast.ClassDef, definition).body
    return inherited | {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


if __name__ == "__main__":
    update(Path(sys.argv[1]))
