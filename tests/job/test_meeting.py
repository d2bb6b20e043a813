"""The port where ranks meet."""

import errno
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from cosmos_hpc.job.meeting import meeting_port


def test_two_jobs_on_a_node_never_have_the_same_port_and_a_rank_can_listen_on_its_own() -> None:
    with meeting_port() as first, meeting_port() as second:
        assert first != second
        store = dist.TCPStore("127.0.0.1", first, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        store.set("met", "here")
        assert store.get("met") == b"here"


def test_nobody_else_is_given_a_port_that_is_held() -> None:
    with meeting_port() as port, socket.socket() as stranger:
        with pytest.raises(OSError, match="in use") as refused:
            stranger.bind(("", port))
        assert refused.value.errno == errno.EADDRINUSE
        given = set()
        for _ in range(2000):
            with socket.socket() as anyone:
                anyone.bind(("", 0))
                given.add(anyone.getsockname()[1])
        assert port not in given
