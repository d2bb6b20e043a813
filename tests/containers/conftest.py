"""The enroot under test, in folders of its own, and the image that its containers come from."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import container_root
import pytest
from small_registry import SmallRegistry, served


@dataclass(frozen=True)
class Enroot:
    """The command, with where it keeps its things."""

    command: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What every call gets."""
        paths = {f"ENROOT_{name}_PATH": str(self.folder / name.lower()) for name in
                 ("DATA", "CACHE", "RUNTIME", "TEMP", "CONFIG")}  # fmt: skip
        home, path = str(self.folder / "home"), f"{self.command.parent}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": home, "ENROOT_ALLOW_HTTP": "yes", **paths}

    def __call__(self, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a verb to its end."""
        return subprocess.run(
            [self.command, *map(str, arguments)],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
        """A verb that goes on."""
        command = [self.command, *map(str, arguments)]
        return subprocess.Popen(command, env=self.environment | environment, stdout=subprocess.PIPE, text=True)

    @property
    def data(self) -> Path:
        """Where containers lie."""
        return self.folder / "data"


@pytest.fixture(scope="session")
def image() -> Path:
    """A squashfs file with Python in it."""
    reason = container_root.what_is_missing()
    if reason is None:
        try:
            return container_root.root_squashfs()
        except RuntimeError as error:
            reason = str(error)
    if container_root.REQUIRED in os.environ:
        pytest.fail(f"{container_root.REQUIRED} is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def enroot(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Enroot:
    """With a container named `base`."""
    folder = tmp_path_factory.mktemp("enroot")
    for name in ("data", "cache", "runtime", "temp", "config", "home"):
        (folder / name).mkdir(mode=0o700)
    command = Enroot(container_root.enroot(), folder)
    made = command("create", "--name", "base", image)
    assert made.returncode == 0, made.stderr
    return command


@pytest.fixture
def registry() -> Iterator[SmallRegistry]:
    """On 127.0.0.1, with the image lab/base:1.0."""
    with served() as registry:
        yield registry
