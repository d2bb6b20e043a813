"""Importing images by the enroot under test from a small registry."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.launch import image_import
from cosmos_hpc.launch.image_import import bring, find
from cosmos_hpc.launch.images import imported, manifest_file, read_manifest

PIP = {"opt/venv/lib/python3.12/site-packages/torch-2.7.1+cu128.dist-info/METADATA": b"",
       "opt/venv/lib/python3.12/site-packages/megatron_core-0.16.1.dist-info/METADATA": b"",
       "usr/lib/python3/dist-packages/Some_Tool-1.0-py3.egg-info/PKG-INFO": b""}  # fmt: skip


@pytest.fixture
def images(enroot, registry, tmp_path, monkeypatch):
    """Where they go, with the command line's environment."""
    for name, value in enroot.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COSMOS_HPC_IMAGES", str(tmp_path / "images"))
    monkeypatch.setattr(image_import, "PAUSE_S", 0.01)
    monkeypatch.setattr(image_import, "POLL_S", 0.05)
    return tmp_path / "images"


def cosmos_hpc(*arguments):
    command = [sys.executable, "-m", "cosmos_hpc.cli", "image", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_image_is_imported_once_listed_with_what_it_holds_and_removed(images, registry):
    digest = registry.push("lab/base:2.0", PIP)
    name = f"{registry.host}/lab/base:2.0"
    done = cosmos_hpc("import", name)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.splitlines()[0])
    assert (file.parent, digest in done.stdout) == (images, True)
    manifest = read_manifest(file)
    assert (manifest.name, manifest.digest, manifest.size) == (name, digest, file.stat().st_size)
    assert manifest.packages == {"torch": "2.7.1+cu128", "megatron-core": "0.16.1", "some-tool": "1.0"}

    asked = len([line for line in registry.asked if "/blobs/" in line])
    again = cosmos_hpc("import", f"docker://{registry.host}#lab/base:2.0")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, str(file))
    assert len([line for line in registry.asked if "/blobs/" in line]) == asked

    (row,) = json.loads(cosmos_hpc("list", "--json").stdout)
    assert (row["file"], row["packages"]["torch"]) == (str(file), "2.7.1+cu128")
    assert "0.16.1" in cosmos_hpc("list").stdout
    assert cosmos_hpc("remove", "nothing:1").returncode == 2
    assert cosmos_hpc("remove", digest.removeprefix("sha256:")[:12]).stdout == f"removed {file}\n"
    assert [path for path in images.iterdir() if not path.name.startswith(".")] == []


def test_the_same_content_under_another_tag_is_not_brought_again(images, registry):
    first = bring(find(f"docker://{registry.host}#lab/base:1.0", images))
    registry.tags["lab/base:latest"] = registry.tags["lab/base:1.0"]
    second = bring(find(f"docker://{registry.host}#lab/base", images))
    assert first.samefile(second)
    assert [manifest.name for _, manifest in imported(images)] == [
        f"{registry.host}/lab/base:1.0",
        f"{registry.host}/lab/base:latest",
    ]


def test_a_registry_that_fails_now_and_then_is_asked_again(images, registry):
    registry.failures = 2
    told = []
    file = bring(find(f"docker://{registry.host}#lab/base:1.0", images), lambda step, _: told.append(step))
    assert file.is_file()
    registry.failures = 10**6
    for layer in (images.parent / "cache").glob("*"):
        layer.unlink()
    digest = registry.push("lab/base:3.0", {"srv/other": b"other"})
    with pytest.raises(ConfigError, match=r"enroot could not import .*lab/base:3.0 in 4 attempts: \S"):
        bring(find(f"docker://{registry.host}#lab/base@{digest}".replace("base@", "base:3.0@"), images))
    assert not [path for path in images.iterdir() if "partial" in path.name]


def test_a_second_importer_waits_and_what_a_killed_one_left_is_removed(images, registry):
    name = f"docker://{registry.host}#lab/base:1.0"
    wanted = find(name, images)
    images.mkdir(exist_ok=True)
    leftover = images / f".{wanted.name.file_stem}.dead-1.partial"
    leftover.write_text("half")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom cosmos_hpc.launch.local import locked\n"
        "with locked(Path(sys.argv[1])) as ours:\n    print(ours, flush=True)\n    time.sleep(600)"
    )
    lock = images / f".{wanted.name.file_stem}.lock"
    other = subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    told = []

    def tell(step, _):
        if not told:
            os.kill(other.pid, signal.SIGKILL)
        told.append(step)

    assert bring(wanted, tell).is_file()
    other.communicate()
    assert told[0] == "waiting for another import of the same image"
    assert not leftover.exists()


def test_a_killed_import_leaves_nothing_that_counts_as_an_image(images, registry):
    registry.push("lab/base:4.0", {f"data/{number}": os.urandom(2**20) for number in range(24)})
    command = [sys.executable, "-m", "cosmos_hpc.cli", "image", "import", f"docker://{registry.host}#lab/base:4.0"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(images.glob(".*.partial")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert imported(images) == []
    assert cosmos_hpc("import", f"docker://{registry.host}#lab/base:4.0").returncode == 0
    ((file, manifest),) = imported(images)
    assert file.stat().st_size == manifest.size


def test_a_disk_without_room_is_told_before_anything_is_transferred(images, registry, monkeypatch):
    wanted = find(f"docker://{registry.host}#lab/base:1.0", images)
    huge = wanted.remote.__class__(wanted.remote.digest, {"sha256:layer": 2**50})
    with pytest.raises(ConfigError, match=r"GiB left, but importing .* may take .* set \w+ to a folder with more room"):
        bring(wanted.__class__(wanted.name, huge, images))
    assert not [line for line in registry.asked if "/blobs/" in line]


def test_a_machine_without_enroot_says_where_to_import(images, registry, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"there is no enroot on .*: import where it is, with --cluster PROFILE"):
        bring(find(f"docker://{registry.host}#lab/base:1.0", images))


def test_a_login_is_checked_first_and_neither_printed_nor_kept(images, registry, enroot):
    registry.wants_login = True
    missing = cosmos_hpc("import", f"{registry.host}/lab/base:1.0")
    assert (missing.returncode, "wants a login for lab/base" in missing.stderr) == (2, True)
    credentials = enroot.folder / "config" / ".credentials"
    credentials.write_text("machine 127.0.0.1 login $oauthtoken password key-of-a-test\n")
    credentials.chmod(0o600)
    try:
        done = cosmos_hpc("import", f"{registry.host}/lab/base:1.0")
    finally:
        credentials.unlink()
    assert done.returncode == 0, done.stderr
    ((file, _),) = imported(images)
    assert "key-of-a-test" not in done.stdout + done.stderr + manifest_file(file).read_text()


def test_a_profile_names_the_image_and_its_digest(images, registry, tmp_path):
    older = registry.push("lab/base:moved", {"srv/hello": b"older\n"})
    registry.push("lab/base:moved", {"srv/hello": b"newer\n"})
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"mode: enroot\nimage: {registry.host}/lab/base:moved\ndigest: {older}\n")
    told = json.loads(cosmos_hpc("import", profile, "--json").stdout)
    assert told["digest"] == older
    profile.write_text("mode: enroot\nimage: /shared/own.sqsh\n")
    refused = cosmos_hpc("import", profile)
    assert (refused.returncode, "only a registry's image can be imported" in refused.stderr) == (2, True)
