"""Importing Megatron-Core without what it brings for transformers: 2 s in place of 10 on each start of a rank."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def lean_import() -> Iterator[None]:
    """While it lasts, `wandb` can't be imported (4 s), `torch.compile` decorates nothing (4 s), and no one warns.

    Megatron-Core imports wandb for its inference server, and compiles fused transformer functions at import; a video
    tokenizer uses neither.
    """
    hidden = "wandb" not in sys.modules
    with warnings.catch_warnings(), mock.patch.object(torch, "compile", _leave_as_it_is):
        warnings.simplefilter("ignore")
        if hidden:
            sys.modules["wandb"] = None  # type: ignore[assignment]  # what makes an import fail
        try:
            yield
        finally:
            if hidden:
                del sys.modules["wandb"]


def _leave_as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    return function if function is not None else _leave_as_it_is
