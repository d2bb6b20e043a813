"""A real SLURM of four nodes with accounting on one machine, in a private directory; up in seconds, gone afterwards.

Each node is a slurmd in namespaces of its own: its host name, processes and /dev/shm are its own, and its address is a
loopback one; /tmp plays the shared file system. All daemons are children of this process and die with it.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import slurm_files

from cosmos_hpc.launch.local import is_locked
from cosmos_hpc.ranks import die_with_parent

PACKAGES = "slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server"
COMMANDS = (
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "sbatch",
    "sacct",
    "munged",
    "mungekey",
    "mariadbd",
    "mariadb-install-db",
)
APT_LINE = f"apt-get install -y --no-install-recommends {PACKAGES}"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PREFIX = "cosmos-hpc-slurm-"
FREEZER = Path("/sys/fs/cgroup/freezer")
START_LIMIT_S = 60
CALM_LIMIT_S = 60


@dataclass(frozen=True)
class Flavor:
    """What differs between the clusters that the tests run on."""

    proctrack: str = "cgroup"
    """`cgroup`: signals reach the tasks; `linuxproc`: every process of a step."""

    preempts_by_user_signal: bool = False
    """Whether a preempted job gets the signal of its --signal in place of SIGTERM."""

    def __str__(self) -> str:
        return f"{self.proctrack}{'-user-signal' if self.preempts_by_user_signal else ''}"


class Job(NamedTuple):
    """A job or array element as slurmctld sees it now."""

    state: str
    """Such as PENDING, RUNNING, COMPLETED."""

    reason: str
    """Why it is pending."""

    restarts: int
    """How often it was requeued."""

    nodes: str
    """Host list; `(null)` before it started."""

    exit_code: str
    """status:signal of the batch script."""


class AccountingRow(NamedTuple):
    """A run of a job, or of one of its steps, as sacct tells it; a requeued job has several."""

    job: str
    state: str
    exit_code: str
    nodes: str


def what_is_missing(flavor: Flavor) -> str | None:
    """Why no cluster can be started here, with the mend; none if it can."""
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: {APT_LINE}"
    if os.geteuid() != 0:
        return "nodes need namespaces and devices of their own: run as root"
    if flavor.proctrack == "cgroup" and not os.access(FREEZER, os.W_OK):
        return f"proctrack/cgroup needs a writable {FREEZER} (cgroup v1)"
    return None


class SlurmCluster:
    """A running cluster: partitions `low` and `high`, which preempts by requeue; eight GPUs a node that are none."""

    def __init__(self, flavor: Flavor, num_nodes: int = 4) -> None:
        self.flavor = flavor
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._ports = slurm_files.free_ports(3 + num_nodes)
        self.nodes = tuple(f"c{self._ports[0]}n{index}" for index in range(1, num_nodes + 1))
        """Names that no other cluster on this machine has: /sys/fs/cgroup is shared."""
        self.environment = {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "PATH": PATH}
        """Points every SLURM command at this cluster."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._is_on: dict[str, subprocess.Popen[bytes]] = {}

    # Up and down

    def start(self) -> None:
        """Bring everything up.

        Raises:
            RuntimeError: with the ends of all logs, if something does not come up; all of it is down again then.
        """
        _sweep_up_after_the_dead()
        try:
            self._start()
        except BaseException as error:
            logs = self._ends_of_logs()
            self.stop()
            raise RuntimeError(f"the cluster did not start: {error}\n{logs}") from error

    def stop(self) -> None:
        """Bring everything down and leave nothing behind."""
        for name in ("slurmctld", *self._is_on, "slurmdbd", "mariadbd", "munged"):
            daemon = self._daemons.pop(name, None) or self._is_on.pop(name, None)
            if daemon is not None:
                daemon.kill()
                daemon.wait()
        _remove(self.folder)

    def power_off(self, node: str) -> None:
        """Pull the plug: slurmd, step managers and all tasks of the node are gone at once."""
        switch = self._is_on.pop(node)
        switch.kill()
        switch.wait()

    def power_on(self, node: str) -> None:
        """Start the node anew; it registers by itself."""
        hosts, spool = self.folder / "etc" / "hosts", self.folder / "spool" / node
        spool.mkdir(parents=True, exist_ok=True)
        script = (
            f"hostname {node} && mount --bind {hosts} /etc/hosts && mount -t tmpfs shm /dev/shm && "
            f"{{ slurmd -D -N {node} & wait; }}"  # slurmd must not be the first process: the shell reaps orphans
        )
        namespaces = ["--uts", "--ipc", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc"]
        self._is_on[node] = self._spawn(node, ["unshare", *namespaces, "--kill-child", "sh", "-c", script])

    def calm(self) -> None:
        """Nothing in the queue, all nodes on and idle."""
        self.call("scancel", "--full", "--user=root")
        for node in self.nodes:
            if node not in self._is_on:
                self.power_on(node)
        wait_until(lambda: not self.call("squeue", "--noheader"), "an empty queue", CALM_LIMIT_S, self.queue)
        self._wait_for_idle_nodes(CALM_LIMIT_S)

    # Commands

    def call(self, *command: str) -> str:
        """What a SLURM command prints.

        Raises:
            subprocess.CalledProcessError: with its words, if it fails.
        """
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout.strip()

    def queue(self) -> str:
        """What squeue says of all jobs, the newly ended ones included."""
        return self.call("squeue", "--states=all")

    def sbatch(self, script: str, *options: str, output: Path) -> str:
        """Submit a bash script; returns the job's id.

        Args:
            script: its lines after the shebang.
            options: of sbatch.
            output: file of the job's output; its folder takes the script as well.
        """
        file = output.with_suffix(".sh")
        file.write_text(f"#!/usr/bin/env bash\n{script}\n")
        output.touch()
        return self.call("sbatch", "--parsable", f"--output={output}", *options, str(file))

    def job(self, job: str) -> Job:
        """What slurmctld knows of a job, or of an array element `A_T`."""
        line = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        told = dict(re.findall(r"(\w+)=(\S*)", line))
        return Job(told["JobState"], told["Reason"], int(told["Restarts"]), told["NodeList"], told["ExitCode"])

    def wait_for_state(self, job: str, *states: str, limit_s: float = 60) -> Job:
        """Wait until a job is in one of the states; returns it as it is then."""
        wait_until(lambda: self.job(job).state in states, f"{job} in {states}", limit_s, lambda: self.job(job))
        return self.job(job)

    def wait_for_restart(self, job: str, restarts: int, limit_s: float = 60) -> Job:
        """Wait until a job runs for the time after so many requeues."""

        def runs() -> bool:
            found = self.job(job)
            return found.state == "RUNNING" and found.restarts >= restarts

        wait_until(runs, f"restart {restarts} of {job}", limit_s, lambda: self.job(job))
        return self.job(job)

    def accounting(self, job: str) -> list[AccountingRow]:
        """Every run of a job and of its steps, oldest first. A few seconds behind the job."""
        fields = ["--format=JobID,State,ExitCode,NodeList", "--parsable2", "--noheader"]
        text = self.call("sacct", "--duplicates", f"--jobs={job}", *fields)
        return [AccountingRow(*line.split("|")) for line in text.splitlines()]

    # Parts of the start

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munge refuses a folder that others can't enter
        lock = os.open(folder / "alive", os.O_CREAT | os.O_RDWR)  # held, by this process alone, until it ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (folder / name).mkdir()
        _database(folder).mkdir(mode=0o700)
        slurm_files.write_all(folder, _database(folder), self.nodes, self._ports, self.flavor)
        for index in range(slurm_files.GPUS_PER_NODE):
            os.mknod(folder / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        self._start_munge()
        self._start_database()
        self._start_daemon("slurmdbd", ["slurmdbd", "-D"], lambda: _listens(self._ports[1]))
        self._start_daemon("slurmctld", ["slurmctld", "-D", "-c"], self._answers)
        for node in self.nodes:
            self.power_on(node)
        self._wait_for_idle_nodes(START_LIMIT_S)

    def _start_munge(self) -> None:
        run, key = self.folder / "run", self.folder / "etc" / "munge.key"
        self.call("mungekey", "--create", f"--keyfile={key}")
        files = [f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed"]
        log = f"--log-file={self.folder}/log/munged.log"
        self._start_daemon(
            "munged", ["munged", "--foreground", f"--key-file={key}", *files, log], (run / "munge.sock").exists
        )

    def _start_database(self) -> None:
        settings = f"--defaults-file={self.folder}/etc/my.cnf"
        plain = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        self.call("mariadb-install-db", settings, "--user=root", *plain)
        client = f"--socket={self.folder}/run/mysql.sock"
        self._start_daemon("mariadbd", ["mariadbd", settings], lambda: self._succeeds("mariadb-admin", client, "ping"))
        grant = "create user slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm_acct.* to slurm@'127.0.0.1'"
        self.call("mariadb", "--no-defaults", client, f"--execute={grant}")

    def _start_daemon(self, name: str, command: Sequence[str], is_up: Callable[[], bool]) -> None:
        daemon = self._daemons[name] = self._spawn(name, command)

        def is_up_or_dead() -> bool:
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with {daemon.returncode}")
            return is_up()

        wait_until(is_up_or_dead, name, START_LIMIT_S)

    def _spawn(self, name: str, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C is for the tests, which stop the daemons themselves
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def _succeeds(self, *command: str) -> bool:
        try:
            self.call(*command)
        except subprocess.CalledProcessError:
            return False
        return True

    def _answers(self) -> bool:
        return self._succeeds("scontrol", "ping") and "is UP" in self.call("scontrol", "ping")

    def _wait_for_idle_nodes(self, limit_s: float) -> None:
        def are_idle() -> bool:
            idle = self.call("sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%T")
            return idle.split() == ["idle"] * len(self.nodes)

        wait_until(are_idle, "idle nodes", limit_s, lambda: self.call("sinfo", "--Node", "--long"))

    def _ends_of_logs(self) -> str:
        logs = [log for log in sorted((self.folder / "log").glob("*")) if log.stat().st_size]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


@contextlib.contextmanager
def running(flavor: Flavor) -> Iterator[SlurmCluster]:
    """A cluster for the length of a block."""
    cluster = SlurmCluster(flavor)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def wait_until(happened: Callable[[], bool], what: str, limit_s: float, tell: Callable[[], object] = str) -> None:
    """Wait for something to become true, asked ten times a second.

    Raises:
        TimeoutError: with `what` was waited for, and what `tell` says at the end.
    """
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit_s:.0f} s for {what}: {tell()}")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def _database(folder: Path) -> Path:
    """In memory: on a disk the many fsyncs of MariaDB's first start take seconds."""
    return Path("/dev/shm") / folder.name


def _sweep_up_after_the_dead() -> None:
    """Remove what a killed test session has left; its daemons were killed with it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if folder.stat().st_uid == os.geteuid() and (folder / "alive").exists() and not is_locked(folder / "alive"):
            _remove(folder)


def _remove(folder: Path) -> None:
    for node in (folder / "spool").glob("*"):
        for group in sorted((FREEZER / f"slurm_{node.name}").glob("**/"), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
    shutil.rmtree(_database(folder), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
