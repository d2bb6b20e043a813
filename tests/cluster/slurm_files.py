"""The configuration files of the tests' SLURM cluster."""

import contextlib
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm_cluster import Flavor

GPUS_PER_NODE = 8
CRED_EXPIRE_S = 5
"""A requeued job waits so long before it may start again; clusters in production keep 120."""

GRACE_S = 15
"""Between the warning of a preempted job and its end; checked in steps of several seconds."""

SLURMD_TIMEOUT_S = 10
"""After which a silent node counts as down."""

SLURM = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctl_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire={cred_expire}
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
{user_signal}
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
KillWait=5
MinJobAge=600
MaxArraySize=1001
JobRequeue=1
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/run/munge.sock
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
PlugStackConfig={folder}/etc/plugstack.conf
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE {grace}
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL Default=NO MaxTime=30 DefaultTime=10 PriorityTier=1 PreemptMode=OFF
"""

NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.1.{index} Port={port} CPUs=4 RealMemory=16000 Gres=gpu:{gpus}"
)

CGROUP = "CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""

MARIADB = """\
[mariadbd]
user=root
datadir={database}
socket={folder}/run/mysql.sock
pid-file={folder}/run/mariadbd.pid
log-error={folder}/log/mariadbd.log
port={sql_port}
bind-address=127.0.0.1
skip-name-resolve
skip-log-bin
performance_schema=OFF
innodb_buffer_pool_size=64M
innodb_log_file_size=8M
innodb_flush_log_at_trx_commit=0
innodb_flush_method=nosync
innodb_lock_wait_timeout=900
"""


def write_all(folder: Path, database: Path, nodes: Sequence[str], ports: Sequence[int], flavor: "Flavor") -> None:
    """Every file that a daemon reads, in `folder`/etc."""
    ctl_port, dbd_port, sql_port, *node_ports = ports
    node_lines = [
        NODE.format(name=name, index=index, port=port, gpus=GPUS_PER_NODE)
        for index, (name, port) in enumerate(zip(nodes, node_ports, strict=True), start=1)
    ]
    values = {
        "folder": folder,
        "database": database,
        "host": socket.gethostname().partition(".")[0],
        "ctl_port": ctl_port,
        "dbd_port": dbd_port,
        "sql_port": sql_port,
        "cred_expire": CRED_EXPIRE_S,
        "slurmd_timeout": SLURMD_TIMEOUT_S,
        "user_signal": "SlurmctldParameters=preempt_send_user_signal" if flavor.preempts_by_user_signal else "",
        "grace": f"GraceTime={GRACE_S}",
        "proctrack": flavor.proctrack,
        "nodes": "\n".join(node_lines),
    }
    gpus = f"Name=gpu File={folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]"
    texts = {
        "slurm.conf": SLURM.format(**values),
        "gres.conf": "".join(f"NodeName={name} {gpus}\n" for name in nodes),
        "cgroup.conf": CGROUP,
        "slurmdbd.conf": SLURMDBD.format(**values),
        "my.cnf": MARIADB.format(**values),
        "plugstack.conf": "",
        "hosts": "127.0.0.1 localhost\n"
        + "".join(f"127.0.1.{index} {name}\n" for index, name in enumerate(nodes, start=1)),
    }
    for name, text in texts.items():
        (folder / "etc" / name).write_text(text)
    (folder / "etc" / "slurmdbd.conf").chmod(0o600)


def free_ports(count: int) -> list[int]:
    """Different ports on which nobody listens, of those that Linux gives to nobody who asks for any free one.

    A node that is switched on again finds its own as it left it.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            found.append(port)
    return found[:count]
