"""Clients that read nothing of what they are sent."""

import socket
import sys
from contextlib import suppress

LIMIT_MS = 60_000


def bounded(door: socket.socket) -> socket.socket:
    """`door`, whose connections Linux ends when the other side has taken nothing for `LIMIT_MS`,
    or is not there any more. A server only sees a connection that is full, and would wait, with
    all that the answer holds, for as long as the client likes."""
    if sys.platform == "linux":
        with suppress(OSError):  # of a sandbox that does not know it
            door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LIMIT_MS)
    return door
