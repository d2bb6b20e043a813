"""What cosmos-hpc relies on of enroot: each test holds for the real one (COSMOS_HPC_ENROOT) and for the double."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import container_root
import pytest


def test_a_double_says_so(enroot):
    version = enroot("version").stdout
    is_double = enroot.command == container_root.DOUBLE
    assert ("double" in version) == is_double
    assert version[0].isdigit()


# start: what a container sees


def seen(enroot, *arguments, **environment):
    """What a command in the container prints."""
    done = enroot("start", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_the_images_environment_and_what_is_named_is_there(enroot):
    told = seen(enroot, "--env", "GIVEN=by value", "--env", "NAMED", "base", "env", NAMED="by name", OTHER="hidden",
                SLURM_JOB_ID="17", CUDA_VISIBLE_DEVICES="0")  # fmt: skip
    lines = told.splitlines()
    assert {"GIVEN=by value", "NAMED=by name", "IMAGE_SAYS=hello"} <= {*lines}
    assert not [line for line in lines if line.startswith(("OTHER=", "SLURM_", "CUDA_"))]
    names = {line.partition("=")[0] for line in lines}
    assert {"HOME", "PATH", "TERM", "USER", "LOGNAME", "SHELL"} <= names


def test_a_named_variable_wins_over_the_images_own(enroot):
    assert seen(enroot, "--env", "IMAGE_SAYS", "base", "printenv", "IMAGE_SAYS", IMAGE_SAYS="host") == "host\n"


def test_there_is_no_slurm_inside(enroot):
    assert enroot("start", "base", "sh", "-c", "command -v scontrol").returncode != 0


def test_the_root_is_read_only_unless_asked_for(enroot):
    refused = enroot("start", "base", "touch", "/written")
    assert (refused.returncode, "Read-only file system" in refused.stderr) == (1, True)
    seen(enroot, "--rw", "base", "touch", "/written")
    assert (enroot.data / "base" / "written").exists()


def test_tmp_is_the_containers_own_and_can_be_written(enroot, tmp_path):
    (tmp_path / "outside").touch()
    assert seen(enroot, "base", "sh", "-c", "touch /tmp/mine && ls /tmp") == "mine\n"


def test_dev_shm_and_the_hosts_names_are_the_hosts(enroot):
    told = seen(enroot, "base", "sh", "-c", "hostname; cat /etc/hosts; test -w /dev/shm")
    assert told == f"{socket.gethostname()}\n{Path('/etc/hosts').read_text()}"


def test_the_user_is_the_same_inside(enroot):
    assert seen(enroot, "base", "id", "-u") == f"{os.getuid()}\n"


def test_a_mount_is_at_its_target_and_made_there(enroot, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("content")
    assert seen(enroot, "--mount", f"{tmp_path}/data:{tmp_path}/data", "base", "cat", tmp_path / "data/file") == (
        "content"
    )
    seen(enroot, "--mount", f"{tmp_path}/data:/data", "base", "touch", "/data/from_inside")
    assert (tmp_path / "data" / "from_inside").exists()


def test_a_mount_with_options_says_all_of_them(enroot, tmp_path):
    option = f"{tmp_path}:/read/only:rbind,x-create=auto,ro"
    refused = enroot("start", "--mount", option, "base", "touch", "/read/only/file")
    assert (refused.returncode, "Read-only file system" in refused.stderr) == (1, True)
    assert enroot("start", "--mount", f"{tmp_path}:/not/there:ro", "base", "true").returncode == 1


def test_a_mount_without_its_source_is_an_error(enroot):
    assert enroot("start", "--mount", "/no/such/folder:/data", "base", "true").returncode == 1


def test_the_home_is_there_only_if_asked_for(enroot):
    home = enroot.folder / "home"
    (home / "private").touch()
    assert enroot("start", "base", "test", "-e", home / "private").returncode == 1
    assert enroot("start", "base", "test", "-e", home / "private", ENROOT_MOUNT_HOME="yes").returncode == 0


def test_the_command_starts_in_the_images_folder(enroot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert seen(enroot, "base", "pwd") == f"{container_root.WORKDIR}\n"


def test_a_configuration_script_adds_to_environment_and_mounts_and_runs_hooks(enroot, tmp_path):
    (tmp_path / "conf").write_text(
        f'environ() {{ echo CONFIGURED=yes; }}\nmounts() {{ echo "{tmp_path} /configured none x-create=dir,bind"; }}\n'
        f'hooks() {{ test -d "$ENROOT_ROOTFS" && touch {tmp_path}/hooked; }}\n'
    )
    told = seen(enroot, "--conf", tmp_path / "conf", "base", "sh", "-c", "echo $CONFIGURED; ls /configured")
    assert told == "yes\nconf\nhooked\n"


def test_a_host_python_runs_inside_at_its_own_path(enroot):
    mounts = [word for folder in container_root.python_mounts() for word in ("--mount", f"{folder}:{folder}")]
    script = "import sqlite3, ssl, sys, cosmos_hpc; print(sys.prefix)"
    assert seen(enroot, *mounts, "base", sys.executable, "-c", script) == f"{sys.prefix}\n"


# start: how it ends


def test_the_commands_exit_code_passes_through(enroot):
    assert enroot("start", "base", "sh", "-c", "exit 7").returncode == 7


def test_the_command_takes_the_place_of_the_process_that_was_started(enroot):
    script = "trap 'echo heard; exit 5' USR2; echo $$; while :; do sleep 0.1; done"
    process = enroot.start("start", "base", "sh", "-c", script)
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGUSR2)
    assert process.communicate()[0] == "heard\n"
    assert process.returncode == 5


def test_a_signal_without_a_handler_ends_the_command(enroot):
    process = enroot.start("start", "base", "sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate()
    assert process.returncode == -signal.SIGTERM


def test_open_files_are_closed_so_that_no_lock_outlives_the_start(enroot, tmp_path):
    script = f"exec 9> {tmp_path}/lock; flock 9; exec {enroot.command} start base sh -c 'echo ready; exec sleep 60'"
    process = subprocess.Popen(["bash", "-c", script], env=enroot.environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert subprocess.run(["flock", "--nonblock", tmp_path / "lock", "true"], check=False).returncode == 0
    process.kill()
    process.communicate()


def test_a_name_that_is_not_there_is_an_error(enroot):
    missing = enroot("start", "nobody", "true")
    assert (missing.returncode, "No such file or directory" in missing.stderr) == (1, True)


# create, list, remove, export


@pytest.fixture
def small(tmp_path):
    """An image without anything to run."""
    (tmp_path / "small" / "etc").mkdir(parents=True)
    (tmp_path / "small" / "etc" / "name").write_text("small")
    command = ["mksquashfs", tmp_path / "small", tmp_path / "small.sqsh", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return tmp_path / "small.sqsh"


def test_create_refuses_a_name_that_is_there_unless_forced(enroot, small):
    assert enroot("create", "--name", "twice", small).returncode == 0
    (enroot.data / "twice" / "mark").touch()
    again = enroot("create", "--name", "twice", small)
    assert (again.returncode, "already exists" in again.stderr) == (1, True)
    assert enroot("create", "--force", "--name", "twice", small).returncode == 0
    assert not (enroot.data / "twice" / "mark").exists()
    assert "twice" in enroot("list").stdout.split()
    assert enroot("remove", "twice").returncode == 1, "there is no terminal to ask at"
    assert "twice" in enroot("list").stdout.split()
    assert enroot("remove", "--force", "twice").returncode == 0
    assert "twice" not in enroot("list").stdout.split()
    assert enroot("remove", "--force", "twice").returncode == 1


def test_create_refuses_what_is_no_image(enroot, tmp_path):
    (tmp_path / "broken.sqsh").write_text("no squashfs")
    assert enroot("create", "--name", "broken", tmp_path / "broken.sqsh").returncode == 1
    assert enroot("create", "--name", "missing", tmp_path / "missing.sqsh").returncode == 1


def test_nodes_with_data_paths_of_their_own_do_not_meet(enroot, small, tmp_path):
    for node in ("one", "two"):
        assert enroot("create", "--name", "same", small, ENROOT_DATA_PATH=str(tmp_path / node)).returncode == 0
    assert "same" not in enroot("list").stdout.split()


def test_export_writes_an_image_that_create_takes_and_refuses_one_that_is_there(enroot, small, tmp_path):
    enroot("create", "--force", "--name", "changed", small)
    (enroot.data / "changed" / "etc" / "name").write_text("changed")
    assert enroot("export", "--output", tmp_path / "out.sqsh", "changed").returncode == 0
    assert enroot("export", "--output", tmp_path / "out.sqsh", "changed").returncode == 1
    assert enroot("create", "--force", "--name", "changed", tmp_path / "out.sqsh").returncode == 0
    assert (enroot.data / "changed" / "etc" / "name").read_text() == "changed"
    enroot("remove", "--force", "changed")


# import


def test_import_writes_the_image_with_its_environment_and_command(enroot, registry, tmp_path):
    uri, file = f"docker://{registry.host}#lab/base:1.0", tmp_path / "base.sqsh"
    assert (done := enroot("import", "--output", file, uri)).returncode == 0, done.stderr
    assert enroot("create", "--force", "--name", "imported", file).returncode == 0
    root = enroot.data / "imported"
    assert (root / "srv" / "hello").read_text() == "hello\n"
    assert "SAYS=from the image" in (root / "etc" / "environment").read_text()
    assert "cd" in (rc := (root / "etc" / "rc").read_text())
    assert "/srv" in rc
    enroot("remove", "--force", "imported")

    again = enroot("import", "--output", file, uri)
    assert (again.returncode, "already exists" in again.stderr) == (1, True)
    missing = enroot("import", "--output", tmp_path / "no.sqsh", f"docker://{registry.host}#lab/base:2.0")
    assert (missing.returncode, "404" in missing.stderr) == (1, True)


def test_import_takes_a_digest_in_the_place_of_a_tag(enroot, registry, tmp_path):
    digest = registry.push("lab/base:moved", {"srv/hello": b"older\n"})
    registry.push("lab/base:moved", {"srv/hello": b"newer\n"})
    done = enroot("import", "--output", tmp_path / "base.sqsh", f"docker://{registry.host}#lab/base:{digest}")
    assert done.returncode == 0, done.stderr
    enroot("create", "--force", "--name", "imported", tmp_path / "base.sqsh")
    assert (enroot.data / "imported" / "srv" / "hello").read_text() == "older\n"
    enroot("remove", "--force", "imported")


@pytest.mark.parametrize(("key", "code"), [("key-of-a-test", 0), ("$KEY_OF_A_TEST", 0), ("another", 1)])
def test_import_takes_credentials_from_its_file(enroot, registry, tmp_path, key, code):
    registry.wants_login = True
    credentials = enroot.folder / "config" / ".credentials"
    credentials.write_text(f"machine 127.0.0.1 login $oauthtoken password {key}\n")
    uri = f"docker://{registry.host}#lab/base:1.0"
    try:
        done = enroot("import", "--output", tmp_path / "base.sqsh", uri, KEY_OF_A_TEST="key-of-a-test")
    finally:
        credentials.unlink()
    assert done.returncode == code, done.stderr
    assert "key-of-a-test" not in done.stdout + done.stderr
