"""Where the ranks of an attempt meet: a port of this node that nobody else can be given meanwhile."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def meeting_port() -> Iterator[int]:
    """A TCP port that is this block's alone, on which a rank can listen all the same.

    The kernel gives a bound port to no one who asks for any free one: not to another supervisor, not to an outgoing
    connection. It lets a process listen on it by number if both sides set SO_REUSEADDR, as torch's store does, and
    this side does not listen. Its own flag comes after the bind, so that no port that is bound already is given out.
    """
    with socket.socket() as held:
        held.bind(("", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield held.getsockname()[1]
