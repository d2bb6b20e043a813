"""What several verbs share of their options and of what they print."""

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def print_json(value: Any) -> None:
    """For scripts."""
    print(json.dumps(value, indent=1, default=str))
