"""Small networks for the tests of the tokenizer."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from weight_parts import JIT_FORMS, WRITERS

from cosmos_hpc.config.schema import ModelConfig
from cosmos_hpc.tokenizer import ContinuousTokenizer, DiscreteTokenizer, export_jit, starting_tokenizer


def pytest_collection_modifyitems(items):
    """TorchScript is deprecated and yet what the released files are."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Several threads on a shared machine wait for each other longer than they compute; processes inherit it."""
    num_threads, setting = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(num_threads)
    if setting is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = setting


@pytest.fixture(scope="session")
def small() -> Callable[[str], ContinuousTokenizer | DiscreteTokenizer]:
    """A fresh network by its name, such as CV8x8x8, of width 4."""
    return lambda name: starting_tokenizer(ModelConfig(model=name, channels=4), seed=0)


@pytest.fixture(scope="session")
def exported(small, tmp_path_factory) -> Callable[[str], Path]:
    """Folder with the TorchScript files of the small network by its name."""

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("exported")
        with ThreadPoolExecutor(1) as pool:  # a trace notes the stack of each call, and pytest's is deep
            pool.submit(export_jit, small(name), folder).result()
        return folder

    return write


@pytest.fixture(scope="session")
def _written(small, exported, tmp_path_factory) -> Callable[[str, str], Path]:
    """Weights of the small network in one form; each is written once, since tracing takes seconds."""

    @cache
    def write(form: str, name: str) -> Path:
        folder = tmp_path_factory.mktemp("weights")
        if form in WRITERS:
            WRITERS[form](small(name), folder)
        for file in JIT_FORMS.get(form, ()):
            shutil.copy(exported(name) / file, folder)
        return folder

    return write


@pytest.fixture
def weights_in(_written, tmp_path) -> Callable[[str, str], Path]:
    """A folder with the weights of the small network by its name in a form of `weight_parts.FORMS`, open to damage."""

    def copy(form: str, name: str) -> Path:
        if "safetensors" in form:
            pytest.importorskip("safetensors")
        return Path(shutil.copytree(_written(form, name), tmp_path / "weights"))

    return copy
