"""Child processes that leave nothing behind: they end with their parent, and their children too."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

import psutil

PROGRAM = (sys.executable, "-m", "r3mes_vllm")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # here, because a child must load nothing before it becomes a program


def end_with(parent: int) -> Callable[[], None]:
    """To be called in a child, which then gets SIGTERM when `parent` ends, also by `kill -9`.

    The kernel takes the thread that made the child for its parent: it has to live as long.
    """

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended meanwhile
            os._exit(1)

    return prepare


def ended(number: int, frame: object) -> NoReturn:
    """A handler of signals: end as who has none, but for what is on the way out."""
    raise SystemExit(128 + number)


def kill_session(leader: int) -> None:
    """Of the process `leader`, which began a session: also those that outlived it."""
    for it in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(it.pid) == leader:
                it.kill()


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with none of this package's settings."""
    return {
        name: it
        for name, it in environment.items()
        if not name.startswith("R3MES_") and name != "BACKEND_PORT"
    }


def free_port() -> int:
    """On loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
