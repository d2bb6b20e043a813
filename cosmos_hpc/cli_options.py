"""What several verbs share of their options and of what they print."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

JobFile = Annotated[Path, typer.Argument(help="Experiment file, such as jobs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings on top of the file, such as optim.lr=3e-5.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def print_json(value: Any) -> None:
    """For scripts."""
    print(json.dumps(value, indent=1, default=str))
